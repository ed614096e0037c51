//! What an application publishes, before it has a form on any wire.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC};

use crate::id::MessageId;

/// What is percent-encoded in a filename: all but RFC 3986's unreserved characters, so that it is one path segment,
/// whatever is in it.
pub(crate) const FILENAME_SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The most buttons that one message may carry.
pub const BUTTONS_MAX: usize = 25;
/// The most characters (Unicode scalar values) of a button's label.
pub const LABEL_CHARS_MAX: usize = 80;
/// The most characters (Unicode scalar values) of a button's custom id.
pub const CUSTOM_ID_CHARS_MAX: usize = 100;

/// A point in time as frames carry it: Unix time in microseconds, written as a JSON float of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(u64);

impl Timestamp {
    /// From microseconds since the Unix epoch.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since the Unix epoch.
    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Seconds since the Unix epoch.
    #[must_use]
    pub fn as_seconds(self) -> f64 {
        Duration::from_micros(self.0).as_secs_f64()
    }
}

impl From<SystemTime> for Timestamp {
    /// A time before the epoch becomes the epoch.
    fn from(time: SystemTime) -> Self {
        let micros = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self(u64::try_from(micros).unwrap_or(u64::MAX))
    }
}

/// How a button looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ButtonStyle {
    /// The main action.
    Primary,
    /// A lesser action.
    Secondary,
    /// Agreement.
    Success,
    /// Something that cannot be undone.
    Danger,
    /// Opens `url`.
    Link,
    /// A paid action.
    Premium,
}

impl ButtonStyle {
    /// Its name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
            Self::Success => "success",
            Self::Danger => "danger",
            Self::Link => "link",
            Self::Premium => "premium",
        }
    }
}

/// One button. Absent options are absent in the JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Button {
    /// What a person reads, at most [`LABEL_CHARS_MAX`] characters.
    pub label: String,
    /// What comes back when it is pressed, at most [`CUSTOM_ID_CHARS_MAX`] characters.
    pub custom_id: String,
    /// Shown before the label.
    pub emoji: Option<String>,
    /// Its look.
    pub style: Option<ButtonStyle>,
    /// Where a link button leads.
    pub url: Option<String>,
    /// Shown, but cannot be pressed.
    pub disabled: Option<bool>,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The answer is complete.
    Stop,
    /// The worker failed.
    Error,
    /// The worker took too long.
    Timeout,
    /// The reader or the worker gave up.
    Cancelled,
}

impl EndReason {
    /// Its name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
        }
    }

    /// Reads the name on the wire.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Stop, Self::Error, Self::Timeout, Self::Cancelled].into_iter().find(|reason| reason.as_str() == text)
    }
}

/// What an application publishes. It borrows: encoding is immediate, and copies what it needs once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// `{"type":"message", id, text, sender, reply_to?, timestamp}`
    Message {
        /// The new message's id.
        id: MessageId,
        /// Sent as is: no trimming, no HTML escaping.
        text: &'a str,
        /// A user id.
        sender: &'a str,
        /// The message that this one answers.
        reply_to: Option<MessageId>,
        /// When it was sent.
        timestamp: Timestamp,
    },
    /// `{"type":"message", id, text, sender, reply_to?, buttons, timestamp}`, `buttons` always present.
    Buttons {
        /// The new message's id.
        id: MessageId,
        /// As in a message.
        text: &'a str,
        /// A user id.
        sender: &'a str,
        /// The message that this one answers.
        reply_to: Option<MessageId>,
        /// At most [`BUTTONS_MAX`].
        buttons: &'a [Button],
        /// When it was sent.
        timestamp: Timestamp,
    },
    /// `{"type":"file", id, filename, mimetype, data, size, timestamp}`
    File {
        /// The new file's id.
        id: MessageId,
        /// Verbatim.
        filename: &'a str,
        /// `application/octet-stream` if the sender named none.
        mimetype: &'a str,
        /// The raw bytes; the frame carries padded standard base64.
        data: &'a [u8],
        /// When it was sent.
        timestamp: Timestamp,
    },
    /// `{"type":"edit", id, text, timestamp}`: the whole new text of an earlier message.
    Edit {
        /// The edited message.
        id: MessageId,
        /// Its whole new text.
        text: &'a str,
        /// When it was edited.
        timestamp: Timestamp,
    },
    /// `{"type":"typing", active}`
    Typing {
        /// Whether the bot is typing now.
        active: bool,
    },
    /// `{"type":"end", reason}`: the last frame of a stream.
    End {
        /// Why it ended.
        reason: EndReason,
    },
}

