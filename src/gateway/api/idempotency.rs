//! Answers that are kept for repeats of a request.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The most bytes of an `Idempotency-Key`.
pub(super) const KEY_BYTES_MAX: usize = 255;
/// What one answer costs beside its key and body: map, queue and allocations, about.
const ENTRY_BYTES: usize = 320;
/// One answer takes at most one of so many parts of what all may take.
const LARGEST_PART: usize = 10;

/// How many answers are kept, and for how long.
///
/// Only answers to requests that were carried out are kept: after an error nothing was done, and a repeat is a new
/// try. A batch is carried out once it was begun: a repeat gets the same lines, also those that say `overloaded`, so
/// the rest is sent again under a new key. When a bound is reached the oldest answer goes early, and its repeat would
/// be carried out again: at 10,000 keyed requests a second the default reaches 6 seconds back, not 10 minutes. An
/// answer that takes more than a tenth of `bytes_max` would push too many others out: it is not kept, and says so by
/// `Idempotency-Kept: false`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdempotencyLimits {
    /// Default 10 minutes.
    pub kept_for: Duration,
    /// Answers. Default 65,536.
    pub answers_max: usize,
    /// Their bytes, keys and bookkeeping included. Default 32 MiB, and that is what it may cost.
    pub bytes_max: usize,
}

impl Default for IdempotencyLimits {
    fn default() -> Self {
        Self { kept_for: Duration::from_secs(600), answers_max: 65_536, bytes_max: 32 << 20 }
    }
}

/// An answer as it is kept.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) status: StatusCode,
    pub(super) content_type: HeaderValue,
    pub(super) body: Bytes,
}

impl Stored {
    /// The response, by itself.
    pub(super) fn into_response(self) -> Response<Bytes> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, self.content_type);
        response
    }

    /// The response, of what a key stands for: a repeat says so.
    pub(super) fn into_repeat(self) -> Response<Bytes> {
        let mut response = self.into_response();
        response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
        response
    }

    /// The response, if it was not kept: a repeat would be carried out again.
    pub(super) fn into_promise_less(self) -> Response<Bytes> {
        let mut response = self.into_response();
        response.headers_mut().insert("idempotency-kept", HeaderValue::from_static("false"));
        response
    }
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finished {
    /// A repeat gets it.
    Kept,
    /// It is too large to be kept, and its key is free again.
    TooLarge,
}

/// What a key stands for now.
pub(super) enum Claim<'i> {
    /// Nobody has used it: carry the request out, and hand in the answer.
    First(Ticket<'i>),
    /// It was answered before.
    Repeat(Stored),
    /// It stands for another request.
    Mismatch,
}

type Fingerprint = [u8; 32];
/// Caller and key, neither of which can hold the zero between them.
type Key = Arc<str>;

enum Entry {
    /// Being carried out. Bounded by the requests that are.
    InFlight {
        fingerprint: Fingerprint,
        done: Arc<Notify>,
    },
    Done {
        fingerprint: Fingerprint,
        answer: Stored,
    },
}

struct State {
    entries: HashMap<Key, Entry>,
    /// Answers that are done, oldest first, and when they expire.
    oldest: VecDeque<(Instant, Key)>,
    bytes: usize,
}

/// The answers that are kept.
pub(super) struct Idempotency {
    limits: IdempotencyLimits,
    state: Mutex<State>,
}

impl std::fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idempotency").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Idempotency {
    pub(super) fn new(limits: IdempotencyLimits) -> Self {
        let state = State { entries: HashMap::new(), oldest: VecDeque::new(), bytes: 0 };
        Self { limits, state: Mutex::new(state) }
    }

    /// No code that can panic runs under the lock, so a poisoned state is still whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks what `key` stands for. While the same request is being carried out, waits for its answer.
    ///
    /// # Cancel safety
    /// Dropping it before it is ready claims nothing.
    pub(super) async fn claim(&self, caller: &str, key: &str, fingerprint: Fingerprint, now: Instant) -> Claim<'_> {
        let key: Key = Arc::from(format!("{caller}\0{key}"));
        loop {
            let done = {
                let mut state = self.state();
                state.expire(now, &self.limits);
                match state.entries.get(&key) {
                    None => {
                        let done = Arc::new(Notify::new());
                        state.entries.insert(Arc::clone(&key), Entry::InFlight { fingerprint, done });
                        return Claim::First(Ticket { store: self, key, fingerprint, is_done: false });
                    }
                    Some(Entry::InFlight { fingerprint: other, .. } | Entry::Done { fingerprint: other, .. })
                        if *other != fingerprint =>
                    {
                        return Claim::Mismatch;
                    }
                    Some(Entry::Done { answer, .. }) => return Claim::Repeat(answer.clone()),
                    // Made under the lock, so it hears the end of what it found there.
                    Some(Entry::InFlight { done, .. }) => Arc::clone(done).notified_owned(),
                }
            };
            done.await;
        }
    }
}

impl State {
    /// Drops what is too old or too much, oldest first.
    fn expire(&mut self, now: Instant, limits: &IdempotencyLimits) {
        while let Some((expires, _)) = self.oldest.front() {
            let is_over = self.oldest.len() > limits.answers_max || self.bytes > limits.bytes_max;
            if *expires > now && !is_over {
                return;
            }
            if let Some((_, key)) = self.oldest.pop_front()
                && let Some(Entry::Done { answer, .. }) = self.entries.remove(&key)
            {
                self.bytes -= cost(&key, &answer);
            }
        }
    }
}

fn cost(key: &str, answer: &Stored) -> usize {
    ENTRY_BYTES + key.len() + answer.body.len()
}

