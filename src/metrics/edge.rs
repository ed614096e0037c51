//! Labels of the edge: what became of TLS handshakes and requests, and why something was refused.

use crate::metrics::Label;
use crate::metrics::label::label;

label! {
    /// What became of a TLS handshake.
    TlsHandshake {
        /// Done, with a signature.
        Full = "full",
        /// Done, from a ticket.
        Resumed = "resumed",
        /// Not done: no TLS, nothing in common, too slow, or gone.
        Failed = "failed",
    }
}

label! {
    /// The first digit of a response's status.
    StatusClass {
        /// 1xx.
        Informational = "1xx",
        /// 2xx.
        Success = "2xx",
        /// 3xx.
        Redirection = "3xx",
        /// 4xx.
        ClientError = "4xx",
        /// 5xx.
        ServerError = "5xx",
    }
}

impl StatusClass {
    /// The class of a status code; what is out of range counts as 5xx.
    #[must_use]
    pub const fn of(status: u16) -> Self {
        match status {
            100..200 => Self::Informational,
            200..300 => Self::Success,
            300..400 => Self::Redirection,
            400..500 => Self::ClientError,
            _ => Self::ServerError,
        }
    }
}

label! {
    /// What there was too much of, or what was wrong, when a connection or a request was refused.
    Refusal {
        /// The node has as many sessions as it may have (503).
        Tabs = "tabs",
        /// The user has (429).
        TabsOfUser = "tabs_of_user",
        /// The address has (429).
        TabsOfAddress = "tabs_of_address",
        /// Too many requests for sessions in the time, of all clients (503).
        Handshakes = "handshakes",
        /// Of one address (429).
        HandshakesOfAddress = "handshakes_of_address",
        /// An address has shown too many keys in the time that are not known here (429).
        BadKeysOfAddress = "bad_keys_of_address",
        /// The address has as many connections as it may have (429, or closed).
        ConnectionsOfAddress = "connections_of_address",
        /// A connection that does not come from a trusted proxy, where all have to (closed).
        UntrustedPeer = "untrusted_peer",
        /// A connection from a trusted proxy that does not say whom it is for (closed).
        NoIntroduction = "no_introduction",
        /// As many answers are under way as may be (503).
        Answers = "answers",
        /// Of one user (429).
        AnswersOfUser = "answers_of_user",
        /// Bodies hold as many bytes as they may (503).
        Bodies = "bodies",
        /// Answers in one piece hold as many bytes as they may (503).
        WholeAnswers = "whole_answers",
        /// As many tokens are being verified as may be (503).
        Checks = "checks",
        /// A client that takes its responses too slowly (its connection ends).
        SlowReader = "slow_reader",
    }
}
