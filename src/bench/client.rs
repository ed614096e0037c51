//! One client: a connection, how far it is, and bytes that are not whole yet.

use std::io;

use super::http::{self, Body, Chunks};
use super::socket::{Transport, is_not_now};
use super::websocket::{self, FRAME_BYTES_MAX, Fault, Kind, Next, Opcode};

/// How far a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not begun, or over.
    Closed,
    Connecting,
    /// The request has been written.
    Shaking,
    /// A response's head has come; what says that it hears everything may not have.
    Open,
}

/// What only some clients have, and only for a while.
#[derive(Debug, Default)]
struct Rest {
    /// The beginning of a frame or event.
    carry: Vec<u8>,
    /// Fragments of a message.
    message: Vec<u8>,
    is_in_message: bool,
    /// What the socket had no room for.
    out: Vec<u8>,
}

impl Rest {
    fn is_empty(&self) -> bool {
        self.carry.is_empty() && !self.is_in_message && self.out.is_empty()
    }
}

/// See the module. 48 bytes; with its lane in [`Lanes`](super::lanes::Lanes) that is all an idle one costs.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) transport: Transport,
    rest: Option<Box<Rest>>,
    pub(super) state: State,
    pub(super) is_stream: bool,
    /// It hears whatever is published for it.
    pub(super) is_subscribed: bool,
    /// It goes as soon as it has what was published before that was decided.
    pub(super) is_leaving: bool,
    /// Its bytes stay where they are.
    pub(super) is_deaf: bool,
    /// A chunked body's; none for one that ends with the connection.
    chunks: Option<Chunks>,
}

/// Why a client's connection is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// A close frame with this code, or the last chunk.
    Closed(u16),
    /// Refused: the status, and the beginning of the response.
    Refused(u16, String),
    Fault(Fault),
}

impl From<Fault> for Ending {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// What a client got, as it goes through its bytes.
pub(super) trait Sink {
    /// The response's head was what it should be.
    fn opened(&mut self);
    /// A whole message, or the text of a whole event.
    fn message(&mut self, payload: &[u8]);
    /// The compressed form of a whole message (RFC 7692).
    ///
    /// # Errors
    /// The client did not offer that, or it is none.
    fn deflated(&mut self, payload: &[u8]) -> Result<(), Fault>;
    fn ping(&mut self);
}

impl Client {
    pub(super) fn new(is_stream: bool) -> Self {
        Self {
            transport: Transport::None,
            rest: None,
            state: State::Closed,
            is_stream,
            is_subscribed: false,
            is_leaving: false,
            is_deaf: false,
            chunks: None,
        }
    }

    /// Drops the connection and everything of it.
    pub(super) fn close(&mut self) {
        *self = Self::new(self.is_stream);
    }

    /// Puts what is not whole yet to the front of `buffer`, and says how much that is.
    pub(super) fn carried(&self, buffer: &mut Vec<u8>) -> usize {
        let carry = self.rest.as_ref().map_or(&[][..], |rest| &rest.carry);
        // At least as much again has to fit behind it, or a large frame would never be whole.
        let needed = 2 * carry.len();
        if buffer.len() < needed {
            buffer.resize(needed.next_power_of_two(), 0);
        }
        buffer[..carry.len()].copy_from_slice(carry);
        carry.len()
    }

    /// Goes through `bytes`, of which the first `carried` are from before.
    pub(super) fn take(&mut self, bytes: &mut [u8], carried: usize, sink: &mut impl Sink) -> Result<(), Ending> {
        let (mut from, mut end) = (0, bytes.len());
        let mut decoded = carried;
        if self.state == State::Shaking {
            match http::head(bytes)? {
                None => return self.carry(bytes),
                Some(head) => {
                    self.shake(&head, bytes)?;
                    from = head.length;
                    decoded = from;
                    sink.opened();
                }
            }
        }
        if let Some(chunks) = &mut self.chunks {
            end = chunks.unwrap_chunks(bytes, decoded)?;
        }
        let used = if self.is_stream { events(&bytes[from..end], sink) } else { self.frames(&bytes[from..end], sink)? };
        self.carry(&bytes[from + used..end])?;
        match self.chunks {
            Some(chunks) if chunks.is_over() => Err(Ending::Closed(0)),
            _ => Ok(()),
        }
    }

