//! The most memory that the settings allow, as a sum with its terms.

use super::{Deflate, Settings, base64_bytes};
use crate::proto::deflate::{DEFLATER_BYTES, INFLATER_BYTES, JSON_BYTES_MAX, LARGE_BYTES_MIN, LARGE_DEFLATES_MAX};

/// A session without anything queued: its slot, timers, registry entry, identity and socket state.
const SESSION_BYTES: u64 = 1 << 10;
/// A room membership, in the session and in the room, whose lists grow by doubling; and the room itself, if nobody else
/// is in it.
const MEMBERSHIP_BYTES: u64 = 24 + 320;
/// An address in a map that has just grown.
const ADDRESS_BYTES: u64 = 40;
/// A session's place among those of its address, in a list that grows by doubling.
const PLACE_BYTES: u64 = 32;
/// How fast addresses ask for sessions and show wrong keys, and how fast users say something by requests.
const RATES_BYTES: u64 = 3 * 64 * (17 << 10);
/// A slot of an inbox.
const POST_BYTES: u64 = 64;
/// The read and write buffers of a connection that is not a session, beside its head.
const HTTP_BUFFERS_BYTES: u64 = 16 << 10;
/// What TLS keeps of a session beside what it may have to send: keys, mostly.
const TLS_SESSION_BYTES: u64 = 5 << 10;
/// What TLS keeps of a connection that is not a session: what is not whole, not read and not sent yet.
const TLS_HTTP_BYTES: u64 = 128 << 10;
/// What remembered answers may take, for each that may be remembered.
pub(crate) const IDEMPOTENCY_BYTES: usize = 1 << 10;
/// What a user may take while a listing is made and written, within the budget of bodies.
pub(crate) const LISTED_USER_BYTES: usize = 1 << 10;
/// What a body costs while it is held, in its own bytes: it may have grown by doubling, and what its texts and its
/// base64 decode to stands beside it.
const BODY_FORMS: u64 = 3;
/// What a body costs beside that while its JSON is parsed: texts with escapes, undone into a buffer that grows by
/// doubling, and copied. One body a thread.
const PARSE_FORMS: u64 = 3;
/// What an answer in one piece costs, in the bytes that it holds: its body is made while it is still there.
const WHOLE_FORMS: u64 = 2;
/// What the values of one `/v1` request may take while they are parsed, beside its bytes.
const REQUEST_BYTES: u64 = 64 << 20;
/// Messages that wait to be appended to workers' stream.
const APPENDER_BYTES: u64 = 64 << 20;
/// Files of other nodes that are held at one time.
const REMOTE_FILES: u64 = 16;
/// Threads for what is not a shard's, large bodies among it.
pub(crate) const CONTROL_THREADS: usize = 2;
/// A remembered client id with its user and message id.
const CLIENT_ID_BYTES: u64 = 640;
/// A kept file beside its bytes and names: its places in the store, and what counts its readers.
const KEPT_FILE_BYTES: u64 = 256;
/// A shard's stack, its runtime, and its pools of buffers and queue blocks.
const SHARD_BYTES: u64 = 8 << 20;
/// Code, main's stack, the control runtime, the page and the keys.
const BASE_BYTES: u64 = 32 << 20;

fn term(count: usize, bytes_each: u64) -> u64 {
    (count as u64).saturating_mul(bytes_each)
}

impl Settings {
    /// Frames that wait for Redis and from it, messages that wait for workers' stream, files of other nodes.
    fn redis_bytes(&self) -> u64 {
        if self.redis.is_empty() {
            return 0;
        }
        let spools = term(self.redis_spool_bytes_max, 2);
        spools.saturating_add(APPENDER_BYTES).saturating_add(term(self.file_bytes_max, REMOTE_FILES))
    }

    /// What counts sessions and connections by address, if each is of another one.
    fn address_bytes(&self) -> u64 {
        if self.is_development() {
            return 0;
        }
        let connections = term(self.http_connections_max, ADDRESS_BYTES);
        term(self.tabs_max, ADDRESS_BYTES + PLACE_BYTES).saturating_add(connections).saturating_add(RATES_BYTES)
    }

    /// Compressors of the threads that publish and of large frames, with what they write; what shards inflate with, and
    /// one message each.
    fn deflate_bytes(&self) -> u64 {
        if self.deflate == Deflate::Off {
            return 0;
        }
        let threads = self.shards.saturating_add(CONTROL_THREADS);
        let large = term(LARGE_DEFLATES_MAX, (DEFLATER_BYTES + JSON_BYTES_MAX) as u64);
        let message = self.message_bytes_max.saturating_add(base64_bytes(self.attachment_bytes_max));
        term(threads, (DEFLATER_BYTES + LARGE_BYTES_MIN) as u64)
            .saturating_add(large)
            .saturating_add(term(self.shards, (INFLATER_BYTES + message) as u64))
    }

    /// What sessions and other connections cost beside their plain form. What waits for sessions to take it is within
    /// `bytes_budget`, and what of their records is not whole within `inbound_bytes_max`.
    fn tls_bytes(&self) -> u64 {
        if self.tls_cert.is_none() {
            return 0;
        }
        term(self.tabs_max, TLS_SESSION_BYTES).saturating_add(term(self.http_connections_max, TLS_HTTP_BYTES))
    }

