//! Ids: parsed once at the edge, types from there on.
//!
//! A channel id names where a frame goes: `webchat:{user}` (or a bare user id), `sse:{request}`, `room:{name}`.
//! What stands after the first colon is opaque, and is never again looked at as text with a meaning.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

/// The most bytes that a channel id, user id, room name or request id may have (UTF-8).
pub const ID_BYTES_MAX: usize = 256;

/// Why an id was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// Nothing there, or nothing after the prefix.
    #[error("the id is empty")]
    Empty,
    /// More than [`ID_BYTES_MAX`] bytes.
    #[error("the id has {bytes} bytes; at most {ID_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A control character (Unicode category Cc) somewhere in it.
    #[error("the id has a control character")]
    Control,
    /// A message id that is not a UUID of 36 characters.
    #[error("a message id is a UUID of 36 characters")]
    NotUuid,
}

fn check(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        Err(IdError::Empty)
    } else if text.len() > ID_BYTES_MAX {
        Err(IdError::TooLong { bytes: text.len() })
    } else if text.chars().any(char::is_control) {
        Err(IdError::Control)
    } else {
        Ok(())
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `text` and takes a copy.
            ///
            /// # Errors
            /// Empty, longer than [`ID_BYTES_MAX`] bytes, or with a control character.
            pub fn parse(text: &str) -> Result<Self, IdError> {
                check(text).map(|()| Self(Arc::from(text)))
            }

            /// The id as it was given.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The shared text, for those who keep it beside other shared texts.
            #[must_use]
            pub fn shared(&self) -> Arc<str> {
                Arc::clone(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id! {
    /// A user: the owner of any number of tabs. Clones share one text.
    UserId
}
text_id! {
    /// A room: the tabs that joined it.
    RoomName
}
text_id! {
    /// A request whose answer is a stream.
    RequestId
}

impl UserId {
    /// An id that no user has: it is empty.
    pub(crate) fn nobody() -> Self {
        Self(Arc::from(""))
    }
}

impl RoomName {
    /// What those who watch something are found by: nobody parses it, and no room of that name is meant.
    pub(crate) fn of_watchers(watched: &str) -> Self {
        Self(Arc::from(watched))
    }
}

impl RequestId {
    /// A fresh id of 128 random bits in hexadecimal: nobody guesses another's.
    #[must_use]
    pub fn random() -> Self {
        Self::random_with_prefix("")
    }

    /// The same behind a prefix, which is to be short and without control characters.
    #[must_use]
    pub fn random_with_prefix(prefix: &str) -> Self {
        // A version 4 UUID has six bits that are not random, all of them in its third and fourth part.
        let [first, second] = [Uuid::new_v4(), Uuid::new_v4()].map(|uuid| uuid.as_u128());
        let bits = first ^ second.rotate_left(64);
        Self(Arc::from(format!("{prefix}{bits:032x}")))
    }
}

/// Where a frame goes.
///
/// ```
/// use tabcast::id::ChannelId;
/// assert_eq!(ChannelId::parse("alice")?, ChannelId::parse("webchat:alice")?);
/// assert_eq!(ChannelId::parse("sse:a:b")?.key(), "a:b");
/// // A known prefix is only ever a prefix.
/// assert_eq!(ChannelId::parse("xwebchat:u")?.key(), "xwebchat:u");
/// # Ok::<(), tabcast::id::IdError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ChannelId {
    /// `webchat:{user}`, or a bare user id: every tab of that user.
    User(UserId),
    /// `sse:{request}`: the stream of that request.
    Stream(RequestId),
    /// `room:{name}`: every tab that joined.
    Room(RoomName),
}

impl ChannelId {
    /// Splits at the first colon if what stands before it is a known prefix; anything else is a user id.
    ///
    /// # Errors
    /// The id, which is what stands after the prefix, is empty, over [`ID_BYTES_MAX`] bytes, or has a control character.
    /// So whatever has an id has a channel id.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        Ok(match text.split_once(':') {
            Some(("webchat", user)) => Self::User(UserId::parse(user)?),
            Some(("sse", request)) => Self::Stream(RequestId::parse(request)?),
            Some(("room", name)) => Self::Room(RoomName::parse(name)?),
            _ => Self::User(UserId::parse(text)?),
        })
    }

    /// What stands after the prefix.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::User(id) => id.as_str(),
            Self::Stream(id) => id.as_str(),
            Self::Room(id) => id.as_str(),
        }
    }
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self {
            Self::User(_) => "webchat",
            Self::Stream(_) => "sse",
            Self::Room(_) => "room",
        };
        write!(f, "{prefix}:{}", self.key())
    }
}

/// A message: a UUID, written as 36 lower-case characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(Uuid);

