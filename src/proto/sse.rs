//! Event streams beside their frames: the response's head, keep-alive, retry, and the end.
//!
//! The bodies of an event stream are [`EventStream`](crate::proto::frame::EventStream)s; everything here goes between
//! them. Each piece is one HTTP/1.1 chunk, so that pieces can be written in any order.

use std::time::Duration;

use crate::proto::disconnect::Disconnect;

/// A comment that readers ignore: it keeps proxies from closing an idle stream.
pub const KEEP_ALIVE: &[u8] = b"e\r\n: keep-alive\n\n\r\n";

/// What ends the response (RFC 9112 §7.1).
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\
    content-type: text/event-stream; charset=utf-8\r\n\
    cache-control: no-cache\r\n\
    x-accel-buffering: no\r\n\
    transfer-encoding: chunked\r\n";

/// The head of an event stream's response, its empty line included.
///
/// `headers` are added as they are (CORS, `date`): the caller has checked that names and values are legal, without
/// CR, LF or NUL.
///
/// ```
/// use tabcast::proto::sse::response_head;
/// let head = response_head(&[("access-control-allow-origin", "https://chat.example")]);
/// assert!(head.starts_with(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"));
/// assert!(head.ends_with(b"\r\naccess-control-allow-origin: https://chat.example\r\n\r\n"));
/// ```
#[must_use]
pub fn response_head(headers: &[(&str, &str)]) -> Vec<u8> {
    let added: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    let mut head = Vec::with_capacity(HEAD.len() + added + 2);
    head.extend_from_slice(HEAD);
    for (name, value) in headers {
        for part in [name, ": ", value, "\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// One HTTP/1.1 chunk of `content`; nothing for nothing, as an empty chunk would end the response.
#[must_use]
pub fn chunk(content: &[u8]) -> Vec<u8> {
    if content.is_empty() {
        return Vec::new();
    }
    let digits = (usize::BITS - content.len().leading_zeros()).div_ceil(4) as usize;
    let mut chunk = Vec::with_capacity(digits + 2 + content.len() + 2);
    for digit in (0..digits).rev() {
        chunk.push(b"0123456789abcdef"[content.len() >> (4 * digit) & 15]);
    }
    chunk.extend_from_slice(b"\r\n");
    chunk.extend_from_slice(content);
    chunk.extend_from_slice(b"\r\n");
    chunk
}

/// The content of one whole chunk as [`chunk`] writes it: for a server that makes the chunks itself.
///
/// ```
/// use tabcast::proto::sse::{KEEP_ALIVE, unchunked};
/// assert_eq!(unchunked(KEEP_ALIVE), b": keep-alive\n\n");
/// ```
#[must_use]
pub fn unchunked(chunk: &[u8]) -> &[u8] {
    let content = memchr::memchr(b'\n', chunk).map_or(chunk, |end| &chunk[end + 1..]);
    content.strip_suffix(b"\r\n").unwrap_or(content)
}

/// A record that only says how long a reader waits before it connects again (whole milliseconds): for a drain. It has
/// no data, so it is no event.
#[must_use]
pub fn retry(after: Duration) -> Vec<u8> {
    chunk(format!("retry: {}\n\n", after.as_millis()).as_bytes())
}

/// What an event stream says before it ends. Readers come back to one that ends, so one that is over for another reason
/// than they would think says so: by an event `close` with the code and the reason that a WebSocket would be closed with.
/// Empty for the others. Without a chunk around it, for a server that makes the chunks itself.
///
/// ```
/// use tabcast::proto::disconnect::Disconnect;
/// use tabcast::proto::sse::last_record;
/// let kicked = last_record(Disconnect::Kicked);
/// assert_eq!(kicked, "event: close\ndata: {\"code\":4010,\"reason\":\"kicked\"}\n\n");
/// assert_eq!(last_record(Disconnect::ServiceRestart), "");
/// ```
#[must_use]
pub fn last_record(ending: Disconnect) -> String {
    if ending.is_retryable() && ending != Disconnect::TokenExpired {
        return String::new();
    }
    let (code, reason) = (ending.close_code(), ending.reason());
    format!("event: close\ndata: {{\"code\":{code},\"reason\":\"{reason}\"}}\n\n")
}

/// The end of an event stream: its [`last_record`], and the end of the response.
#[must_use]
pub fn end(ending: Disconnect) -> Vec<u8> {
    [&chunk(last_record(ending).as_bytes()), LAST_CHUNK].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The content of a chunk, whose size must be right.
    fn unchunk(chunk: &[u8]) -> &str {
        let (size, rest) = std::str::from_utf8(chunk).unwrap().split_once("\r\n").unwrap();
        let content = rest.strip_suffix("\r\n").unwrap();
        assert_eq!(usize::from_str_radix(size, 16).unwrap(), content.len());
        content
    }

    #[test]
    fn the_head_has_what_proxies_and_readers_need_and_ends_once() {
        assert_eq!(
            String::from_utf8(response_head(&[])).unwrap(),
            "HTTP/1.1 200 OK\r\n\
             content-type: text/event-stream; charset=utf-8\r\n\
             cache-control: no-cache\r\n\
             x-accel-buffering: no\r\n\
             transfer-encoding: chunked\r\n\r\n"
        );
        let head = String::from_utf8(response_head(&[("a", "b"), ("vary", "origin")])).unwrap();
        assert!(head.ends_with("chunked\r\na: b\r\nvary: origin\r\n\r\n"), "{head}");
        assert_eq!(head.matches("\r\n\r\n").count(), 1);
    }

    #[test]
    fn a_chunks_content_is_found_again() {
        for content in ["x", ": keep-alive\n\n", "retry: 1\n\n", "ends with\r\n"] {
            assert_eq!(unchunked(&chunk(content.as_bytes())), content.as_bytes());
        }
        assert_eq!(unchunked(KEEP_ALIVE), b": keep-alive\n\n");
        assert_eq!(unchunked(LAST_CHUNK), b"");
    }

    #[test]
    fn records_are_whole_chunks_and_no_events() {
        assert_eq!(unchunk(KEEP_ALIVE), ": keep-alive\n\n");
        assert_eq!(unchunk(LAST_CHUNK), "");
        assert_eq!(unchunk(&retry(Duration::from_millis(1500))), "retry: 1500\n\n");
        assert_eq!(unchunk(&retry(Duration::ZERO)), "retry: 0\n\n");
        assert_eq!(unchunk(&retry(Duration::from_secs(1_000_000))), "retry: 1000000000\n\n");
    }

    #[test]
    fn a_stream_says_that_it_is_over_where_its_reader_would_come_back_for_nothing() {
        for ending in Disconnect::ALL {
            let end = end(ending);
            let close = end.strip_suffix(LAST_CHUNK).unwrap();
            if ending.is_retryable() && ending != Disconnect::TokenExpired {
                assert!(close.is_empty(), "{ending:?}");
                continue;
            }
            let (code, reason) = (ending.close_code(), ending.reason());
            let expected = format!("event: close\ndata: {{\"code\":{code},\"reason\":\"{reason}\"}}\n\n");
            assert_eq!(unchunk(close), expected);
        }
    }
}
