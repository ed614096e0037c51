//! Why a session ends: a closed list, each with its close code (RFC 6455 §7.4) and whether coming back makes sense.

/// Why a session ends. An ending is protocol, not an error string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Disconnect {
    /// The peer closed, or asked to (1000).
    Normal,
    /// The connection broke, or its other end went away, without a close frame (nothing can be sent any more).
    ConnectionLost,
    /// The peer broke RFC 6455 (1002).
    ProtocolError,
    /// A binary message, which this endpoint does not take (1003).
    UnsupportedData,
    /// A text message that is not UTF-8 (1007).
    InvalidPayload,
    /// Too many bad frames (1008).
    PolicyViolation,
    /// A message over the limit (1009).
    MessageTooBig,
    /// A fault of ours (1011).
    InternalError,
    /// This node shuts down (1012).
    ServiceRestart,
    /// The process is over its byte budget and this session's queue was among the fattest (1013).
    OverBudget,
    /// The token expired (4001).
    TokenExpired,
    /// The session's queue was full and its next frame may not be dropped (4008).
    SlowConsumer,
    /// No sign of life within the heartbeat's deadline (4009).
    HeartbeatTimeout,
    /// An operator ended the user's sessions (4010).
    Kicked,
}

impl Disconnect {
    /// Every one of them, for tables and metrics.
    pub const ALL: [Self; 14] = [
        Self::Normal,
        Self::ConnectionLost,
        Self::ProtocolError,
        Self::UnsupportedData,
        Self::InvalidPayload,
        Self::PolicyViolation,
        Self::MessageTooBig,
        Self::InternalError,
        Self::ServiceRestart,
        Self::OverBudget,
        Self::TokenExpired,
        Self::SlowConsumer,
        Self::HeartbeatTimeout,
        Self::Kicked,
    ];

    /// The code of the close frame; 1006 stands for "no frame was sent" and never goes onto the wire.
    #[must_use]
    pub const fn close_code(self) -> u16 {
        match self {
            Self::Normal => 1000,
            Self::ConnectionLost => 1006,
            Self::ProtocolError => 1002,
            Self::UnsupportedData => 1003,
            Self::InvalidPayload => 1007,
            Self::PolicyViolation => 1008,
            Self::MessageTooBig => 1009,
            Self::InternalError => 1011,
            Self::ServiceRestart => 1012,
            Self::OverBudget => 1013,
            Self::TokenExpired => 4001,
            Self::SlowConsumer => 4008,
            Self::HeartbeatTimeout => 4009,
            Self::Kicked => 4010,
        }
    }

    /// The reason in the close frame, and its name in metrics with spaces as underscores. At most 123 bytes.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::ConnectionLost => "connection lost",
            Self::ProtocolError => "protocol error",
            Self::UnsupportedData => "unsupported data",
            Self::InvalidPayload => "invalid payload",
            Self::PolicyViolation => "policy violation",
            Self::MessageTooBig => "message too big",
            Self::InternalError => "internal error",
            Self::ServiceRestart => "service restart",
            Self::OverBudget => "over budget",
            Self::TokenExpired => "token expired",
            Self::SlowConsumer => "slow consumer",
            Self::HeartbeatTimeout => "heartbeat timeout",
            Self::Kicked => "kicked",
        }
    }

    /// Whether a client should connect again by itself (after a backoff, with a fresh token after [`Self::TokenExpired`]).
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        !matches!(
            self,
            Self::Normal
                | Self::ProtocolError
                | Self::UnsupportedData
                | Self::InvalidPayload
                | Self::PolicyViolation
                | Self::MessageTooBig
                | Self::Kicked
        )
    }

    /// Whether a close frame can still be written: not when the connection itself is gone.
    #[must_use]
    pub const fn has_close_frame(self) -> bool {
        !matches!(self, Self::ConnectionLost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ending_has_its_own_code_and_a_reason_that_fits_a_close_frame() {
        let codes: std::collections::HashSet<u16> = Disconnect::ALL.iter().map(|d| d.close_code()).collect();
        assert_eq!(codes.len(), Disconnect::ALL.len());
        for ending in Disconnect::ALL {
            assert!(ending.reason().len() <= 123);
            assert!(ending.is_retryable() || ending.close_code() < 1012 || ending == Disconnect::Kicked);
        }
        assert_eq!(Disconnect::SlowConsumer.close_code(), 4008);
        assert!(Disconnect::SlowConsumer.is_retryable());
        assert!(!Disconnect::Kicked.is_retryable());
    }
}
