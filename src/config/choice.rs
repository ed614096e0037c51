//! The settings that are one word of a few.

use super::value::words;

words! {
    /// Whose table the descriptors of sessions are in.
    FileTables {
        /// Per shard only if `tabs_max` does not fit one table.
        Auto = "auto",
        /// One table for the process.
        Shared = "shared",
        /// Each shard's thread has its own: the open file limit then counts per shard.
        PerShard = "per_shard",
    }
}

words! {
    /// Who answers what browsers send.
    Worker {
        /// Built in: echoes, and shows every kind of frame.
        Demo = "demo",
        /// An HTTP endpoint, `webhook_url`.
        Webhook = "webhook",
        /// Workers that consume and produce on Redis Streams; needs `redis`.
        Redis = "redis",
        /// Nobody here; messages from browsers are accepted and go to the tabs only.
        None = "none",
    }
}

words! {
    /// Whether WebSockets are compressed.
    Deflate {
        /// No tab's.
        Off = "off",
        /// Those of tabs that offer it, as all browsers do.
        On = "on",
    }
}

words! {
    /// Where frames are kept for tabs that come back.
    Recovery {
        /// Nowhere: a tab that comes back is told that there is a gap.
        Off = "off",
        /// In this process.
        Memory = "memory",
        /// In Redis: whichever node a tab comes back to.
        Redis = "redis",
    }
}

words! {
    /// How the envelopes of workers are written on the inbound stream. Outbound both are read.
    EnvelopeForm {
        /// JSON, attachments in base64.
        Json = "json",
        /// MessagePack, attachments as bytes.
        MessagePack = "msgpack",
    }
}

words! {
    /// Whether connections begin with who they are for.
    ProxyProtocol {
        /// With what is spoken on them.
        Off = "off",
        /// With a header of the PROXY protocol, version 2, before TLS.
        V2 = "v2",
    }
}

words! {
    /// How log lines look.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}
