//! However a request is written, it is one request or none: what follows it, or hides in it, is never answered as another.
//! On raw sockets, against the whole gateway. RFC 9112 unless another is named.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{Client, Gateway};

const HOST: &str = "Host: localhost\r\n";
const BODY: &str = r#"{"channel_id":"u","text":"x"}"#;
/// What is behind the request, or hidden in it; whoever answers it ends the connection.
const HIDDEN: &str = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
const HIDDEN_ANSWER: &[u8] = br#"{"status":"ok"}"#;

/// One way to write a request.
struct Case {
    name: String,
    bytes: Vec<u8>,
    /// The status of each response, in order.
    statuses: Vec<u16>,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>, statuses: &[u16]) {
        self.0.push(Case { name: name.into(), bytes: bytes.into(), statuses: statuses.to_vec() });
    }

    /// A POST with these headers, and behind them this.
    fn post(&mut self, headers: &str, rest: &str, statuses: &[u16]) {
        let head = format!("POST /api/send HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n{headers}\r\n");
        self.add(format!("{headers:?} {:?}", head_of(rest)), head + rest, statuses);
    }

    /// A chunked POST, and [`HIDDEN`] behind it.
    fn chunks(&mut self, chunks: &str, statuses: &[u16]) {
        self.post("Transfer-Encoding: chunked\r\n", &format!("{chunks}{HIDDEN}"), statuses);
    }

    /// A request without a body, and [`HIDDEN`] behind it.
    fn line(&mut self, line: &str, headers: &str, statuses: &[u16]) {
        self.add(
            format!("{} {:?}", head_of(line), head_of(headers)),
            format!("{line}\r\n{headers}\r\n{HIDDEN}"),
            statuses,
        );
    }

    /// Sends each on a connection of its own, and looks at all that comes back.
    fn check(self, gateway: &Gateway) {
        let (next, address) = (AtomicUsize::new(0), gateway.address);
        // Ordering: Relaxed: each takes another place, which is all.
        let work = || {
            while let Some(case) = self.0.get(next.fetch_add(1, Ordering::Relaxed)) {
                case.check(address);
            }
        };
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(work))));
    }
}

fn head_of(text: &str) -> String {
    text.chars().take(60).collect()
}

impl Case {
    fn check(&self, address: SocketAddr) {
        let mut client = Client::connect(address);
        // Whoever was refused before its end may find nobody there.
        let _ = client.stream.write_all(&self.bytes);
        let answer = client.until_the_end();
        let (statuses, hidden) = responses(&answer);
        assert_eq!(statuses, self.statuses, "{}\n{}", self.name, String::from_utf8_lossy(&answer));
        let is_answered = self.statuses.get(1) == Some(&200);
        assert_eq!(hidden, usize::from(is_answered), "{}\n{}", self.name, String::from_utf8_lossy(&answer));
    }
}

