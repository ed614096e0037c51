//! The last endings, each with one sentence that says why.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::Settings;
use crate::fanout::session::Address;
use crate::fanout::shard::{Ended, Wire};
use crate::gateway::status::name_of;
use crate::gateway::status::sample::rounded;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::Timestamp;
use crate::proto::limits::SessionLimits;

/// Endings that are shown.
const SHOWN_MAX: usize = 20;
/// So many of them are of sessions that just went, if there are more that were cut than have room beside them.
const LEFT_SHOWN_MAX: usize = 10;

/// What is known of endings, the newest first.
pub(super) struct Endings {
    why: Why,
    /// With when it was, which does not change any more once it was told.
    ended: Vec<(Timestamp, Ended)>,
}

impl Endings {
    pub(super) fn new(settings: &Settings) -> Self {
        Self { why: Why::new(settings), ended: Vec::new() }
    }

    /// From now on these are the limits that sentences name.
    pub(super) fn explain_by(&mut self, settings: &Settings) {
        self.why = Why::new(settings);
    }

    /// Takes what shards have told at `now`, of which most is known already. What they have forgotten stays for as long
    /// as it is shown.
    pub(super) fn update(&mut self, told: Vec<Ended>, now: Timestamp) {
        let known: HashMap<Address, Timestamp> = self.ended.iter().map(|(at, ended)| (ended.address, *at)).collect();
        let at = |ended: &Ended| {
            let micros = u64::try_from(ended.age.as_micros()).unwrap_or(u64::MAX);
            let about = Timestamp::from_micros(now.as_micros().saturating_sub(micros));
            known.get(&ended.address).copied().unwrap_or(about)
        };
        let is_told: HashSet<Address> = told.iter().map(|ended| ended.address).collect();
        self.ended = self.shown().into_iter().cloned().collect();
        self.ended.retain(|(_, ended)| !is_told.contains(&ended.address));
        self.ended.extend(told.into_iter().map(|ended| (at(&ended), ended)));
        self.ended.sort_by_key(|(at, _)| Reverse(at.as_micros()));
    }

    /// The newest first.
    pub(super) fn newest(&self) -> Value {
        self.shown().into_iter().map(|(at, ended)| self.row(*at, ended)).collect()
    }

    /// The newest of those that were cut and of those that were not: however many just go, the others stay.
    fn shown(&self) -> Vec<&(Timestamp, Ended)> {
        let (cut, left): (Vec<_>, Vec<_>) = self.ended.iter().partition(|(_, ended)| ended.is_cut());
        let left_max = SHOWN_MAX.saturating_sub(cut.len()).max(LEFT_SHOWN_MAX).min(left.len());
        let mut shown: Vec<_> = cut.into_iter().take(SHOWN_MAX - left_max).collect();
        shown.extend(left.into_iter().take(left_max));
        shown.sort_by_key(|(at, _)| Reverse(at.as_micros()));
        shown
    }

    fn row(&self, at: Timestamp, ended: &Ended) -> Value {
        let seconds = |from: Timestamp| rounded((at.as_seconds() - from.as_seconds()).max(0.0));
        json!({
            "at": at.as_seconds(),
            "user_id": name_of(ended.user.as_ref()),
            "session": session_name(ended.address),
            "wire": wire_name(ended.wire),
            "reason": ended.ending.reason(),
            "code": ended.ending.close_code(),
            "retryable": ended.ending.is_retryable(),
            "connected_seconds": ended.connected_at.map(seconds),
            "queue_frames": ended.queue_frames,
            "queue_bytes": ended.queue_bytes,
            "detail": self.why.sentence(ended),
        })
    }
}

/// As in `hello`, and in `/api/users/{user}`.
fn session_name(address: Address) -> String {
    address.as_u64().to_string()
}

const fn wire_name(wire: Wire) -> &'static str {
    match wire {
        Wire::WebSocket | Wire::DeflatedWebSocket | Wire::NarrowWebSocket(_) => "websocket",
        Wire::Frames => "frames",
        Wire::EventStream => "events",
        Wire::Completion => "answer",
    }
}

/// The limits that sessions end by.
struct Why {
    limits: SessionLimits,
    bytes_budget: usize,
    inbound_bytes_max: usize,
}

