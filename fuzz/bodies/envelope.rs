//! Whatever a worker writes on its stream is a call of the adapter within its limits, or is refused with a reason.

use serde::Deserialize;
use serde_json::value::RawValue;
use tabcast::gateway::worker::redis::envelope::{MESSAGE_KEY_BYTES_MAX, Malformed, decode};
use tabcast::id::{ChannelId, ID_BYTES_MAX};

/// The bytes are one envelope.
pub(crate) fn run(bytes: &[u8]) {
    let first = decode(bytes, 4096);
    assert_eq!(first, decode(bytes, 4096));
    let is_json = bytes.trim_ascii_start().first() == Some(&b'{');
    match first {
        Ok(outbound) => {
            assert!(bytes.len() <= 4096);
            assert!(outbound.message_key().is_none_or(|key| (1..=MESSAGE_KEY_BYTES_MAX).contains(&key.len())));
            assert!(outbound.trace_id().is_none_or(|id| id.len() <= bytes.len()));
            let channel = outbound.channel();
            assert!(channel.key().len() <= ID_BYTES_MAX);
            assert_eq!(ChannelId::parse(&channel.to_string()).as_ref(), Ok(channel));
            if is_json {
                let read: Reference<'_> = serde_json::from_slice(bytes).expect("an object, no key of ours twice");
                assert_eq!(text(read.channel_id).as_deref().map(ChannelId::parse), Some(Ok(channel.clone())));
                assert_eq!(text(read.message_key).as_deref(), outbound.message_key());
                assert_eq!(text(read.trace_id).as_deref(), outbound.trace_id());
                let kinds = ["message", "buttons", "file", "edit", "typing", "end"];
                assert!(kinds.contains(&text(read.kind).as_deref().expect("a type")));
                assert!(text(read.platform).is_none_or(|platform| platform == "webchat"));
            }
            // What surrounds JSON changes nothing; what follows MessagePack does.
            let longer = [bytes, b" "].concat();
            assert_eq!(decode(&longer, 4097).is_ok(), is_json);
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            match error {
                Malformed::TooLarge { bytes: size, .. } => assert_eq!((size, size > 4096), (bytes.len(), true)),
                Malformed::NotJson { .. } => assert!(is_json),
                Malformed::NotMessagePack { .. } => assert!(!is_json),
                _ => {}
            }
        }
    }
}

/// What `serde_json` reads: each of these fields as it is written, and at most once.
#[derive(Deserialize)]
struct Reference<'a> {
    #[serde(borrow)]
    channel_id: Option<&'a RawValue>,
    #[serde(rename = "type")]
    kind: Option<&'a RawValue>,
    platform: Option<&'a RawValue>,
    message_key: Option<&'a RawValue>,
    trace_id: Option<&'a RawValue>,
}

/// A text, `null` or not there.
fn text(field: Option<&RawValue>) -> Option<String> {
    field.and_then(|text| serde_json::from_str::<Option<String>>(text.get()).expect("a field of its type"))
}
