//! The readers of answers: frames become records when they are written, and an answer may outlive its reader.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::Value;

use super::endings::drain;
use super::rig::{Got, Rig, edit, head, message, typing};
use crate::fanout::hub::Hub;
use crate::fanout::shard::{Answer, OpenError, Outcome, Shard};
use crate::fanout::streams::{AttachError, OpenError as StreamError, StreamOptions};
use crate::id::{ChannelId, MessageId, RequestId, UserId};
use crate::proto::completion::Completion;
use crate::proto::delivery::Nobody;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{EndReason, Event, Timestamp};
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, SessionLimits};

fn options() -> StreamOptions {
    StreamOptions { owner: Some(user("ann")), ..StreamOptions::default() }
}

fn detachable() -> StreamOptions {
    StreamOptions { is_detachable: true, ..options() }
}

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn request(name: &str) -> RequestId {
    RequestId::parse(name).unwrap()
}

fn end(reason: EndReason) -> Frame {
    Frame::encode(&Event::End { reason })
}

fn said(text: &str) -> (MessageId, Frame) {
    let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
    (id, Frame::encode(&Event::Message { id, text, sender: "star", reply_to: None, timestamp }))
}

fn cancelled(rig: &Rig) -> Option<String> {
    rig.hub.next_cancelled().now_or_never().map(|cancelled| cancelled.request.as_str().to_owned())
}

#[test]
fn a_stream_ends_with_its_last_frame_in_one_write() {
    let mut rig = Rig::new(2);
    let tab = rig.answer(1, ("ann", "r"), Some(options())).unwrap();
    let (id, frame) = said("Hel");
    assert!(rig.publish("sse:r", &frame).is_delivered());
    rig.publish("sse:r", &edit(id, "Hello"));
    let writes = rig.tabs[tab].writes;
    rig.post("sse:r", &edit(id, "Hello!"));
    rig.post("sse:r", &end(EndReason::Stop));
    rig.turn();
    assert_eq!(rig.content(tab), "Hello!");
    assert!(rig.records(tab).ends_with("data: [DONE]\n\n"));
    assert_eq!(rig.last(tab), Got::LastChunk);
    assert_eq!(rig.tabs[tab].writes, writes + 1, "what waits leaves in one write, and in one chunk");
    assert!(rig.tabs[tab].gone);
    assert_eq!(rig.publish("sse:r", &message("late")).nobody, Some(Nobody::NoSuchStream));
    assert_eq!(cancelled(&rig), None, "it was not cancelled, it ended");
    assert_eq!((rig.hub.stream_count(), rig.hub.recovery_bytes()), (0, 0));
}

#[test]
fn a_reader_that_is_behind_gets_one_long_delta_instead_of_many() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(options())).unwrap();
    let (id, frame) = said("0");
    rig.publish("sse:r", &frame);
    rig.stall(tab, 0);
    let mut text = "0".to_owned();
    for n in 1..500 {
        text.push_str(&format!(" {n}"));
        rig.publish("sse:r", &edit(id, &text));
    }
    rig.check_gauges();
    assert_eq!(rig.shards[0].queued().0, 2, "what met the full socket, and the newest edit behind it");
    rig.writable(tab, 7);
    rig.publish("sse:r", &message("next"));
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.content(tab), format!("{text}\n\nnext"));
    assert_eq!(rig.records(tab).matches("data: ").count(), 4, "{}", rig.records(tab));
    rig.check_gauges();
}

#[test]
fn typing_is_a_keep_alive_and_silence_brings_one_too() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(options())).unwrap();
    rig.publish("sse:r", &typing(false, "u"));
    assert_eq!(rig.records(tab), "");
    rig.publish("sse:r", &typing(true, "u"));
    assert_eq!(rig.records(tab), ": keep-alive\n\n");
    rig.wait(60);
    assert_eq!(rig.records(tab), ": keep-alive\n\n".repeat(3));
}

#[test]
fn a_reader_that_goes_away_cancels_what_is_not_detached() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(options())).unwrap();
    rig.lose(tab);
    assert_eq!(cancelled(&rig).as_deref(), Some("r"));
    assert_eq!(rig.publish("sse:r", &message("x")).nobody, Some(Nobody::NoSuchStream));
    assert_eq!(rig.hub.stream_count(), 0);
}

