//! Every limit of a session, of a frame and of a file, with its unit and default, in one place.

use std::time::Duration;

/// What one session may hold and do. One value is shared by all sessions of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionLimits {
    /// Frames that may wait for one session. Default 1,024. The first two cost nothing, each other one 8 bytes of a block,
    /// which grows by doubling.
    pub queue_frames_max: usize,
    /// Bytes that may wait for one session behind its first frame, shared frames counted in full. Default 1 MiB. It
    /// bounds delay; the memory is shared by all sessions that wait for the same frame. An empty queue admits any legal
    /// frame, which then takes no room from those behind it.
    pub queue_bytes_max: usize,
    /// Bytes of one inbound WebSocket message, all fragments together. Default 64 KiB with room for attachments
    /// on top: the gateway raises it to fit `attachment_bytes_max`. Held only while a message is incomplete.
    pub message_bytes_max: usize,
    /// Bytes of one attachment, decoded. Default 1 MiB.
    pub attachment_bytes_max: usize,
    /// Characters of one inbound text. Default 16,384.
    pub text_chars_max: usize,
    /// Rooms that one session may be in. Default 64. Each costs up to 24 bytes, in the session and in the room.
    pub rooms_max: usize,
    /// A ping goes out this long after the last one, or after the timeout if that is longer. Default 25 s.
    pub heartbeat_interval: Duration,
    /// A session without a sign of life (bytes read, or progress in writing) for this long after a ping is ended. Default 20 s.
    pub heartbeat_timeout: Duration,
    /// How long a session that was told to close may take to read what is left and the close frame. Default 5 s.
    pub close_timeout: Duration,
    /// Bad frames that one session may send within ten seconds before it is ended with 1008. Default 10. A compressed
    /// one that inflates to over 4 KiB and a hundred times its bytes counts, though it is heard.
    pub bad_frames_max: u8,
    /// Frames that one session may send in a second, ten times as many at once: messages, empty fragments, pings and
    /// pongs. Default 20; 0: no limit. A frame past it is refused, and counts as a bad one.
    pub inbound_messages_per_second_max: usize,
    /// Bytes of messages, inflated ones in full, that one session may send in a second, and ten times as many at once.
    /// Default 1 MiB, at most 256 MiB; 0: no limit. Who has sent nothing for a while may send any legal message. What
    /// the client of a stream sends after its request counts as well.
    pub inbound_bytes_per_second_max: usize,
}

/// A session may send at once what its limits per second allow in so many seconds.
pub const INBOUND_BURST_SECONDS: u32 = 10;

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            queue_frames_max: 1_024,
            queue_bytes_max: 1 << 20,
            message_bytes_max: 64 << 10,
            attachment_bytes_max: 1 << 20,
            text_chars_max: 16_384,
            rooms_max: 64,
            heartbeat_interval: Duration::from_secs(25),
            heartbeat_timeout: Duration::from_secs(20),
            close_timeout: Duration::from_secs(5),
            bad_frames_max: 10,
            inbound_messages_per_second_max: 20,
            inbound_bytes_per_second_max: 1 << 20,
        }
    }
}