/// What tabcast itself tells a client. All of them are optional for a client: it ignores types that it does not know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Notice<'a> {
    /// `{"type":"hello", session, server_time, limits:{message_bytes_max, attachment_bytes_max}}`, for a tab that asked.
    Hello {
        /// The session's id, unique in this process.
        session: u64,
        /// The server's clock.
        server_time: Timestamp,
        /// The most bytes of one inbound WebSocket message.
        message_bytes_max: usize,
        /// The most bytes of one attachment, decoded.
        attachment_bytes_max: usize,
    },
    /// `{"type":"ack", client_id, id?}`: what carried `client_id` was accepted; `id` where a message came of it.
    Ack {
        /// The client's own id for what it sent.
        client_id: &'a str,
        /// The id that the message got.
        id: Option<MessageId>,
    },
    /// `{"type":"error", code, message, client_id?}`
    Error {
        /// One of a closed list.
        code: ErrorCode,
        /// For a person.
        message: &'a str,
        /// The client's own id for what was refused.
        client_id: Option<&'a str>,
    },
    /// `{"type":"pong", client_id?}`: the answer to `{"type":"ping"}`.
    Pong {
        /// The client's own id for its ping.
        client_id: Option<&'a str>,
    },
    /// `{"type":"gap", reason, count?}`: frames were lost to this tab.
    Gap {
        /// One of a closed list.
        reason: GapReason,
        /// How many, where that is known.
        count: Option<u64>,
    },
    /// `{"type":"draining", retry_after_ms}`: the connection will end; come back after that many milliseconds.
    Draining {
        /// Milliseconds, different for each connection.
        retry_after_ms: u64,
    },
}

/// A closed list of words on the wire.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$word_doc:meta])* $word:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$word_doc])* $word,)+
        }

        impl $name {
            /// Every one of them.
            pub const ALL: &'static [Self] = &[$(Self::$word),+];

            /// Its name on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                }
            }
        }
    };
}

words! {
    /// Why something from a browser was refused: the codes of `error` frames.
    ErrorCode {
        /// Not JSON, or not an object with a known `type`.
        BadFrame = "bad_frame",
        /// A field is missing, has the wrong type or a value that is not allowed.
        BadField = "bad_field",
        /// A text, an attachment or an id is longer than allowed.
        TooLarge = "too_large",
        /// The token does not allow this (for example the room).
        Forbidden = "forbidden",
        /// More of something than one tab may have (for example rooms).
        LimitReached = "limit_reached",
        /// More than one tab may send in the time: nothing was accepted, try again more slowly.
        RateLimited = "rate_limited",
        /// The worker's queue is full: nothing was accepted, try again later.
        Overloaded = "overloaded",
        /// The gateway is shutting down: nothing was accepted.
        Draining = "draining",
    }
}

words! {
    /// Why frames were lost to a tab.
    GapReason {
        /// The position that the client named is not in the buffer.
        UnknownPosition = "unknown_position",
        /// Frames to a room are not kept.
        RoomNotKept = "room_not_kept",
        /// Another node's frames were lost on their way to this one, and perhaps frames to this tab's user among them.
        LostBetweenNodes = "lost_between_nodes",
    }
}
