//! What must not grow with the number of frames: system calls. Real sockets and the real driver; the calls are counted
//! where they are made, by functions of libc's names that stand before libc's.
#![cfg(all(feature = "cli", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use support::shards::{PAUSE, PAUSES, Shards};
use support::{Client, PATIENCE, Seen, now};
use tabcast::id::{ChannelId, MessageId};
use tabcast::metrics::Reading;
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::Frame;

thread_local! {
    /// This thread is the test's: its calls are not a shard's.
    static IS_CLIENT: Cell<bool> = const { Cell::new(false) };
    /// Calls of this thread.
    static OWN_CALLS: Cell<usize> = const { Cell::new(0) };
}

#[expect(unsafe_code, reason = "a function of libc's is replaced by one that counts and calls it")]
mod counted {
    use super::{AtomicUsize, IS_CLIENT, OWN_CALLS, Ordering};
    use std::ffi::{CStr, c_char, c_int, c_void};
    use std::sync::OnceLock;

    unsafe extern "C" {
        safe fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
    }

    /// The next object that has the symbol: libc.
    fn next(symbol: &CStr) -> usize {
        const RTLD_NEXT: *mut c_void = std::ptr::without_provenance_mut(usize::MAX);
        let found = dlsym(RTLD_NEXT, symbol.as_ptr());
        assert!(!found.is_null(), "libc has no {symbol:?}");
        found as usize
    }