    /// The terms of the most memory, in bytes, that the process may take in user space, for settings from
    /// [`Sources::load`](super::Sources::load). The kernel's socket buffers come on top, about 4.4 KiB a session and
    /// more for those that read slowly.
    #[must_use]
    pub fn memory_worst_case(&self) -> Vec<(&'static str, u64)> {
        let head = self.header_bytes_max as u64;
        let inbound = self.inbound_bytes_max as u64;
        vec![
            (
                "sessions: (tabs_max + watchers_max) × 1 KiB",
                term(self.tabs_max.saturating_add(self.watchers_max), SESSION_BYTES),
            ),
            (
                "rooms: tabs_max × rooms_max × 344 B, each a room of its own",
                term(self.tabs_max, term(self.rooms_max, MEMBERSHIP_BYTES)),
            ),
            ("frames and queues: bytes_budget", self.bytes_budget as u64),
            (
                "inboxes: shards × (inbox_bytes_max + inbox_posts_max × 64 B)",
                term(self.shards, term(self.inbox_posts_max, POST_BYTES).saturating_add(self.inbox_bytes_max as u64)),
            ),
            ("incomplete messages, and those between tabs and queue: 2 × inbound_bytes_max", term(2, inbound)),
            ("worker's queue: worker_queue_bytes_max", self.worker_queue_bytes_max as u64),
            ("with Redis: 2 × redis_spool_bytes_max, 64 MiB for workers, 16 × file_bytes_max", self.redis_bytes()),
            ("request bodies, and what they decode to: 3 × bodies_bytes_max", term(self.bodies_bytes_max, BODY_FORMS)),
            (
                "bodies that are being parsed: 2 threads × 3 × body_bytes_max",
                term(self.body_bytes_max, PARSE_FORMS).saturating_mul(CONTROL_THREADS as u64),
            ),
            ("requests of /v1 that are being parsed: 2 threads × 64 MiB", term(CONTROL_THREADS, REQUEST_BYTES)),
            (
                "files: files_bytes_max + files_max × 256 B",
                term(self.files_max, KEPT_FILE_BYTES).saturating_add(self.files_bytes_max as u64),
            ),
            (
                "connections: http_connections_max × (header_bytes_max + 16 KiB)",
                term(self.http_connections_max, head.saturating_add(HTTP_BUFFERS_BYTES)),
            ),
            (
                "with deflate: (shards + 2) × 400 KiB, 6 MiB for large frames, shards × (112 KiB + a message)",
                self.deflate_bytes(),
            ),
            ("with TLS: tabs_max × 5 KiB + http_connections_max × 128 KiB", self.tls_bytes()),
            ("addresses, with keys: tabs_max × 72 B + http_connections_max × 40 B + 3.2 MiB", self.address_bytes()),
            ("answers: answers_max × 1 KiB", term(self.answers_max, SESSION_BYTES)),
            (
                "answers in one piece, and their bodies: 2 × whole_answers_bytes_max",
                term(self.whole_answers_bytes_max, WHOLE_FORMS),
            ),
            ("idempotency: idempotency_keys_max × 1 KiB", term(self.idempotency_keys_max, IDEMPOTENCY_BYTES as u64)),
            ("doubles: client_ids_max × 640 B", term(self.client_ids_max, CLIENT_ID_BYTES)),
            ("stacks and pools: shards × 8 MiB", term(self.shards, SHARD_BYTES)),
            ("the process itself", BASE_BYTES),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Machine, Sources};

    #[test]
    fn every_term_grows_with_its_setting() {
        let sum = |toml: &str| -> u64 {
            let settings = Sources::new().with_toml(toml).load(Machine { cores: 2, open_files_max: 20_000 }).unwrap();
            settings.memory_worst_case().iter().map(|(_, bytes)| bytes).sum()
        };
        let base = sum("");
        assert!(base > 256 << 20 && base < 2 << 30, "{base}");
        for (toml, more) in [
            ("tabs_max = 18_900", -100 * (1024 + 64 * 344)),
            ("watchers_max = 33", 1 << 10),
            ("bytes_budget = '257MiB'", 1 << 20),
            ("inbox_bytes_max = '65MiB'", 2 << 20),
            ("inbound_bytes_max = '65MiB'", 2 << 20),
            ("worker_queue_bytes_max = '65MiB'", 1 << 20),
            ("bodies_bytes_max = '129MiB'", 3 << 20),
            ("body_bytes_max = '25MiB'", 6 << 20),
            ("files_bytes_max = '65MiB'", 1 << 20),
            ("files_max = 10_001", 256),
            ("http_connections_max = 1025", 32 << 10),
            ("idempotency_keys_max = 10_001", 1 << 10),
            ("client_ids_max = 100_001", 640),
            ("answers_max = 20_001", 1 << 10),
            ("whole_answers_bytes_max = '65MiB'", 2 << 20),
            ("api_keys = ['k']", 19_000 * 72 + 1_024 * 40 + 3 * (1_088 << 10)),
            ("tls_cert = 'c'\ntls_key = 'k'", 19_000 * (5 << 10) + (128 << 20)),
            ("redis = ['redis://h']", (2 * 64 + 64 + 16 * 16) << 20),
            ("shards = 3", (64 << 20) + 4096 * 64 + (8 << 20)),
            ("deflate = 'on'", ((4 * 400 + 4 * (384 + 1024) + 2 * (112 + 64)) << 10) + 2 * 1_398_104),
        ] {
            assert_eq!(sum(toml).checked_signed_diff(base), Some(more), "{toml}");
        }
    }
}
