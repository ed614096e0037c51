//! What the integration tests share: a gateway as a process of its own, and a client that looks at every byte.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test's helper fails the test")]

pub(crate) mod shards;
#[cfg(feature = "cli")]
pub(crate) mod tls;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than anything takes on a busy machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[expect(clippy::disallowed_methods, reason = "a test with real sockets is at the edge")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// A gateway on a free port. Killed when dropped.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    child: Child,
    log: Receiver<String>,
}

/// A gateway that did not start: its exit code, and what it said.
#[derive(Debug)]
pub(crate) struct NotStarted {
    pub(crate) code: Option<i32>,
    pub(crate) log: String,
}

impl Gateway {
    pub(crate) fn start(settings: &[(&str, &str)]) -> Self {
        Self::try_start(settings, None).unwrap()
    }

    /// With a limit of open files.
    pub(crate) fn try_start(settings: &[(&str, &str)], open_files: Option<usize>) -> Result<Self, NotStarted> {
        let binary = env!("CARGO_BIN_EXE_tabcast");
        let mut command = match open_files {
            None => Command::new(binary),
            Some(limit) => {
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("ulimit -n {limit}; exec {binary}"));
                shell
            }
        };
        // The test's settings, and no others.
        let is_setting = |name: &str| name.starts_with("TABCAST_") || name.starts_with("OTEL_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        command.env("TABCAST_LISTEN", "127.0.0.1:0");
        for (name, value) in settings {
            let is_whole = name.starts_with("OTEL_");
            command.env(if is_whole { (*name).to_owned() } else { format!("TABCAST_{}", name.to_uppercase()) }, value);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (line, log) = sync_channel(100_000);
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        let mut said = String::new();
        loop {
            match log.recv_timeout(PATIENCE) {
                Ok(text) => {
                    if let Some((_, rest)) = text.split_once("ready: http").and_then(|(_, rest)| rest.split_once("://"))
                    {
                        let address = rest.split('/').next().unwrap_or_default().parse().unwrap();
                        return Ok(Self { address, child, log });
                    }
                    said.push_str(&text);
                    said.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let code = child.wait().unwrap().code();
                    return Err(NotStarted { code, log: said });
                }
                Err(RecvTimeoutError::Timeout) => {
                    child.kill().unwrap();
                    panic!("the gateway neither starts nor ends: {said}");
                }
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until it logs a line with `part`.
    pub(crate) fn wait_for_log(&self, part: &str) -> String {
        loop {
            let line = self.log.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("it never says {part}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Waits for the process's own end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(now() < deadline, "the gateway does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What it logged since it was asked last.
    pub(crate) fn log(&self) -> String {
        self.log.try_iter().collect::<Vec<_>>().join("\n")
    }

    /// CPU time of all its threads.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let nanos = tasks.map(|task| {
            let path = task.unwrap().path().join("schedstat");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            text.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0)
        });
        Duration::from_nanos(nanos.sum())
    }

    pub(crate) fn tab(&self, query: &str) -> Client {
        Client::tab(self.address, query)
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// One POST of JSON on a connection of its own; its answer must be 200.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        let mut client = self.connect();
        client.write(&post(path, "application/json", body.to_string().as_bytes()));
        let response = client.response();
        assert_eq!(response.status, 200, "{path} {body}: {}", response.text());
        serde_json::from_slice(&response.body).unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

pub(crate) fn post(path: &str, content_type: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

pub(crate) fn handshake(query: &str) -> Vec<u8> {
    format!(
        "GET /ws?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .into_bytes()
}

/// A client's compressed text, masked (RFC 7692 §7.2.1).
pub(crate) fn deflated(text: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(text.len() + 1000);
    let mut state = flate2::Compress::new(flate2::Compression::best(), false);
    state.compress_vec(text, &mut payload, flate2::FlushCompress::Sync).unwrap();
    assert_eq!(payload.split_off(payload.len() - 4), [0, 0, 0xff, 0xff]);
    masked(0x41, &payload)
}

/// What a server's compressed payload says (RFC 7692 §7.2.2).
fn inflated(mut payload: Vec<u8>) -> Vec<u8> {
    payload.extend_from_slice(&[0, 0, 0xff, 0xff]);
    let mut text = Vec::with_capacity(1 << 20);
    let mut state = flate2::Decompress::new(false);
    let status = state.decompress_vec(&payload, &mut text, flate2::FlushDecompress::Sync);
    assert!(matches!(status, Ok(flate2::Status::Ok)), "{status:?}");
    assert!(state.total_in() == payload.len() as u64 && text.len() < text.capacity());
    text
}

/// A client's frame, masked; the upper half of `opcode` is for the reserved bits.
pub(crate) fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x5a, 0x17, 0xc3, 0x08];
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short @ 0..126 => frame.push(0x80 | u8::try_from(short).unwrap()),
        length => match u16::try_from(length) {
            Ok(length) => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&length.to_be_bytes());
            }
            Err(_) => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&(length as u64).to_be_bytes());
            }
        },
    }
    frame.extend_from_slice(&mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The code of an error in our one shape.
    pub(crate) fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A frame of the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Text(Vec<u8>),
    Ping(Vec<u8>),
    Close(u16, String),
    End,
}

/// A connection, and everything that came and was not looked at yet. Whatever is not exactly what a server may send
/// fails the test.
pub(crate) struct Client<S = TcpStream> {
    pub(crate) stream: S,
    buffer: Vec<u8>,
    at: usize,
    /// It has negotiated permessage-deflate.
    deflates: bool,
    /// Texts that came compressed.
    pub(crate) compressed_texts: usize,
    /// It ended without the goodbye that its transport has.
    pub(crate) is_truncated: bool,
}

impl Client {
    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self::over(stream)
    }

    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).unwrap())
    }

    /// With a small receive buffer, so that the server writes in parts.
    pub(crate) fn connect_narrow(address: SocketAddr, bytes: usize) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(bytes).unwrap();
        socket.connect(&address.into()).unwrap();
        Self::new(socket.into())
    }

    pub(crate) fn tab(address: SocketAddr, query: &str) -> Self {
        Self::connect(address).upgraded(query)
    }
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn over(stream: S) -> Self {
        Self { stream, buffer: Vec::new(), at: 0, deflates: false, compressed_texts: 0, is_truncated: false }
    }

    /// Makes the connection a tab.
    pub(crate) fn upgraded(mut self, query: &str) -> Self {
        self.write(&handshake(query));
        self.expect_switch();
        self
    }

    /// Makes the connection a tab that offers extensions.
    pub(crate) fn offering(mut self, query: &str, extensions: &str) -> Self {
        let request = String::from_utf8(handshake(query)).unwrap();
        let head = request.strip_suffix("\r\n").unwrap();
        self.write(format!("{head}Sec-WebSocket-Extensions: {extensions}\r\n\r\n").as_bytes());
        self.expect_switch();
        self
    }

    pub(crate) fn expect_switch(&mut self) {
        let head = self.head();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let head = head.to_ascii_lowercase();
        assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        let accepted = head.lines().find_map(|line| line.strip_prefix("sec-websocket-extensions: "));
        self.deflates = accepted.is_some();
        let parameters = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        assert!(accepted.is_none_or(|accepted| accepted.starts_with(parameters)), "{head}");
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn send(&mut self, message: &Value) {
        self.write(&masked(1, message.to_string().as_bytes()));
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.at..]
    }

    /// Reads more. False at the end of the stream, and when the connection was reset.
    fn fill(&mut self) -> bool {
        if self.at > 1 << 16 && self.at * 2 > self.buffer.len() {
            self.buffer.drain(..std::mem::take(&mut self.at));
        }
        let mut chunk = [0; 16 << 10];
        match self.stream.read(&mut chunk) {
            Ok(bytes) => {
                self.buffer.extend_from_slice(&chunk[..bytes]);
                bytes > 0
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.is_truncated = true;
                false
            }
            Err(error) => panic!("nothing came: {error}; unread: {:?}", String::from_utf8_lossy(self.rest())),
        }
    }

    fn need(&mut self, bytes: usize) {
        while self.rest().len() < bytes {
            assert!(self.fill(), "the stream ended early; unread: {:?}", String::from_utf8_lossy(self.rest()));
        }
    }

    pub(crate) fn take(&mut self, bytes: usize) -> Vec<u8> {
        self.need(bytes);
        let taken = self.rest()[..bytes].to_vec();
        self.at += bytes;
        taken
    }

    pub(crate) fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.rest().windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                return String::from_utf8(self.take(end + 4)).unwrap();
            }
            assert!(self.fill(), "no whole head: {:?}", String::from_utf8_lossy(self.rest()));
        }
    }

    /// A response with a length, or one that ends with the connection.
    pub(crate) fn response(&mut self) -> Response {
        self.response_to("GET")
    }

    pub(crate) fn response_to(&mut self, method: &str) -> Response {
        let head = self.head();
        let status =
            head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|status| status.parse().ok());
        let mut response = Response { status: status.unwrap_or_else(|| panic!("{head}")), head, body: Vec::new() };
        let length = response.header("content-length").map(|length| length.parse().unwrap());
        response.body = match length {
            _ if method == "HEAD" || matches!(response.status, 204 | 304) => Vec::new(),
            Some(length) => self.take(length),
            None => self.until_the_end(),
        };
        response
    }

    /// Everything up to the end of the stream.
    pub(crate) fn until_the_end(&mut self) -> Vec<u8> {
        while self.fill() {}
        let rest = self.rest().to_vec();
        self.at = self.buffer.len();
        rest
    }

    pub(crate) fn frame(&mut self) -> Seen {
        if self.rest().is_empty() && !self.fill() {
            return Seen::End;
        }
        let head = self.take(2);
        let length = match head[1] {
            short @ 0..126 => usize::from(short),
            126 => {
                let length = u16::from_be_bytes(self.take(2).try_into().unwrap());
                assert!(length >= 126, "not the shortest form");
                usize::from(length)
            }
            127 => {
                let length = u64::from_be_bytes(self.take(8).try_into().unwrap());
                assert!((1 << 16..64 << 20).contains(&length), "a length of {length}");
                usize::try_from(length).unwrap()
            }
            masked => panic!("a server's frame with a mask: {head:?} {masked}"),
        };
        let payload = self.take(length);
        match head[0] {
            0x81 => Seen::Text(payload),
            0xc1 if self.deflates => {
                self.compressed_texts += 1;
                Seen::Text(inflated(payload))
            }
            0x89 => Seen::Ping(payload),
            0x88 => {
                let code = u16::from_be_bytes([payload[0], payload[1]]);
                Seen::Close(code, String::from_utf8(payload[2..].to_vec()).unwrap())
            }
            other => panic!("a server's frame begins with {other:#x}"),
        }
    }

    /// The next frame; None for a pong.
    pub(crate) fn frame_or_pong(&mut self) -> Option<Seen> {
        self.need(2);
        if self.rest()[0] != 0x8a {
            return Some(self.frame());
        }
        let length = usize::from(self.take(2)[1]);
        self.take(length);
        None
    }

    /// The next text as JSON; pings on the way are answered.
    pub(crate) fn json(&mut self) -> Value {
        loop {
            match self.frame() {
                Seen::Text(text) => return serde_json::from_slice(&text).unwrap(),
                Seen::Ping(payload) => self.write(&masked(10, &payload)),
                other => panic!("expected a text, not {other:?}"),
            }
        }
    }

    /// The code and reason of the close that is next.
    pub(crate) fn closed(&mut self) -> (u16, String) {
        loop {
            match self.frame() {
                Seen::Close(code, reason) => return (code, reason),
                Seen::Ping(_) => {}
                other => panic!("expected a close, not {other:?}"),
            }
        }
    }
}

