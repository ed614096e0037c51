//! Who gets a frame, how often, and in which order.

use std::sync::Arc;

use super::rig::{Got, Rig, edit, message, typing};
use crate::fanout::hub::Full;
use crate::fanout::shard::{OpenError, Outcome, Wire};
use crate::id::{ChannelId, MessageId, UserId};
use crate::proto::delivery::Nobody;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, SessionLimits};

#[test]
fn a_frame_reaches_every_tab_of_its_user_once_and_nobody_else() {
    let mut rig = Rig::new(3);
    let alice: Vec<_> = [0, 1, 1, 2].map(|shard| rig.tab(shard, "alice")).into();
    let bob = rig.tab(0, "bob");
    let delivery = rig.publish("alice", &message("hi"));
    assert_eq!((delivery.tabs, delivery.nobody), (4, None));
    for tab in alice {
        assert_eq!(rig.texts(tab), ["hi"]);
    }
    assert_eq!(rig.got(bob), []);
    assert_eq!(rig.publish("carol", &message("hi")).nobody, Some(Nobody::Offline));
    assert_eq!(rig.publish("room:r", &message("hi")).nobody, Some(Nobody::EmptyRoom));
    assert_eq!(rig.publish("sse:r", &message("hi")).nobody, Some(Nobody::NoSuchStream));
}

#[test]
fn nothing_is_sent_on_connect_nor_before_the_first_writable() {
    let mut rig = Rig::new(1);
    let early = rig.try_open(0, "u", Wire::WebSocket).unwrap();
    let late = rig.tab(0, "u");
    assert_eq!(rig.got(late), []);
    rig.publish("u", &message("hi"));
    assert_eq!((rig.texts(late).len(), rig.texts(early).len()), (1, 0));
    rig.writable(early, usize::MAX);
    assert_eq!(rig.texts(early), ["hi"]);
}

#[test]
fn sessions_are_kept_in_connection_order_and_the_last_one_out_removes_the_user() {
    let mut rig = Rig::new(2);
    let user = UserId::parse("u").unwrap();
    let tabs: Vec<_> = [1, 0, 1].map(|shard| rig.tab(shard, "u")).into();
    let addresses = |rig: &Rig| -> Vec<_> {
        let sessions = rig.hub.registry().get_sessions(&user);
        sessions.iter().flat_map(|sessions| sessions.iter()).map(|session| session.address()).collect()
    };
    let snapshot = rig.hub.registry().get_sessions(&user).unwrap();
    let expected: Vec<_> = tabs.iter().map(|tab| rig.tabs[*tab].address).collect();
    assert_eq!(addresses(&rig), expected);
    rig.lose(tabs[1]);
    rig.lose(tabs[1]);
    assert_eq!(addresses(&rig), [expected[0], expected[2]]);
    assert_eq!(snapshot.len(), 3, "a snapshot does not change");
    assert_eq!(rig.hub.registry().total_connections(), 2);
    rig.lose(tabs[0]);
    rig.lose(tabs[2]);
    assert!(!rig.hub.registry().is_online(&user));
    assert_eq!(rig.ended(Disconnect::ConnectionLost), 3);
}

#[test]
fn a_user_has_at_most_as_many_tabs_as_allowed_and_the_refused_one_leaves_nothing_behind() {
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..HubLimits::default().tabs_per_user_max).map(|_| rig.tab(0, "u")).collect();
    assert!(matches!(rig.try_open(0, "u", Wire::WebSocket), Err(OpenError::TooManyTabs(_))));
    assert_eq!(rig.shards[0].session_count(), tabs.len());
    rig.lose(tabs[0]);
    let _ = rig.tab(0, "u");
}

#[test]
fn an_address_that_outlived_its_session_reaches_nobody() {
    let mut rig = Rig::new(1);
    let old = rig.tab(0, "old");
    let address = rig.tabs[old].address;
    rig.post("old", &message("for the old one"));
    rig.lose(old);
    let new = rig.tab(0, "new");
    assert_eq!(rig.tabs[new].address.slot(), address.slot(), "the slot is another's now");
    rig.hub.post_to_session(address, &message("for the old one")).unwrap();
    rig.turn();
    assert_eq!(rig.got(new), []);
    assert!(rig.is_open(new));
}

#[test]
fn an_ending_meant_for_an_old_session_does_not_end_the_next_one_in_its_slot() {
    let mut rig = Rig::new(1);
    let old = rig.tab(0, "old");
    assert_eq!(rig.hub.end_sessions(&ChannelId::parse("old").unwrap(), Disconnect::Kicked), Ok(1));
    rig.lose(old);
    let new = rig.tab(0, "new");
    rig.turn();
    assert!(rig.is_open(new));
}

