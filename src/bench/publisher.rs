//! A connection that publishes: one request under way, kept alive, and opened again when the server closes it.

use std::io;
use std::net::SocketAddr;

use memchr::memmem;
use mio::{Registry, Token};

use super::http::{self, Body, Chunks};
use super::plan::{Plan, Publishing};
use super::socket::{Dial, Transport, is_not_now};
use super::tls::Tls;
use super::websocket::Fault;

/// The tokens of publishers begin here: above all clients', below the waker's.
pub(super) const FIRST_PUBLISHER: usize = 1 << 40;
/// The most bytes of one answer: 64 MiB.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// With so many of its lines refused, and the first of what was said about that.
    Accepted,
    Refused(u64, String),
    /// The connection ended before it was answered: it may have taken effect.
    None,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Publisher {
    transport: Transport,
    out: Vec<u8>,
    written: usize,
    answer: Vec<u8>,
    /// A request is under way.
    pub(super) is_busy: bool,
    is_http: bool,
}

impl Publisher {
    /// Connects, or begins to.
    ///
    /// # Errors
    /// If that cannot even begin.
    pub(super) fn new(plan: &Plan, publishing: &Publishing, registry: &Registry, at: usize) -> io::Result<Self> {
        let socket = connect(publishing.address)?;
        let mut transport = match &plan.tls {
            Some(trust) if publishing.address == plan.address => Transport::Tls(Box::new(Tls::new(socket, trust)?)),
            _ => Transport::Plain(socket),
        };
        transport.register(registry, Token(FIRST_PUBLISHER + at))?;
        let out = publishing.first.clone().unwrap_or_default().into_bytes();
        let is_http = publishing.is_http;
        Ok(Self { transport, out, written: 0, answer: Vec::new(), is_busy: false, is_http })
    }

    /// Begins a request.
    ///
    /// # Errors
    /// The connection's.
    pub(super) fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.out.extend_from_slice(request);
        self.is_busy = self.is_http;
        self.flush()
    }

    /// True if it may be given something to send.
    pub(super) fn is_free(&self) -> bool {
        // Where nothing is answered, what does not fit into the socket must not pile up here.
        !self.is_busy && (self.is_http || self.out.is_empty())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.written < self.out.len() {
            match self.transport.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if is_not_now(&error) => return self.transport.flush(),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.written = 0;
        self.transport.flush()
    }

    /// Writes and reads what it can; says how the request ended if it did. `None` in the error means that the
    /// connection is over.
    ///
    /// # Errors
    /// The connection's; the end of it is [`io::ErrorKind::UnexpectedEof`].
    pub(super) fn handle(&mut self, buffer: &mut [u8]) -> io::Result<Option<Answer>> {
        self.flush()?;
        loop {
            match self.transport.read(buffer) {
                Ok(0) => return self.ended(),
                Ok(count) if self.is_http => self.answer.extend_from_slice(&buffer[..count]),
                // Servers that are not asked still ask: NATS wants to know whether somebody is there.
                Ok(count) if buffer[..count].starts_with(b"PING") => self.send(b"PONG\r\n")?,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_not_now(&error) => break,
                Err(error) => return Err(error),
            }
        }
        if !self.is_http || self.answer.is_empty() {
            return Ok(None);
        }
        let answer = whole(&self.answer).map_err(|fault| io::Error::other(fault.to_string()))?;
        if answer.is_some() {
            self.answer.clear();
            self.is_busy = false;
        }
        Ok(answer)
    }

    /// The server has closed the connection, which may be how it says that an answer is whole.
    fn ended(&mut self) -> io::Result<Option<Answer>> {
        match http::head(&self.answer) {
            Ok(Some(head)) if self.is_busy && head.body == Body::Open => {
                let answer = judge(head.status, &self.answer[head.length..]);
                self.answer.clear();
                self.is_busy = false;
                Ok(Some(answer))
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn connect(address: SocketAddr) -> io::Result<mio::net::TcpStream> {
    Dial { address, source: None, receive_buffer: None }.connect()
}

/// What the answer says, once it is whole.
fn whole(answer: &[u8]) -> Result<Option<Answer>, Fault> {
    if answer.len() > ANSWER_BYTES_MAX {
        return Err(Fault::TooLarge);
    }
    let Some(head) = http::head(answer)? else { return Ok(None) };
    let body = &answer[head.length..];
    match head.body {
        Body::Length(length) if (body.len() as u64) < length => Ok(None),
        Body::Length(_) => Ok(Some(judge(head.status, body))),
        Body::Chunks(_) => {
            let (mut chunks, mut body) = (Chunks::default(), body.to_vec());
            let end = chunks.unwrap_chunks(&mut body, 0)?;
            Ok(chunks.is_over().then(|| judge(head.status, &body[..end])))
        }
        Body::Open => Ok(None),
    }
}

/// A request of several lines is answered line by line, each with an error or without.
fn judge(status: u16, body: &[u8]) -> Answer {
    let said = |at: usize| String::from_utf8_lossy(&body[at..body.len().min(at + 200)]).into_owned();
    if !(200..300).contains(&status) {
        return Answer::Refused(1, format!("{status} {}", said(0)));
    }
    let mut lines = memmem::find_iter(body, br#"{"error":"#).peekable();
    match lines.peek().copied() {
        None => Answer::Accepted,
        Some(first) => Answer::Refused(lines.count() as u64, said(first)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_once_they_are_whole() {
        let refused = |count: u64, text: &str| Answer::Refused(count, text.to_owned());
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", Answer::Accepted),
            ("HTTP/1.1 204 None\r\n\r\n", Answer::Accepted),
            ("HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nfull", refused(1, "503 full")),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Answer::Accepted),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 36\r\n\r\n{\"id\":1}\n{\"error\":{}}\n{\"error\":{}}\n\n",
                refused(2, "{\"error\":{}}\n{\"error\":{}}\n\n"),
            ),
        ] {
            for cut in 0..text.len() {
                assert_eq!(whole(&text.as_bytes()[..cut]), Ok(None), "{text} cut at {cut}");
            }
            assert_eq!(whole(text.as_bytes()), Ok(Some(expected)), "{text}");
        }
        assert_eq!(whole(b"NATS\r\n\r\n"), Err(Fault::Http));
    }
}
