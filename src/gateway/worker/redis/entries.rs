//! Entries of a stream, as Redis tells of them.

use std::fmt;

use redis::Value;
use sha2::{Digest, Sha256};

use crate::id::MessageId;

/// The id of an entry: when it was appended, and which it was of that millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct EntryId {
    millis: u64,
    sequence: u64,
}

impl EntryId {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (millis, sequence) = text.split_once('-')?;
        Some(Self { millis: millis.parse().ok()?, sequence: sequence.parse().ok()? })
    }

    /// The id of the message that this entry of `stream` becomes: the same whenever and wherever that is.
    pub(super) fn message_id(self, stream: &str) -> MessageId {
        let mut digest = Sha256::new();
        digest.update(stream.as_bytes());
        digest.update(self.millis.to_le_bytes());
        digest.update(self.sequence.to_le_bytes());
        let mut bits = [0; 16];
        bits.copy_from_slice(&digest.finalize()[..16]);
        MessageId::from_bits(bits)
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.millis, self.sequence)
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: EntryId,
    /// Its field `e`.
    pub(super) envelope: Option<Vec<u8>>,
}

/// The answer of XREADGROUP for one stream; without entries it is nil.
pub(super) fn of_read(answer: Value) -> Vec<Entry> {
    let streams = match answer {
        Value::Array(streams) => streams.into_iter().next().and_then(|stream| match stream {
            Value::Array(mut pair) => pair.pop(),
            _ => None,
        }),
        // So in RESP3, which a URL may ask for.
        Value::Map(streams) => streams.into_iter().next().map(|(_, entries)| entries),
        _ => None,
    };
    streams.map(list).unwrap_or_default()
}

/// The answer of XAUTOCLAIM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claimed {
    /// Where to go on; nothing when all was claimed.
    pub(super) next: Option<EntryId>,
    pub(super) entries: Vec<Entry>,
    /// Entries that were pending and are not in the stream any more: it was cut.
    pub(super) gone: usize,
}

/// `None` for what is no such answer.
pub(super) fn of_claim(answer: Value) -> Option<Claimed> {
    let Value::Array(parts) = answer else { return None };
    let mut parts = parts.into_iter();
    let next = text(&parts.next()?).and_then(EntryId::parse)?;
    let entries = list(parts.next()?);
    let gone = match parts.next() {
        Some(Value::Array(ids)) => ids.len(),
        _ => 0,
    };
    Some(Claimed { next: (next != EntryId { millis: 0, sequence: 0 }).then_some(next), entries, gone })
}

/// Whether the summary of XPENDING has entries of any consumer but `ours`.
pub(super) fn has_strays(answer: &Value, ours: &str) -> bool {
    let Value::Array(parts) = answer else { return false };
    let Some(Value::Array(consumers)) = parts.get(3) else { return false };
    consumers.iter().any(|consumer| match consumer {
        Value::Array(pair) => pair.first().and_then(text) != Some(ours),
        _ => false,
    })
}

fn list(entries: Value) -> Vec<Entry> {
    match entries {
        Value::Array(entries) => entries.into_iter().filter_map(entry).collect(),
        _ => Vec::new(),
    }
}

fn entry(value: Value) -> Option<Entry> {
    let Value::Array(parts) = value else { return None };
    let mut parts = parts.into_iter();
    let id = text(&parts.next()?).and_then(EntryId::parse)?;
    let mut fields = match parts.next() {
        Some(Value::Array(fields)) => fields.into_iter(),
        // It is not in the stream any more.
        _ => return None,
    };
    let mut envelope = None;
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        if let (Value::BulkString(name), Value::BulkString(value)) = (name, value)
            && name == b"e"
        {
            envelope = Some(value);
        }
    }
    Some(Entry { id, envelope })
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn array(items: impl IntoIterator<Item = Value>) -> Value {
        Value::Array(items.into_iter().collect())
    }

    fn one(id: &str, fields: &[&str]) -> Value {
        array([bulk(id), array(fields.iter().map(|field| bulk(field)))])
    }

    #[test]
    fn answers_are_read() {
        let id = |text: &str| EntryId::parse(text).unwrap();
        let entries = || array([one("5-0", &["x", "1", "e", "{}"]), one("5-1", &["x", "1"])]);
        let expected =
            [Entry { id: id("5-0"), envelope: Some(b"{}".to_vec()) }, Entry { id: id("5-1"), envelope: None }];
        assert_eq!(of_read(array([array([bulk("s"), entries()])])), expected);
        assert_eq!(of_read(Value::Map(vec![(bulk("s"), entries())])), expected);
        assert_eq!(of_read(Value::Nil), []);
        assert_eq!(of_read(Value::Okay), []);
        let claimed = of_claim(array([bulk("0-0"), entries(), array([bulk("1-1")])])).unwrap();
        assert_eq!((claimed.next, claimed.entries, claimed.gone), (None, expected.to_vec(), 1));
        // Older servers: no third part, and nothing in the place of what was cut.
        let claimed = of_claim(array([bulk("7-1"), array([Value::Nil, one("7-0", &["e", ""])])])).unwrap();
        assert_eq!((claimed.next, claimed.entries.len(), claimed.gone), (Some(id("7-1")), 1, 0));
        assert_eq!(of_claim(Value::Nil), None);
    }

    #[test]
    fn what_others_have_is_found_in_the_summary() {
        let pending = |consumers| array([Value::Int(1), bulk("1-1"), bulk("1-1"), consumers]);
        let pair = |name| array([bulk(name), bulk("3")]);
        assert!(!has_strays(&pending(Value::Nil), "a"));
        assert!(!has_strays(&pending(array([pair("a")])), "a"));
        assert!(has_strays(&pending(array([pair("a"), pair("b")])), "a"));
        assert!(has_strays(&pending(array([pair("a:1")])), "a"));
        assert!(!has_strays(&Value::Nil, "a"));
    }

    #[test]
    fn an_entry_has_one_message_id_on_every_node() {
        let id = |stream: &str, entry: &str| EntryId::parse(entry).unwrap().message_id(stream).to_string();
        assert_eq!(id("s", "5-1"), id("s", "5-1"));
        let ids: std::collections::HashSet<_> = [("s", "5-1"), ("s", "5-2"), ("s", "6-1"), ("t", "5-1")]
            .iter()
            .map(|(stream, at)| id(stream, at))
            .collect();
        assert_eq!(ids.len(), 4);
        assert!(ids.iter().all(|id| id.as_bytes()[14] == b'4' && matches!(id.as_bytes()[19], b'8'..=b'b')));
        for text in ["", "5", "5-", "-5", "5-x", "18446744073709551616-0"] {
            assert_eq!(EntryId::parse(text), None, "{text}");
        }
        assert_eq!(EntryId::parse("5-7").unwrap().to_string(), "5-7");
    }
}
