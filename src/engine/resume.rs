//! What a tab has missed, found in what is kept between nodes.

use std::collections::HashSet;

use crate::broker::KeptFrame;
use crate::fanout::backlog::{Backlog, Bounds, Displaced, Edits};
use crate::fanout::returning::Missed;
use crate::id::MessageId;
use crate::proto::frame::{Class, Frame};
use crate::proto::limits::RecoveryLimits;

/// Looks for `positions`, the newest first, in what is kept, and notes what a tab has missed that has them. False if
/// none is known.
///
/// What several nodes publish at once is not in the same order on every node. A tab that names several positions says
/// what it has: what is kept behind the middle one of them, and is none of them, it does not have. One that names one
/// gets what is behind it.
///
/// What is kept is bounded there by its frames; here its bytes and its age are, by the same rules as in memory.
pub(super) fn find(missed: &Missed, kept: Vec<KeptFrame>, positions: &[MessageId], limits: &RecoveryLimits) -> bool {
    let bounds = Bounds { frames_max: limits.frames_max, bytes_max: limits.bytes_max, edits: Edits::Posted };
    let (mut backlog, mut displaced) = (Backlog::default(), Displaced::new());
    let (mut all, mut seen): (Vec<Frame>, HashSet<MessageId>) = (Vec::new(), HashSet::new());
    // Ages count backwards from the end of all time, so that the oldest is the least.
    let end = u64::MAX / 2;
    for entry in kept {
        match entry {
            KeptFrame::Frame { frame, age } => {
                // One whose writer did not hear that it was kept was kept twice.
                let is_ordered = frame.class() == Class::Ordered;
                if is_ordered && !frame.message_id().is_some_and(|id| seen.insert(id)) {
                    continue;
                }
                backlog.keep(&frame, end - age.as_secs(), bounds, &mut displaced);
                all.push(frame);
            }
            KeptFrame::Hole { id } => backlog.keep_hole(id, &mut displaced),
        }
    }
    backlog.expire(end, limits.lifetime, &mut displaced);
    let is_ordered = |frame: &Frame| frame.class() == Class::Ordered;
    let has = |frame: &Frame| is_ordered(frame) && frame.message_id().is_some_and(|id| positions.contains(&id));
    let known: Vec<MessageId> = backlog.frames().filter(|frame| has(frame)).filter_map(Frame::message_id).collect();
    let behind = match known.len() {
        // It may be right before the first that is held.
        0 | 1 => positions.iter().find_map(|position| backlog.since(*position)),
        count => backlog.since(known[count / 2]).map(|mut frames| {
            frames.retain(|frame| !has(frame));
            frames
        }),
    };
    match behind {
        Some(frames) => {
            missed.set(&all, frames);
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::fanout::returning::Returning;
    use crate::fanout::session::Address;
    use crate::id::UserId;
    use crate::proto::event::{Event, Timestamp};

    fn id(number: u128) -> MessageId {
        MessageId::from_u128(number)
    }

    fn kept(step: &str) -> KeptFrame {
        let (number, timestamp) = (id(step[1..].parse().unwrap()), Timestamp::from_micros(1));
        let text = "text";
        let frame = match &step[..1] {
            "m" => Event::Message { id: number, text, sender: "star", reply_to: None, timestamp },
            "e" => Event::Edit { id: number, text, timestamp },
            "h" => return KeptFrame::Hole { id: Some(number) },
            _ => return KeptFrame::Hole { id: None },
        };
        KeptFrame::Frame { frame: Frame::encode(&frame), age: Duration::ZERO }
    }

    #[test]
    fn what_is_kept_is_replayed_whole_or_not_at_all() {
        let limits = RecoveryLimits { frames_max: 8, ..RecoveryLimits::default() };
        let check = |steps: &str, positions: &[u128], expected: Option<&[u128]>| {
            let returning = Arc::new(Returning::default());
            let missed = returning.begin(&UserId::parse("u").unwrap(), &[]);
            let positions: Vec<_> = positions.iter().copied().map(id).collect();
            find(&missed, steps.split_whitespace().map(kept).collect(), &positions, &limits);
            let found = returning.finish(&missed, Address::new(0, 0, 0), 0);
            let ids = found
                .map(|frames| frames.iter().map(|frame| frame.message_id().unwrap().as_u128()).collect::<Vec<_>>());
            assert_eq!(ids.as_deref(), expected, "{steps} after {positions:?}");
        };
        check("m1 m2 e1 m3", &[1], Some(&[2, 1, 3]));
        check("m1 m2 m2 m3", &[1], Some(&[2, 3]));
        check("m1 m2", &[9, 2], Some(&[]));
        // Another node's order: what is none of those that the tab has is missed.
        check("m1 m2 m5 m3 m4 m6", &[4, 3, 2, 1], Some(&[6]));
        check("m1 m2 m3 m5 m4 e3 m6", &[4, 3, 2, 1], Some(&[5, 3, 6]));
        check("m3 m4 m5", &[4, 3, 2, 1], Some(&[5]));
        check("m1 m2", &[9], None);
        check("", &[1], None);
        check("m1 h2 m3", &[1], None);
        check("m1 h2 m3", &[2], Some(&[3]));
        check("m1 x0 m3", &[1], None);
        check("m1 x0 m3 m4", &[3], Some(&[4]));
    }
}