impl Why {
    fn new(settings: &Settings) -> Self {
        Self {
            limits: settings.session_limits(),
            bytes_budget: settings.bytes_budget,
            inbound_bytes_max: settings.inbound_bytes_max,
        }
    }

    fn sentence(&self, ended: &Ended) -> String {
        let limits = &self.limits;
        let queue = counted(ended);
        match ended.ending {
            Disconnect::SlowConsumer if ended.queue_frames >= limits.queue_frames_max => {
                format!("its queue held {queue}; the limit is {} frames", grouped(limits.queue_frames_max))
            }
            Disconnect::SlowConsumer => {
                let max = grouped(limits.queue_bytes_max);
                format!("its queue held {queue}, and the next frame had no room; the limit is {max} bytes")
            }
            Disconnect::OverBudget if ended.is_deaf => {
                let max = grouped(self.inbound_bytes_max);
                format!("unfinished messages of all clients would have passed {max} bytes, and its was one of them")
            }
            Disconnect::OverBudget => {
                let max = grouped(self.bytes_budget);
                format!("the process was over its budget of {max} bytes, and its queue, {queue}, among the largest")
            }
            Disconnect::HeartbeatTimeout => {
                let after = Time(limits.heartbeat_timeout);
                format!("there was no sign of life for {after} after a ping{}", waited(ended))
            }
            Disconnect::ConnectionLost => format!("the connection broke without a close{}", waited(ended)),
            Disconnect::PolicyViolation => self.too_much(ended),
            Disconnect::MessageTooBig => {
                format!("it sent a message of more than {} bytes", grouped(limits.message_bytes_max))
            }
            Disconnect::TokenExpired => "its token expired".to_owned(),
            Disconnect::Kicked => "an operator ended the sessions of this user".to_owned(),
            Disconnect::ServiceRestart => "this node shuts down".to_owned(),
            Disconnect::ProtocolError => "it broke the rules of WebSocket (RFC 6455)".to_owned(),
            Disconnect::UnsupportedData => "it sent a binary message, which is not taken here".to_owned(),
            Disconnect::InvalidPayload => "it sent text that is not UTF-8".to_owned(),
            Disconnect::InternalError => "a fault of this gateway, which its log has more of".to_owned(),
            Disconnect::Normal => "its client closed it".to_owned(),
        }
    }

    fn too_much(&self, ended: &Ended) -> String {
        let limits = &self.limits;
        let bytes = grouped(limits.inbound_bytes_per_second_max);
        if !ended.wire.is_websocket() {
            return format!("it went on to send after its request, more than {bytes} bytes a second");
        }
        let frames = grouped(limits.inbound_messages_per_second_max);
        format!(
            "it sent more than {} bad frames in ten seconds; what is past {frames} messages or {bytes} bytes a second \
             counts as bad",
            limits.bad_frames_max
        )
    }
}

/// What waited for it.
fn counted(ended: &Ended) -> String {
    let noun = if ended.queue_frames == 1 { "frame" } else { "frames" };
    format!("{} {noun}, {} bytes", grouped(ended.queue_frames), grouped(ended.queue_bytes))
}

/// The same behind another reason, if anything did.
fn waited(ended: &Ended) -> String {
    if ended.queue_frames == 0 { String::new() } else { format!("; {} waited for it", counted(ended)) }
}

/// A time as the settings write it.
struct Time(Duration);

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.subsec_millis() == 0 {
            write!(f, "{}s", self.0.as_secs())
        } else {
            write!(f, "{}ms", self.0.as_millis())
        }
    }
}

