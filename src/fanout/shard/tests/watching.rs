//! Those who watch, and what a shard tells of itself.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::rig::{CLOSE, Got, Rig, client_frame, message};
use crate::fanout::hub::{Drain, TooManyWatchers, Watched};
use crate::fanout::shard::{Ended, OpenError, Report, Wire};
use crate::fanout::streams::StreamOptions;
use crate::id::{ChannelId, UserId};
use crate::proto::delivery::Nobody;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind};
use crate::proto::limits::{HubLimits, SessionLimits};

impl Rig {
    /// Whoever watches: an event stream of nobody's.
    fn watcher(&mut self, shard: u16, watched: &Watched) -> Result<usize, OpenError> {
        let address = self.shards[usize::from(shard)].open_watcher(watched)?;
        let tab = self.add(address, Wire::EventStream);
        self.writable(tab, usize::MAX);
        Ok(tab)
    }
}

fn channel(text: &str) -> Watched {
    Watched::Channel(ChannelId::parse(text).unwrap())
}

fn status() -> Frame {
    Frame::relay(Kind::Status, None, None, r#"{"type":"status"}"#)
}

fn kinds(rig: &Rig, tab: usize) -> Vec<String> {
    rig.got(tab).iter().map(|got| got.kind().to_owned()).collect()
}

/// What a shard answers when it is asked.
fn report(rig: &mut Rig, shard: u16) -> Report {
    let told = Arc::new(Mutex::new(None));
    let answer = Arc::clone(&told);
    rig.hub.ask_report(shard, Box::new(move |report| *answer.lock().unwrap() = Some(report)));
    rig.fan_out();
    let report = told.lock().unwrap().take();
    report.expect("the shard has answered")
}

#[test]
fn whoever_watches_can_be_asked_for_a_key_again_and_tabs_notice_nothing() {
    let mut rig = Rig::new(2);
    let (ann, reader) = (rig.tab(0, "ann"), rig.answer(1, ("ann", "1"), Some(StreamOptions::default())).unwrap());
    let watchers = [rig.watcher(0, &Watched::Status).unwrap(), rig.watcher(1, &channel("ann")).unwrap()];
    rig.hub.end_watchers();
    rig.fan_out();
    for watcher in watchers {
        assert!(!rig.is_open(watcher));
        assert!(kinds(&rig, watcher).is_empty());
    }
    assert_eq!(rig.hub.watcher_count(), 0);
    assert!(rig.is_open(ann) && rig.is_open(reader));
}

#[test]
fn whoever_watches_a_channel_sees_its_frames_whether_or_not_somebody_is_there() {
    let mut rig = Rig::new(2);
    let ann = rig.tab(0, "ann");
    let watchers = ["webchat:ann", "room:r", "sse:1"].map(|watched| rig.watcher(1, &channel(watched)).unwrap());
    let [of_ann, of_room, of_stream] = watchers;
    assert_eq!(rig.publish("ann", &message("to ann")).tabs, 1, "who watches is no tab");
    assert_eq!(rig.publish("bob", &message("to bob")).nobody, Some(Nobody::Offline));
    assert_eq!(rig.publish("room:r", &message("to nobody in r")).nobody, Some(Nobody::EmptyRoom));
    assert_eq!(rig.publish("sse:1", &message("to no stream")).tabs, 0);
    assert_eq!(rig.publish("room:status", &message("to a room of that name")).tabs, 0);
    assert_eq!(rig.texts(ann), ["to ann"]);
    assert_eq!(rig.texts(of_ann), ["to ann"]);
    assert_eq!(rig.texts(of_room), ["to nobody in r"]);
    assert_eq!(rig.texts(of_stream), ["to no stream"]);
    // What an answer says to its owner's tabs too is seen there as well.
    let options = StreamOptions { is_mirrored: true, ..StreamOptions::default() };
    let options = StreamOptions { owner: Some(UserId::parse("ann").unwrap()), ..options };
    rig.answer(0, ("ann", "1"), Some(options)).unwrap();
    rig.publish("sse:1", &message("an answer"));
    assert_eq!(rig.texts(of_ann), ["to ann", "an answer"]);
    assert_eq!(rig.texts(of_stream), ["to no stream", "an answer"]);
}

#[test]
fn whoever_watches_is_nobody_and_in_no_room() {
    let mut rig = Rig::new(2);
    let watchers = [rig.watcher(0, &Watched::Status).unwrap(), rig.watcher(1, &channel("room:r")).unwrap()];
    assert_eq!((rig.hub.registry().total_connections(), rig.hub.registry().user_count()), (0, 0));
    assert_eq!((rig.hub.room_count(), rig.hub.watcher_count()), (0, 2));
    // A room's numbers are its own, whatever is watched.
    let tab = rig.tab(0, "u");
    rig.say(tab, "join r");
    rig.publish("room:r", &message("x"));
    assert_eq!((rig.texts(tab), rig.texts(watchers[0])), (vec!["x".to_owned()], Vec::new()));
    assert_eq!(rig.texts(watchers[1]), ["x"]);
    rig.hub.show_status(&status());
    rig.turn();
    assert_eq!(kinds(&rig, watchers[0]), ["status"]);
    for watcher in watchers {
        rig.lose(watcher);
    }
    assert!(!rig.hub.is_status_watched());
    assert_eq!((rig.hub.watcher_count(), rig.hub.room_count()), (0, 1));
    assert_eq!(rig.publish("room:r", &message("y")).tabs, 1);
    assert_eq!(report(&mut rig, 0).ended, [], "that nobody watches any more is no news");
}

#[test]
fn so_many_may_watch_and_no_more() {
    let mut rig = Rig::new(2);
    let watchers_max = HubLimits::default().watchers_max;
    let watchers: Vec<usize> = (0..watchers_max).map(|_| rig.watcher(0, &Watched::Status).unwrap()).collect();
    let refused = OpenError::TooManyWatchers(TooManyWatchers { watchers_max });
    assert_eq!(rig.watcher(1, &channel("u")), Err(refused));
    assert_eq!(rig.watcher(1, &channel("u")), Err(refused), "being refused takes no place");
    rig.lose(watchers[3]);
    assert!(rig.watcher(1, &channel("u")).is_ok());
}

#[test]
fn who_watches_and_does_not_read_is_cut_and_told_before_of_what_found_no_room() {
    let mut rig = Rig::with_queues(1, 4, 1 << 20);
    let (slow, quick) = (rig.watcher(0, &channel("u")).unwrap(), rig.watcher(0, &channel("u")).unwrap());
    rig.stall(slow, 0);
    for n in 0..40 {
        rig.publish("u", &message(&n.to_string()));
    }
    assert!(!rig.is_open(slow));
    assert_eq!((rig.hub.watcher_count(), rig.texts(quick).len()), (1, 40));
    // An inbox that is full holds up nobody who publishes, and whoever watches hears that there was more.
    let mut count = 0;
    while rig.hub.post_to_session(rig.tabs[quick].address, &Frame::ping()).is_ok() {
        count += 1;
    }
    rig.post("u", &message("not shown"));
    rig.turn();
    assert!(count > 0);
    rig.publish("u", &message("shown"));
    let got: Vec<_> = kinds(&rig, quick).into_iter().skip(40).filter(|kind| !kind.is_empty()).collect();
    assert_eq!(got, ["gap", "message"]);
    assert_eq!(rig.texts(quick).last().map(String::as_str), Some("shown"));
}

#[test]
fn who_watches_is_pinged_and_drained_like_any_reader() {
    let mut rig = Rig::new(1);
    let watcher = rig.watcher(0, &Watched::Status).unwrap();
    rig.wait(30);
    assert!(rig.got(watcher).contains(&Got::KeepAlive));
    rig.hub.drain(Drain { spread: Duration::from_secs(1), closes_per_second_max: 100, latest: Duration::from_secs(2) });
    for _ in 0..100 {
        rig.turn();
        rig.jump(Duration::from_millis(50));
    }
    assert!(rig.tabs[watcher].gone || rig.tabs[watcher].fin);
    assert_eq!(rig.hub.watcher_count(), 0);
    assert_eq!(rig.watcher(0, &Watched::Status), Err(OpenError::Draining));
    assert_eq!(rig.hub.watcher_count(), 0);
}

#[test]
fn a_report_says_who_ended_and_why_with_what_waited() {
    let mut rig = Rig::with_queues(1, 2, 1 << 20);
    let (slow, gone, own) = (rig.tab(0, "slow"), rig.tab(0, "gone"), rig.tab(0, "own"));
    let bytes: usize = [message("1"), message("2")].iter().map(|frame| frame.websocket().len()).sum();
    rig.stall(slow, 0);
    for n in 1..=3 {
        rig.publish("slow", &message(&n.to_string()));
    }
    rig.wait(2);
    rig.lose(gone);
    rig.receive(own, &client_frame(CLOSE, &1000u16.to_be_bytes()));
    let ended = report(&mut rig, 0).ended;
    let seen: Vec<_> = ended.iter().map(|e| (e.user.as_ref().unwrap().as_str(), e.ending, e.queue_frames)).collect();
    assert_eq!(seen, [("slow", Disconnect::SlowConsumer, 2), ("gone", Disconnect::ConnectionLost, 0)]);
    assert_eq!((ended[0].queue_bytes, ended[0].age, ended[1].age), (bytes, Duration::from_secs(2), Duration::ZERO));
    assert_eq!((ended[0].wire, ended[0].is_deaf), (Wire::WebSocket, false));
}

#[test]
fn a_storm_of_endings_leaves_the_last_few_and_who_was_cut_before_it() {
    let mut rig = Rig::new(1);
    let cut = rig.tab(0, "cut");
    let (shard, slot) = rig.shard_of(cut);
    shard.end(slot, Disconnect::Kicked);
    for n in 0..500 {
        let tab = rig.tab(0, &format!("u{n}"));
        rig.lose(tab);
    }
    let ended = report(&mut rig, 0).ended;
    assert!(ended.len() < 50, "{}", ended.len());
    let user = |ended: &Ended| ended.user.as_ref().unwrap().as_str().to_owned();
    assert_eq!((user(&ended[0]), user(ended.last().unwrap())), ("cut".to_owned(), "u499".to_owned()));
}

#[test]
fn an_answer_that_is_cut_is_told_by_its_owner() {
    let mut rig = Rig::with(1, SessionLimits { queue_frames_max: 1, ..SessionLimits::default() }, usize::MAX);
    let options = StreamOptions { owner: Some(UserId::parse("ann").unwrap()), ..StreamOptions::default() };
    let tab = rig.answer(0, ("ann", "1"), Some(options)).unwrap();
    let (shard, slot) = rig.shard_of(tab);
    shard.handle_lost(slot, Disconnect::ConnectionLost);
    let ended = report(&mut rig, 0).ended;
    assert_eq!((ended[0].user.clone(), ended[0].wire), (Some(UserId::parse("ann").unwrap()), Wire::Completion));
    assert_eq!(ended[0].connected_at, None);
}

#[test]
fn the_fattest_queues_are_found_within_some_reports_however_many_sessions_there_are() {
    let mut rig = Rig::new(1);
    assert_eq!(report(&mut rig, 0).waiting, []);
    for n in 0..10_000 {
        rig.try_open(0, &format!("u{n}"), Wire::WebSocket).unwrap();
    }
    // Nobody has been writable yet: all that is published waits.
    let publish = |rig: &mut Rig, user: &str, bytes: usize| {
        rig.post(user, &message(&"x".repeat(bytes)));
        rig.fan_out();
    };
    publish(&mut rig, "u9990", 5_000);
    (0..40).for_each(|n| publish(&mut rig, &format!("u{}", 100 * n), 10 + n));
    let waiting = (0..4).map(|_| report(&mut rig, 0).waiting).last().unwrap();
    assert_eq!(waiting.len(), 16);
    assert_eq!((waiting[0].user.as_str(), waiting[0].queue_frames), ("u9990", 1));
    assert!(waiting[0].queue_bytes > 5_000);
    assert!(waiting.is_sorted_by_key(|waiting| std::cmp::Reverse(waiting.queue_bytes)), "{waiting:?}");
    assert_eq!(waiting[1].user.as_str(), "u3900");
}
