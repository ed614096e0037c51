//! However a client's bytes are cut, the reader delivers the same and ends the same, within its bound of memory; and what
//! another reader delivers, and as it ends, but for what is named below.

use std::io;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use futures_core::Stream;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::websocket::{Incoming, Partial, ReadError, ReadLimits, read};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_websockets::proto::ProtocolError;
use tokio_websockets::{Error, Limits, Message, ServerBuilder};

const MESSAGE_BYTES_MAX: usize = 600;

#[derive(Debug, PartialEq)]
enum Got {
    /// Of ours it is UTF-8.
    Text(Vec<u8>),
    Binary(Vec<u8>),
    Deflated(Vec<u8>),
    DeflatedBinary(Vec<u8>),
    Control(u8, Vec<u8>),
    Close(Option<(u16, String)>),
}

/// The first byte says how long the pieces are; the rest is the stream. The stream is read as it is, and once more
/// with every frame's mask bit set, so that the fuzzer need not find that out for each frame; each without and with
/// permessage-deflate.
pub(crate) fn run(bytes: &[u8]) {
    let Some((&seed, stream)) = bytes.split_first() else { return };
    for stream in [stream.to_vec(), masked(stream)] {
        for deflates in [false, true] {
            let whole = deliver(&stream, deflates, |_| stream.len());
            let bytewise = deliver(&stream, deflates, |_| 1);
            let mixed = deliver(&stream, deflates, |turn| 1 + (usize::from(seed).wrapping_mul(turn + 1)) % 17);
            assert_eq!(whole, bytewise);
            assert_eq!(whole, mixed);
            if !deflates {
                compare(stream.clone(), seed);
            }
            assert!(deflates || !whole.0.iter().any(|got| matches!(got, Got::Deflated(_) | Got::DeflatedBinary(_))));
        }
    }
}

fn deliver(stream: &[u8], deflates: bool, piece: impl Fn(usize) -> usize) -> (Vec<Got>, Result<(), ReadError>) {
    let limits = ReadLimits { message_bytes_max: MESSAGE_BYTES_MAX, deflates };
    let (mut partial, mut got, mut rest, mut turn) = (None, Vec::new(), stream.to_vec(), 0);
    while !rest.is_empty() {
        let later = rest.split_off(piece(turn).clamp(1, rest.len()));
        let mut now = std::mem::replace(&mut rest, later);
        turn += 1;
        let mut is_closed = false;
        let result = read(&mut partial, &mut now, &limits, &mut |message| {
            is_closed |= matches!(message, Incoming::Close(_));
            got.push(match message {
                Incoming::Text(text) => Got::Text(std::str::from_utf8(text).expect("checked").as_bytes().to_vec()),
                Incoming::Binary(bytes) => Got::Binary(bytes.to_vec()),
                Incoming::Deflated(bytes) => Got::Deflated(bytes.to_vec()),
                Incoming::EmptyFragment => return ControlFlow::Continue(()),
                Incoming::DeflatedBinary(bytes) => Got::DeflatedBinary(bytes.to_vec()),
                Incoming::Ping(bytes) => Got::Control(9, bytes.to_vec()),
                Incoming::Pong(bytes) => Got::Control(10, bytes.to_vec()),
                Incoming::Close(payload) => Got::Close(payload.map(|(code, reason)| (code, reason.to_owned()))),
            });
            ControlFlow::Continue(())
        });
        let bound = size_of::<Partial>() + MESSAGE_BYTES_MAX + 125;
        assert!(partial.as_ref().is_none_or(|partial| partial.bytes() <= bound));
        if result.is_err() || is_closed {
            assert!(partial.is_none());
            return (got, result);
        }
    }
    (got, Ok(()))
}