/// A number with commas between its thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::UserId;

    fn ended(ending: Disconnect, slot: u32, age: u64) -> Ended {
        Ended {
            address: Address::new(0, slot, 0),
            user: Some(UserId::parse("ann").unwrap()),
            connected_at: Some(Timestamp::from_micros(88_000_000)),
            wire: Wire::WebSocket,
            ending,
            is_deaf: false,
            queue_frames: 3,
            queue_bytes: 900_000,
            age: Duration::from_secs(age),
        }
    }

    fn endings() -> Endings {
        let why = Why { limits: SessionLimits::default(), bytes_budget: 1_000, inbound_bytes_max: 2_000 };
        Endings { why, ended: Vec::new() }
    }

    #[test]
    fn every_reason_is_a_sentence_with_its_numbers() {
        let why = endings().why;
        let check = |ended: Ended, expected: &str| assert_eq!(why.sentence(&ended), expected);
        let of = |ending| ended(ending, 1, 0);
        let slow = Ended { queue_frames: 1_024, queue_bytes: 1_048_576, ..of(Disconnect::SlowConsumer) };
        check(slow, "its queue held 1,024 frames, 1,048,576 bytes; the limit is 1,024 frames");
        check(
            of(Disconnect::SlowConsumer),
            "its queue held 3 frames, 900,000 bytes, and the next frame had no room; the limit is 1,048,576 bytes",
        );
        check(
            of(Disconnect::HeartbeatTimeout),
            "there was no sign of life for 20s after a ping; 3 frames, 900,000 bytes waited for it",
        );
        let nothing = Ended { queue_frames: 0, queue_bytes: 0, ..of(Disconnect::ConnectionLost) };
        check(nothing, "the connection broke without a close");
        check(
            of(Disconnect::OverBudget),
            "the process was over its budget of 1,000 bytes, and its queue, 3 frames, 900,000 bytes, among the largest",
        );
        check(
            Ended { is_deaf: true, ..of(Disconnect::OverBudget) },
            "unfinished messages of all clients would have passed 2,000 bytes, and its was one of them",
        );
        for ending in Disconnect::ALL {
            let sentence = why.sentence(&of(ending));
            assert!(sentence.len() > 10 && !sentence.ends_with('.'), "{sentence}");
        }
    }

    #[test]
    fn each_ending_is_shown_once_with_a_time_that_stays_the_newest_first() {
        let mut endings = endings();
        let at = |seconds: u64| Timestamp::from_micros(seconds * 1_000_000);
        endings.update(vec![ended(Disconnect::Kicked, 1, 0)], at(100));
        endings.update(vec![ended(Disconnect::Kicked, 1, 2), ended(Disconnect::SlowConsumer, 2, 0)], at(101));
        let rows = endings.newest();
        let seen = |row: &Value| (row["session"].clone(), row["at"].clone(), row["connected_seconds"].clone());
        let name = |slot| session_name(Address::new(0, slot, 0));
        assert_eq!(seen(&rows[0]), (name(2).into(), 101.0.into(), 13.0.into()));
        assert_eq!(seen(&rows[1]), (name(1).into(), 100.0.into(), 12.0.into()));
        assert_eq!(rows[0]["code"], 4008);
        assert_eq!(rows[0]["retryable"], true);
        endings.update((10..60).map(|slot| ended(Disconnect::ConnectionLost, slot, 0)).collect(), at(102));
        assert_eq!(endings.newest().as_array().unwrap().len(), SHOWN_MAX);
        // Those that are told again, and were not shown, do not become newer.
        let before = endings.newest();
        endings.update((10..60).map(|slot| ended(Disconnect::ConnectionLost, slot, 0)).collect(), at(103));
        assert_eq!(endings.newest(), before);
        endings.update(Vec::new(), at(104));
        assert_eq!(endings.newest(), before, "what shards have forgotten is still shown");
        let reasons: Vec<_> = before.as_array().unwrap().iter().map(|row| row["code"].as_u64().unwrap()).collect();
        assert_eq!(reasons[18..], [4008, 4010], "who was cut stays among the many who went");
        endings.update((100..130).map(|slot| ended(Disconnect::OverBudget, slot, 0)).collect(), at(105));
        let rows = endings.newest();
        let of = |code: u64| rows.as_array().unwrap().iter().filter(|row| row["code"] == code).count();
        assert_eq!((rows.as_array().unwrap().len(), of(1013), of(1006)), (20, 10, 10));
    }

    #[test]
    fn numbers_have_commas_between_their_thousands() {
        let check = |number, expected: &str| assert_eq!(grouped(number), expected);
        check(0, "0");
        check(999, "999");
        check(1_000, "1,000");
        check(12_345_678, "12,345,678");
    }
}