#[test]
fn a_detached_answer_goes_on_and_is_found_again() {
    let mut rig = Rig::new(2);
    let tab = rig.answer(0, ("ann", "r"), Some(detachable())).unwrap();
    let (id, frame) = said("a");
    rig.publish("sse:r", &frame);
    rig.lose(tab);
    assert!(rig.publish("sse:r", &edit(id, "a b")).is_delivered(), "it is kept, and the worker goes on");
    assert_eq!(cancelled(&rig), None);
    let wrong = rig.answer(1, ("bob", "r"), None).unwrap_err();
    assert_eq!(wrong, OpenError::Attach(AttachError::NoSuchStream), "another's is as good as none");
    let tab = rig.answer(1, ("ann", "r"), None).unwrap();
    rig.publish("sse:r", &edit(id, "a b c"));
    assert_eq!(rig.content(tab), "a b c");
    // A second reader takes over, the first one sees the end.
    let other = rig.answer(0, ("ann", "r"), None).unwrap();
    rig.turn();
    assert!(rig.records(tab).contains("\"code\":\"cancelled\"") && rig.tabs[tab].gone);
    rig.publish("sse:r", &end(EndReason::Stop));
    assert_eq!(rig.content(other), "a b c");
    assert!(rig.tabs[other].gone);
    // It can be found for a while after its end, and then not any more.
    let late = rig.answer(1, ("ann", "r"), None).unwrap();
    assert_eq!((rig.content(late).as_str(), rig.last(late)), ("a b c", Got::LastChunk));
    rig.wait(125);
    assert!(rig.answer(1, ("ann", "r"), None).is_err());
    assert_eq!((rig.hub.stream_count(), rig.hub.recovery_bytes()), (0, 0));
}

#[test]
fn a_slow_reader_is_told_and_loses_its_place_but_not_the_answer() {
    let mut rig = Rig::with_queues(1, 3, 1 << 20);
    let tab = rig.answer(0, ("ann", "r"), Some(detachable())).unwrap();
    rig.stall(tab, 0);
    for n in 0..8 {
        rig.publish("sse:r", &message(&n.to_string()));
    }
    rig.writable(tab, usize::MAX);
    assert!(rig.records(tab).contains("\"code\":\"slow_consumer\""), "{}", rig.records(tab));
    assert_eq!(rig.last(tab), Got::LastChunk);
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1);
    rig.publish("sse:r", &end(EndReason::Stop));
    let again = rig.answer(0, ("ann", "r"), None).unwrap_err();
    assert_eq!(again, OpenError::Attach(AttachError::Lost), "eight messages are more than three are kept of");
}

#[test]
fn silence_ends_an_answer_and_its_worker_is_told() {
    let mut rig = Rig::new(1);
    let options = StreamOptions { idle_timeout: Some(Duration::from_secs(30)), ..options() };
    let tab = rig.answer(0, ("ann", "r"), Some(options)).unwrap();
    rig.wait(25);
    rig.publish("sse:r", &typing(true, "u"));
    rig.wait(25);
    assert!(!rig.tabs[tab].gone);
    rig.wait(10);
    rig.turn();
    assert!(rig.records(tab).contains("\"code\":\"timeout\"") && rig.tabs[tab].gone);
    assert_eq!(cancelled(&rig).as_deref(), Some("r"));
}

#[test]
fn whoever_owns_it_cancels_it() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(detachable())).unwrap();
    assert_eq!(rig.hub.cancel_stream(&request("r"), &user("bob")), Err(AttachError::NoSuchStream));
    assert_eq!(rig.hub.cancel_stream(&request("r"), &user("ann")), Ok(true));
    rig.turn();
    assert!(rig.records(tab).contains("\"code\":\"cancelled\"") && rig.tabs[tab].gone);
    assert_eq!(cancelled(&rig).as_deref(), Some("r"));
    assert_eq!(rig.hub.cancel_stream(&request("r"), &user("ann")), Err(AttachError::NoSuchStream));
}

#[test]
fn one_owner_has_so_many_and_no_more() {
    let mut rig = Rig::new(1);
    for n in 0..128 {
        rig.answer(0, ("ann", &n.to_string()), Some(options())).unwrap();
    }
    let error = rig.answer(0, ("ann", "more"), Some(options())).unwrap_err();
    assert_eq!(error, OpenError::Stream(StreamError::TooManyOfOwner { streams_max: 128 }));
    let error = rig.answer(0, ("ann", "1"), Some(options())).unwrap_err();
    assert_eq!(error, OpenError::Stream(StreamError::Exists));
    rig.publish("sse:7", &end(EndReason::Stop));
    rig.answer(0, ("ann", "more"), Some(options())).unwrap();
}

