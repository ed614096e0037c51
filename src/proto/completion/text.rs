//! Texts as they stand in a frame's JSON: escaped, and never decoded to be compared, cut or copied.
//!
//! The JSON of our own writer has a text at a fixed place, and escapes each character by itself. So what follows a text
//! that was sent is found by comparing bytes, and copied as it stands. Another node's JSON may escape more (all that
//! is not ASCII): where bytes differ, characters decide.

use memchr::{memchr, memchr2};

use crate::proto::frame::{Frame, Kind};

const ID_BYTES: usize = 36;

/// What stands before a frame's id, and between the id and the text; for a file the text is its name.
const fn around_id(kind: Kind) -> Option<(&'static [u8], &'static [u8])> {
    match kind {
        Kind::Message | Kind::Buttons => Some((b"{\"type\":\"message\",\"id\":\"", b"\",\"text\":\"")),
        Kind::Edit => Some((b"{\"type\":\"edit\",\"id\":\"", b"\",\"text\":\"")),
        Kind::File => Some((b"{\"type\":\"file\",\"id\":\"", b"\",\"filename\":\"")),
        _ => None,
    }
}

/// The JSON of `frame` from the first byte of its text on; `None` if the JSON has not the shape of our writer.
pub(super) fn open_text(frame: &Frame) -> Option<&[u8]> {
    let (before, after) = around_id(frame.kind())?;
    frame.json().strip_prefix(before)?.get(ID_BYTES..)?.strip_prefix(after)
}

/// The text that `open` begins with, up to its closing quote; `None` if that is not the inside of a JSON string.
pub(super) fn closed(open: &[u8]) -> Option<&[u8]> {
    let mut at = 0;
    loop {
        at += memchr2(b'"', b'\\', open.get(at..)?)?;
        if open[at] == b'"' {
            break;
        }
        at += unescape(&open[at..])?.1;
    }
    let text = &open[..at];
    let lowest = text.iter().fold(u8::MAX, |lowest, byte| lowest.min(*byte));
    (lowest >= 0x20).then_some(text)
}

/// The text of `frame`; `None` if its JSON has not the shape of our writer.
pub(super) fn text(frame: &Frame) -> Option<&[u8]> {
    closed(open_text(frame)?)
}

/// What a new text has that was not sent yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rest<'a> {
    /// Behind the longest common beginning.
    pub(super) rest: &'a [u8],
    /// How long the whole new text is.
    pub(super) text_bytes: usize,
    /// Whether the new text begins with all that was sent.
    pub(super) is_extension: bool,
}

/// Compares the text that `open` begins with to `sent`; `None` if there is no such text.
///
/// An extension is found by one comparison, and of its text only the rest is read again.
pub(super) fn rest_after<'a>(sent: &[u8], open: &'a [u8]) -> Option<Rest<'a>> {
    if let Some(behind) = open.strip_prefix(sent) {
        let rest = closed(behind)?;
        return Some(Rest { rest, text_bytes: sent.len() + rest.len(), is_extension: true });
    }
    let text = closed(open)?;
    let (sent_common, text_common) = common_beginning(sent, text);
    Some(Rest { rest: &text[text_common..], text_bytes: text.len(), is_extension: sent_common == sent.len() })
}

/// How many bytes of each text are the longest common beginning, in whole characters.
fn common_beginning(left: &[u8], right: &[u8]) -> (usize, usize) {
    let start = character_start(left, equal_bytes(left, right));
    let (mut left_at, mut right_at) = (start, start);
    while let (Some((left_one, left_bytes)), Some((right_one, right_bytes))) =
        (character(&left[left_at..]), character(&right[right_at..]))
        && left_one == right_one
    {
        left_at += left_bytes;
        right_at += right_bytes;
    }
    (left_at, right_at)
}

fn equal_bytes(left: &[u8], right: &[u8]) -> usize {
    const BLOCK: usize = 64;
    let blocks = left.chunks_exact(BLOCK).zip(right.chunks_exact(BLOCK));
    let at = BLOCK * blocks.take_while(|(left, right)| left == right).count();
    at + left[at..].iter().zip(&right[at..]).take_while(|(left, right)| left == right).count()
}

/// The last place up to `at` where a character of `text` begins or `text` ends.
fn character_start(text: &[u8], mut at: usize) -> usize {
    let mut from = 0;
    while let Some(found) = memchr(b'\\', &text[from..at]) {
        let start = from + found;
        let Some((_, bytes)) = unescape(&text[start..]) else { return start };
        if start + bytes > at {
            return start;
        }
        from = start + bytes;
    }
    while at > from && text.get(at).is_some_and(|byte| is_continuation(*byte)) {
        at -= 1;
    }
    at
}

/// How many characters a text has.
pub(super) fn count(text: &[u8]) -> u64 {
    let mut chars = text.iter().filter(|byte| !is_continuation(**byte)).count();
    let mut at = 0;
    while let Some(found) = memchr(b'\\', &text[at..]) {
        at += found;
        let Some((_, bytes)) = unescape(&text[at..]) else { break };
        at += bytes;
        chars -= bytes - 1;
    }
    chars as u64
}

const fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

/// The character that `text` begins with, escaped or not, and how many bytes it takes; `None` at the end.
fn character(text: &[u8]) -> Option<(u32, usize)> {
    let bytes = match *text.first()? {
        b'\\' => return unescape(text),
        byte if byte < 0x80 => return Some((u32::from(byte), 1)),
        byte if byte < 0xe0 => 2,
        byte if byte < 0xf0 => 3,
        _ => 4,
    };
    let raw = std::str::from_utf8(text.get(..bytes)?).ok()?;
    Some((u32::from(raw.chars().next()?), bytes))
}