impl MessageId {
    /// A fresh random one (version 4).
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// A fresh one (version 4) whose first 32 bits are `tag`: a mark of whoever made it. 90 bits are random.
    #[must_use]
    pub fn random_with_tag(tag: u32) -> Self {
        let mut bytes = *Uuid::new_v4().as_bytes();
        bytes[..4].copy_from_slice(&tag.to_be_bytes());
        Self(Uuid::from_bytes(bytes))
    }

    /// The first 32 bits: what [`random_with_tag`](Self::random_with_tag) was given.
    #[must_use]
    pub fn tag(&self) -> u32 {
        let [a, b, c, d, ..] = *self.0.as_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    /// One of the given bits, in the place of random ones (version 4): the same bits are the same id.
    #[must_use]
    pub fn from_bits(bits: [u8; 16]) -> Self {
        Self(uuid::Builder::from_random_bytes(bits).into_uuid())
    }

    /// Reads the hyphenated form of 36 characters, in either case.
    ///
    /// # Errors
    /// [`IdError::NotUuid`] for anything else.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        if text.len() != 36 {
            return Err(IdError::NotUuid);
        }
        Uuid::try_parse(text).map(Self).map_err(|_| IdError::NotUuid)
    }

    /// Writes the 36 characters into `buffer` and returns them.
    pub fn encode<'b>(&self, buffer: &'b mut [u8; 36]) -> &'b str {
        self.0.as_hyphenated().encode_lower(buffer)
    }

    /// The id whose number it is.
    #[must_use]
    pub const fn from_u128(number: u128) -> Self {
        Self(Uuid::from_u128(number))
    }

    /// The id as a number: what latest-by-key frames are compared by.
    #[must_use]
    pub fn as_u128(&self) -> u128 {
        self.0.as_u128()
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.encode(&mut [0; 36]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_ids_split_at_the_first_colon_and_only_after_a_known_prefix() {
        let check = |text: &str, expected: &str| {
            assert_eq!(ChannelId::parse(text).map(|c| c.to_string()), Ok(expected.to_owned()), "{text}");
        };
        check("webchat:u", "webchat:u");
        check("alice", "webchat:alice");
        check("sse:a:b", "sse:a:b");
        check("room:r", "room:r");
        check("xwebchat:u", "webchat:xwebchat:u");
        check("webchat:webchat:u", "webchat:webchat:u");
        check("WEBCHAT:u", "webchat:WEBCHAT:u");
        check("discord:1", "webchat:discord:1");
        check("日本", "webchat:日本");
    }

    #[test]
    fn bad_ids_are_refused_with_the_reason() {
        let check = |text: &str, expected: IdError| assert_eq!(ChannelId::parse(text), Err(expected), "{text:?}");
        check("", IdError::Empty);
        check("webchat:", IdError::Empty);
        check("sse:", IdError::Empty);
        check("room:", IdError::Empty);
        check(&"a".repeat(257), IdError::TooLong { bytes: 257 });
        // The prefix is not part of the id: every user and room has a channel.
        for prefix in ["", "webchat:", "sse:", "room:"] {
            let longest = format!("{prefix}{}", "a".repeat(256));
            assert_eq!(ChannelId::parse(&longest).map(|channel| channel.key().len()), Ok(256), "{prefix}");
            assert_eq!(ChannelId::parse(&format!("{longest}a")), Err(IdError::TooLong { bytes: 257 }), "{prefix}");
        }
        check("a\r\nPUBLISH", IdError::Control);
        check("a\0", IdError::Control);
        check("a\u{85}", IdError::Control);
        assert_eq!(MessageId::parse("not-a-uuid"), Err(IdError::NotUuid));
        assert_eq!(MessageId::parse("6c84fb90-12c4-11e1-840d-7b25c5ee775"), Err(IdError::NotUuid));
    }

    #[test]
    fn message_ids_are_36_lower_case_characters() {
        let id = MessageId::random().to_string();
        assert_eq!(id.len(), 36);
        assert_eq!(id, id.to_lowercase());
        assert_eq!(MessageId::parse(&id.to_uppercase()).map(|i| i.to_string()), Ok(id));
        assert_ne!(MessageId::random(), MessageId::random());
    }

    #[test]
    fn every_bit_of_a_request_id_is_random() {
        let bits = || u128::from_str_radix(RequestId::random().as_str(), 16).unwrap();
        let (ones, zeros) = (0..64).map(|_| bits()).fold((0, 0), |(ones, zeros), bits| (ones | bits, zeros | !bits));
        assert_eq!((ones, zeros), (u128::MAX, u128::MAX));
        assert_eq!(RequestId::random_with_prefix("x-").as_str().len(), 34);
    }
}
