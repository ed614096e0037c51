//! Whatever a worker writes on its stream is a call of the adapter within its limits, or is refused with a reason.

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
