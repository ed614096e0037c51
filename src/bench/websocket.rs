//! A client's side of RFC 6455: frames out of whatever bytes have come, and the few frames that it sends.
//!
//! Nothing is kept here and nothing is copied: a frame that is not whole stays with the caller until it is.

use std::fmt;

/// The most bytes of one frame, and of one message in fragments: 64 MiB, so that a server's mistake costs no more.
pub(super) const FRAME_BYTES_MAX: usize = 64 << 20;

/// The most bytes of a control frame's payload (RFC 6455 §5.5).
const CONTROL_BYTES_MAX: usize = 125;

/// What a server did that no server may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A server's frame is never masked (§5.1).
    Masked,
    /// A reserved bit without an extension (§5.2).
    Reserved,
    /// A compressed message that is none (RFC 7692 §7.2.2).
    Deflate,
    /// An opcode that does not exist (§5.2).
    Opcode,
    /// A control frame in fragments, or over 125 bytes (§5.5).
    Control,
    /// A length that is not in its shortest form (§5.2).
    Length,
    /// A fragment without a beginning, or a message inside another (§5.4).
    Fragment,
    /// Over [`FRAME_BYTES_MAX`].
    TooLarge,
    /// A response that is none, or a chunk without a size (RFC 9112 §7.1).
    Http,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Masked => "a masked frame from the server",
            Self::Reserved => "reserved bits set by the server",
            Self::Deflate => "a compressed message that cannot be inflated",
            Self::Opcode => "an unknown opcode from the server",
            Self::Control => "a control frame that is too long or in fragments",
            Self::Length => "a length that is not in its shortest form",
            Self::Fragment => "fragments that do not follow each other",
            Self::TooLarge => "a frame over 64 MiB",
            Self::Http => "not HTTP/1.1",
        })
    }
}

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole message, text or binary.
    Message,
    /// The same, compressed (RFC 7692 §6). In fragments it is not understood: no server that fans out sends one so.
    Deflated,
    /// The first fragment of a message.
    First,
    /// A fragment in the middle.
    Middle,
    /// The last fragment of a message.
    Last,
    Close,
    Ping,
    Pong,
}

/// What stands at the beginning of the bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    /// A whole frame, and how many bytes it is with its header.
    Frame(Kind, &'a [u8], usize),
    /// The frame is this long, or will at least need this many bytes to say so.
    Needs(usize),
}

/// The frame at the beginning of `bytes`.
///
/// # Errors
/// What is no frame of a server.
pub(super) fn next(bytes: &[u8]) -> Result<Next<'_>, Fault> {
    let &[first, second, ..] = bytes else { return Ok(Next::Needs(2)) };
    if second & 0x80 != 0 {
        return Err(Fault::Masked);
    }
    let (header, length) = match second {
        126 => match bytes.get(2..4) {
            Some(&[high, low]) => (4, usize::from(u16::from_be_bytes([high, low]))),
            _ => return Ok(Next::Needs(4)),
        },
        127 => match bytes.get(2..10).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok()) {
            Some(length) => (10, usize::try_from(u64::from_be_bytes(length)).unwrap_or(usize::MAX)),
            None => return Ok(Next::Needs(10)),
        },
        short => (2, usize::from(short)),
    };
    let kind = kind(first, length)?;
    match header {
        4 if length < 126 => return Err(Fault::Length),
        10 if length <= usize::from(u16::MAX) => return Err(Fault::Length),
        _ if length > FRAME_BYTES_MAX => return Err(Fault::TooLarge),
        _ => {}
    }
    match bytes.get(header..header + length) {
        Some(payload) => Ok(Next::Frame(kind, payload, header + length)),
        None => Ok(Next::Needs(header + length)),
    }
}

