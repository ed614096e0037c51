//! Settings: each has one name in three spellings (TOML `tabs_max`, flag `--tabs-max`, environment
//! `TABCAST_TABS_MAX`), is written once in the table below, and is checked once, at the start.
//!
//! A flag wins over the environment, the environment over the file, the file over the default. What is not a setting
//! is refused, with the nearest name. Durations are texts with a unit (`"25s"`, `"500ms"`), bytes are whole numbers
//! or texts with a unit (`"64MiB"`), lists are TOML arrays, or separated by commas in a flag (which may also be
//! repeated) or a variable (`token_keys`: by semicolons). Where a key or a secret is expected, `file:PATH` stands for
//! what that file holds (for a list: one a line).
//!
//! ```
//! use tabcast::config::{Machine, Sources};
//!
//! let settings = Sources::new().with_toml("tabs_max = 1000").with_variable("TABCAST_HEARTBEAT_INTERVAL", "30s")
//!     .load(Machine { cores: 4, open_files_max: 20_000 })?;
//! assert_eq!((settings.tabs_max, settings.shards), (1000, 4));
//! # Ok::<(), tabcast::config::ConfigError>(())
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::id::UserId;
use crate::proto::limits::{FileLimits, HubLimits, RecoveryLimits, SessionLimits};

mod check;
mod choice;
mod error;
mod keys;
mod memory;
mod reference;
mod setting;
mod sources;
mod value;

pub use check::Machine;
pub use choice::Deflate;
pub use choice::EnvelopeForm;
pub use choice::FileTables;
pub use choice::LogFormat;
pub use choice::ProxyProtocol;
pub use choice::Recovery;
pub use choice::Worker;
pub use error::ConfigError;
pub(crate) use keys::KEY_BYTES_MIN;
pub use keys::KeyDigest;
pub use keys::Secret;
pub use keys::SecretUrl;
pub use keys::TokenAlgorithm;
pub use keys::TokenKey;
pub use keys::UserKey;
pub use reference::ReferenceForm;
pub use setting::Change;
pub use setting::Effect;
pub use setting::Setting;
pub use sources::Sources;

pub(crate) use memory::CONTROL_THREADS;
pub(crate) use memory::IDEMPOTENCY_BYTES;
pub(crate) use memory::LISTED_USER_BYTES;

use setting::settings;
use setting::units_fit;
use value::Value;