/// Keys of a gateway that is not in development mode: [`token`]'s, a worker's, an operator's, and two of `/v1`.
pub(crate) const KEYS: [(&str, &str); 4] = [
    ("token_keys", "kid=main,alg=HS256,secret=a-secret-for-tests-only-of-32-bytes-or-more"),
    ("api_keys", "worker"),
    ("operator_keys", "operator"),
    ("openai_keys", "ann:openai-ann,bob:openai-bob"),
];

/// A user's token, good for an hour and for any room.
pub(crate) fn token(user: &str) -> String {
    token_with_rooms(user, &["*"])
}

/// A user's token, good for an hour and for these rooms.
pub(crate) fn token_with_rooms(user: &str, rooms: &[&str]) -> String {
    let expires = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 3600;
    let claims = serde_json::json!({ "sub": user, "rooms": rooms, "exp": expires });
    let header = jsonwebtoken::Header { kid: Some("main".to_owned()), ..jsonwebtoken::Header::default() };
    let key = jsonwebtoken::EncodingKey::from_secret(b"a-secret-for-tests-only-of-32-bytes-or-more");
    jsonwebtoken::encode(&header, &claims, &key).unwrap()
}

/// A request with more lines in its head, each with its end.
pub(crate) fn with_lines(request: &[u8], lines: &str) -> Vec<u8> {
    let end = request.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 2;
    [&request[..end], lines.as_bytes(), &request[end..]].concat()
}

pub(crate) fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}\r\n")
}

/// What a metric counts in the text of `/metrics`; all its labels together if `name` has none.
pub(crate) fn metric_in(text: &str, name: &str) -> u64 {
    // A name with labels may be a part of them; one without is whole.
    let is_meant = |rest: &&str| name.contains('{') || rest.starts_with([' ', '{']);
    let rests = text.lines().filter_map(|line| line.strip_prefix(name)).filter(is_meant);
    let values = rests.filter_map(|rest| rest.rsplit_once(' '));
    values.map(|(_, value)| value.parse::<u64>().unwrap()).sum()
}

impl Gateway {
    /// What a metric counts now, asked for with the operator's key of [`KEYS`].
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let mut client = self.connect();
        client.write(&with_lines(&get("/metrics"), &bearer("operator")));
        metric_in(&client.response().text(), name)
    }

    /// Waits until a metric is at least `expected`.
    pub(crate) fn wait_for_metric(&self, name: &str, expected: u64) {
        let deadline = now() + PATIENCE;
        while self.metric(name) < expected {
            assert!(now() < deadline, "{name} is {}, not {expected}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
