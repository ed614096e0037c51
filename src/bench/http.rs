//! A client's side of HTTP/1.1, as far as a load generator needs it: response heads, and bodies of known length, in
//! chunks, or up to the end of the connection.

use memchr::memmem;

use super::websocket::Fault;

/// The most bytes of a response's head: 32 KiB.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// The most hexadecimal digits of a chunk's size.
const DIGITS_MAX: u8 = 8;

/// How the body of a response ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// That many bytes are left.
    Length(u64),
    Chunks(Chunks),
    /// With the connection.
    Open,
}

/// A response's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) body: Body,
    /// Bytes of it.
    pub(super) length: usize,
}

/// The head at the beginning of `bytes`; `None` while it is not whole.
///
/// # Errors
/// What is no response, or has a head over 32 KiB.
pub(super) fn head(bytes: &[u8]) -> Result<Option<Head>, Fault> {
    let Some(end) = memmem::find(bytes, b"\r\n\r\n") else {
        return if bytes.len() > HEAD_BYTES_MAX { Err(Fault::Http) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| Fault::Http)?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
    let status: u16 = status.ok_or(Fault::Http)?;
    let mut body = Body::Open;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(Fault::Http)?;
        if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            body = Body::Chunks(Chunks::default());
        } else if name.eq_ignore_ascii_case("content-length") && body == Body::Open {
            body = Body::Length(value.trim().parse().map_err(|_| Fault::Http)?);
        }
    }
    if matches!(status, 100..200 | 204 | 304) {
        body = Body::Length(0);
    }
    Ok(Some(Head { status, body, length: end + 4 }))
}

/// Where a chunked body is (RFC 9112 §7.1): 8 bytes, so that every client can have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Chunks {
    /// Bytes of this chunk's content that are still to come.
    left: u32,
    step: Step,
    digits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Step {
    #[default]
    Size,
    /// A chunk's extension, up to the end of its line.
    Extension,
    SizeEnd,
    Content,
    ContentEnd,
    ContentEnded,
    /// Lines behind the last chunk; true while a line has something.
    Trailer(bool),
    Over,
}

impl Chunks {
    /// Moves the content in `bytes[from..]` to the front of it, and says where it ends.
    ///
    /// # Errors
    /// What is not chunked.
    pub(super) fn unwrap_chunks(&mut self, bytes: &mut [u8], from: usize) -> Result<usize, Fault> {
        let (mut read, mut written) = (from, from);
        while read < bytes.len() {
            if self.step == Step::Content {
                let count = (bytes.len() - read).min(self.left as usize);
                bytes.copy_within(read..read + count, written);
                read += count;
                written += count;
                self.left -= u32::try_from(count).unwrap_or(self.left);
                if self.left == 0 {
                    self.step = Step::ContentEnd;
                }
                continue;
            }
            self.step_over(bytes[read])?;
            read += 1;
        }
        Ok(written)
    }

    /// True once the last chunk and its trailer have come.
    pub(super) fn is_over(&self) -> bool {
        self.step == Step::Over
    }

    fn step_over(&mut self, byte: u8) -> Result<(), Fault> {
        self.step = match (self.step, byte) {
            (Step::Size, b'\r') if self.digits > 0 => Step::SizeEnd,
            (Step::Size, b';' | b' ' | b'\t') if self.digits > 0 => Step::Extension,
            (Step::Size, digit) if self.digits < DIGITS_MAX => {
                let digit = char::from(digit).to_digit(16).ok_or(Fault::Http)?;
                self.left = self.left << 4 | digit;
                self.digits += 1;
                Step::Size
            }
            (Step::Extension, b'\r') => Step::SizeEnd,
            (Step::Extension, _) => Step::Extension,
            (Step::SizeEnd, b'\n') => {
                self.digits = 0;
                if self.left == 0 { Step::Trailer(false) } else { Step::Content }
            }
            (Step::ContentEnd, b'\r') => Step::ContentEnded,
            (Step::ContentEnded, b'\n') => Step::Size,
            (Step::Trailer(false), b'\n') => Step::Over,
            (Step::Trailer(true), b'\n') => Step::Trailer(false),
            (Step::Trailer(has), b'\r') => Step::Trailer(has),
            (Step::Trailer(_), _) => Step::Trailer(true),
            _ => return Err(Fault::Http),
        };
        Ok(())
    }
}