    macro_rules! counted {
        ($($count:ident $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
            $(
                pub(super) static $count: AtomicUsize = AtomicUsize::new(0);

                // SAFETY: the signature is libc's, and every call is passed on to libc unchanged.
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $name($($argument: $kind),*) -> $result {
                    static NEXT: OnceLock<usize> = OnceLock::new();
                    // A thread that is ending is no shard's.
                    if !IS_CLIENT.try_with(|is_client| is_client.get()).unwrap_or(true) {
                        // Relaxed: a statistic, publishes nothing.
                        $count.fetch_add(1, Ordering::Relaxed);
                    }
                    let _ = OWN_CALLS.try_with(|calls| calls.set(calls.get() + 1));
                    let address = *NEXT.get_or_init(|| {
                        let name = concat!(stringify!($name), "\0").as_bytes();
                        next(CStr::from_bytes_with_nul(name).expect("it ends with one"))
                    });
                    // SAFETY: libc's function of that name has this signature.
                    let function: unsafe extern "C" fn($($kind),*) -> $result = unsafe { std::mem::transmute(address) };
                    // SAFETY: the caller's promise is passed on.
                    unsafe { function($($argument),*) }
                }
            )*
        };
    }

    counted! {
        SENDS send(socket: c_int, bytes: *const c_void, length: usize, flags: c_int) -> isize;
        VECTORED writev(file: c_int, slices: *const c_void, count: c_int) -> isize;
        WRITES write(file: c_int, bytes: *const c_void, length: usize) -> isize;
        RECEIVES recv(socket: c_int, bytes: *mut c_void, length: usize, flags: c_int) -> isize;
        READS read(file: c_int, bytes: *mut c_void, length: usize) -> isize;
        POLLS epoll_wait(poll: c_int, events: *mut c_void, events_max: c_int, timeout: c_int) -> c_int;
    }
}

/// System calls of the shards' threads.
#[derive(Debug)]
struct Calls {
    sends: usize,
    receives: usize,
    polls: usize,
    /// Of descriptors that are no sockets: wake-ups.
    wakes: usize,
}

fn calls() -> Calls {
    let of = |counts: &[&AtomicUsize]| counts.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    Calls {
        sends: of(&[&counted::SENDS, &counted::VECTORED]),
        receives: of(&[&counted::RECEIVES]),
        polls: of(&[&counted::POLLS]),
        wakes: of(&[&counted::WRITES, &counted::READS]),
    }
}

/// Counted in `run`, in which nothing else is done.
fn counted<T>(run: impl FnOnce() -> T) -> (Calls, T) {
    let before = calls();
    let result = run();
    let after = calls();
    let counted = Calls {
        sends: after.sends - before.sends,
        receives: after.receives - before.receives,
        polls: after.polls - before.polls,
        wakes: after.wakes - before.wakes,
    };
    (counted, result)
}

/// Calls are counted for the whole process: one test at a time. The caller's thread is no shard's.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    IS_CLIENT.set(true);
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `post` while the one shard is held up, so that it finds all of it at once.
fn post_at_once(pausing: &mut Client, post: impl FnOnce()) {
    let paused = PAUSES.load(Ordering::Acquire);
    let pause = PAUSE.lock().unwrap_or_else(PoisonError::into_inner);
    pausing.send(&json!({"pause": true}));
    let deadline = now() + PATIENCE;
    while PAUSES.load(Ordering::Acquire) == paused {
        assert!(now() < deadline, "the shard does not read");
        std::thread::yield_now();
    }
    post();
    drop(pause);
}

fn user() -> ChannelId {
    ChannelId::parse("u").unwrap()
}

fn messages(count: usize, bytes: usize) -> Vec<Frame> {
    let message = |number: usize| {
        let text = format!("{number:0bytes$}");
        let timestamp = Timestamp::from_micros(1);
        let id = MessageId::random();
        Frame::encode(&Event::Message { id, text: &text, sender: "star", reply_to: None, timestamp })
    };
    (0..count).map(message).collect()
}

/// A reader of an event stream, its head read.
fn stream(shards: &Shards) -> Client {
    let mut client = Client::connect(shards.address());
    client.write(b"GET /events?user=u HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(client.head().starts_with("HTTP/1.1 200 "));
    client
}

fn total<R: Reading>(shards: &Shards, pick: impl Fn(&tabcast::metrics::ShardMetrics) -> &R) -> usize {
    usize::try_from(shards.hub.metrics().sum(pick)).unwrap()
}

/// 16 frames for each of 1,000 tabs: 1,000 system calls. So it is for event streams, and for frames that are too large
/// to be gathered by copy.
#[test]
fn a_session_gets_all_that_waits_for_it_in_one_call() {
    const FRAMES: usize = 16;
    let _alone = alone();
    let shards = Shards::start(1);
    let mut tabs: Vec<_> = (0..1_000).map(|_| Client::tab(shards.address(), "user=u")).collect();
    let mut streams: Vec<_> = (0..200).map(|_| stream(&shards)).collect();
    let mut pausing = Client::tab(shards.address(), "user=another");
    let readers = tabs.len() + streams.len();
    for bytes in [100, 2_500] {
        let frames = messages(FRAMES, bytes);
        let written = total(&shards, |shard| &shard.writes);
        let ((count, ()), posts) = {
            let mut posts = 0;
            let post = || frames.iter().for_each(|frame| posts += shards.hub.post(&user(), frame).unwrap().tabs);
            let run = || {
                post_at_once(&mut pausing, post);
                for tab in &mut tabs {
                    for frame in &frames {
                        assert_eq!(tab.frame(), Seen::Text(frame.json().to_vec()));
                    }
                }
                for stream in &mut streams {
                    for frame in &frames {
                        let form = frame.event_stream().unwrap();
                        assert_eq!(stream.take(form.prefix.len() + form.body.len()), [form.prefix, form.body].concat());
                    }
                }
            };
            (counted(run), posts)
        };
        assert_eq!(posts, FRAMES * readers);
        assert_eq!(count.sends, readers, "{count:?}");
        assert_eq!(total(&shards, |shard| &shard.writes) - written, readers, "what the metric says");
        // The one that was held up has one message; nobody else is looked at.
        assert_eq!(count.receives, 1, "{count:?}");
        // One for the sockets and one for the runtime in a turn, which is 64 writes at the least.
        assert!(count.polls + count.wakes <= 8 + readers / 32, "{count:?}");
    }
    drop((tabs, streams, pausing));
    assert_eq!(shards.drain(Duration::ZERO, PATIENCE), 0);
}

/// From when the kernel takes no more until it does, a tab that does not read is not written to, whatever is published.
#[test]
fn a_stalled_tab_costs_no_call() {
    const STALLED: usize = 3;
    let _alone = alone();
    let shards = Shards::start(1);
    let mut tabs: Vec<_> = (0..30).map(|_| Client::tab(shards.address(), "user=u")).collect();
    let stall = |_| Client::connect_narrow(shards.address(), 4 << 10).upgraded("user=u");
    let mut stalled: Vec<_> = (0..STALLED).map(stall).collect();
    let mut publish = |frame: &Frame| {
        assert_eq!(shards.hub.post(&user(), frame).unwrap().tabs, tabs.len() + STALLED);
        tabs.iter_mut().for_each(|tab| assert_eq!(tab.frame(), Seen::Text(frame.json().to_vec())));
    };
    let fill = messages(600, 16 << 10);
    fill.iter().for_each(&mut publish);
    let frames = messages(100, 1_000);
    let (count, ()) = counted(|| frames.iter().for_each(&mut publish));
    assert_eq!(count.sends, frames.len() * tabs.len(), "{count:?}");
    for tab in &mut stalled {
        fill.iter().chain(&frames).for_each(|frame| assert_eq!(tab.frame(), Seen::Text(frame.json().to_vec())));
    }
    drop((tabs, stalled));
    assert_eq!(shards.drain(Duration::ZERO, PATIENCE), 0);
}

#[test]
fn a_message_from_a_tab_is_read_in_one_call_and_answered_in_another() {
    const MESSAGES: usize = 200;
    let _alone = alone();
    let shards = Shards::start(1);
    let mut others: Vec<_> = (0..100).map(|_| Client::tab(shards.address(), "user=u")).collect();
    let mut tab = Client::tab(shards.address(), "user=u");
    let talk = |tab: &mut Client, count| {
        for _ in 0..count {
            tab.send(&json!({"join": "r"}));
            assert_eq!(tab.json(), json!({"type": "pong"}));
        }
    };
    talk(&mut tab, 1);
    let (count, ()) = counted(|| talk(&mut tab, MESSAGES));
    assert_eq!((count.sends, count.receives), (MESSAGES, MESSAGES), "{count:?}");
    assert!(count.polls + count.wakes <= 3 * MESSAGES, "{count:?}");
    others.iter_mut().for_each(|other| other.stream.shutdown(std::net::Shutdown::Both).unwrap());
    drop(tab);
    assert_eq!(shards.drain(Duration::ZERO, PATIENCE), 0);
}

/// A publisher that finds shards asleep wakes one of them, which wakes the others; awake ones cost it nothing.
#[test]
fn a_publish_makes_at_most_one_call() {
    let _alone = alone();
    for count in [1, 4] {
        let shards = Shards::start(count);
        let mut tabs: Vec<_> = (0..64).map(|_| Client::tab(shards.address(), "user=u")).collect();
        for frame in messages(50, 100) {
            let before = OWN_CALLS.get();
            shards.hub.post(&user(), &frame).unwrap();
            let calls = OWN_CALLS.get() - before;
            assert!(calls <= 1, "{calls} calls to wake {count} shards");
            tabs.iter_mut().for_each(|tab| assert_eq!(tab.frame(), Seen::Text(frame.json().to_vec())));
        }
        if count == 1 {
            let mut spent = 0;
            let frames = messages(50, 100);
            let post = || {
                let before = OWN_CALLS.get();
                for frame in &frames {
                    shards.hub.post(&user(), frame).unwrap();
                }
                spent = OWN_CALLS.get() - before;
            };
            post_at_once(&mut Client::tab(shards.address(), "user=another"), post);
            assert_eq!(spent, 0, "an awake shard is not rung");
        }
        drop(tabs);
        assert_eq!(shards.drain(Duration::ZERO, PATIENCE), 0);
    }
}