#[test]
fn all_that_waits_for_a_tab_leaves_in_one_write() {
    let mut rig = Rig::new(1);
    let (tab, reader) = (rig.tab(0, "u"), rig.reader(0, "u"));
    for n in 0..50 {
        rig.post("u", &message(&format!("{n}")));
    }
    rig.post("u", &typing(true, "u"));
    rig.post("u", &message(&"large ".repeat(2000)));
    rig.post("u", &edit(MessageId::random(), "an edit"));
    rig.turn();
    for tab in [tab, reader] {
        assert_eq!(rig.tabs[tab].writes, 1);
        let got = rig.got(tab);
        assert_eq!(got.len(), 53);
        assert!((0..50).all(|n| got[n].text() == Some(&n.to_string())));
        assert_eq!((got[50].kind(), got[52].kind()), ("typing", "edit"));
    }
}

#[test]
fn one_write_is_bounded_and_the_rest_follows_after_the_others_had_a_turn() {
    let mut rig = Rig::with_queues(1, 1000, usize::MAX);
    let (tab, other) = (rig.tab(0, "u"), rig.tab(0, "v"));
    let text = "x".repeat(40_000);
    for _ in 0..20 {
        rig.post("u", &message(&text));
    }
    rig.post("v", &message("short"));
    rig.fan_out();
    let shard = &mut rig.shards[0];
    let first = shard.poll_transmit().unwrap();
    let bytes: usize = first.slices.iter().map(|slice| slice.len()).sum();
    assert!((256 << 10..(256 << 10) + 41_000).contains(&bytes), "{bytes}");
    assert_eq!(first.slot, rig.tabs[tab].address.slot());
    rig.tabs[tab].received.extend(first.slices.iter().flat_map(|slice| slice.iter().copied()));
    drop(first);
    shard.handle_written(rig.tabs[tab].address.slot(), Outcome::Taken(bytes));
    assert_eq!(shard.poll_transmit().unwrap().slot, rig.tabs[other].address.slot());
    rig.shards[0].handle_written(rig.tabs[other].address.slot(), Outcome::Taken(0));
    rig.flush();
    assert_eq!((rig.texts(tab).len(), rig.texts(other).len()), (20, 1));
}

#[test]
fn a_long_text_and_a_file_sized_frame_arrive_whole() {
    let mut rig = Rig::new(1);
    let (tab, reader) = (rig.tab(0, "u"), rig.reader(0, "u"));
    for length in [0, 90, 125, 126, 2_000, 2_048, 65_535, 65_536, 300_000, 2 << 20] {
        rig.publish("u", &message(&"é".repeat(length / 2)));
    }
    for tab in [tab, reader] {
        let lengths: Vec<_> = rig.texts(tab).iter().map(String::len).collect();
        assert_eq!(lengths, [0, 90, 124, 126, 2_000, 2_048, 65_534, 65_536, 300_000, 2 << 20]);
    }
}

#[test]
fn separators_are_escaped_in_event_streams_only() {
    let mut rig = Rig::new(1);
    let (tab, reader) = (rig.tab(0, "u"), rig.reader(0, "u"));
    rig.publish("u", &message("a\u{2028}b\u{85}c"));
    assert_eq!(rig.texts(tab), ["a\u{2028}b\u{85}c"]);
    assert_eq!(rig.texts(reader), ["a\u{2028}b\u{85}c"]);
    let raw = |tab: usize| String::from_utf8_lossy(&rig.tabs[tab].received).contains('\u{2028}');
    assert!(raw(tab) && !raw(reader));
}

#[test]
fn all_tabs_of_a_channel_see_all_publishers_in_one_order() {
    const PUBLISHERS: usize = 3;
    const EACH: usize = 400;
    let limits = SessionLimits { queue_frames_max: PUBLISHERS * EACH, ..SessionLimits::default() };
    let mut rig = Rig::with(4, limits, usize::MAX);
    let tabs: Vec<_> = [0, 1, 2, 3, 1].map(|shard| rig.tab(shard, "u")).into();
    tabs.iter().for_each(|tab| rig.say(*tab, "join r"));
    let hub = Arc::clone(&rig.hub);
    std::thread::scope(|scope| {
        let publish = |publisher: usize| {
            let hub = &hub;
            move || {
                for n in 0..EACH {
                    let channel = ChannelId::parse(["u", "room:r"][n % 2]).unwrap();
                    while hub.post(&channel, &message(&format!("{publisher}.{n}"))) == Err(Full) {
                        std::thread::yield_now();
                    }
                }
            }
        };
        let publishers: Vec<_> = (0..PUBLISHERS).map(|publisher| scope.spawn(publish(publisher))).collect();
        while !publishers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            rig.turn();
        }
    });
    rig.turn();
    // Order is a channel's: user and room apart.
    for parity in 0..2 {
        let seen = |tab: usize| -> Vec<(usize, usize)> {
            let texts = rig.texts(tab);
            let parse =
                |text: &str| text.split_once('.').map(|(p, n)| (p.parse().unwrap(), n.parse().unwrap())).unwrap();
            texts.iter().map(|text| parse(text)).filter(|(_, n): &(usize, usize)| n % 2 == parity).collect()
        };
        let first = seen(tabs[0]);
        assert_eq!(first.len(), PUBLISHERS * EACH / 2);
        assert!(tabs.iter().all(|tab| seen(*tab) == first), "one order for all tabs");
        for publisher in 0..PUBLISHERS {
            assert!(first.iter().filter(|(p, _)| *p == publisher).is_sorted(), "a publisher's order is kept");
        }
    }
}

