//! What is counted of frames: how long they took, of which kinds they were, and how many of them waited.

use std::time::Duration;

use super::rig::{Got, Rig, message, typing};
use crate::fanout::shard::Resume;
use crate::fanout::streams::StreamOptions;
use crate::id::ChannelId;
use crate::metrics::HistogramSum;
use crate::metrics::LATENCY_MICROS_BOUNDS;
use crate::proto::event::Notice;
use crate::proto::frame::{Frame, Kind, Moment};
use crate::proto::limits::SessionLimits;

const MS: Duration = Duration::from_millis(1);

/// Publishes, as an engine does, now.
fn publish(rig: &Rig, channel: &str, text: &str) {
    let mut frame = message(text);
    frame.accept(Moment::at(rig.now()));
    rig.post(channel, &frame);
}

fn posted(rig: &Rig) -> HistogramSum<{ LATENCY_MICROS_BOUNDS.len() }> {
    rig.hub.metrics().histogram(|shard| &shard.posted_micros)
}

fn written(rig: &Rig) -> HistogramSum<{ LATENCY_MICROS_BOUNDS.len() }> {
    rig.hub.metrics().histogram(|shard| &shard.written_micros)
}

/// So many values that sum up to that time; each may have lost up to a microsecond to rounding.
#[track_caller]
fn check(sum: &HistogramSum<{ LATENCY_MICROS_BOUNDS.len() }>, count: u64, time: Duration) {
    assert_eq!(sum.count(), count);
    let micros = u64::try_from(time.as_micros()).unwrap();
    assert!(sum.sum.abs_diff(micros) <= count, "{} is not {micros}", sum.sum);
}

#[test]
fn a_post_is_timed_once_a_shard_and_a_write_once_a_session() {
    let mut rig = Rig::new(2);
    for shard in [0, 0, 1] {
        rig.tab(shard, "ann");
    }
    publish(&rig, "ann", "hi");
    rig.elapsed += 3 * MS;
    rig.fan_out();
    check(&posted(&rig), 2, 6 * MS);
    assert_eq!(written(&rig).count(), 0, "nothing is written yet");
    rig.elapsed += 4 * MS;
    rig.flush();
    check(&written(&rig), 3, 21 * MS);
    check(&posted(&rig), 2, 6 * MS);
}

#[test]
fn a_write_is_as_old_as_its_oldest_frame() {
    let mut rig = Rig::new(1);
    let _ = rig.tab(0, "ann");
    for text in ["first", "second", "third"] {
        publish(&rig, "ann", text);
        rig.elapsed += 10 * MS;
    }
    rig.turn();
    check(&posted(&rig), 3, 60 * MS);
    check(&written(&rig), 1, 30 * MS);
}

#[test]
fn a_write_counts_when_the_kernel_has_the_whole_frame() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "ann");
    rig.stall(tab, 5);
    publish(&rig, "ann", "hi");
    rig.turn();
    assert_eq!(written(&rig).count(), 0, "five bytes are no frame");
    rig.elapsed += 500 * MS;
    rig.writable(tab, usize::MAX);
    rig.turn();
    check(&written(&rig), 1, 500 * MS);
}

#[test]
fn the_reader_of_an_answer_is_timed_by_the_frames_that_its_chunk_was_made_of() {
    let mut rig = Rig::new(1);
    rig.answer(0, ("ann", "r"), Some(StreamOptions::default())).unwrap();
    publish(&rig, "sse:r", "hello");
    rig.elapsed += 2 * MS;
    rig.turn();
    check(&written(&rig), 1, 2 * MS);
    assert_eq!(rig.content(0), "hello");
}

#[test]
fn what_nobody_published_and_what_is_said_again_is_not_timed() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "ann");
    rig.reader(0, "ann");
    publish(&rig, "ann", "1");
    rig.turn();
    publish(&rig, "ann", "2");
    rig.turn();
    let counts = |rig: &Rig| (posted(rig).count(), written(rig).count());
    assert_eq!(counts(&rig), (2, 4));
    let pong = Frame::notice(&Notice::Pong { client_id: None });
    rig.hub.post_to_session(rig.tabs[tab].address, &pong).unwrap();
    rig.wait(SessionLimits::default().heartbeat_interval.as_secs() + 1);
    assert!(rig.got(tab).contains(&Got::Ping), "and it had the pong before that");
    let first = rig.hub.history(&ChannelId::parse("ann").unwrap())[0].message_id().unwrap();
    let back = rig.resumed(0, "ann", Resume::After(vec![first]));
    rig.turn();
    assert_eq!(rig.texts(back), ["2"]);
    assert_eq!(counts(&rig), (2, 4));
}

#[test]
fn offers_are_counted_by_kind_once_a_session() {
    let mut rig = Rig::new(2);
    for shard in [0, 0, 1] {
        let tab = rig.tab(shard, "ann");
        rig.say(tab, "join r");
    }
    rig.reader(0, "ann");
    rig.publish("ann", &message("for tabs and the stream"));
    rig.publish("room:r", &message("for the members"));
    rig.publish("ann", &typing(true, "ann"));
    let offered = |rig: &Rig, kind| rig.hub.metrics().sum(|shard| shard.offered_frames.of(kind));
    assert_eq!((offered(&rig, Kind::Message), offered(&rig, Kind::Typing), offered(&rig, Kind::PingFrame)), (7, 4, 0));
    rig.wait(SessionLimits::default().heartbeat_interval.as_secs() + 1);
    assert_eq!((offered(&rig, Kind::PingFrame), rig.hub.metrics().sum(|shard| &shard.keep_alives)), (3, 1));
}

#[test]
fn what_waits_for_a_session_is_sampled_at_its_heartbeat() {
    let mut rig = Rig::new(1);
    let (slow, _fast) = (rig.tab(0, "ann"), rig.tab(0, "bob"));
    rig.stall(slow, 0);
    for text in ["1", "2", "3"] {
        rig.publish("ann", &message(text));
    }
    let bytes = rig.shards[0].queued().1 as u64;
    rig.wait(SessionLimits::default().heartbeat_interval.as_secs());
    let metrics = rig.hub.metrics();
    let frames = metrics.histogram(|shard| &shard.session_queue_frames);
    assert_eq!((frames.count(), frames.sum), (2, 3), "one sample of three, and one of none");
    assert_eq!(metrics.histogram(|shard| &shard.session_queue_bytes).sum, bytes);
}
