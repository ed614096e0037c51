//! Peers that do not read, do not answer or do not go on: each is ended within its deadline, by the right code or status,
//! and costs no more than its bound. What never begins (a head, a TLS handshake, a body of which nothing comes) is in
//! `slow_and_odd_http_is_answered`, `a_tls_handshake_that_fails_is_over_soon` and `an_address_has_its_limits`.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use serde_json::json;
use support::tls::Authority;
use support::{Client, Gateway, PATIENCE, Seen, get, handshake, masked, now};

/// How much later than its deadline something may be on a busy machine.
const SLACK: Duration = Duration::from_secs(6);

/// Small queues, and nobody is pinged.
const SMALL: [(&str, &str); 6] = [
    ("shards", "1"),
    ("session_queue_bytes_max", "64KiB"),
    ("recovery_bytes_max", "1KiB"),
    ("heartbeat_interval", "10m"),
    ("close_timeout", "1s"),
    ("worker", "none"),
];

/// A tab whose connection holds little.
fn narrow_tab(gateway: &Gateway, user: &str) -> Client {
    Client::connect_narrow(gateway.address, 4 << 10).upgraded(&format!("user={user}"))
}

/// What a queue of 64 KiB may hold: that behind its first frame, which may be one of the texts, and what we say to a
/// tab before we cut it.
const QUEUE_BYTES_MAX: u64 = (64 << 10) + (4 << 10) + 2_048;

/// Sends `user` texts of 4 KiB, each on a connection of its own, until `ended` of its tabs have ended for `reason`;
/// returns how many, and the most bytes that were seen in all queues together.
fn send_until_ended(gateway: &Gateway, user: &str, (reason, ended): (&str, u64)) -> (usize, u64) {
    let metric = format!("tabcast_ended_sessions_total{{reason=\"{reason}\"}}");
    let deadline = now() + PATIENCE;
    let text = "x".repeat(4 << 10);
    let mut most = 0;
    for sent in 1.. {
        gateway.post("/api/send", &json!({ "channel_id": user, "text": text }));
        most = most.max(gateway.metric("tabcast_queue_bytes"));
        if sent % 8 == 0 && gateway.metric(&metric) >= ended {
            return (sent, most);
        }
        assert!(now() < deadline, "{sent} messages, and nobody is cut");
    }
    unreachable!()
}