/// The character of the escape that `text` begins with, and how many bytes that takes (RFC 8259 §7); a surrogate pair
/// is one character. `None` if it is no escape, or half a pair.
fn unescape(text: &[u8]) -> Option<(u32, usize)> {
    let short = match *text.get(1)? {
        byte @ (b'"' | b'\\' | b'/') => byte,
        b'b' => 0x08,
        b't' => 0x09,
        b'n' => 0x0a,
        b'f' => 0x0c,
        b'r' => 0x0d,
        b'u' => {
            let first = hexadecimal(text.get(2..6)?)?;
            return match first {
                0xd800..0xdc00 => {
                    let second = hexadecimal(text.get(6..12)?.strip_prefix(b"\\u")?)?;
                    let is_low = (0xdc00..0xe000).contains(&second);
                    is_low.then(|| (0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00), 12))
                }
                0xdc00..0xe000 => None,
                _ => Some((first, 6)),
            };
        }
        _ => return None,
    };
    Some((u32::from(short), 2))
}

fn hexadecimal(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |number, digit| Some(number << 4 | char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::json::escape_plain;

    /// As our writer escapes, and as one that leaves only ASCII does.
    fn escaped(text: &str) -> [Vec<u8>; 2] {
        let mut plain = Vec::new();
        escape_plain(text, &mut plain);
        let ascii = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
        [plain, ascii.into_bytes()]
    }

    #[test]
    fn a_text_ends_at_its_quote_and_is_legal() {
        let check = |open: &str, expected: Option<&str>| {
            assert_eq!(closed(open.as_bytes()), expected.map(str::as_bytes), "{open}");
        };
        check(r#"abc","sender"#, Some("abc"));
        check(r#"""#, Some(""));
        check(r#"a\"b\\"c"#, Some(r#"a\"b\\"#));
        check(r#"\u00e9\ud83d\ude00\/""#, Some(r"\u00e9\ud83d\ude00\/"));
        check("日本\"", Some("日本"));
        check("", None);
        check("abc", None);
        check(r#"abc\"#, None);
        check(r#"abc\""#, None);
        check(r#"\x""#, None);
        check(r#"\u00""#, None);
        check(r#"\u00g0""#, None);
        check(r#"\u+0ff""#, None);
        check(r#"\ud83d""#, None);
        check(r#"\ud83d\n""#, None);
        check(r#"\ud83d\u0041""#, None);
        check(r#"\ude00""#, None);
        check("a\nb\"", None);
        check("a\0\"", None);
    }

    #[test]
    fn the_rest_begins_at_a_character() {
        let check = |sent: &str, open: &str, rest: &str, is_extension: bool| {
            let found = rest_after(sent.as_bytes(), open.as_bytes()).unwrap();
            let found = (std::str::from_utf8(found.rest).unwrap(), found.is_extension);
            assert_eq!(found, (rest, is_extension), "{sent} {open}");
        };
        check("", r#"a""#, "a", true);
        check("ab", r#"abc""#, "c", true);
        check("ab", r#"ab""#, "", true);
        check("ab", r#"a""#, "", false);
        check("ab", r#"""#, "", false);
        check("abc", r#"axc""#, "xc", false);
        // é and è share their first byte.
        check("aé", r#"aè""#, "è", false);
        check("😀", r#"😁""#, "😁", false);
        // \n and \t share the backslash, and so do \u0001 and \u0002 all but the last.
        check(r"a\n", r#"a\t""#, r"\t", false);
        check(r"a\u0001", r#"a\u0002""#, r"\u0002", false);
        check(r"a\\n", r#"a\\t""#, "t", false);
        check(r"a\\\n", r#"a\\\t""#, r"\t", false);
        check(r"\ud83d\ude00", r#"\ud83d\ude01""#, r"\ud83d\ude01", false);
        // The same characters, escaped differently.
        check("é😀", r#"\u00e9\ud83d\ude00b""#, "b", true);
        check(r"\u00e9\ud83d\ude00", r#"é😀b""#, "b", true);
        check(r"\n/", r#"\u000a\/x""#, "x", true);
        check(r"\u00E9", r#"\u00e9b""#, "b", true);
        check(r"\\u00e9", r#"é""#, "é", false);
        assert_eq!(rest_after(b"a", b"ab"), None);
        assert_eq!(rest_after(b"a", b"b"), None);
    }

    proptest! {
        #[test]
        fn the_rest_is_what_decoded_texts_say(
            common in r#"(["\\\n\u{1}]|[a-cäö]|\PC){0,80}"#,
            left in r#"(["\\\n\u{1}]|[a-cäö]|\PC){0,3}"#,
            right in r#"(["\\\n\u{1}]|[a-cäö]|\PC){0,3}"#,
        ) {
            let (left, right) = (format!("{common}{left}"), format!("{common}{right}"));
            let equal = left.chars().zip(right.chars()).take_while(|(left, right)| left == right).count();
            let rest: String = right.chars().skip(equal).collect();
            for (rests, new) in escaped(&rest).iter().zip(escaped(&right)) {
                prop_assert_eq!(count(&new), right.chars().count() as u64);
                for sent in escaped(&left) {
                    let open = [&new[..], b"\""].concat();
                    let found = rest_after(&sent, &open).unwrap();
                    prop_assert_eq!(found.rest, &rests[..]);
                    prop_assert_eq!(found.text_bytes, new.len());
                    prop_assert_eq!(found.is_extension, right.starts_with(&left));
                }
            }
        }
    }
}