settings! {
    ["Where it listens"]
    /// Address and port to listen on. Without any key only a loopback address is allowed. Default 127.0.0.1:8080.
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8080));
    /// A file of certificates in PEM, the server's own first, then those that vouch for it: with it TLS is spoken, and
    /// nothing else. It is read again on SIGHUP and when it has changed. Default none: plain HTTP.
    /// Memory: about 4 KiB more a session, and up to 32 KiB of `bytes_budget` while it does not read.
    tls_cert: Option<String> = None;
    /// A file with the private key of `tls_cert` in PEM, read along with it. Default none.
    tls_key: Option<String> = None;

    ["Shards and tabs"]
    /// Shards: threads that each hold a part of the sessions. 0, the default: as many as cores, more if `tabs_max`
    /// needs them.
    /// Memory: each up to 8 MiB for its stack and pools, and up to `inbox_bytes_max`.
    shards: usize ["shards"] = 0;
    /// Whose table descriptors are in: auto (default), shared or per_shard. Per shard, the limit of open files counts
    /// for each shard.
    file_tables: FileTables = FileTables::Auto;
    /// Sessions (tabs and event streams) on this node. 0, the default: what the hard limit of open files allows in one
    /// file table, a million at most.
    /// Memory: each about 1 KiB here and about 4.4 KiB in the kernel.
    tabs_max: usize ["sessions"] = 0, live;
    /// Sessions of one user on this node. Default 32.
    /// Memory: each 16 bytes in the list of its user.
    tabs_per_user_max: usize ["sessions"] = 32, live;

    /// Who may watch at once (`/events?watch=…`), with one of `operator_keys`. Default 32; 0: nobody. Past it 429.
    /// Memory: each 1 KiB, and what waits for it within `bytes_budget`.
    watchers_max: usize ["watchers"] = HubLimits::default().watchers_max;
    /// Users that one `GET /api/users` names; it counts all of this node, and as many of the other nodes' as
    /// it may name. Default 10000.
    /// Memory: each up to 1 KiB while its answer is made and written, within `bodies_bytes_max`.
    users_listed_max: usize ["users"] = 10_000, live;

    ["Clients' addresses"]
    /// Sessions (tabs, event streams, answers of /v1) of one address, or one /64 of IPv6, on this node. Default 1000;
    /// 0: no limit, as in development mode.
    /// Memory: each 16 bytes, each address up to 40.
    tabs_per_address_max: usize ["sessions"] = 1000, live;
    /// Requests for sessions (/ws and /events) in a second, of all clients together; as many at once. Default 5000; 0:
    /// no limit, as in development mode. Past it they are answered 503.
    handshakes_per_second_max: usize ["requests a second"] = 5000, live;
    /// Those of one address, or one /64 of IPv6. Default 100; 0: no limit, as in development mode. Past it they are
    /// answered 429.
    /// Memory: all addresses together up to 1.1 MiB.
    handshakes_per_address_per_second_max: usize ["requests a second"] = 100, live;
    /// Keys for /api, /v1, /metrics, /status and for cutting users that are not known here and that one address, or one /64 of
    /// IPv6, may show in a second, and as many at once. Default 10; 0: no limit, as in development mode. Past it 429: a
    /// key of under 16 bytes is not even looked at, one that is longer and known is let through.
    /// Memory: 1.1 MiB for all addresses.
    bad_keys_per_address_per_second_max: usize ["keys"] = 10, live;
    /// Proxies that say for whom they speak: addresses such as 10.0.0.7, or networks such as 10.0.0.0/8. Only from them
    /// is X-Forwarded-For believed, from its end up to the first address that is none of them. Default none: a client
    /// is who connects. Not in development mode.
    trusted_proxies: Vec<IpNet> = Vec::new();
    /// Whether every connection begins with a header of the PROXY protocol: off (default) or v2. With v2 only
    /// `trusted_proxies` may connect, and X-Forwarded-For counts no more; the header counts within `header_timeout`.
    proxy_protocol: ProxyProtocol = ProxyProtocol::Off;

    ["Sessions"]
    /// Frames that may wait for one session. Default 1024.
    /// Memory: past the second each 8 bytes of a block that grows by doubling, within `bytes_budget`.
    session_queue_frames_max: usize ["frames"] = SessionLimits::default().queue_frames_max;
    /// Bytes that may wait for one session behind its first frame, shared frames counted in full. Default 1MiB. An
    /// empty queue admits any legal frame.
    /// Memory: bounded by `bytes_budget`; this bounds delay.
    session_queue_bytes_max: usize = SessionLimits::default().queue_bytes_max;
    /// Bytes of one WebSocket message from a browser, without its attachment. Default 64KiB.
    /// Memory: held only while a message is incomplete, within `inbound_bytes_max`.
    message_bytes_max: usize = SessionLimits::default().message_bytes_max, live;
    /// Bytes of one attachment from a browser, decoded. Default 1MiB. Raises the limit of a message by its base64 form.
    /// Memory: within `inbound_bytes_max` and `worker_queue_bytes_max`.
    attachment_bytes_max: usize = SessionLimits::default().attachment_bytes_max, live;
    /// Characters of one text from a browser. Default 16384.
    text_chars_max: usize ["characters"] = SessionLimits::default().text_chars_max, live;
    /// Rooms that one session may be in. Default 64.
    /// Memory: each membership up to 24 bytes, and 320 if nobody else is in the room.
    rooms_max: usize ["rooms"] = SessionLimits::default().rooms_max, live;
    /// A ping goes out this long after the last one. Default 25s.
    heartbeat_interval: Duration = SessionLimits::default().heartbeat_interval;
    /// A session without a sign of life for this long after a ping is ended. Default 20s.
    heartbeat_timeout: Duration = SessionLimits::default().heartbeat_timeout;
    /// How long a session that was told to close may take for what is left. Default 5s.
    close_timeout: Duration = SessionLimits::default().close_timeout;
    /// Bad frames that one session may send within ten seconds before it is ended. Default 10.
    bad_frames_max: u8 ["frames in 10 s"] = SessionLimits::default().bad_frames_max, live;
    /// Frames from a browser that one session may send in a second, ten times as many at once: messages, empty
    /// fragments, pings and pongs. Default 20; 0: no limit, as in development mode. One too many is answered
    /// rate_limited and counts as a bad frame.
    inbound_messages_per_second_max: usize ["frames a second"] = SessionLimits::default().inbound_messages_per_second_max, live;
    /// Bytes of messages, inflated ones in full, that one session may send in a second, ten times as many at once.
    /// Default 1MiB, at most 256MiB; 0: no limit, as in development mode. Who was silent may send any legal message.
    inbound_bytes_per_second_max: usize ["bytes a second"] = SessionLimits::default().inbound_bytes_per_second_max, live;
    /// Bytes of messages from browsers that are not complete yet, in the whole process. Default 64MiB. Past it, a
    /// session that needs more is ended with 1013.
    /// Memory: all of it, and as much again on its way to the worker's queue.
    inbound_bytes_max: usize = 64 << 20;
    /// Whether WebSockets are compressed (permessage-deflate) for tabs that offer it, as all browsers do: off (default)
    /// or on. On, a frame of `deflate_bytes_min` or more costs its publisher 10 µs to 100 µs, once for all tabs, and
    /// its compressed form within `bytes_budget`; text becomes about half as long.
    /// Memory: each thread that publishes 400 KiB, each shard 112 KiB and a message more, 6 MiB for large frames.
    deflate: Deflate = Deflate::Off;
    /// Bytes of JSON from which a frame is compressed. Default 512: below it there is little to win. Files are not
    /// compressed, nor what is over 1 MiB.
    deflate_bytes_min: usize = HubLimits::default().deflate_bytes_min;

    ["Publishing"]
    /// Posts that may wait in one shard's inbox. Default 4096.
    /// Memory: each 64 bytes a shard.
    inbox_posts_max: usize ["posts"] = 4096;
    /// Bytes of frames that may wait in one shard's inbox. Default 64MiB a shard.
    /// Memory: all of it, a shard.
    inbox_bytes_max: usize = 64 << 20;
    /// Bytes of frames and queue entries in the whole process. Default 256MiB. Past it the fattest queues are cut.
    /// Memory: all of it.
    bytes_budget: usize = 256 << 20;
    /// How long a publish waits for room in an inbox before it is refused as overloaded. Default 1s.
    publish_deadline: Duration = Duration::from_secs(1);

    ["Requests"]
    /// Connections that are not sessions (requests, and sockets between requests), and so requests under way. Default
    /// 1024. Past it the one that has waited longest for a request is closed, and if none does, the one whose client has
    /// taken nothing of a response for longest, a second at least.
    /// Memory: each up to `header_bytes_max` and 16 KiB; with TLS 128 KiB more.
    http_connections_max: usize ["connections"] = 1024;
    /// Those of one address, or one /64 of IPv6; not of `trusted_proxies`. Default 256; 0: no limit, as in development
    /// mode. Past it a connection is answered 429 and closed, with TLS just closed.
    /// Memory: each address up to 40 bytes.
    connections_per_address_max: usize ["connections"] = 256, live;
    /// How long a client may take to send the head of a request, and for the TLS handshake. Default 10s.
    header_timeout: Duration = Duration::from_secs(10);
    /// Bytes of the head of a request. Default 16KiB.
    /// Memory: this much for each of `http_connections_max`.
    header_bytes_max: usize = 16 << 10;
    /// How long a client may take to send the body of a request, and to take some of a response. Default 60s.
    body_timeout: Duration = Duration::from_secs(60);
    /// Bytes of responses in a second that a client has to take while any wait for it. Default 1KiB; 0: any. Whoever is
    /// slower is cut once it is `body_timeout` behind.
    /// Memory: none.
    response_bytes_per_second_min: usize ["bytes a second"] = 1 << 10;
    /// Bytes of the body of a request. Default 24MiB.
    /// Memory: within `bodies_bytes_max`; while it is parsed up to three times as much, on each of two threads.
    body_bytes_max: usize = 24 << 20, live;
    /// Bytes of all bodies that are held at one time. Default 128MiB. Past it a request is answered 503.
    /// Memory: each byte up to three: a body grows by doubling, and what its base64 and its texts decode to stands
    /// beside it.
    bodies_bytes_max: usize = 128 << 20;
    /// Lines of one batch. Default 10000.
    batch_lines_max: usize ["lines"] = 10_000;
    /// Bytes of one line of a batch. Default 2MiB: a file of 1 MiB in base64 fits.
    /// Memory: within `bodies_bytes_max`.
    batch_line_bytes_max: usize = 2 << 20;

    ["Files"]
    /// Bytes of one file that a worker sends, decoded. Default 16MiB.
    /// Memory: within `bytes_budget`; with Redis sixteen files of other nodes beside that.
    file_bytes_max: usize = 16 << 20;
    /// Bytes of files that are kept so that their links resolve, with their names. Default 64MiB; 0 keeps none. Past it
    /// the oldest go; a file larger than the whole is not kept. What is still being fetched counts.
    /// Memory: all of it.
    files_bytes_max: usize = FileLimits::default().bytes_max;
    /// Files that are kept. Default 10000.
    /// Memory: each up to 256 bytes beside its own.
    files_max: usize ["files"] = FileLimits::default().files_max;
    /// How long a file is kept. Default 1h. Memory is bounded without it.
    files_time: Duration = FileLimits::default().time;

    ["Repeats"]
    /// Answers that are remembered for 10 minutes by Idempotency-Key. Default 10000. Past the count or the bytes the
    /// oldest are forgotten, before their 10 minutes are over. An answer of more than a tenth of those bytes (a batch
    /// of some 9,000 lines by default) is not remembered.
    /// Memory: 1 KiB each at most, all together.
    idempotency_keys_max: usize ["answers"] = 10_000;
    /// Client ids that are remembered for 5 minutes against doubles. Default 100000. Past it the oldest is forgotten.
    /// Memory: each up to 640 bytes.
    client_ids_max: usize ["ids"] = 100_000;

    ["The worker"]
    /// Who answers what browsers send: demo (default), webhook, redis or none.
    worker: Worker = Worker::Demo;
    /// Where messages are POSTed with `worker = "webhook"`: an http or https URL. Default none. Its query is shown
    /// nowhere.
    webhook_url: Option<SecretUrl> = None;
    /// Signs what is POSTed (`X-Tabcast-Signature`, HMAC-SHA-256). Default none: not signed.
    webhook_secret: Option<Secret> = None;
    /// How long one attempt may take. Default 30s.
    webhook_timeout: Duration = Duration::from_secs(30);
    /// Attempts for one message before it is given up. Default 6.
    webhook_attempts_max: u32 ["attempts"] = 6;
    /// The pause after the first failed attempt; it doubles with each. Default 500ms.
    webhook_backoff_min: Duration = Duration::from_millis(500);
    /// The longest pause between two attempts. Default 30s.
    webhook_backoff_max: Duration = Duration::from_secs(30);
    /// Attempts that may be under way at one time, one a channel. Default 64.
    webhook_in_flight_max: usize ["requests"] = 64;
    /// Messages that may wait for the worker. Default 1024. Past it a tab is told `overloaded`.
    /// Memory: within `worker_queue_bytes_max`.
    worker_queue_max: usize ["messages"] = 1024;
    /// Bytes of messages that may wait for the worker. Default 64MiB.
    /// Memory: all of it.
    worker_queue_bytes_max: usize = 64 << 20;
    /// Whether what a user sends goes to all tabs of that user. Default true.
    echo_to_tabs: bool = true;

    ["Redis"]
    /// Redis, through which this gateway is one node of many: a URL such as `redis://user:password@host:6379/0`,
    /// `rediss://` for TLS; several are the seeds of a cluster. Default none: a node on its own.
    /// Memory: 64 MiB for what waits for workers, beside `redis_spool_bytes_max` and `file_bytes_max`.
    redis: Vec<SecretUrl> = Vec::new();
    /// Whether `redis` is a Redis Cluster. Default false.
    redis_cluster: bool = false;
    /// A file of certificates in PEM that are trusted for `rediss://`. Default none: those of the system.
    redis_ca_file: Option<String> = None;
    /// What the names of all keys and channels in Redis begin with. Default sg:.
    redis_prefix: String = "sg:".to_owned();
    /// How long an answer of Redis may take before its connection counts as lost. Default 2s.
    redis_timeout: Duration = Duration::from_secs(2);
    /// How long a message to oneself through Redis may take before this node is not ready. Default 3s.
    redis_canary_deadline: Duration = Duration::from_secs(3);
    /// Bytes of frames for other nodes that may wait for Redis, and as much again from them that may wait for the
    /// shards. Default 64MiB. Past it a frame with nobody here to take it is refused.
    /// Memory: twice this.
    redis_spool_bytes_max: usize = 64 << 20;
    /// The stream that workers read. Default none: the prefix and stream:inbound.
    redis_inbound_stream: Option<String> = None;
    /// Their group, which is made if it is not there. Default none: the prefix and workers.
    redis_inbound_group: Option<String> = None;
    /// The stream that workers write. Default none: the prefix and stream:outbound:webchat.
    redis_outbound_stream: Option<String> = None;
    /// The gateways' group. Default none: the prefix and gateway:webchat.
    redis_outbound_group: Option<String> = None;
    /// About how many entries a stream keeps (MAXLEN ~); outbound, those that are not acknowledged stay. Default
    /// 100000, at least 1000.
    redis_stream_entries_max: usize ["entries"] = 100_000;
    /// How inbound envelopes are written: json (default) or msgpack.
    redis_envelope: EnvelopeForm = EnvelopeForm::Json;
    /// Where the other nodes find this one, such as `http://10.0.0.7:8080`: for the files that it keeps. Default none:
    /// `listen`, if that is an address and not all of them. With TLS it needs a name that the certificate has.
    node_url: Option<String> = None;

    ["OpenAI's clients"]
    /// Whether what a `/v1` client asks, and what it is answered, also goes to the open tabs of its user. Default
    /// false.
    mirror_to_tabs: bool = false, live;
    /// Models that `/v1/models` lists; the first is that of a request that names none. Any name is taken, and told to
    /// the worker. Default tabcast.
    models: Vec<String> = vec!["tabcast".to_owned()], live;
    /// Bytes of the body of one `/v1` request, if `body_bytes_max` is not less. Default 8MiB.
    /// Memory: parsed up to ten times as much while it waits for the worker, within `worker_queue_bytes_max`.
    completion_bytes_max: usize = 8 << 20, live;
    /// How long the worker may be silent before an answer of `/v1` ends with a timeout. Default 5m.
    answer_timeout: Duration = Duration::from_secs(300), live;
    /// Answers of `/v1` that are under way on this node. Default 20000.
    /// Memory: each about 1 KiB, and its text within `bytes_budget`.
    answers_max: usize ["answers"] = 20_000;
    /// Answers of one user that are under way on this node. Default 128.
    answers_per_user_max: usize ["answers"] = 128;
    /// Bytes of JSON of one answer that its client may leave and find again (`x-tabcast-detach`). Default 1MiB, within
    /// `answers_bytes_max`.
    /// Memory: within `answers_bytes_max`.
    answer_bytes_max: usize = 1 << 20;
    /// Memory of all answers that may be left and found again, within `bytes_budget`. Default 64MiB. Past it the next
    /// one that says something cannot be found again.
    /// Memory: all of it, within `bytes_budget`.
    answers_bytes_max: usize = 64 << 20;
    /// Bytes that one answer of `/v1` without `stream` may hold while it is collected: the texts of its messages and what
    /// is around them. Default 8MiB, at least 1KiB. Past it the request is answered 502, and the worker is told that nobody
    /// waits.
    /// Memory: within `whole_answers_bytes_max`.
    whole_answer_bytes_max: usize = 8 << 20, live;
    /// Bytes of all of these, until each is written. Default 64MiB. Past it those give theirs back whose clients take
    /// nothing of it for a second, or not all of it in 20; and if that gives no room within two seconds, a new one is
    /// answered 503, before the worker is asked; and one that grows.
    /// Memory: twice this: what is collected, and the body that is made of it.
    whole_answers_bytes_max: usize = 64 << 20;

    ["Recovery"]
    /// Where frames are kept for tabs that come back: memory (default), redis or off.
    recovery: Recovery = Recovery::Memory;
    /// Frames that are kept for one user. Default 64.
    /// Memory: within `recovery_total_bytes_max`.
    recovery_frames_max: usize ["frames"] = RecoveryLimits::default().frames_max;
    /// Bytes of JSON of frames that are kept for one user. Default 64KiB.
    /// Memory: within `recovery_total_bytes_max`.
    recovery_bytes_max: usize = RecoveryLimits::default().bytes_max;
    /// How long a frame, or an answer that has ended, is kept. Default 2m. A user's newest message is kept up to thirty
    /// times as long.
    recovery_time: Duration = RecoveryLimits::default().lifetime;
    /// Memory of all frames that are kept for users, within `bytes_budget`. Default 64MiB, in 64 equal parts for as
    /// many parts of the users. Past its part those are forgotten whose last frame is the oldest.
    /// Memory: all of it, within `bytes_budget`.
    recovery_total_bytes_max: usize = RecoveryLimits::default().total_bytes_max;
    /// Whether a worker's `fetch_history` gets what recovery keeps. Default false: it gets nothing.
    history_from_recovery: bool = false;

    ["Keys"]
    /// Keys that verify users' tokens: tables of kid, alg (HS256, RS256, ES256, EdDSA) and secret, secret_file or
    /// public_key_file; in a flag or a variable `kid=main,alg=HS256,secret=…`, separated by semicolons. Default none.
    token_keys: Vec<TokenKey> = Vec::new(), live;
    /// Issuers that a token may name (`iss`). Default none: not looked at.
    token_issuer: Vec<String> = Vec::new(), live;
    /// Audiences of which a token must name one (`aud`). Default none: a token that names an audience is refused.
    token_audience: Vec<String> = Vec::new(), live;
    /// How far clocks may differ when a token's times are checked. Default 30s, at most 10m.
    token_leeway: Duration = Duration::from_secs(30), live;
    /// Keys of workers, for /api: each in clear, as `sha256:` and its digest in hexadecimal, or `file:PATH`. Default
    /// none.
    api_keys: Vec<KeyDigest> = Vec::new(), live;
    /// Keys for /v1, each naming a user: `user:key`, the key as in `api_keys`. Default none.
    openai_keys: Vec<UserKey> = Vec::new(), live;
    /// Keys for /status, /metrics and for cutting users, as in `api_keys`. Default none.
    operator_keys: Vec<KeyDigest> = Vec::new(), live;
    /// Origins of pages that may connect beside our own, such as `https://example.org`, or `*` for any. Default none.
    allowed_origins: Vec<String> = Vec::new(), live;
    /// Where browsers find this gateway, such as `https://chat.example.org`: for links and as our own origin. Default
    /// none: the Host of the request.
    public_url: Option<String> = None, live;

    ["The bot"]
    /// The bot's user id: the sender of its messages; no token may name it. Default star.
    bot_user_id: UserId = star();
    /// The bot's name for people. Default Star.
    bot_display_name: String = "Star".to_owned();
    /// How the bot is addressed in a text. Default @Star.
    bot_mention: String = "@Star".to_owned();

    ["Shutdown"]
    /// Over which time tabs are closed at shutdown, evenly; longer if `drain_closes_per_second_max` asks for it.
    /// Default 10s.
    drain_spread: Duration = Duration::from_secs(10), live;
    /// Tabs that are closed in a second at shutdown, at most: they come back, to the other nodes. Default 2000: 19,000
    /// tabs fit into 10 s. With more the drain takes longer, up to `drain_deadline` less `close_timeout`; that wins,
    /// and with more tabs than fit into it they are closed faster.
    /// Memory: none.
    drain_closes_per_second_max: u32 ["tabs a second"] = 2_000, live;
    /// When the process leaves after the signal to shut down, whatever is left. Default 30s.
    drain_deadline: Duration = Duration::from_secs(30), live;

    ["Logs"]
    /// What is logged: error, warn, info, debug, or rules such as `info,tabcast::gateway=debug`. Default info.
    log: String = "info".to_owned(), live;
    /// How log lines look: text (default) or json.
    log_format: LogFormat = LogFormat::Text;
}

