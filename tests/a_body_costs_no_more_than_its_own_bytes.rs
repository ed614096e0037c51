//! A body of `/api`, however it is made, costs a few times its bytes while it is read: never a tree of values.
#![cfg(feature = "gateway")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method};
use tabcast::engine::{Engine, EngineSettings};
use tabcast::gateway::api::{Api, ApiLimits, ApiRequest};
use tabcast::platform::adapter::BotIdentity;
use tabcast::platform::webchat::WebChat;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, with the most bytes that each thread held.
struct Measuring;

#[expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts and passes on")]
// SAFETY: every call is passed on to `System` unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn count(bytes: isize) {
    // A thread that is ending counts no more.
    let live = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        live.get()
    });
    let _ = live.map(|live| PEAK.try_with(|peak| peak.set(peak.get().max(live))));
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

/// `run`, and the most bytes that this thread held more than before.
fn peak<T>(run: impl FnOnce() -> T) -> (usize, T) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = run();
    (usize::try_from(PEAK.get() - before).unwrap(), result)
}

const BODY_BYTES: usize = 1 << 20;

/// `head`, `part` again and again, and `tail`: together about [`BODY_BYTES`].
fn body(head: &str, part: &str, tail: &str) -> Bytes {
    Bytes::from(format!("{head}{}{tail}", part.repeat(BODY_BYTES / part.len())))
}

#[test]
fn of_any_call() {
    let chat = WebChat::new(Arc::new(Engine::new(EngineSettings::default())), BotIdentity::default());
    let api = Api::new(Arc::new(chat), ApiLimits::default());
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    let check = |name: &str, body: &Bytes, status: u16, bytes_max: usize| {
        let path = &format!("/api/{name}");
        let (method, headers, body) = (&Method::POST, &headers, body.clone());
        let request = ApiRequest { method, path, query: None, headers, caller: "w", body };
        let (bytes, response) = peak(|| api.handle(request).now_or_never().unwrap());
        let text = String::from_utf8_lossy(response.body());
        assert_eq!(response.status().as_u16(), status, "{name}: {text}");
        assert!(bytes <= bytes_max, "{name} took {bytes} bytes: {text}");
    };
    // What an answer and a description of buttons may take.
    const SMALL: usize = 384 << 10;
    for field in ["active", "buttons", "view", "new"] {
        let one = format!(r#"{{"channel_id":"u","text":"t","{field}":["#);
        for (part, last) in [("0,", "0]}"), (r#"{"children":[{"label":"a"}]},"#, "{}]}")] {
            let body = body(&one, part, last);
            check("buttons", &body, 400, SMALL);
            check("send", &body, 200, SMALL);
            check("typing", &body, 400, SMALL);
        }
        // A level costs a byte, in a list that grows by doubling.
        check("buttons", &body(&one, "[", ""), 400, 3 * BODY_BYTES);
        check("buttons", &body(&one, r#"{"children":["#, ""), 400, BODY_BYTES);
    }
    // Escapes are undone into a buffer that grows by doubling, and copied once.
    check("send", &body(r#"{"text":"","channel_id":"\n"#, "t", r#""}"#), 400, 4 * BODY_BYTES);
    check("file", &body(r#"{"channel_id":"u","filename":"","data":""#, "AAAA", r#""}"#), 400, BODY_BYTES);
    check("file", &body(r#"{"channel_id":"u","filename":"","data":"\u0041AAA"#, "AAAA", r#""}"#), 400, 4 * BODY_BYTES);
}