fn kind(first: u8, length: usize) -> Result<Kind, Fault> {
    let is_final = first & 0x80 != 0;
    if first & 0x70 != 0 {
        return if matches!(first, 0xc1 | 0xc2) { Ok(Kind::Deflated) } else { Err(Fault::Reserved) };
    }
    let control = |kind| if is_final && length <= CONTROL_BYTES_MAX { Ok(kind) } else { Err(Fault::Control) };
    match first & 0x0f {
        0 => Ok(if is_final { Kind::Last } else { Kind::Middle }),
        1 | 2 => Ok(if is_final { Kind::Message } else { Kind::First }),
        8 => control(Kind::Close),
        9 => control(Kind::Ping),
        10 => control(Kind::Pong),
        _ => Err(Fault::Opcode),
    }
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opcode {
    Text = 1,
    Binary = 2,
    Close = 8,
    Pong = 10,
}

/// Appends a client's frame. The mask is zero: it protects caches between browsers and servers, and none is here; the
/// server unmasks all the same.
pub(super) fn write(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    out.push(0x80 | opcode as u8);
    match payload.len() {
        short @ 0..126 => out.push(0x80 | u8::try_from(short).unwrap_or_default()),
        length => match u16::try_from(length) {
            Ok(length) => {
                out.push(0x80 | 126);
                out.extend_from_slice(&length.to_be_bytes());
            }
            Err(_) => {
                out.push(0x80 | 127);
                out.extend_from_slice(&(length as u64).to_be_bytes());
            }
        },
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![first];
        match length {
            0..126 => bytes.push(u8::try_from(length).unwrap()),
            126..65_536 => {
                bytes.push(126);
                bytes.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                bytes.push(127);
                bytes.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        bytes.extend((0..length).map(|at| u8::try_from(at % 251).unwrap()));
        bytes
    }

    #[test]
    fn frames_of_all_lengths_are_whole_only_at_their_last_byte() {
        for length in [0, 1, 125, 126, 127, 300, 65_535, 65_536, 70_000] {
            let bytes = frame(0x81, length);
            for cut in (0..bytes.len()).filter(|cut| *cut < 20 || bytes.len() - cut < 3) {
                match next(&bytes[..cut]) {
                    Ok(Next::Needs(needs)) => assert!(needs > cut && needs <= bytes.len(), "{length} cut at {cut}"),
                    other => panic!("{length} cut at {cut}: {other:?}"),
                }
            }
            let header = bytes.len() - length;
            let more = [bytes.as_slice(), b"\x81"].concat();
            assert_eq!(next(&more), Ok(Next::Frame(Kind::Message, &bytes[header..], bytes.len())), "{length}");
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        for (first, expected) in [
            (0x81, Kind::Message),
            (0x82, Kind::Message),
            (0xc1, Kind::Deflated),
            (0xc2, Kind::Deflated),
            (0x01, Kind::First),
            (0x02, Kind::First),
            (0x00, Kind::Middle),
            (0x80, Kind::Last),
            (0x88, Kind::Close),
            (0x89, Kind::Ping),
            (0x8a, Kind::Pong),
        ] {
            assert_eq!(next(&[first, 0]), Ok(Next::Frame(expected, &[], 2)), "{first:#x}");
        }
    }

    #[test]
    fn what_no_server_may_send_is_a_fault() {
        let long = |length: u64| [&[0x81, 127], length.to_be_bytes().as_slice()].concat();
        for (bytes, expected) in [
            (vec![0x81, 0x80], Fault::Masked),
            (vec![0x91, 0], Fault::Reserved),
            (vec![0x41, 0], Fault::Reserved),
            (vec![0xc9, 0], Fault::Reserved),
            (vec![0x83, 0], Fault::Opcode),
            (vec![0x8b, 0], Fault::Opcode),
            (vec![0x09, 0], Fault::Control),
            (vec![0x89, 126, 0, 126], Fault::Control),
            (vec![0x81, 126, 0, 125], Fault::Length),
            (long(65_535), Fault::Length),
            (long(FRAME_BYTES_MAX as u64 + 1), Fault::TooLarge),
            (long(u64::MAX), Fault::TooLarge),
        ] {
            assert_eq!(next(&bytes), Err(expected), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_written_has_a_mask_and_the_shortest_length() {
        for (length, header) in [(0usize, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)] {
            let mut out = Vec::new();
            write(&mut out, Opcode::Text, &vec![b'x'; length]);
            assert_eq!(out.len(), header + 4 + length);
            assert_eq!((out[0], out[1] & 0x80), (0x81, 0x80));
            out[1] &= 0x7f;
            out.drain(header..header + 4);
            assert!(matches!(next(&out), Ok(Next::Frame(Kind::Message, payload, _)) if payload.len() == length));
        }
    }
}