fn star() -> UserId {
    UserId::parse("star").expect("`star` is a valid id")
}

/// Bytes of the base64 form of `bytes` bytes.
#[must_use]
pub const fn base64_bytes(bytes: usize) -> usize {
    bytes.div_ceil(3).saturating_mul(4)
}

impl Settings {
    /// Whether no key of any class is set: then everything is open, on loopback only.
    #[must_use]
    pub fn is_development(&self) -> bool {
        self.token_keys.is_empty()
            && self.api_keys.is_empty()
            && self.openai_keys.is_empty()
            && self.operator_keys.is_empty()
    }

    /// How the URLs of this gateway begin.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        if self.tls_cert.is_some() { "https" } else { "http" }
    }

    /// How long a webhook may take for one message at most: all attempts and all pauses.
    #[must_use]
    pub fn webhook_message_timeout(&self) -> Duration {
        self.webhook_timeout.saturating_add(self.webhook_backoff_max).saturating_mul(self.webhook_attempts_max)
    }

    /// Where other nodes find this one: `node_url`, or `listen` if that is one address.
    #[must_use]
    pub fn node_address(&self) -> Option<String> {
        self.node_url.clone().or_else(|| self.address_at(self.listen))
    }

    /// The same for an address whose port was chosen by the system.
    pub(crate) fn address_at(&self, listen: SocketAddr) -> Option<String> {
        let scheme = self.scheme();
        (!listen.ip().is_unspecified() && listen.port() != 0).then(|| format!("{scheme}://{listen}"))
    }

    /// The limits of the files that are kept.
    #[must_use]
    pub fn file_limits(&self) -> FileLimits {
        FileLimits { bytes_max: self.files_bytes_max, files_max: self.files_max, time: self.files_time }
    }

    /// `limit`, a limit per address or per second; in development mode 0, which is none.
    pub(crate) fn outside_development(&self, limit: usize) -> usize {
        if self.is_development() { 0 } else { limit }
    }

    /// The limits of sessions; `message_bytes_max` is raised so that an attachment fits.
    #[must_use]
    pub fn session_limits(&self) -> SessionLimits {
        SessionLimits {
            queue_frames_max: self.session_queue_frames_max,
            queue_bytes_max: self.session_queue_bytes_max,
            message_bytes_max: self.message_bytes_max + base64_bytes(self.attachment_bytes_max),
            attachment_bytes_max: self.attachment_bytes_max,
            text_chars_max: self.text_chars_max,
            rooms_max: self.rooms_max,
            heartbeat_interval: self.heartbeat_interval,
            heartbeat_timeout: self.heartbeat_timeout,
            close_timeout: self.close_timeout,
            bad_frames_max: self.bad_frames_max,
            inbound_messages_per_second_max: self.outside_development(self.inbound_messages_per_second_max),
            inbound_bytes_per_second_max: self.outside_development(self.inbound_bytes_per_second_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_has_one_name_in_three_spellings() {
        let setting = Settings::ALL.iter().find(|s| s.name == "tabs_per_user_max").unwrap();
        assert_eq!(setting.flag, "tabs-per-user-max");
        assert_eq!(setting.variable(), "TABCAST_TABS_PER_USER_MAX");
        assert!(!setting.is_list);
        assert!(Settings::ALL.iter().find(|s| s.name == "api_keys").unwrap().is_list);
        assert!(Settings::ALL.iter().all(|s| s.help.contains("efault") || s.help.contains("(default)")));
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        let shown = Settings::default().to_toml();
        let read = Sources::new().with_toml(&shown).unchecked().unwrap();
        assert_eq!(read.to_toml(), shown);
        assert_eq!(shown.lines().count(), Settings::ALL.len());
    }

    #[test]
    fn session_limits_leave_room_for_an_attachment() {
        let expected = SessionLimits { message_bytes_max: (64 << 10) + 1_398_104, ..SessionLimits::default() };
        let settings = Settings { api_keys: vec![KeyDigest::of(b"k")], ..Settings::default() };
        assert_eq!(settings.session_limits(), expected);
        let unlimited =
            SessionLimits { inbound_messages_per_second_max: 0, inbound_bytes_per_second_max: 0, ..expected };
        assert_eq!(Settings::default().session_limits(), unlimited, "in development mode");
    }

    #[test]
    fn a_single_key_of_any_class_ends_development_mode() {
        assert!(Settings::default().is_development());
        let key = KeyDigest::of(b"k");
        let user_key = UserKey { user: star(), digest: key.clone() };
        assert!(!Settings { api_keys: vec![key.clone()], ..Settings::default() }.is_development());
        assert!(!Settings { operator_keys: vec![key], ..Settings::default() }.is_development());
        assert!(!Settings { openai_keys: vec![user_key], ..Settings::default() }.is_development());
    }
}