/// What one engine may hold, beside its sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubLimits {
    /// Posts that may wait in one shard's inbox. Default 4,096. Costs about 64 bytes each.
    pub inbox_posts_max: usize,
    /// Frame bytes that may wait in one shard's inbox. Default 64 MiB; an empty inbox admits any legal frame.
    pub inbox_bytes_max: usize,
    /// Sessions that one user may have. Default 32. Costs 16 bytes each in the registry.
    pub tabs_per_user_max: usize,
    /// Sessions that may watch at once. Default 32. Each is a session with its queue, and shared frames.
    pub watchers_max: usize,
    /// Streams that may be open at once. Default 20,000. Costs about 400 bytes each while empty.
    pub streams_max: usize,
    /// Streams that one owner may have open at once. Default 128.
    pub streams_per_owner_max: usize,
    /// Bytes of JSON of one stream that can be left and found again. Default 1 MiB. Past it there is nothing to come
    /// back to, while whoever reads it goes on.
    pub stream_bytes_max: usize,
    /// Memory of all streams that can be left and found again. Default 64 MiB. Past it the next one that says something
    /// is not kept any more.
    pub streams_bytes_max: usize,
    /// What users' tabs can get again.
    pub recovery: RecoveryLimits,
    /// Bytes of one file on its way out, before base64. Default 16 MiB. Other frames may be as large as a file's.
    pub file_bytes_max: usize,
    /// The byte budget of the process: live frames once, plus what queues cost. Past it the fattest queues are cut
    /// first. Default 256 MiB. Memory is the process's, so frames of all engines in it count; each cuts among its own
    /// sessions, and never one that reads. All other bounds are an engine's own.
    pub bytes_budget: usize,
    /// Bytes of messages from clients that are not complete yet, of all sessions together; a session that needs more
    /// is ended with 1013. Default 64 MiB.
    pub inbound_bytes_max: usize,
    /// Bytes of JSON from which a frame is compressed, if a tab here has negotiated that. Default 512. Costs 10 µs of the
    /// publisher at 512 bytes, 30 µs at 4 KiB, and the compressed form within `bytes_budget`.
    pub deflate_bytes_min: usize,
}

impl Default for HubLimits {
    fn default() -> Self {
        Self {
            inbox_posts_max: 4_096,
            inbox_bytes_max: 64 << 20,
            tabs_per_user_max: 32,
            watchers_max: 32,
            streams_max: 20_000,
            streams_per_owner_max: 128,
            stream_bytes_max: 1 << 20,
            streams_bytes_max: 64 << 20,
            recovery: RecoveryLimits::default(),
            file_bytes_max: 16 << 20,
            bytes_budget: 256 << 20,
            inbound_bytes_max: 64 << 20,
            deflate_bytes_min: 512,
        }
    }
}

/// What is kept of a user's frames, so that a tab which comes back gets what it missed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryLimits {
    /// Frames of one user. Default 64; 0 keeps none, and every position is unknown.
    pub frames_max: usize,
    /// Bytes of JSON of one user's frames. Default 64 KiB.
    pub bytes_max: usize,
    /// How long a frame is kept. Default 120 s. The newest message and its edits are kept up to thirty times as long,
    /// so that a tab which missed nothing is not told of a gap. A stream that has ended is kept as long.
    pub lifetime: Duration,
    /// Memory of all users' frames. Default 64 MiB. A sixty-fourth of it is for a sixty-fourth of the users; past that
    /// those go whose last frame is the oldest.
    pub total_bytes_max: usize,
}

impl Default for RecoveryLimits {
    fn default() -> Self {
        Self { frames_max: 64, bytes_max: 64 << 10, lifetime: Duration::from_secs(120), total_bytes_max: 64 << 20 }
    }
}

impl RecoveryLimits {
    /// Nothing is kept.
    #[must_use]
    pub fn off() -> Self {
        Self { frames_max: 0, ..Self::default() }
    }

    /// Whether anything is kept.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.frames_max > 0
    }
}

impl HubLimits {
    /// Bytes of one frame on its way out: the largest file in base64, its names, and some.
    #[must_use]
    pub const fn frame_bytes_max(&self) -> usize {
        const ROOM: usize = 64 << 10;
        self.file_bytes_max.div_ceil(3).saturating_mul(4).saturating_add(ROOM)
    }
}

/// How much of what workers sent is kept, so that the links of files resolve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLimits {
    /// Bytes of all files, with their names and types; what is still read counts although it is no longer kept.
    /// Default 64 MiB; 0 keeps none. Past it the oldest go; a file larger than the whole is not kept.
    pub bytes_max: usize,
    /// Files. Default 10,000. Past it the oldest go. Each costs up to 256 bytes beside its own.
    pub files_max: usize,
    /// How long a file is kept. Default 1 h. Memory is bounded without it.
    pub time: Duration,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self { bytes_max: 64 << 20, files_max: 10_000, time: Duration::from_secs(3600) }
    }
}