#[test]
fn what_is_mirrored_reaches_the_owners_tabs_too() {
    let mut rig = Rig::new(2);
    let (tab, other) = (rig.tab(1, "ann"), rig.tab(1, "bob"));
    let options = StreamOptions { is_mirrored: true, ..options() };
    let reader = rig.answer(0, ("ann", "r"), Some(options)).unwrap();
    let (id, frame) = said("a");
    rig.publish("sse:r", &frame);
    rig.publish("sse:r", &edit(id, "a b"));
    rig.publish("sse:r", &end(EndReason::Stop));
    assert_eq!((rig.texts(tab), rig.content(reader).as_str()), (vec!["a".to_owned(), "a b".to_owned()], "a b"));
    assert!(rig.got(other).is_empty());
}

#[test]
fn a_drain_lets_answers_end_and_then_ends_them() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(options())).unwrap();
    rig.hub.drain(drain(0));
    rig.turn();
    rig.wait(3);
    rig.publish("sse:r", &message("still here"));
    assert_eq!(rig.content(tab), "still here");
    assert_eq!(rig.answer(0, ("ann", "s"), Some(options())).unwrap_err(), OpenError::Draining);
    rig.hub.end_streams();
    rig.turn();
    assert!(rig.tabs[tab].gone && rig.last(tab) == Got::LastChunk);
    assert!(rig.shards[0].is_drained());
}

#[test]
fn answers_do_not_hurry_the_drain_of_tabs() {
    let mut rig = Rig::new(1);
    let answers: Vec<_> = (0..90).map(|n| rig.answer(0, ("ann", &format!("r{n}")), Some(options())).unwrap()).collect();
    let tabs: Vec<_> = (0..10).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    rig.hub.drain(drain(10));
    rig.turn();
    for second in 1..=10 {
        for _ in 0..20 {
            rig.jump(Duration::from_millis(50));
            rig.turn();
        }
        let open = tabs.iter().filter(|tab| rig.is_open(**tab)).count();
        assert!((10 - second..=11 - second).contains(&open), "{open} open after second {second}");
    }
    assert!(answers.iter().all(|answer| rig.is_open(*answer)));
}

#[test]
fn a_replay_says_the_same_as_the_stream_did() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(detachable())).unwrap();
    let (id, frame) = said("");
    rig.publish("sse:r", &frame);
    rig.publish("sse:r", &edit(id, "AAA"));
    rig.publish("sse:r", &message("BBB"));
    rig.publish("sse:r", &edit(id, "AAA!"));
    rig.publish("sse:r", &end(EndReason::Stop));
    assert_eq!(rig.content(tab), "AAA\n\nBBB\n\n!");
    let again = rig.answer(0, ("ann", "r"), None).unwrap();
    // The difference was all that was left to say of the first message.
    assert_eq!(rig.content(again), "AAA!\n\nBBB");
}

#[test]
fn a_reader_of_an_ended_answer_may_take_as_long_as_it_goes_on_reading() {
    let mut rig = Rig::new(1);
    let tab = rig.answer(0, ("ann", "r"), Some(options())).unwrap();
    rig.stall(tab, 0);
    rig.publish("sse:r", &message(&"x".repeat(100_000)));
    rig.publish("sse:r", &end(EndReason::Stop));
    for _ in 0..9 {
        rig.writable(tab, 10_000);
        rig.wait(4);
        assert!(!rig.tabs[tab].gone);
    }
    rig.writable(tab, usize::MAX);
    assert_eq!((rig.content(tab).len(), rig.last(tab)), (100_000, Got::LastChunk));
    // One that takes nothing has the time of any other that was told to close.
    let tab = rig.answer(0, ("ann", "s"), Some(options())).unwrap();
    rig.stall(tab, 0);
    rig.publish("sse:s", &message("x"));
    rig.publish("sse:s", &end(EndReason::Stop));
    rig.wait(7);
    assert!(rig.tabs[tab].gone);
}

#[test]
fn what_answers_hold_counts_against_the_budget_and_the_fattest_goes_first() {
    let held = crate::proto::frame::live_bytes();
    let mut rig = Rig::with(1, SessionLimits::default(), held + (4 << 20));
    let (small, bystander) = (rig.answer(0, ("ann", "small"), Some(options())).unwrap(), rig.tab(0, "bob"));
    rig.publish("sse:small", &message(&"x".repeat(10_000)));
    rig.stall(bystander, 0);
    rig.publish("bob", &message("waits"));
    let fat = rig.answer(0, ("ann", "fat"), Some(options())).unwrap();
    rig.publish("sse:fat", &message(&"x".repeat(6 << 20)));
    rig.turn();
    assert!(rig.is_open(bystander) && rig.is_open(small), "it is not they who hold it");
    assert!(rig.tabs[fat].gone || !rig.is_open(fat));
    assert_eq!(rig.ended(Disconnect::OverBudget), 1);
}

