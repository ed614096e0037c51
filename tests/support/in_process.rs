//! A gateway in the test's own process, so that its heap can be counted; and clients that have none.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test's helper fails the test")]

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tabcast::config::{Machine, Sources};
use tabcast::gateway::serve::{ServeError, run};

/// Longer than anything takes on a busy machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Connections that are opened at once: fewer than a gateway holds that are no sessions yet.
const OPENING: usize = 64;

/// So many looks that find the same, 10 ms apart.
const QUIET_LOOKS: u32 = 50;

#[expect(clippy::disallowed_methods, reason = "a test with real sockets is at the edge")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Starts a gateway, which lives as long as the process.
pub(crate) fn start(settings: &[(&str, &str)]) -> SocketAddr {
    loop {
        // Free now: whoever takes it before the gateway does makes it choose anew.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listen = address.to_string();
        let variables = settings.iter().copied().chain([("listen", &*listen)]);
        let variables =
            variables.map(|(name, value)| (OsString::from(format!("TABCAST_{}", name.to_uppercase())), value.into()));
        let settings = Sources::new().with_variables(variables).load(Machine::here()).unwrap();
        let thread = std::thread::spawn(move || run(settings));
        let deadline = now() + PATIENCE;
        while !thread.is_finished() {
            if TcpStream::connect(address).is_ok() {
                return address;
            }
            assert!(now() < deadline, "the gateway does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        match thread.join().unwrap() {
            Err(ServeError::Listen { error, .. }) if error.kind() == ErrorKind::AddrInUse => {}
            ended => panic!("the gateway does not run: {ended:?}"),
        }
    }
}

/// Opens `count` connections that say `request` and are answered with that status, and puts them into `clients`, which
/// has room for them.
pub(crate) fn open(
    address: SocketAddr,
    clients: &mut Vec<TcpStream>,
    count: usize,
    status: u16,
    request: impl Fn(usize) -> Vec<u8>,
) {
    let first = clients.len();
    assert!(clients.capacity() >= first + count, "the client's own memory is none");
    while clients.len() < first + count {
        let opened = clients.len();
        for number in opened..first + count.min(opened - first + OPENING) {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&request(number)).unwrap();
            clients.push(stream);
        }
        for stream in &mut clients[opened..] {
            let head = head(stream);
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        }
    }
}

/// The head of a response, and nothing behind it.
fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let seen = stream.peek(&mut chunk).unwrap();
        assert!(seen > 0, "it ended within its head: {}", String::from_utf8_lossy(&head));
        let before = head.len();
        head.extend_from_slice(&chunk[..seen]);
        let end = head.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4);
        let taken = end.unwrap_or(head.len()) - before;
        stream.read_exact(&mut chunk[..taken]).unwrap();
        if let Some(end) = end {
            head.truncate(end);
            return String::from_utf8(head).unwrap();
        }
    }
}

/// Waits until `value` is at most `most` and does not change any more; what it is then, or at the end of all
/// patience.
pub(crate) fn settle(most: usize, mut value: impl FnMut() -> usize) -> usize {
    let deadline = now() + PATIENCE;
    let (mut last, mut looks) = (value(), 0);
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let found = value();
        looks = if found == last { looks + 1 } else { 0 };
        last = found;
        if (found <= most && looks >= QUIET_LOOKS) || now() >= deadline {
            return found;
        }
    }
}

/// A tab of a user of its own.
pub(crate) fn handshake(number: usize) -> Vec<u8> {
    format!(
        "GET /ws?user=user-{number} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .into_bytes()
}

/// An event stream of a user of its own.
pub(crate) fn events(number: usize) -> Vec<u8> {
    format!("GET /events?user=user-{number} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

/// An answer that says nothing until a worker does.
pub(crate) fn answer(_number: usize) -> Vec<u8> {
    let body = r#"{"messages":[{"role":"user","content":"go"}],"stream":true}"#;
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}