/// The length of the event at the beginning of an event stream, up to and with its empty line; `None` while it is not
/// whole. Lines end with LF, CR LF or CR, as the standard of server-sent events has it.
pub(super) fn event_length(text: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let end = from + memchr::memchr2(b'\n', b'\r', &text[from..])?;
        let next = match (text[end], text.get(end + 1)) {
            (b'\n', _) => end + 1,
            (_, Some(b'\n')) => end + 2,
            (_, Some(_)) => end + 1,
            // Whether the line goes on with an LF is not known yet.
            (_, None) => return None,
        };
        if end == from {
            return Some(next);
        }
        from = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_say_how_their_body_ends() {
        let chunks = Body::Chunks(Chunks::default());
        for (text, status, body) in [
            ("HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n", 101, Body::Length(0)),
            ("HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n", 200, Body::Length(12)),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", 200, chunks),
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 200, chunks),
            ("HTTP/1.0 503 No\r\n\r\n", 503, Body::Open),
            ("HTTP/1.1 204 None\r\n\r\n", 204, Body::Length(0)),
        ] {
            for cut in 0..text.len() {
                assert_eq!(head(&text.as_bytes()[..cut]), Ok(None), "{text} cut at {cut}");
            }
            let more = format!("{text}more");
            assert_eq!(head(more.as_bytes()), Ok(Some(Head { status, body, length: text.len() })), "{text}");
        }
        for bad in ["SSH-2.0\r\n\r\n", "HTTP/1.1 2x0\r\n\r\n", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n"] {
            assert_eq!(head(bad.as_bytes()), Err(Fault::Http), "{bad}");
        }
        assert_eq!(head(&[b'x'; HEAD_BYTES_MAX + 1]), Err(Fault::Http));
    }

    #[test]
    fn chunks_cut_at_every_byte_come_out_whole() {
        let wire = b"5\r\nhello\r\n1;a=b\r\n,\r\n00a\r\n 123456789\r\n0\r\nx: y\r\n\r\n";
        for cut in 0..=wire.len() {
            let (mut chunks, mut text) = (Chunks::default(), Vec::new());
            for part in [&wire[..cut], &wire[cut..]] {
                // Something that was decoded before stands in front, as it does in a thread's buffer.
                let mut bytes = [b"kept".as_slice(), part].concat();
                let end = chunks.unwrap_chunks(&mut bytes, 4).unwrap();
                assert_eq!(&bytes[..4], b"kept");
                text.extend_from_slice(&bytes[4..end]);
            }
            assert_eq!(String::from_utf8_lossy(&text), "hello, 123456789", "cut at {cut}");
            assert!(chunks.is_over());
        }
    }

    #[test]
    fn what_is_not_chunked_is_a_fault() {
        for bad in ["x\r\n", "\r\n", "1\n", "1\r\nab", "1\r\na\n", "123456789\r\n", "1\r\na\r\n0\r\n\r\n5"] {
            let mut bytes = bad.as_bytes().to_vec();
            assert_eq!(Chunks::default().unwrap_chunks(&mut bytes, 0), Err(Fault::Http), "{bad:?}");
        }
    }

    #[test]
    fn events_end_at_their_empty_line() {
        for (text, expected) in [
            ("data: a\n\nrest", Some(9)),
            ("data: a\r\n\r\nrest", Some(11)),
            ("data: a\r\rrest", Some(9)),
            ("id: 1\ndata: a\ndata: b\n\n", Some(23)),
            (": keep-alive\n\n", Some(14)),
            ("\n", Some(1)),
            ("data: a\n", None),
            ("data: a\r\n\r", None),
            ("data: a", None),
            ("", None),
        ] {
            assert_eq!(event_length(text.as_bytes()), expected, "{text:?}");
        }
    }
}