/// The connection is dropped: what is written to it is answered by a reset.
fn expect_reset(stream: &mut TcpStream, within: Duration) {
    let start = now();
    loop {
        match stream.write(&masked(10, b"")) {
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => return,
            Err(error) => assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}"),
            Ok(_) => {}
        }
        assert!(start.elapsed() < within, "the connection is still held");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn one_that_never_reads_is_cut_and_one_that_reads_gets_everything() {
    let gateway = Gateway::start(&SMALL);
    let (mut stalled, mut reader) = (narrow_tab(&gateway, "u"), gateway.tab("user=u"));
    let mut other = narrow_tab(&gateway, "u");
    let reading = std::thread::spawn(move || {
        let mut texts = 0;
        while matches!(reader.frame(), Seen::Text(_)) {
            texts += 1;
        }
        texts
    });
    let (sent, most) = send_until_ended(&gateway, "u", ("slow_consumer", 2));
    // More was written to their sockets, which the kernel bounds.
    assert!(sent < 4_000, "{sent} messages of 4 KiB waited for a tab that does not read");
    assert!((32 << 10..=3 * QUEUE_BYTES_MAX).contains(&most), "{most} bytes in the queues of three tabs");
    // One reads now, within the time that it has for that: a frame that was begun, and why it is over.
    let close = loop {
        match stalled.frame() {
            Seen::Text(_) => {}
            Seen::Close(code, reason) => break (code, reason),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close, (4008, "slow consumer".to_owned()));
    // The other one never does.
    expect_reset(&mut other.stream, Duration::from_secs(1) + SLACK);
    gateway.post("/api/send", &json!({ "channel_id": "u", "text": "last" }));
    let request = b"DELETE /api/users/u HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut operator = gateway.connect();
    operator.write(request);
    assert_eq!(operator.response().status, 200);
    assert_eq!(reading.join().unwrap(), sent + 1);
}

/// Reads a byte a second, and says all the time that it lives: only the bound of its queue ends it.
#[test]
fn one_that_reads_a_byte_at_a_time_is_cut_by_the_bound_of_its_queue() {
    let settings = [&SMALL[..], &[("heartbeat_interval", "2s"), ("heartbeat_timeout", "2s")]].concat();
    let gateway = Gateway::start(&settings);
    let tab = narrow_tab(&gateway, "u");
    let mut stream = tab.stream.try_clone().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let (stop, stopped) = sync_channel::<()>(0);
    let reading = std::thread::spawn(move || {
        let (mut bytes, mut byte, mut next) = (0_u32, [0], now());
        while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
            if now() >= next {
                next += Duration::from_secs(1);
                bytes += u32::from(stream.read(&mut byte).is_ok_and(|read| read == 1));
            }
            // It may be over by now.
            let _ = stream.write_all(&masked(10, b""));
        }
        bytes
    });
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(gateway.metric("tabcast_ended_sessions_total"), 0, "a pong is a sign of life");
    let (sent, most) = send_until_ended(&gateway, "u", ("slow_consumer", 1));
    assert!(sent < 4_000, "{sent}");
    assert!((32 << 10..=QUEUE_BYTES_MAX).contains(&most), "{most} bytes in its queue");
    drop(stop);
    let bytes = reading.join().unwrap();
    assert!((2..=60).contains(&bytes), "{bytes}");
}

/// Its other end is gone without a word: nothing comes back, and what is sent to it is taken by nobody.
#[test]
fn one_that_is_gone_without_a_word_ends_within_a_heartbeat() {
    let gateway = Gateway::start(&[
        ("heartbeat_interval", "1s"),
        ("heartbeat_timeout", "1s"),
        ("close_timeout", "1s"),
        ("worker", "none"),
    ]);
    let start = now();
    let mut gone: Vec<_> = (0..20).map(|user| gateway.tab(&format!("user=u{user}"))).collect();
    let mut lives = gateway.tab("user=lives");
    let living = std::thread::spawn(move || {
        for _ in 0..5 {
            let Seen::Ping(payload) = lives.frame() else { panic!("no ping") };
            lives.write(&masked(10, &payload));
        }
        lives.send(&json!({"type": "ping"}));
        assert_eq!(lives.json(), json!({"type": "pong"}));
    });
    // Half of a frame is a sign of life once, and no more.
    for (tab, part) in gone.iter_mut().zip([&[][..], &[0x81], &[0x81, 0x85, 0, 0, 0, 0, b'h']].into_iter().cycle()) {
        tab.write(part);
    }
    for tab in &mut gone {
        assert_eq!(tab.closed(), (4009, "heartbeat timeout".to_owned()));
    }
    // Up to two seconds until the first ping, one for the answer, and ticks of a second.
    assert!(start.elapsed() < Duration::from_secs(5) + SLACK, "{:?}", start.elapsed());
    // They do not answer the close either.
    for tab in &mut gone {
        expect_reset(&mut tab.stream, Duration::from_secs(2) + SLACK);
    }
    living.join().unwrap();
    assert_eq!(gateway.metric("tabcast_ended_sessions_total{reason=\"heartbeat_timeout\"}"), 20);
}

/// Sends `bytes`, then one more byte every 100 ms for as long as it can: how long that was, and what was said.
fn trickle(mut stream: TcpStream, bytes: &[u8], byte: u8) -> (Duration, String) {
    let start = now();
    stream.write_all(bytes).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut said = Vec::new();
    loop {
        let mut buffer = [0; 1024];
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => said.extend_from_slice(&buffer[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "it goes on for ever");
    }
    (start.elapsed(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_byte_now_and_then_ends_no_later_than_nothing_at_all() {
    let times = [("header_timeout", "1s"), ("body_timeout", "1s"), ("shards", "1")];
    let gateway = Gateway::start(&times);
    let check = |bytes: &[u8], byte: u8, expected: &str| {
        let (time, said) = trickle(gateway.connect().stream, bytes, byte);
        assert!(said.starts_with(expected), "{said:?}");
        assert!((Duration::from_millis(900)..Duration::from_secs(1) + SLACK).contains(&time), "{time:?}");
    };
    // A head, also that of a handshake; a body with a length, and one in chunks.
    let head = handshake("user=u");
    check(b"G", b'E', "HTTP/1.1 408 ");
    check(&head[..head.len() - 4], b'x', "HTTP/1.1 408 ");
    check(&[&get("/healthz")[..], b"GET /x"].concat(), b'x', "HTTP/1.1 200 ");
    let body = b"POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    check(&[&body[..], b"Content-Length: 100000\r\n\r\n{"].concat(), b' ', "HTTP/1.1 408 ");
    check(&[&body[..], b"Transfer-Encoding: chunked\r\n\r\n4000\r\n{"].concat(), b' ', "HTTP/1.1 408 ");
    let authority = Authority::new();
    let gateway = authority.gateway(&times);
    // The record of a hello that is 16 KiB long, a byte at a time.
    let (time, said) = trickle(gateway.connect().stream, b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xfb", 3);
    assert!(time < Duration::from_secs(1) + SLACK && !said.starts_with("HTTP"), "{time:?} {said:?}");
}

/// Past the byte budget of the process the fattest queue is cut, and a thinner one that does not read either stays: also
/// one of another shard, to which comes what is too much.
#[test]
fn the_budget_cuts_the_fattest_first() {
    let gateway = Gateway::start(&[
        ("shards", "2"),
        ("file_bytes_max", "64KiB"),
        ("bytes_budget", "2MiB"),
        ("recovery_bytes_max", "1KiB"),
        ("recovery_total_bytes_max", "128KiB"),
        ("answers_bytes_max", "128KiB"),
        ("session_queue_bytes_max", "64MiB"),
        ("session_queue_frames_max", "100000"),
        ("heartbeat_interval", "10m"),
        ("close_timeout", "10s"),
        ("worker", "none"),
    ]);
    let mut thin = narrow_tab(&gateway, "thin");
    // The kernel chooses the shard: the last of these is not on the thin one's.
    let mut others = Vec::new();
    let has_tabs = |shard: u8| gateway.metric(&format!("tabcast_shard_sessions{{shard=\"{shard}\"}}")) > 0;
    while !(has_tabs(0) && has_tabs(1)) {
        others.push(narrow_tab(&gateway, &format!("u{}", others.len())));
        assert!(others.len() < 100, "all of them on one shard");
    }
    let fat_user = format!("u{}", others.len() - 1);
    let mut fat = others.pop().unwrap();
    let text = "x".repeat(4 << 10);
    // More than its connection holds waits for the thin one.
    let mut thin_texts = 0;
    while gateway.metric("tabcast_queue_frames") < 8 {
        gateway.post("/api/send", &json!({ "channel_id": "thin", "text": text }));
        thin_texts += 1;
        assert!(thin_texts < 10_000, "a connection without end");
    }
    while gateway.metric("tabcast_queue_bytes") < 3 << 19 {
        gateway.post("/api/send", &json!({ "channel_id": fat_user, "text": text }));
    }
    thin_texts += send_until_ended(&gateway, "thin", ("over_budget", 1)).0;
    assert!(thin_texts < 4_000, "{thin_texts} messages of 4 KiB are over 2 MiB");
    let close = loop {
        match fat.frame() {
            Seen::Text(_) => {}
            Seen::Close(code, reason) => break (code, reason),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close, (1013, "over budget".to_owned()));
    gateway.post("/api/send", &json!({ "channel_id": "thin", "text": "last" }));
    for _ in 0..thin_texts {
        assert_eq!(thin.json()["text"], text);
    }
    assert_eq!(thin.json()["text"], "last");
    assert_eq!(gateway.metric("tabcast_ended_sessions_total"), 1);
}
