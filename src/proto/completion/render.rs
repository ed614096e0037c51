//! What is not a text already: files as links, buttons as lines, errors; all of it escaped for JSON.

use std::fmt::Write as _;

use percent_encoding::utf8_percent_encode;

use super::text::text;
use crate::proto::event::{BUTTONS_MAX, FILENAME_SEGMENT};
use crate::proto::frame::{Frame, Kind};
use crate::proto::json::{escape_plain, escape_separators};

/// Stands between a text and its buttons, escaped.
pub(super) const LINE_BREAK: &[u8] = b"\\n";
/// Stands between two messages, files or lists of buttons, escaped.
pub(super) const BLANK_LINE: &[u8] = b"\\n\\n";

/// What an error is about: the `type` of an OpenAI error, a closed list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is wrong, or asks for what is not there.
    InvalidRequest,
    /// No key, or not a valid one.
    Authentication,
    /// A key that does not allow this.
    Permission,
    /// Too much at a time.
    RateLimit,
    /// The body did not come in time.
    Timeout,
    /// Not the client's fault.
    Server,
}

impl ErrorKind {
    /// Its name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request_error",
            Self::Authentication => "authentication_error",
            Self::Permission => "permission_error",
            Self::RateLimit => "rate_limit_error",
            Self::Timeout => "timeout",
            Self::Server => "server_error",
        }
    }
}

/// The body of an OpenAI error: `{"error":{"message","type","param","code"}}`, keys in this order, absent ones `null`.
///
/// ```
/// use tabcast::proto::completion::{ErrorKind, error_body};
/// let body = error_body("`n` must be 1", ErrorKind::InvalidRequest, Some("n"), None);
/// let expected = br#"{"error":{"message":"`n` must be 1","type":"invalid_request_error","param":"n","code":null}}"#;
/// assert_eq!(body, expected);
/// ```
#[must_use]
pub fn error_body(message: &str, kind: ErrorKind, param: Option<&str>, code: Option<&str>) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 100);
    let fields = [
        (&b"{\"error\":{\"message\":"[..], Some(message)),
        (b",\"type\":", Some(kind.as_str())),
        (b",\"param\":", param),
        (b",\"code\":", code),
    ];
    for (key, value) in fields {
        out.extend_from_slice(key);
        match value {
            Some(value) => {
                out.push(b'"');
                put_escaped(value, &mut out);
                out.push(b'"');
            }
            None => out.extend_from_slice(b"null"),
        }
    }
    out.extend_from_slice(b"}}");
    out
}

/// Appends `text` as it stands within a JSON string of an event stream.
pub(super) fn put_escaped(text: &str, out: &mut Vec<u8>) {
    let mut escaped = Vec::with_capacity(text.len());
    escape_plain(text, &mut escaped);
    escape_separators(&escaped, out);
}

/// The markdown link of a file, escaped; `None` if the frame's JSON has not the shape of our writer. The file's data is
/// never looked at.
pub(super) fn file_link(frame: &Frame, files_url: &str) -> Option<Vec<u8>> {
    let (id, escaped) = (frame.message_id()?, text(frame)?);
    let filename: String = serde_json::from_slice(&[b"\"", escaped, b"\""].concat()).ok()?;
    let mut link = String::with_capacity(files_url.len() + 2 * filename.len() + 50);
    link.push('[');
    push_label(&filename, &mut link);
    // Writing to a string cannot fail.
    let _ = write!(link, "]({files_url}/files/{id}/{})", utf8_percent_encode(&filename, FILENAME_SEGMENT));
    let mut out = Vec::with_capacity(link.len() + 16);
    put_escaped(&link, &mut out);
    Some(out)
}

/// A file's frame without the file: its id and name are all that a link needs. `None` for any other frame.
#[must_use]
pub fn without_data(frame: &Frame) -> Option<Frame> {
    if frame.kind() != Kind::File {
        return None;
    }
    let (id, filename) = (frame.message_id()?, std::str::from_utf8(text(frame)?).ok()?);
    let json = format!(
        "{{\"type\":\"file\",\"id\":\"{id}\",\"filename\":\"{filename}\",\"mimetype\":\"\",\"data\":\"\",\"size\":0,\"timestamp\":0}}"
    );
    Some(Frame::relay(Kind::File, Some(id), None, &json))
}

/// Appends a name that somebody gave as markdown that is no more than that name: on one line, and no link with another
/// text, no code span and no HTML can begin in it (CommonMark 0.31 §6). What only emphasises is left as it is, for those who
/// show the text as it comes, and so are addresses: who links those by themselves shows where they lead.
fn push_label(name: &str, out: &mut String) {
    for character in name.chars() {
        match character {
            '\\' | '[' | ']' | '<' | '`' => out.extend(['\\', character]),
            _ => out.push(on_one_line(character)),
        }
    }
}

/// Appends a button's address. What no URL may have (RFC 3986 §2) is percent-encoded, and so is what would make it a
/// link with another target: clients link what begins with `https://` by themselves, and nothing else here.
fn push_url(url: &str, out: &mut String) {
    let mut previous = ' ';
    for character in url.chars() {
        match on_one_line(character) {
            ' ' => out.push_str("%20"),
            '<' => out.push_str("%3C"),
            '>' => out.push_str("%3E"),
            '`' => out.push_str("%60"),
            '\\' => out.push_str("%5C"),
            '(' if previous == ']' => out.push_str("%28"),
            other => out.push(other),
        }
        previous = character;
    }
}

const fn on_one_line(character: char) -> char {
    match character {
        '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => ' ',
        _ => character,
    }
}

#[derive(serde::Deserialize)]
struct ButtonsFrame {
    buttons: Vec<ButtonLine>,
}

#[derive(serde::Deserialize)]
struct ButtonLine {
    label: String,
    emoji: Option<String>,
    url: Option<String>,
}

/// The buttons of a frame's JSON, a line each, escaped; empty if there are none, or what is there are no buttons.
pub(super) fn button_lines(json: &[u8]) -> Vec<u8> {
    let Ok(frame) = serde_json::from_slice::<ButtonsFrame>(json) else { return Vec::new() };
    let mut lines = String::new();
    for button in frame.buttons.iter().take(BUTTONS_MAX) {
        lines.push_str(if lines.is_empty() { "- " } else { "\n- " });
        if let Some(emoji) = &button.emoji {
            push_label(emoji, &mut lines);
            lines.push(' ');
        }
        push_label(&button.label, &mut lines);
        if let Some(url) = &button.url {
            lines.push_str(" (");
            push_url(url, &mut lines);
            lines.push(')');
        }
    }
    let mut out = Vec::with_capacity(lines.len() + 16);
    put_escaped(&lines, &mut out);
    out
}