    fn shake(&mut self, head: &http::Head, bytes: &[u8]) -> Result<(), Ending> {
        let expected = if self.is_stream { 200 } else { 101 };
        if head.status != expected {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).replace("\r\n", " ");
            return Err(Ending::Refused(head.status, text));
        }
        self.chunks = match head.body {
            Body::Chunks(chunks) if self.is_stream => Some(chunks),
            _ => None,
        };
        self.state = State::Open;
        Ok(())
    }

    fn frames(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<usize, Ending> {
        let mut used = 0;
        while let Next::Frame(kind, payload, length) = websocket::next(&bytes[used..])? {
            let is_in_message = self.rest.as_ref().is_some_and(|rest| rest.is_in_message);
            match kind {
                Kind::Message if !is_in_message => sink.message(payload),
                Kind::Deflated if !is_in_message => sink.deflated(payload)?,
                Kind::First if !is_in_message => self.fragment(payload)?,
                Kind::Middle if is_in_message => self.fragment(payload)?,
                Kind::Last if is_in_message => {
                    self.fragment(payload)?;
                    if let Some(rest) = &mut self.rest {
                        rest.is_in_message = false;
                        sink.message(&std::mem::take(&mut rest.message));
                    }
                }
                Kind::Message | Kind::Deflated | Kind::First | Kind::Middle | Kind::Last => {
                    return Err(Fault::Fragment.into());
                }
                Kind::Ping => {
                    sink.ping();
                    self.write_frame(Opcode::Pong, payload);
                }
                Kind::Pong => {}
                Kind::Close => {
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    return Err(Ending::Closed(code));
                }
            }
            used += length;
        }
        Ok(used)
    }

    fn fragment(&mut self, payload: &[u8]) -> Result<(), Fault> {
        let rest = self.rest.get_or_insert_default();
        if rest.message.len() + payload.len() > FRAME_BYTES_MAX {
            return Err(Fault::TooLarge);
        }
        rest.is_in_message = true;
        rest.message.extend_from_slice(payload);
        Ok(())
    }

    /// Keeps what is not whole yet, and no memory where there is nothing to keep.
    fn carry(&mut self, bytes: &[u8]) -> Result<(), Ending> {
        if bytes.len() > FRAME_BYTES_MAX + 16 {
            return Err(Fault::TooLarge.into());
        }
        if !bytes.is_empty() {
            let rest = self.rest.get_or_insert_default();
            rest.carry.clear();
            rest.carry.extend_from_slice(bytes);
        } else if let Some(rest) = &mut self.rest {
            rest.carry = Vec::new();
            if rest.is_empty() {
                self.rest = None;
            }
        }
        Ok(())
    }

    /// Writes a frame, as far as it goes now.
    pub(super) fn write_frame(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut frame = Vec::with_capacity(payload.len() + 14);
        websocket::write(&mut frame, opcode, payload);
        // An error of the connection comes back when it is read.
        let _ = self.write(&frame);
    }

    /// Writes as much as fits now, and the rest when there is room.
    ///
    /// # Errors
    /// The connection's, also if it is not connected yet: then nothing was taken.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = bytes;
        let has_more = self.rest.as_ref().is_some_and(|rest| !rest.out.is_empty());
        if !has_more {
            match self.transport.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_not_now(&error) && self.state != State::Connecting => {}
                Err(error) => return Err(error),
            }
        }
        if !bytes.is_empty() {
            self.rest.get_or_insert_default().out.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Goes on with what had no room.
    pub(super) fn flush(&mut self) {
        let _ = self.transport.flush();
        if let Some(rest) = &mut self.rest
            && !rest.out.is_empty()
            && let Ok(count) = self.transport.write(&rest.out)
        {
            rest.out.drain(..count);
            if rest.is_empty() {
                self.rest = None;
            }
        }
    }
}

/// Goes through the events in `bytes` and says how many bytes they are.
fn events(bytes: &[u8], sink: &mut impl Sink) -> usize {
    let mut used = 0;
    while let Some(length) = http::event_length(&bytes[used..]) {
        sink.message(&bytes[used..used + length]);
        used += length;
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Eq)]
    struct Seen {
        opened: usize,
        pings: usize,
        messages: Vec<String>,
    }

    impl Sink for Seen {
        fn opened(&mut self) {
            self.opened += 1;
        }

        fn message(&mut self, payload: &[u8]) {
            self.messages.push(String::from_utf8(payload.to_vec()).unwrap());
        }

