//! An id is refused, or is split as documented and survives being written and read again.

use tabcast::id::{ChannelId, ID_BYTES_MAX, IdError, MessageId};

/// The bytes are a channel id, and a message id.
pub(crate) fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    channel(&text);
    if let Ok(id) = MessageId::parse(&text) {
        assert_eq!(id.to_string(), text.to_lowercase());
        assert_eq!(MessageId::parse(&id.to_string()), Ok(id));
    }
}

fn channel(text: &str) {
    match ChannelId::parse(text) {
        Ok(channel) => {
            let key = channel.key();
            assert!((1..=ID_BYTES_MAX).contains(&key.len()) && !text.chars().any(char::is_control));
            let expected = match &channel {
                ChannelId::User(_) => text.strip_prefix("webchat:").unwrap_or(text),
                ChannelId::Stream(_) => text.strip_prefix("sse:").expect("a stream has its prefix"),
                ChannelId::Room(_) => text.strip_prefix("room:").expect("a room has its prefix"),
            };
            assert_eq!(key, expected);
            assert_eq!(ChannelId::parse(&channel.to_string()), Ok(channel));
        }
        Err(IdError::Empty) => assert!(["", "webchat:", "sse:", "room:"].contains(&text)),
        Err(IdError::TooLong { bytes }) => assert!(text.len() >= bytes && bytes > ID_BYTES_MAX),
        Err(IdError::Control) => assert!(text.chars().any(char::is_control)),
        Err(other) => panic!("{other} for {text:?}"),
    }
}
