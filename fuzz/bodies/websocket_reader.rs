//! However a client's bytes are cut, the reader delivers the same and ends the same, within its bound of memory.

use std::ops::ControlFlow;

use tabcast::proto::websocket::{Incoming, Partial, ReadError, ReadLimits, read};

const MESSAGE_BYTES_MAX: usize = 600;

#[derive(Debug, PartialEq)]
enum Got {
    Text(Vec<u8>),
    Binary(Vec<u8>),
    Deflated(Vec<u8>),
    Fragment,
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
                Incoming::Fragment => Got::Fragment,
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