        fn ping(&mut self) {
            self.pings += 1;
        }

        fn deflated(&mut self, payload: &[u8]) -> Result<(), Fault> {
            self.messages.push(format!("{} bytes", payload.len()));
            Ok(())
        }
    }

    /// Everything that a client sees of `parts`, which come one by one, and how it ends.
    fn check(is_stream: bool, parts: &[&[u8]], expected: &Seen, ending: &Result<(), Ending>) {
        let mut client = Client::new(is_stream);
        client.state = State::Shaking;
        let (mut buffer, mut seen, mut result) = (vec![0; 64], Seen::default(), Ok(()));
        for part in parts {
            let carried = client.carried(&mut buffer);
            let end = carried + part.len();
            buffer.resize(buffer.len().max(end), 0);
            buffer[carried..end].copy_from_slice(part);
            result = client.take(&mut buffer[..end], carried, &mut seen);
            if result.is_err() {
                break;
            }
        }
        assert_eq!((&seen, &result), (expected, ending), "{parts:?}");
        assert!(result.is_err() || client.rest.as_ref().is_none_or(|rest| !rest.out.is_empty()), "kept: {client:?}");
    }

    fn cut_everywhere(is_stream: bool, wire: &[u8], expected: &Seen, ending: &Result<(), Ending>) {
        for cut in 0..=wire.len() {
            check(is_stream, &[&wire[..cut], &wire[cut..]], expected, ending);
        }
        let bytes: Vec<&[u8]> = wire.chunks(1).collect();
        check(is_stream, &bytes, expected, ending);
    }

    #[test]
    fn a_websocket_cut_at_every_byte_says_the_same() {
        let mut wire = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n".to_vec();
        wire.extend_from_slice(b"\x81\x02hi\x89\x01p\x01\x02ab\x00\x01c\x89\x00\x80\x01d\x82\x7e\x00\x80");
        wire.extend_from_slice(&[b'y'; 128]);
        wire.extend_from_slice(b"\xc1\x02..");
        let messages = vec!["hi".to_owned(), "abcd".to_owned(), "y".repeat(128), "2 bytes".to_owned()];
        let expected = Seen { opened: 1, pings: 2, messages };
        let mut closed = wire.clone();
        closed.extend_from_slice(b"\x88\x02\x0f\xa8");
        cut_everywhere(false, &closed, &expected, &Err(Ending::Closed(4008)));
    }

    #[test]
    fn an_event_stream_cut_at_every_byte_says_the_same() {
        let wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
            8\r\ndata: a\n\r\n1\r\n\n\r\ne\r\n: keep-alive\n\n\r\n10\r\nid: 1\ndata: b\n\nd\r\n8\r\nata: c\n\n\r\n0\r\n\r\n";
        let messages = ["data: a\n\n", ": keep-alive\n\n", "id: 1\ndata: b\n\n", "data: c\n\n"];
        let expected = Seen { opened: 1, pings: 0, messages: messages.map(str::to_owned).to_vec() };
        cut_everywhere(true, wire, &expected, &Err(Ending::Closed(0)));
        let identity = b"HTTP/1.1 200 OK\r\n\r\ndata: a\n\n";
        let expected = Seen { opened: 1, pings: 0, messages: vec!["data: a\n\n".to_owned()] };
        cut_everywhere(true, identity, &expected, &Ok(()));
    }

    #[test]
    fn refusals_and_faults_end_it() {
        let refused = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";
        let text = "HTTP/1.1 503 No content-length: 0  ".to_owned();
        check(false, &[refused], &Seen::default(), &Err(Ending::Refused(503, text)));
        let opened = Seen { opened: 1, ..Seen::default() };
        for (bytes, fault) in [
            (b"\x80\x00".as_slice(), Fault::Fragment),
            (b"\x01\x00\x81\x00", Fault::Fragment),
            (b"\x01\x00\x01\x00", Fault::Fragment),
            (b"\x81\x80", Fault::Masked),
            (b"\x41\x00", Fault::Reserved),
            (b"\x01\x00\xc1\x00", Fault::Fragment),
        ] {
            let head = b"HTTP/1.1 101 Switching\r\n\r\n";
            check(false, &[head, bytes], &opened, &Err(Ending::Fault(fault)));
        }
    }

    #[test]
    fn an_idle_client_is_small() {
        assert!(size_of::<Client>() <= 48, "{}", size_of::<Client>());
    }
}