/// Sets the mask bit of every frame, as far as the lengths lead to one.
fn masked(stream: &[u8]) -> Vec<u8> {
    let (mut stream, mut at) = (stream.to_vec(), 0_usize);
    while let Some(second) = at.checked_add(1).and_then(|at| stream.get_mut(at)) {
        *second |= 0x80;
        let short = usize::from(*second & 0x7f);
        let rest = &stream[at + 2..];
        let (length, bytes) = match short {
            126 => (rest.first_chunk().map_or(0, |length| usize::from(u16::from_be_bytes(*length))), 2),
            127 => {
                (rest.first_chunk().map_or(0, |length| usize::try_from(u64::from_be_bytes(*length)).unwrap_or(0)), 8)
            }
            _ => (short, 0),
        };
        let Some(next) = at.checked_add(2 + bytes + 4).and_then(|at| at.checked_add(length)) else { break };
        at = next;
    }
    stream
}

/// More than completes any frame that is not too long, and breaks a rule behind it: every stream comes to an end.
const ENDING: [u8; 2 * MESSAGE_BYTES_MAX] = [0; 2 * MESSAGE_BYTES_MAX];

/// Reads the stream by both readers, cut into pieces.
fn compare(mut stream: Vec<u8>, seed: u8) {
    stream.extend_from_slice(&ENDING);
    let (ours, result) = deliver(&stream, false, |turn| 1 + usize::from(seed) * (turn % 3));
    let (theirs, ending) = oracle(stream, usize::from(seed) + 1);
    let shared = ours.len().min(theirs.len());
    assert_eq!(ours[..shared], theirs[..shared]);
    let error = match result {
        Err(error) => error,
        Ok(()) => {
            assert!(matches!(ours.last(), Some(Got::Close(_))));
            return assert_eq!((theirs.len(), ending), (shared, None));
        }
    };
    assert_eq!(shared, ours.len());
    match (error, theirs.get(shared)) {
        // Not registered, and not for anybody to use (RFC 6455 §7.4.2): they take them.
        (ReadError::CloseCode(1016..=2999), Some(Got::Close(_))) => {}
        // They do not look at a character that an empty last fragment cuts off.
        (ReadError::NotUtf8, Some(Got::Text(text))) => assert!(std::str::from_utf8(text).is_err()),
        (_, Some(more)) => panic!("{error:?}, and they deliver {more:?}"),
        // We look at the top bit of a length, and add the lengths of fragments up, before anything else of the frame.
        (ReadError::LengthTopBit | ReadError::MessageTooBig, None) => assert!(ending.is_some()),
        (error, None) => assert_eq!(ending, Some(error.disconnect())),
    }
}

/// What tokio-websockets delivers, and what it would end the connection with; None after a close frame.
fn oracle(stream: Vec<u8>, piece: usize) -> (Vec<Got>, Option<Disconnect>) {
    let limits = Limits::default().max_payload_len(Some(MESSAGE_BYTES_MAX));
    let mut reader = ServerBuilder::new().limits(limits).serve(Pieces { stream, at: 0, piece });
    let mut got = Vec::new();
    loop {
        match Pin::new(&mut reader).poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Some(Ok(message))) => got.push(got_of(&message)),
            Poll::Ready(Some(Err(error))) => return (got, Some(disconnect(&error))),
            Poll::Ready(None) => return (got, None),
            Poll::Pending => panic!("there is always something to read"),
        }
    }
}

fn got_of(message: &Message) -> Got {
    let bytes = message.as_payload().to_vec();
    match message {
        message if message.is_text() => Got::Text(bytes),
        message if message.is_binary() => Got::Binary(bytes),
        message if message.is_ping() => Got::Control(9, bytes),
        message if message.is_pong() => Got::Control(10, bytes),
        _ => Got::Close(bytes.split_first_chunk().map(|(code, reason)| {
            (u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).expect("they check it"))
        })),
    }
}

fn disconnect(error: &Error) -> Disconnect {
    match error {
        Error::Protocol(ProtocolError::InvalidUtf8) => Disconnect::InvalidPayload,
        Error::Protocol(_) => Disconnect::ProtocolError,
        Error::PayloadTooLong { .. } => Disconnect::MessageTooBig,
        other => panic!("{other}"),
    }
}

/// A connection on which this comes, so many bytes at a time, and which takes whatever is written.
struct Pieces {
    stream: Vec<u8>,
    at: usize,
    piece: usize,
}

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let end = (self.at + self.piece.min(buffer.remaining())).min(self.stream.len());
        buffer.put_slice(&self.stream[self.at..end]);
        self.at = end;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