#[test]
fn an_owner_has_a_few_ended_answers_that_can_be_found() {
    let mut rig = Rig::new(1);
    for n in 0..20 {
        let name = n.to_string();
        rig.answer(0, ("ann", &name), Some(detachable())).unwrap();
        rig.publish(&format!("sse:{name}"), &message("x"));
        rig.publish(&format!("sse:{name}"), &end(EndReason::Stop));
    }
    assert_eq!(rig.answer(0, ("ann", "3"), None).unwrap_err(), OpenError::Attach(AttachError::NoSuchStream));
    let tab = rig.answer(0, ("ann", "4"), None).unwrap();
    assert_eq!(rig.content(tab), "x");
    rig.wait(125);
    assert_eq!(rig.hub.recovery_bytes(), 0);
}

#[test]
fn a_user_who_is_cut_has_no_answers_any_more() {
    let mut rig = Rig::new(1);
    let tabs = ["1", "2"].map(|name| rig.answer(0, ("ann", name), Some(detachable())).unwrap());
    let of_bob = StreamOptions { owner: Some(user("bob")), ..options() };
    let other = rig.answer(0, ("bob", "3"), Some(of_bob)).unwrap();
    assert_eq!(rig.hub.cancel_streams(&user("ann")), 2);
    rig.turn();
    assert!(tabs.iter().all(|tab| rig.tabs[*tab].gone) && !rig.tabs[other].gone);
    assert_eq!((cancelled(&rig).as_deref(), cancelled(&rig).as_deref()), (Some("1"), Some("2")));
    assert_eq!(rig.hub.cancel_streams(&user("ann")), 0);
}

/// What one reader gets who attaches, stays for some turns, and goes away: the text of all deltas.
fn read_for(shard: &mut Shard, turns: usize) -> String {
    let request = request("r");
    let answer = Answer { completion: Completion::new(head(&request)), request };
    let slot = shard.reopen_answer(&user("ann"), answer).unwrap().slot();
    shard.handle_writable(slot);
    let mut bytes = Vec::new();
    for _ in 0..turns {
        while shard.handle_inbox(start()) {}
        loop {
            let Some(transmit) = shard.poll_transmit() else { break };
            let before = bytes.len();
            transmit.slices.iter().for_each(|slice| bytes.extend_from_slice(slice));
            drop(transmit);
            shard.handle_written(slot, Outcome::Taken(bytes.len() - before));
        }
        std::thread::yield_now();
    }
    shard.handle_lost(slot, Disconnect::ConnectionLost);
    while shard.poll_disconnect().is_some() {}
    let delta = |line: &str| {
        let json: Value = serde_json::from_str(line.strip_prefix("data: ")?).ok()?;
        json["choices"][0]["delta"]["content"].as_str().map(str::to_owned)
    };
    String::from_utf8(bytes).unwrap().lines().filter_map(delta).collect()
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
fn start() -> Instant {
    Instant::now()
}

#[test]
fn readers_come_and_go_while_the_answer_is_given_and_each_reads_from_the_beginning_without_a_gap() {
    const MESSAGES: usize = 300;
    let limits = SessionLimits::default();
    let hub = Hub::new(3, &HubLimits::default(), &limits);
    let shard = |index| Shard::new(Arc::clone(&hub), index, SessionLimits::default(), usize::MAX, start());
    let mut home = shard(2);
    let answer = Answer { completion: Completion::new(head(&request("r"))), request: request("r") };
    home.open_answer(answer, detachable()).unwrap();
    let whole: String = (0..MESSAGES).map(|n| if n == 0 { "0".to_owned() } else { format!("\n\n{n}") }).collect();
    std::thread::scope(|threads| {
        for index in 0..2 {
            let (shard, whole) = (&shard, &whole);
            threads.spawn(move || {
                let mut shard = shard(index);
                for turns in 1..60 {
                    let text = read_for(&mut shard, turns % 13);
                    assert!(whole.starts_with(&text), "a gap or a double: {text:?}");
                }
            });
        }
        for n in 0..MESSAGES {
            hub.post(&ChannelId::Stream(request("r")), &message(&n.to_string())).unwrap();
            std::thread::yield_now();
        }
    });
    assert_eq!(read_for(&mut home, 1), whole);
}
