//! What is kept of users' frames in Redis, for tabs that come back to another node: a stream a user.
//!
//! An ordered frame is one entry; a message's edit is one too, and takes the place of the edit before it. A frame that
//! is larger than all that may be kept of a user leaves a mark, so that nobody believes to have everything.

use std::time::Duration;

use redis::{Cmd, Value};

use crate::broker::{Kept, KeptFrame};
use crate::id::MessageId;
use crate::proto::frame::{Frame, Kind};
use crate::proto::limits::RecoveryLimits;

/// How many answers a read has.
pub(crate) const READ_COMMANDS: usize = 2;
/// A user's newest message is kept so many times as long as the others, as it is in memory.
const TAIL_LIFETIMES: u32 = 30;
/// The mark of what was too large.
const HOLE: &str = "hole";

/// Puts an edit behind the others and takes its predecessor away: `ARGV` are the message, the most entries, the JSON,
/// and how long its place is remembered.
const EDIT: &str = r"
local old = redis.call('HGET', KEYS[2], ARGV[1])
if old then redis.call('XDEL', KEYS[1], old) end
if redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[2]) then redis.call('DEL', KEYS[2]) end
local new = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'k', 'edit', 'i', ARGV[1], 'j', ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], new)
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return new";

/// Whether a tab that comes back may want a frame of that kind.
pub(crate) const fn wants(kind: Kind) -> bool {
    matches!(kind, Kind::Message | Kind::Buttons | Kind::File | Kind::Edit)
}

/// How long a user's stream stays without a new frame.
pub(crate) fn key_millis(limits: &RecoveryLimits) -> u64 {
    u64::try_from(limits.lifetime.saturating_mul(TAIL_LIFETIMES).as_millis()).unwrap_or(u64::MAX)
}

/// The command that keeps a frame.
pub(crate) fn write(key: &str, frame: &Frame, limits: &RecoveryLimits) -> Cmd {
    let id = frame.message_id().map(|id| id.to_string()).unwrap_or_default();
    let is_edit = frame.kind() == Kind::Edit;
    let is_hole = frame.json().len() > limits.bytes_max;
    if is_edit && !is_hole {
        let mut command = redis::cmd("EVAL");
        command.arg(EDIT).arg(2).arg(key).arg(format!("{key}:edits"));
        command.arg(id).arg(limits.frames_max).arg(frame.json()).arg(key_millis(limits));
        return command;
    }
    let mut command = redis::cmd("XADD");
    command.arg(key).arg("MAXLEN").arg(limits.frames_max).arg("*");
    if is_hole {
        // A position is the id of an ordered frame.
        command.arg("k").arg(HOLE).arg("i").arg(if is_edit { "" } else { &*id });
    } else {
        command.arg("k").arg(frame.kind().as_str()).arg("i").arg(id).arg("j").arg(frame.json());
    }
    command
}

/// The commands that read all that is kept. Each names its key, so that a cluster knows where they go.
pub(crate) fn read(key: &str, limits: &RecoveryLimits) -> [Cmd; READ_COMMANDS] {
    let (mut time, mut range) = (redis::cmd("EVAL"), redis::cmd("XRANGE"));
    time.arg("return redis.call('TIME')").arg(1).arg(key);
    range.arg(key).arg("-").arg("+").arg("COUNT").arg(limits.frames_max);
    [time, range]
}

/// What a read answered; None if it is not what was expected.
pub(crate) fn frames(answers: &[Value]) -> Kept {
    let [time, entries] = answers else { return None };
    let Value::Array(time) = time else { return None };
    let now = Duration::from_secs(number(time.first()?)?);
    let Value::Array(entries) = entries else { return None };
    entries.iter().map(|entry| kept(entry, now)).collect()
}

fn number(value: &Value) -> Option<u64> {
    text(value)?.parse().ok()
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

fn kept(entry: &Value, now: Duration) -> Option<KeptFrame> {
    let Value::Array(entry) = entry else { return None };
    let [id, Value::Array(fields)] = &entry[..] else { return None };
    let written = Duration::from_millis(text(id)?.split_once('-')?.0.parse().ok()?);
    let field = |name: &str| {
        let mut pairs = fields.chunks_exact(2).filter(|pair| text(&pair[0]) == Some(name));
        pairs.next().and_then(|pair| text(&pair[1]))
    };
    let id = MessageId::parse(field("i")?).ok();
    let kind = field("k")?;
    if kind == HOLE {
        return Some(KeptFrame::Hole { id });
    }
    let kind = Kind::ALL.into_iter().find(|known| wants(*known) && known.as_str() == kind)?;
    let json = field("j")?;
    if json.is_empty() || json.bytes().any(|byte| byte < b' ') {
        return None;
    }
    let frame = Frame::relay(kind, Some(id?), None, json);
    Some(KeptFrame::Frame { frame, age: now.saturating_sub(written) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn entry(id: &str, fields: &[&str]) -> Value {
        Value::Array(vec![bulk(id), Value::Array(fields.iter().map(|field| bulk(field)).collect())])
    }

    fn read(entries: Vec<Value>) -> Option<Vec<String>> {
        let time = Value::Array(vec![bulk("100"), bulk("0")]);
        let shown = |kept: KeptFrame| match kept {
            KeptFrame::Frame { frame, age } => format!("{} {}s", frame.kind().as_str(), age.as_secs()),
            KeptFrame::Hole { id } => format!("hole {}", id.is_some()),
        };
        Some(frames(&[time, Value::Array(entries)])?.into_iter().map(shown).collect())
    }

    #[test]
    fn entries_are_read_whole_or_nothing_is_known() {
        const ID: &str = "00000000-0000-4000-8000-000000000001";
        let good = || {
            vec![
                entry("90000-0", &["k", "message", "i", ID, "j", "{}"]),
                entry("95000-1", &["k", "edit", "i", ID, "j", "{}"]),
                entry("99000-0", &["k", "hole", "i", ID]),
                entry("99000-1", &["k", "hole", "i", ""]),
            ]
        };
        assert_eq!(read(good()).unwrap(), ["message 10s", "edit 5s", "hole true", "hole false"]);
        for bad in [
            entry("x", &["k", "message", "i", ID, "j", "{}"]),
            entry("1-0", &["k", "typing", "i", ID, "j", "{}"]),
            entry("1-0", &["k", "message", "i", "x", "j", "{}"]),
            entry("1-0", &["k", "message", "i", ID]),
            entry("1-0", &["k", "message", "i", ID, "j", "{\n}"]),
            Value::Nil,
        ] {
            assert_eq!(read([good(), vec![bad]].concat()), None);
        }
        assert!(frames(&[Value::Nil, Value::Array(Vec::new())]).is_none());
    }

    #[test]
    fn what_is_too_large_leaves_a_mark() {
        use crate::proto::event::{Event, Timestamp};
        let limits = RecoveryLimits { bytes_max: 200, ..RecoveryLimits::default() };
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        let sent = |event: &Event<'_>| {
            let packed = write("key", &Frame::encode(event), &limits).get_packed_command();
            String::from_utf8_lossy(&packed).into_owned()
        };
        let message = |text| Event::Message { id, text, sender: "s", reply_to: None, timestamp };
        let long = "x".repeat(200);
        assert!(sent(&message("short")).contains("short"));
        let hole = sent(&message(&long));
        assert!(hole.contains(HOLE) && hole.contains(&id.to_string()) && !hole.contains("xxx"));
        let hole = sent(&Event::Edit { id, text: &long, timestamp });
        assert!(hole.contains(HOLE) && !hole.contains(&id.to_string()));
    }
}