/// The right to answer for a key. Dropped without an answer, the key is free again.
pub(super) struct Ticket<'i> {
    store: &'i Idempotency,
    key: Key,
    fingerprint: Fingerprint,
    is_done: bool,
}

impl Ticket<'_> {
    /// Keeps the answer, and gives it to those who wait for it. One that takes more than a tenth of what all may take
    /// is not kept.
    pub(super) fn finish(mut self, answer: Stored, now: Instant) -> Finished {
        if cost(&self.key, &answer) > self.store.limits.bytes_max / LARGEST_PART {
            return Finished::TooLarge;
        }
        self.is_done = true;
        let (key, fingerprint) = (Arc::clone(&self.key), self.fingerprint);
        let mut state = self.store.state();
        state.bytes += cost(&key, &answer);
        state.oldest.push_back((now + self.store.limits.kept_for, Arc::clone(&key)));
        let before = state.entries.insert(key, Entry::Done { fingerprint, answer });
        state.expire(now, &self.store.limits);
        drop(state);
        wake(before);
        Finished::Kept
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            let before = self.store.state().entries.remove(&self.key);
            wake(before);
        }
    }
}

fn wake(entry: Option<Entry>) {
    if let Some(Entry::InFlight { done, .. }) = entry {
        done.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn stored(text: &'static str) -> Stored {
        let content_type = HeaderValue::from_static("application/json");
        Stored { status: StatusCode::OK, content_type, body: Bytes::from_static(text.as_bytes()) }
    }

    /// Claims `key` of the request `print` at second `at`, answers if it is the first, and says what it was.
    fn step(store: &Idempotency, begin: Instant, at: u64, key: &str, print: u8) -> String {
        let now = begin + Duration::from_secs(at);
        match store.claim("w", key, [print; 32], now).now_or_never() {
            None => "waits".to_owned(),
            Some(Claim::Mismatch) => "mismatch".to_owned(),
            Some(Claim::Repeat(answer)) => format!("repeat {}", String::from_utf8_lossy(&answer.body)),
            Some(Claim::First(ticket)) => {
                assert_eq!(ticket.finish(stored("answer"), now), Finished::Kept);
                "first".to_owned()
            }
        }
    }

    #[tokio::test]
    async fn answers_are_kept_for_their_time_and_within_their_bounds() {
        let begin = Instant::now();
        let limits = IdempotencyLimits { answers_max: 2, ..IdempotencyLimits::default() };
        let store = Idempotency::new(limits);
        let check = |at, key, print, expected: &str| assert_eq!(step(&store, begin, at, key, print), expected);
        check(0, "a", 1, "first");
        check(1, "a", 1, "repeat answer");
        check(1, "a", 2, "mismatch");
        check(599, "a", 1, "repeat answer");
        check(600, "a", 2, "first");
        check(601, "b", 1, "first");
        check(602, "c", 1, "first");
        check(603, "b", 1, "repeat answer");
        check(603, "a", 2, "first");
        let state = store.state();
        assert_eq!((state.entries.len(), state.oldest.len()), (2, 2));
        drop(state);
        let small = Idempotency::new(IdempotencyLimits { bytes_max: 3500, ..IdempotencyLimits::default() });
        for key in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"] {
            assert_eq!(step(&small, begin, 0, key, 1), "first");
            assert!(small.state().bytes <= 3500);
        }
        assert_eq!(step(&small, begin, 0, "b", 1), "repeat answer");
        assert_eq!(step(&small, begin, 0, "a", 1), "first");
    }

    #[tokio::test]
    async fn a_very_large_answer_is_not_kept_and_pushes_nothing_out() {
        let store = Idempotency::new(IdempotencyLimits { bytes_max: 10_000, ..IdempotencyLimits::default() });
        let now = Instant::now();
        for key in ["a", "b"] {
            assert_eq!(step(&store, now, 0, key, 1), "first");
        }
        let large = |bytes: usize| Stored { body: vec![b'x'; bytes].into(), ..stored("") };
        let finish = async |bytes: usize| {
            let Claim::First(ticket) = store.claim("w", "large", [1; 32], now).await else { panic!("not the first") };
            ticket.finish(large(bytes), now)
        };
        assert_eq!(finish(2_000).await, Finished::TooLarge);
        assert_eq!(finish(9_500).await, Finished::TooLarge);
        assert_eq!(finish(600).await, Finished::Kept);
        assert_eq!(step(&store, now, 0, "a", 1), "repeat answer");
        assert_eq!(step(&store, now, 0, "b", 1), "repeat answer");
    }

    #[tokio::test]
    async fn a_second_request_waits_for_the_first_and_takes_over_if_that_gives_up() {
        let store = Idempotency::new(IdempotencyLimits::default());
        let now = Instant::now();
        let Claim::First(first) = store.claim("w", "k", [1; 32], now).await else { panic!("not the first") };
        let (mut second, mut third) =
            (Box::pin(store.claim("w", "k", [1; 32], now)), Box::pin(store.claim("w", "k", [1; 32], now)));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        assert!(matches!(store.claim("w", "k", [2; 32], now).await, Claim::Mismatch));
        assert!(matches!(store.claim("other", "k", [2; 32], now).await, Claim::First(_)));
        drop(first);
        let Some(Claim::First(ticket)) = (&mut second).now_or_never() else { panic!("not taken over") };
        assert!((&mut third).now_or_never().is_none());
        assert_eq!(ticket.finish(stored("x"), now), Finished::Kept);
        assert!(matches!(third.now_or_never(), Some(Claim::Repeat(_))));
    }
}