#[test]
fn direct_frames_go_before_the_rest_of_a_broadcast() {
    let mut rig = Rig::new(1);
    let members: Vec<_> = (0..100).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    members.iter().for_each(|tab| rig.say(*tab, "join r"));
    rig.post("room:r", &message("to all"));
    rig.fan_out();
    let first = rig.shards[0].poll_transmit().unwrap().slot;
    rig.shards[0].handle_written(first, Outcome::Taken(0));
    let direct = members[50];
    let before = rig.tabs[direct].writes;
    rig.post("u50", &message("to one"));
    rig.fan_out();
    assert_eq!(rig.shards[0].poll_transmit().unwrap().slot, rig.tabs[direct].address.slot());
    rig.shards[0].handle_written(rig.tabs[direct].address.slot(), Outcome::Taken(0));
    rig.flush();
    assert_eq!(rig.texts(direct), ["to all", "to one"], "but in its own queue nothing overtakes");
    assert_eq!(rig.tabs[direct].writes, before + 1);
}

#[test]
fn a_frame_for_a_tab_without_that_form_is_not_queued() {
    let mut rig = Rig::new(1);
    let reader = rig.reader(0, "u");
    let (shard, slot) = rig.shard_of(reader);
    shard.send(slot, Frame::ping());
    assert_eq!(shard.queued(), (0, 0));
    rig.flush();
    assert_eq!(rig.got(reader), []);
}

#[test]
fn a_full_inbox_takes_a_post_on_all_its_shards_or_on_none() {
    let mut rig = Rig::new(2);
    let (here, there) = (rig.tab(0, "here"), rig.tab(1, "there"));
    let both = [rig.tab(0, "both"), rig.tab(1, "both")];
    for _ in 0..HubLimits::default().inbox_posts_max {
        rig.hub.post_to_session(rig.tabs[there].address, &typing(true, "there")).unwrap();
    }
    let post = |rig: &Rig, channel: &str| rig.hub.post(&ChannelId::parse(channel).unwrap(), &message("x"));
    let before = rig.hub.waiting_posts();
    assert_eq!(post(&rig, "both"), Err(Full));
    assert_eq!(rig.hub.waiting_posts(), before, "what was reserved on the first shard is given back");
    assert!(post(&rig, "here").is_ok());
    rig.turn();
    assert!(post(&rig, "both").is_ok());
    rig.turn();
    assert_eq!(both.map(|tab| rig.texts(tab).len()), [1, 1]);
    assert_eq!((rig.texts(here).len(), rig.got(there).len()), (1, 1));
}

#[test]
fn a_wake_up_of_many_shards_is_passed_on_by_the_woken_ones() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    struct Bell(AtomicUsize);
    impl std::task::Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let mut rig = Rig::new(7);
    let tabs: Vec<_> = (0..7).map(|shard| rig.tab(shard, "u")).collect();
    let bells: Vec<_> = (0..7).map(|_| Arc::new(Bell(AtomicUsize::new(0)))).collect();
    for (shard, bell) in rig.shards.iter_mut().zip(&bells) {
        assert!(shard.park(&Arc::clone(bell).into()));
    }
    rig.post("u", &message("hi"));
    let rung = || bells.iter().filter(|bell| bell.0.load(Ordering::Relaxed) == 1).count();
    assert_eq!(rung(), 1, "the publisher rings one");
    // Only who was rung looks into its inbox.
    let mut awake = vec![false; 7];
    while let Some(next) = (0..7).find(|at| !awake[*at] && bells[*at].0.load(Ordering::Relaxed) > 0) {
        awake[next] = true;
        let now = rig.now();
        assert!(rig.shards[next].handle_inbox(now));
    }
    assert_eq!(awake, [true; 7]);
    rig.flush();
    assert!(tabs.iter().all(|tab| rig.got(*tab).iter().filter_map(Got::text).eq(["hi"])));
}
