//! Clients that are slow, too large or unusual get the standard status, or the end of their connection.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use support::{Client, Gateway, Response, get, now, post};

/// Without a timeout that a busy machine could reach.
const SETTINGS: &[(&str, &str)] =
    &[("header_bytes_max", "8KiB"), ("file_bytes_max", "32KiB"), ("body_bytes_max", "64KiB"), ("shards", "1")];

fn ask(gateway: &Gateway, request: &[u8]) -> Response {
    let mut client = gateway.connect();
    client.write(request);
    let method = request.split(|byte| *byte == b' ').next().unwrap();
    client.response_to(std::str::from_utf8(method).unwrap())
}

fn send(head: &str) -> Vec<u8> {
    format!("POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}").into_bytes()
}

#[test]
fn unusual_requests() {
    let gateway = Gateway::start(SETTINGS);
    let check = |request: &[u8], status: u16, code: &str| {
        let response = ask(&gateway, request);
        let shown = String::from_utf8_lossy(&request[..request.len().min(200)]).into_owned();
        assert_eq!((response.status, response.code().as_str()), (status, code), "{shown}\n{}", response.text());
        response
    };
    let line = |line: &str| format!("{line} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes();

    let head = check(&line("HEAD /healthz"), 200, "");
    assert_eq!(head.header("content-length"), Some("15"));
    check(&line("OPTIONS /healthz"), 405, "method_not_allowed");
    assert_eq!(check(&line("BREW /healthz"), 405, "method_not_allowed").header("allow"), Some("GET, HEAD"));
    let put = b"PUT /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n";
    check(put, 405, "method_not_allowed");
    check(&line("DELETE /"), 405, "method_not_allowed");
    check(&line("GET /nowhere"), 404, "not_found");
    check(&line("GET //healthz"), 200, "");
    check(&line("GET ///api//users"), 200, "");
    check(&line("GET /ws?user=u"), 426, "upgrade_required");
    check(b"nonsense\r\n\r\n", 400, "");
    // An intermediary may send the absolute form.
    check(&line("GET http://localhost/healthz"), 200, "");

    let old = ask(&gateway, b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n");
    assert_eq!((old.status, old.text().as_str()), (200, r#"{"status":"ok"}"#));
    check(
        b"GET /ws?user=u HTTP/1.0\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        426,
        "upgrade_required",
    );
    check(b"GET /events?user=u HTTP/1.0\r\nHost: localhost\r\n\r\n", 505, "http_version");

    let long = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(32 << 10));
    assert_eq!(ask(&gateway, long.as_bytes()).status, 431);

    let user = |encoded: &str| -> Value {
        let response = check(&line(&format!("GET /api/users/{encoded}")), 200, "");
        serde_json::from_slice(&response.body).unwrap()
    };
    let _tab = gateway.tab("user=a%2Fb%20%C3%A9");
    let found = user("a%2Fb%20%C3%A9");
    assert_eq!((&found["user_id"], &found["tabs"]), (&"a/b é".into(), &1.into()));
    assert_eq!(user("a%2fb%20%c3%a9")["online"], true);
    assert_eq!(user("nobody")["online"], false);
    for bad in ["%00", "%ff", "a%0Ab", &"x".repeat(257), ""] {
        check(&line(&format!("GET /api/users/{bad}")), 400, "bad_field");
    }
    check(&post("/api/users/u", "application/json", b"{}"), 405, "method_not_allowed");
}

#[test]
fn bodies_that_are_large_slow_broken_or_in_chunks() {
    let gateway = Gateway::start(SETTINGS);
    let status = |request: &[u8]| {
        let response = ask(&gateway, request);
        (response.status, response.code())
    };
    let is = |status: u16, code: &str| (status, code.to_owned());
    let body = r#"{"channel_id":"u","text":"x"}"#;
    assert_eq!(status(&post("/api/send", "application/json", body.as_bytes())), is(200, ""));
    let chunks =
        format!("Transfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n1c;x=y\r\n{}\r\n0\r\nTrailer: t\r\n\r\n", &body[1..]);
    assert_eq!(status(&send(&chunks)), is(200, ""));
    // Announced, and only found out on the way.
    assert_eq!(status(&send("Content-Length: 65537\r\n\r\n")), is(413, "too_large"));
    let large = format!("Transfer-Encoding: chunked\r\n\r\n10001\r\n{}\r\n0\r\n\r\n", "x".repeat(0x10001));
    assert_eq!(status(&send(&large)), is(413, "too_large"));
    assert_eq!(status(&send("Transfer-Encoding: chunked\r\n\r\nzz\r\n")), is(400, "bad_request"));
    assert_eq!(status(&send("Content-Length: 0\r\n\r\n")).0, 400);
    assert_eq!(status(&send("Content-Length: 1\r\nContent-Length: 2\r\n\r\n12")).0, 400);
    assert_eq!(status(&send("Expect: 100-continue\r\nContent-Length: 70000\r\n\r\n")), is(413, "too_large"));
    let hasty = Gateway::start(&[("body_timeout", "500ms"), ("shards", "1")]);
    for slow in ["Content-Length: 5\r\n\r\n1234", "Transfer-Encoding: chunked\r\n\r\n4\r\n12"] {
        let response = ask(&hasty, &send(slow));
        assert_eq!((response.status, response.code()), is(408, "timeout"), "{slow}");
    }
    // A body that nobody reads is not taken for the next request.
    let mut client = gateway.connect();
    client.write(&post("/nowhere", "text/plain", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    client.write(&get("/healthz"));
    assert_eq!((client.response().status, client.response().text().as_str()), (404, r#"{"status":"ok"}"#));
}

#[test]
fn what_is_answered_before_it_is_a_request_is_counted_too() {
    // As long as this process may be kept from what it is about to send.
    let gateway = Gateway::start(&[("header_timeout", "3s"), ("shards", "1")]);
    let twice = b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
    let long = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(32 << 10));
    let statuses = [&b"nonsense\r\n\r\n"[..], twice, long.as_bytes(), b"GET /healthz HT"].map(|request| {
        let mut client = gateway.connect();
        client.write(request);
        client.response().status
    });
    assert_eq!(statuses, [400, 400, 431, 408]);
    // It is counted after it is written.
    gateway.wait_for_metric("tabcast_http_responses_total{status=\"4xx\"}", 4);
    assert_eq!(gateway.metric("tabcast_http_responses_total{status=\"4xx\"}"), 4);
}

/// The connection ends, with 408 or without a word, in about `after`.
fn expect_end(mut client: Client, after: Duration) {
    let start = now();
    let said = String::from_utf8(client.until_the_end()).unwrap();
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 408 "), "{said}");
    assert!(start.elapsed() < after + Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn connections_on_which_nothing_comes_or_goes() {
    let gateway = Gateway::start(&[("header_timeout", "1s"), ("body_timeout", "500ms"), ("shards", "1")]);
    let timeout = Duration::from_secs(1);
    for part in ["", "GET /heal", "GET /healthz HTTP/1.1\r\nHost: local"] {
        let mut client = gateway.connect();
        client.write(part.as_bytes());
        expect_end(client, timeout);
    }
    let mut kept = gateway.connect();
    for _ in 0..2 {
        kept.write(&get("/healthz"));
        assert_eq!(kept.response().status, 200);
    }
    expect_end(kept, timeout);

    // Asks for more than the kernel holds and reads none of it: it would keep its place for ever.
    let mut client = Client::connect_narrow(gateway.address, 4 << 10);
    client.stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let requests = get("/app.js").repeat(1_000);
    let written = std::io::Write::write_all(&mut client.stream, &requests);
    let deadline = now() + support::PATIENCE;
    let is_reset = |error: &std::io::Error| {
        matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
    };
    if written.as_ref().is_err_and(is_reset) {
        return;
    }
    // The server is done with it when it answers nothing but a reset.
    loop {
        std::thread::sleep(Duration::from_millis(50));
        match std::io::Write::write(&mut client.stream, b"\r\n") {
            Err(error) if is_reset(&error) => break,
            _ => assert!(now() < deadline, "the connection is still held"),
        }
    }
}

/// Asks for more than any connection holds, and takes `bytes` of it every 100 ms: for how long, how much, and
/// whether the connection was still there after `time`.
fn read_slowly(gateway: SocketAddr, bytes: usize, time: Duration) -> (Duration, usize, bool) {
    let mut client = Client::connect_narrow(gateway, 64 << 10);
    client.write(&get("/app.js").repeat(2_000));
    let start = now();
    let (mut taken, mut part) = (0, vec![0; bytes]);
    while start.elapsed() < time {
        let mut left = bytes;
        while left > 0 {
            match std::io::Read::read(&mut client.stream, &mut part[..left]) {
                Ok(read @ 1..) => (taken, left) = (taken + read, left - read),
                _ => return (start.elapsed(), taken, false),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    (start.elapsed(), taken, true)
}

/// It always takes some before `body_timeout` is over: that alone would hold its place for ever.
#[test]
fn whoever_takes_a_response_too_slowly_is_cut_and_nobody_else() {
    let settings = [("body_timeout", "3s"), ("response_bytes_per_second_min", "256KiB"), ("shards", "1")];
    let gateway = Gateway::start(&settings);
    let mut events = gateway.connect();
    events.write(&get("/events?user=quiet"));
    assert!(events.head().starts_with("HTTP/1.1 200 "));
    let address = gateway.address;
    std::thread::scope(|scope| {
        // Eight times as fast as it has to be, and four times as slow.
        let fast = scope.spawn(|| read_slowly(address, 256 << 10, Duration::from_secs(10)));
        let (time, taken, is_there) = read_slowly(address, 6_400, support::PATIENCE);
        assert!(!is_there, "{taken} bytes in {time:?}, and it is still there");
        assert!(time > Duration::from_secs(3) && taken > 64 << 10, "{taken} bytes in {time:?}");
        let (time, taken, is_there) = fast.join().unwrap();
        assert!(is_there, "{taken} bytes in {time:?}");
    });
    assert_eq!(gateway.metric("tabcast_refusals_total{reason=\"slow_reader\"}"), 1);
    // A session has no response to take: it may be quiet for as long as it likes.
    gateway.post("/api/send", &serde_json::json!({ "channel_id": "quiet", "text": "still there" }));
    let mut said = String::new();
    while !said.contains("still there") {
        said.push_str(&String::from_utf8(events.take(1)).unwrap());
    }
}

#[test]
fn whoever_takes_nothing_of_a_response_makes_room() {
    let gateway = Gateway::start(&[("http_connections_max", "4"), ("header_timeout", "60s"), ("shards", "1")]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let start = now();
    let is_over = || stop.load(std::sync::atomic::Ordering::Relaxed) || start.elapsed() > support::PATIENCE * 2;
    let mut slow: Vec<_> = (0..4).map(|_| Client::connect_narrow(gateway.address, 16 << 10)).collect();
    slow.iter_mut().for_each(|client| client.write(&get("/app.js").repeat(2_000)));
    std::thread::scope(|scope| {
        for client in &mut slow {
            // Less in a second than a kernel takes at one time, but never nothing.
            scope.spawn(move || {
                let mut part = [0; 512];
                while !is_over() && matches!(std::io::Read::read(&mut client.stream, &mut part), Ok(1..)) {
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
        let ask = || {
            let mut client = gateway.connect();
            client.write(&get("/metrics"));
            let metrics = client.response().text();
            (client, support::metric_in(&metrics, "tabcast_evicted_connections_total"))
        };
        let (mut first, evicted) = ask();
        assert_eq!(evicted, 1);
        // Whoever has nothing to take goes before them.
        let (_second, evicted) = ask();
        assert_eq!(evicted, 2);
        assert!(first.until_the_end().is_empty());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