/// The status of each response, and how many answer [`HIDDEN`].
fn responses(mut rest: &[u8]) -> (Vec<u16>, usize) {
    let (mut statuses, mut hidden) = (Vec::new(), 0);
    while !rest.is_empty() {
        let end = rest.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        let head = std::str::from_utf8(&rest[..end]).unwrap().to_ascii_lowercase();
        let status = head.strip_prefix("http/1.").unwrap()[2..5].parse().unwrap();
        statuses.push(status);
        if status == 101 {
            break;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
        let (body, after) = rest[end..].split_at(length);
        hidden += usize::from(body == HIDDEN_ANSWER);
        rest = after;
    }
    (statuses, hidden)
}

fn gateway() -> Gateway {
    Gateway::start(&[("shards", "1"), ("header_timeout", "2s"), ("body_timeout", "1s"), ("header_bytes_max", "16KiB")])
}

fn chunked(body: &str) -> String {
    format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
}

#[test]
fn a_bodys_end_is_where_everybody_finds_it() {
    let mut cases = Cases::default();
    let chunks = format!("{}{HIDDEN}", chunked(BODY));
    let length = BODY.len();
    // Both: the coding counts, and nothing behind the response is read (§6.3).
    cases.post(&format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"), &chunks, &[200]);
    cases.post(&format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"), &chunks, &[200]);
    cases.post("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{HIDDEN}"), &[400]);
    cases.post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", &chunked(HIDDEN), &[400]);
    // The one coding that is understood, once.
    for coding in [" chunked", "chunked", "\tchunked", " chunked ", " Chunked", " CHUNKED"] {
        cases.post(&format!("Transfer-Encoding:{coding}\r\n"), &chunks, &[200, 200]);
    }
    for coding in [
        "xchunked",
        "chunked, identity",
        "identity, chunked",
        "identity",
        "gzip, chunked",
        "gzip",
        "chunked, chunked",
        "cow",
        "chunked;q=1",
        "\"chunked\"",
        "chunked\u{b}",
        "\u{b}chunked",
        ",chunked",
        "chunked,",
        "",
        "chunked chunked",
        "chunked\0",
    ] {
        cases.post(&format!("Transfer-Encoding: {coding}\r\n"), &chunks, &[400]);
    }
    for headers in [
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding:\r\n chunked\r\n",
        "Transfer\0-Encoding: chunked\r\n",
        "Transfer-Encoding\u{b}: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        "X: y\rTransfer-Encoding: chunked\r\n",
    ] {
        cases.post(headers, &chunks, &[400]);
    }
    // Another header's name: the body is empty, and what follows is no request.
    cases.post("Transfer_Encoding: chunked\r\n", &chunks, &[400, 400]);
    cases.add(
        "HTTP/1.0 has no codings",
        format!("POST /api/send HTTP/1.0\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n{chunks}"),
        &[400],
    );
    cases.check(&gateway());
}

#[test]
fn a_length_is_a_number_and_one() {
    let mut cases = Cases::default();
    let (plain, length) = (format!("{BODY}{HIDDEN}"), BODY.len());
    for value in [format!("{length}"), format!(" {length}"), format!(" {length}\t"), format!(" 0{length}")] {
        cases.post(&format!("Content-Length:{value}\r\n"), &plain, &[200, 200]);
    }
    cases.post(&format!("Content-Length: {length}\r\nContent-Length: {length}\r\n"), &plain, &[200, 200]);
    for value in [
        "+29",
        "-29",
        "0x1d",
        "29, 29",
        "29,29",
        "29 29",
        "29.0",
        "29e0",
        "\u{b}29",
        "2_9",
        "٢٩",
        "",
        "18446744073709551616",
        "99999999999999999999999999",
        "29;x",
        "\"29\"",
    ] {
        cases.post(&format!("Content-Length: {value}\r\n"), &plain, &[400]);
    }
    // More than hyper counts, and more than a body may have.
    cases.post("Content-Length: 18446744073709551615\r\n", &plain, &[431]);
    cases.post("Content-Length: 9223372036854775807\r\n", &plain, &[413]);
    cases.post(&format!("Content-Length : {length}\r\n"), &plain, &[400]);
    cases.post(&format!("Content-Length: {length}\r\nContent-Length: {}\r\n", length + 1), &plain, &[400]);
    cases.post(&format!("Content-Length: 0\r\nContent-Length: {length}\r\n"), &plain, &[400]);
    cases.check(&gateway());
}

#[test]
fn chunks_are_as_long_as_they_say() {
    let mut cases = Cases::default();
    let with = |size: &str, after: &str| format!("{size}{BODY}{after}");
    let size = format!("{:x}", BODY.len());
    let end = "\r\n0\r\n\r\n";
    // A chunk's size, its extensions, and the trailers: legal, if odd.
    for start in [
        &*size,
        "1D",
        &format!("{}{size}", "0".repeat(40)),
        "1d ",
        "1d\t",
        "1d;a=b",
        "1d;a=\"b;\\\"c\"",
        "1d ;a",
        "1d;",
    ] {
        cases.chunks(&with(&format!("{start}\r\n"), end), &[200, 200]);
    }
    cases.chunks(&with("1d\r\n", "\r\n000\r\n\r\n"), &[200, 200]);
    cases.chunks(&with("1d\r\n", "\r\n0;last\r\n\r\n"), &[200, 200]);
    cases.chunks(&with("1d\r\n", "\r\n0\r\nA: b\r\nA: c\r\n\r\n"), &[200, 200]);
    // Trailers say nothing about the body (§7.1.2).
    cases.chunks(&with("1d\r\n", "\r\n0\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"), &[200, 200]);
    let bytewise: String = BODY.chars().map(|byte| format!("1;{}\r\n{byte}\r\n", "e".repeat(60))).collect();
    cases.chunks(&format!("{bytewise}0\r\n\r\n"), &[200, 200]);
    // Not a size, or another's end of line.
    for start in [
        "zz\r\n",
        "\r\n",
        "-1\r\n",
        "0x1d\r\n",
        "+1d\r\n",
        " 1d\r\n",
        "1d\n",
        "1d\r",
        "1 d\r\n",
        "1d;a\n",
        "1d;a\rb\r\n",
    ] {
        cases.chunks(&with(start, end), &[400]);
    }
    for start in ["fffffffffffffffff\r\n", "1000000000000001d\r\n", &format!("{}\r\n", "f".repeat(10_000))] {
        cases.chunks(&with(start, end), &[400]);
    }
    // As much as it says will never come: nothing is taken for its end.
    cases.chunks(&with("ffffffffffffffff\r\n", end), &[408]);
    for after in
        ["0\r\n\r\n", "xx\r\n0\r\n\r\n", "\n0\r\n\r\n", "\r0\r\n\r\n", "\r\n0\n\n", "\r\n0\r\nno trailer\r\n\r\n"]
    {
        cases.chunks(&with("1d\r\n", after), &[400]);
    }
    // Past the last chunk the request is whole; the connection is not good for another.
    for after in ["\r\n0\r\n\n", "\r\n0\r\nA: b\n\r\n"] {
        cases.chunks(&with("1d\r\n", after), &[200]);
    }
    for extension in [17_000, 200_000] {
        cases.chunks(&with(&format!("1d;{}\r\n", "a".repeat(extension)), end), &[400]);
    }
    let many: String = BODY.chars().map(|byte| format!("1;{}\r\n{byte}\r\n", "e".repeat(1_000))).collect();
    cases.chunks(&format!("{many}0\r\n\r\n"), &[400]);
    cases.chunks(&with("1d\r\n", &format!("\r\n0\r\n{}\r\n", "A: b\r\n".repeat(20_000))), &[400]);
    cases.chunks(&with("1d\r\n", &format!("\r\n0\r\nA: {}\r\n\r\n", "b".repeat(100_000))), &[400]);
    cases.check(&gateway());
}

#[test]
fn heads_are_read_one_way() {
    let mut cases = Cases::default();
    let get = "GET /api/users HTTP/1.1";
    for header in [
        "X: a\rb",
        "X: a\r\n b",
        "X: a\r\n\tb",
        "X : a",
        "X\t: a",
        "X: a\0b",
        "X: a\u{1}b",
        "X: a\u{7f}b",
        "X\0: a",
        "X\u{1}: a",
        "Xé: a",
        "X(: a",
        ": a",
        "X",
        "X y: a",
        "{}: a",
    ] {
        cases.line(get, &format!("{HOST}{header}\r\n"), &[400]);
    }
    cases.line(get, &format!(" X: a\r\n{HOST}"), &[400]);
    // An empty value and bytes beyond ASCII are legal (RFC 9110 §5.5).
    for header in ["X:", "X: é", "X: a\tb", "x-1!#$%&'*+-.^_`|~: a"] {
        cases.line(get, &format!("{HOST}{header}\r\n"), &[200, 200]);
    }
    // LF alone may end a line (§2.2); CR alone ends none.
    cases.add("LF", format!("{get}\nHost: localhost\n\n{HIDDEN}"), &[200, 200]);
    cases.add("CR", format!("{get}\rHost: localhost\r\r{HIDDEN}"), &[400]);
    cases.add("empty lines before", format!("\r\n\r\n{get}\r\n{HOST}\r\n{HIDDEN}"), &[200, 200]);
    cases.add("a space before", format!(" {get}\r\n{HOST}\r\n{HIDDEN}"), &[400]);
    cases.add("many empty lines", format!("{}{get}\r\n{HOST}\r\n{HIDDEN}", "\r\n".repeat(50_000)), &[431]);
    // As many headers as hyper takes, as many bytes as the setting says.
    cases.line(get, &format!("{HOST}{}", "X: a\r\n".repeat(99)), &[200, 200]);
    for flood in ["X: a\r\n".repeat(100), "X: a\r\n".repeat(50_000), format!("X: {}\r\n", "a".repeat(200_000))] {
        cases.line(get, &format!("{HOST}{flood}"), &[431]);
    }
    cases.line(&format!("GET /{} HTTP/1.1", "a".repeat(10_000)), HOST, &[404, 200]);
    cases.line(&format!("GET /{} HTTP/1.1", "a".repeat(100_000)), HOST, &[431]);
    cases.line(&format!("{} / HTTP/1.1", "A".repeat(2_000)), HOST, &[405, 200]);
    cases.line(&format!("{} / HTTP/1.1", "A".repeat(20_000)), HOST, &[431]);
    for line in [
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / HTTP/0.9",
        "GET / HTTP/1.",
        "GET / HTTP/1.1 ",
        "GET / http/1.1",
        "GET / XTTP/1.1",
        "GET  / HTTP/1.1",
        "GET\t/\tHTTP/1.1",
        "GET /a b HTTP/1.1",
        "G(T / HTTP/1.1",
        "G\u{1}T / HTTP/1.1",
        "GET /\u{1} HTTP/1.1",
        "GET /\0 HTTP/1.1",
        "GET \\ HTTP/1.1",
        "GET /",
        "GET / ",
        "/ HTTP/1.1",
        "GET HTTP/1.1",
    ] {
        cases.line(line, HOST, &[400]);
    }
    cases.add("HTTP/0.9", "GET /\r\n".to_owned() + HIDDEN, &[400]);
    cases.add("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(), &[]);
    let upgrade =
        format!("{HOST}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n");
    cases.line(get, &upgrade, &[200, 200]);
    cases.line(get, &format!("{HOST}Expect: a-miracle\r\n"), &[200, 200]);
    cases.line(get, &format!("{HOST}Connection: close\r\n"), &[200]);
    cases.check(&gateway());
}

#[test]
fn a_request_is_for_one_host_by_one_method() {
    let mut cases = Cases::default();
    let get = "GET /api/users HTTP/1.1";
    for hosts in [
        "",
        "Host: localhost\r\nHost: evil.example\r\n",
        "Host: localhost\r\nHost: localhost\r\n",
        "Host:\r\n",
        "Host: a b\r\n",
        "Host: localhost/x\r\n",
        "Host: u@localhost\r\n",
        "Host: localhost, evil.example\r\n",
        "Host: localhost\u{b}\r\n",
    ] {
        cases.line(get, hosts, &[400]);
    }
    // An intermediary's form of a target (§3.2.2), which must say what Host says.
    for target in ["http://localhost/api/users", "https://localhost/api/users", "http://LOCALHOST/api/users"] {
        cases.line(&format!("GET {target} HTTP/1.1"), HOST, &[200, 200]);
    }
    for target in [
        "http://evil.example/api/users",
        "http://localhost:1/api/users",
        "ftp://localhost/api/users",
        "http://u@localhost/api/users",
        "localhost:80",
        "evil.example:443",
    ] {
        cases.line(&format!("GET {target} HTTP/1.1"), HOST, &[400]);
    }
    for (line, status) in [
        ("OPTIONS * HTTP/1.1", 404),
        ("GET * HTTP/1.1", 404),
        ("CONNECT evil.example:443 HTTP/1.1", 404),
        ("CONNECT /api/users HTTP/1.1", 405),
        ("TRACE /api/users HTTP/1.1", 405),
        ("get /api/users HTTP/1.1", 405),
        ("Get /api/users HTTP/1.1", 405),
        ("GET /x/../api/users HTTP/1.1", 404),
        ("GET /api/users#x HTTP/1.1", 200),
        ("GET /api/users%2f HTTP/1.1", 404),
    ] {
        cases.line(line, HOST, &[status, 200]);
    }
    cases.check(&gateway());
    // Where keys are what decides, a Host is still one, and is one.
    let keyed = Gateway::start(&[("shards", "1"), ("api_keys", "0123456789abcdef0123456789abcdef")]);
    let mut cases = Cases::default();
    for hosts in ["", "Host: a.example\r\nHost: b.example\r\n", "Host: a b\r\n"] {
        cases.line("GET /readyz HTTP/1.1", hosts, &[400]);
    }
    cases.line("GET /readyz HTTP/1.1", "Host: whatever.example\r\n", &[200, 200]);
    cases.check(&keyed);
}

#[test]
fn a_body_or_a_handshake_hides_no_request() {
    let mut cases = Cases::default();
    let get = "GET /api/users HTTP/1.1\r\nHost: localhost\r\n";
    let length = HIDDEN.len();
    // Read past, by whoever does not want a body.
    cases.add("in a body", format!("{get}Content-Length: {length}\r\n\r\n{HIDDEN}{HIDDEN}"), &[200, 200]);
    let chunks = chunked(HIDDEN);
    cases.add("in a chunk", format!("{get}Transfer-Encoding: chunked\r\n\r\n{chunks}{HIDDEN}"), &[200, 200]);
    let handshake = |version: u8, more: &str| {
        format!(
            "GET /ws?user=u HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: {version}\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
        )
    };
    // Bytes behind a handshake are frames, and these are none: the session ends with a close frame.
    for more in ["", "Content-Length: 0\r\n"] {
        cases.add("behind a handshake", handshake(13, more) + HIDDEN, &[101]);
    }
    cases.add("behind a refused handshake", handshake(12, "") + HIDDEN, &[426, 200]);
    let with_body = handshake(13, &format!("Content-Length: {length}\r\n"));
    cases.add("in a handshake's body", format!("{with_body}{HIDDEN}{HIDDEN}"), &[400, 200]);
    let with_chunks = handshake(13, "Transfer-Encoding: chunked\r\n");
    cases.add("in a handshake's chunks", format!("{with_chunks}{chunks}{HIDDEN}"), &[400, 200]);
    let both = handshake(13, "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n");
    cases.add("behind a handshake with both", format!("{both}0\r\n\r\n{HIDDEN}"), &[400]);
    cases.check(&gateway());
}
