//! What a frame is, and so what happens to it when a queue is full.

/// What happens to a frame when its session's queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Never dropped; if even that does not fit, the session is cut.
    Control,
    /// Never silently dropped: a session that is too slow for it is cut, and can resume.
    Ordered,
    /// The newest replaces a queued one of the same [`Kind`] and [`Frame::key`](super::Frame::key), in the queued one's place.
    Latest,
}

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $kind:ident $class:ident $name:literal,)*) => {
        /// What a frame is: a closed list, for queues and metrics.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[doc = $doc])* $kind,)*
        }

        impl Kind {
            /// Every one of them, for tables and metrics.
            pub const ALL: [Self; [$(Self::$kind),*].len()] = [$(Self::$kind),*];

            /// Its name in metrics: a frame's JSON `type` where it has one.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// What happens to it when a queue is full.
            #[must_use]
            pub const fn class(self) -> Class {
                match self {
                    $(Self::$kind => Class::$class,)*
                }
            }
        }
    };
}

kinds! {
    /// A text message.
    Message Ordered "message",
    /// A text message with buttons.
    Buttons Ordered "buttons",
    /// A file.
    File Ordered "file",
    /// The new text of an earlier message.
    Edit Latest "edit",
    /// Whether the bot is typing.
    Typing Latest "typing",
    /// The last frame of a stream.
    End Ordered "end",
    /// What a tab that asked for it hears first.
    Hello Control "hello",
    /// Something from the client was accepted.
    Ack Ordered "ack",
    /// Something from the client was refused.
    Error Ordered "error",
    /// The answer to a client's JSON ping.
    Pong Control "pong",
    /// Frames were lost to this tab.
    Gap Control "gap",
    /// The connection will end soon.
    Draining Control "draining",
    /// How a node is, for whoever watches it.
    Status Control "status",
    /// A text of an embedder's own, as it is.
    Text Ordered "websocket_text",
    /// Bytes of an embedder's own.
    Binary Ordered "websocket_binary",
    /// WebSocket ping: the heartbeat.
    PingFrame Control "websocket_ping",
    /// WebSocket pong: the answer to a client's.
    PongFrame Control "websocket_pong",
    /// WebSocket close.
    CloseFrame Control "websocket_close",
}

impl Kind {
    /// Whether it carries JSON: all but WebSocket's own control frames, and an embedder's own messages.
    #[must_use]
    pub const fn has_json(self) -> bool {
        self.is_message() && !matches!(self, Self::Text | Self::Binary)
    }

    /// Whether it is a message on a WebSocket: all but its control frames.
    #[must_use]
    pub const fn is_message(self) -> bool {
        !matches!(self, Self::PingFrame | Self::PongFrame | Self::CloseFrame)
    }

    /// First byte of the WebSocket form: the last frame of its message, and its opcode.
    pub(super) const fn first_byte(self) -> u8 {
        match self {
            Self::Binary => 0x82,
            Self::PingFrame => 0x89,
            Self::PongFrame => 0x8a,
            Self::CloseFrame => 0x88,
            _ => 0x81,
        }
    }

    /// Whether an event stream names its id as the reader's position.
    pub(super) const fn has_position(self) -> bool {
        matches!(self, Self::Message | Self::Buttons | Self::File)
    }
}
