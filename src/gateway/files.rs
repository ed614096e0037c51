//! `GET /files/{id}/{filename}`: what the URL of a file resolves to, for whoever has it. The id is the key, so there is
//! no other; the name is compared with the file's, and never used as a path.
//!
//! What a worker sent may be anything, and comes from the origin of the chat page: only what browsers show without
//! running it is shown in place, the rest is saved, and nothing of it may run, load, or be guessed to be another type.

pub(crate) mod remote;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    HeaderName, HeaderValue, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::Full;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::engine::Engine;
use crate::engine::files::StoredFile;
use crate::gateway::edge::Gateway;
use crate::gateway::response::{Answered, error, finish, method_not_allowed};
use crate::platform::adapter::Outlet;
use crate::platform::webchat::{DEFAULT_MIMETYPE, parse_file_segments};

const POLICY: HeaderValue = HeaderValue::from_static("sandbox; default-src 'none'");
/// Chat pages on other origins show the pictures.
const RESOURCE_POLICY: (HeaderName, HeaderValue) =
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("cross-origin"));

/// Raster images, which run nothing. Audio and video are beside them.
const PICTURES: [&str; 6] = ["image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp"];

/// All but `attr-char` (RFC 8187 §3.2.1).
const VALUE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b'-')
    .remove(b'.')
    .remove(b'^')
    .remove(b'_')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

/// Answers for `path`, which is what stands after `/files/`: with a file of this node, or of the one that its id names.
pub(crate) async fn answer(gateway: &Gateway, path: &str, method: &Method, headers: &HeaderMap) -> Answered {
    if ![Method::GET, Method::HEAD].contains(method) {
        return method_not_allowed("GET, HEAD");
    }
    if let Some(answered) = kept_here(&gateway.engine, path, method, headers) {
        return answered;
    }
    let missing = || error(StatusCode::NOT_FOUND, "not_found", "there is no such file, or no longer");
    let Some((id, _)) = parse_file_segments(path) else { return missing() };
    let broker = gateway.engine.broker();
    if headers.contains_key(remote::FROM_NODE) || [0, id.tag()].contains(&broker.tag()) {
        return missing();
    }
    let node = (Arc::clone(broker), id.tag());
    let asked = (path.to_owned(), method.clone(), headers.clone());
    gateway.remote_files.fetch_apart(&gateway.control, node, asked).await.unwrap_or_else(missing)
}

fn kept_here(engine: &Engine, path: &str, method: &Method, headers: &HeaderMap) -> Option<Answered> {
    let (id, filename) = parse_file_segments(path)?;
    let file = engine.file(id).filter(|file| *file.filename == *filename)?;
    let left = file.time_left(engine.settings().files.time, engine.now())?;
    Some(respond(&file, left, method, headers))
}

/// The file, a part of it, or that the client has it already.
fn respond(file: &StoredFile, left: Duration, method: &Method, headers: &HeaderMap) -> Answered {
    // An id is 36 characters that every header may have.
    let etag = HeaderValue::from_str(&format!("\"{}\"", file.id)).unwrap_or(HeaderValue::from_static("\"\""));
    let size = file.data.len();
    let asked = if has_it(headers, &etag) {
        None
    } else if *method == Method::GET && headers.get(IF_RANGE).is_none_or(|tag| *tag == etag) {
        Some(Asked::by(headers, size))
    } else {
        Some(Asked::Whole)
    };
    let (status, body, part) = match asked {
        None => (StatusCode::NOT_MODIFIED, Bytes::new(), None),
        Some(Asked::Whole) => (StatusCode::OK, file.data.clone(), None),
        Some(Asked::Part(part)) => {
            let range = format!("bytes {}-{}/{size}", part.start, part.end - 1);
            (StatusCode::PARTIAL_CONTENT, file.data.slice(part), HeaderValue::from_str(&range).ok())
        }
        Some(Asked::NothingThere) => return nothing_there(size),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let added = response.headers_mut();
    let caching = format!("private, max-age={}, immutable", left.as_secs());
    added.extend([
        (ETAG, etag),
        (CACHE_CONTROL, HeaderValue::from_str(&caching).unwrap_or(HeaderValue::from_static("no-store"))),
        (ACCEPT_RANGES, HeaderValue::from_static("bytes")),
        (CONTENT_SECURITY_POLICY, POLICY),
        RESOURCE_POLICY,
    ]);
    if status != StatusCode::NOT_MODIFIED {
        let content_type = content_type(&file.mimetype);
        added.insert(CONTENT_DISPOSITION, disposition(content_type.to_str().unwrap_or_default(), &file.filename));
        added.insert(CONTENT_TYPE, content_type);
    }
    added.extend(part.map(|part| (CONTENT_RANGE, part)));
    finish(response)
}

/// RFC 9110 §15.5.17.
fn nothing_there(size: usize) -> Answered {
    let message = format!("the file has {size} bytes, and none in this range");
    let mut response = error(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", &message);
    let whole = HeaderValue::from_str(&format!("bytes */{size}")).ok();
    response.headers_mut().extend(whole.map(|whole| (CONTENT_RANGE, whole)));
    response
}

/// Whether `If-None-Match` names the file: the weak comparison (RFC 9110 §13.1.2).
fn has_it(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    let lists = headers.get_all(IF_NONE_MATCH).into_iter().filter_map(|value| value.to_str().ok());
    let mut tags = lists.flat_map(|list| list.split(',')).map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

/// Which bytes a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// All: also where the header is not understood, or asks for several ranges at once, which nobody here needs.
    Whole,
    /// These, at least one.
    Part(Range<usize>),
    /// Such that there are none.
    NothingThere,
}

impl Asked {
    fn by(headers: &HeaderMap, size: usize) -> Self {
        let mut values = headers.get_all(RANGE).into_iter();
        let (Some(value), None) = (values.next(), values.next()) else { return Self::Whole };
        value.to_str().ok().and_then(|text| Self::parse(text, size)).unwrap_or(Self::Whole)
    }

    /// RFC 9110 §14.1.2. `None`: not one range of bytes.
    fn parse(text: &str, size: usize) -> Option<Self> {
        let (unit, ranges) = text.split_once('=')?;
        let mut ranges = ranges.split(',').map(str::trim).filter(|range| !range.is_empty());
        let (Some(range), None) = (ranges.next(), ranges.next()) else { return None };
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (first, last) = range.split_once('-')?;
        if first.is_empty() {
            let suffix = position(last)?;
            return match size {
                _ if suffix == 0 => Some(Self::NothingThere),
                // The whole of an empty file has no range to name.
                0 => None,
                _ => Some(Self::Part(size - suffix.min(size)..size)),
            };
        }
        let first = position(first)?;
        let last = if last.is_empty() { usize::MAX } else { position(last)? };
        if last < first {
            return None;
        }
        Some(if first < size { Self::Part(first..last.saturating_add(1).min(size)) } else { Self::NothingThere })
    }
}

/// A number of any length: past what fits it is as good as the largest.
fn position(digits: &str) -> Option<usize> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(usize::MAX))
}

/// The type that the sender named, as it stands, if it is one in ASCII.
fn content_type(mimetype: &str) -> HeaderValue {
    let is_type = mimetype.is_ascii() && after_media_type(mimetype).is_some();
    let named = is_type.then(|| HeaderValue::from_str(mimetype).ok()).flatten();
    named.unwrap_or(HeaderValue::from_static(DEFAULT_MIMETYPE))
}

/// Reads a media type up to the end of the text (RFC 9110 §8.3.1, §5.6.6).
fn after_media_type(text: &str) -> Option<()> {
    let rest = after_token(after_token(text)?.strip_prefix('/')?)?;
    let mut rest = rest.trim_start_matches([' ', '\t']);
    while !rest.is_empty() {
        rest = rest.strip_prefix(';')?.trim_start_matches([' ', '\t']);
        if rest.is_empty() || rest.starts_with(';') {
            continue;
        }
        let value = after_token(rest)?.strip_prefix('=')?;
        let after = if value.starts_with('"') { after_quoted(value)? } else { after_token(value)? };
        rest = after.trim_start_matches([' ', '\t']);
    }
    Some(())
}

fn after_token(text: &str) -> Option<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let rest = text.trim_start_matches(is_part);
    (rest.len() < text.len()).then_some(rest)
}

/// Characters that no header may have are not looked for here: the header refuses them.
fn after_quoted(text: &str) -> Option<&str> {
    let inside = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, character) in inside.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(&inside[at + 1..]),
            _ => {}
        }
    }
    None
}

/// Whether browsers show it without running anything. What ends in `+xml` is a document to them, whatever is before it.
fn is_shown(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let plays = essence.starts_with("audio/") || essence.starts_with("video/");
    PICTURES.contains(&&*essence) || (plays && !essence.ends_with("+xml"))
}

/// Shown or saved, and under which name (RFC 6266): once for those who read ASCII only, once as it is. A name is no
/// path, and reads from left to right: both have `_` for what separates directories, and for what would turn
/// `exe.gnp` around.
fn disposition(content_type: &str, filename: &str) -> HeaderValue {
    let kind = if is_shown(content_type) { "inline" } else { "attachment" };
    let name = filename.replace(|c: char| c.is_control() || turns(c) || matches!(c, '/' | '\\'), "_");
    let plain = name.replace(|c: char| !matches!(c, ' '..='~') || matches!(c, '"' | '%'), "_");
    let encoded = utf8_percent_encode(&name, VALUE);
    let value = format!("{kind}; filename=\"{plain}\"; filename*=UTF-8''{encoded}");
    HeaderValue::from_str(&value).unwrap_or(HeaderValue::from_static("attachment"))
}

/// The marks that change the direction of text (Unicode Standard Annex #9 §2).
const fn turns(character: char) -> bool {
    matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http_body_util::BodyExt;

    use super::*;
    use crate::engine::EngineSettings;
    use crate::id::MessageId;
    use crate::platform::adapter::{BotIdentity, PlatformAdapter};
    use crate::platform::webchat::{WebChat, file_path};
    use crate::proto::event::Timestamp;

    const ID: &str = "6c84fb90-12c4-41e1-840d-7b25c5ee7750";

    fn file(filename: &str, mimetype: &str, data: &'static str) -> StoredFile {
        StoredFile {
            id: MessageId::parse(ID).unwrap(),
            data: Bytes::from_static(data.as_bytes()),
            filename: filename.into(),
            mimetype: mimetype.into(),
            stored_at: Timestamp::from_micros(0),
        }
    }

    fn ask(file: &StoredFile, method: &Method, headers: &[(HeaderName, &str)]) -> Answered {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.replace("$ID", ID).parse().unwrap()));
        respond(file, Duration::from_millis(59_900), method, &headers.collect())
    }

    /// Status, `Content-Range` and body.
    fn summary(response: Answered) -> (u16, String, String) {
        let range = response.headers().get(CONTENT_RANGE).map_or("", |value| value.to_str().unwrap()).to_owned();
        let status = response.status().as_u16();
        let body = response.into_body().collect().now_or_never().unwrap().unwrap().to_bytes();
        (status, range, String::from_utf8(body.to_vec()).unwrap())
    }

    #[test]
    fn what_every_file_comes_with() {
        let response = ask(&file("a.png", "image/png", "0123"), &Method::GET, &[]);
        let expected = [
            ("etag", "\"6c84fb90-12c4-41e1-840d-7b25c5ee7750\""),
            ("cache-control", "private, max-age=59, immutable"),
            ("accept-ranges", "bytes"),
            ("content-security-policy", "sandbox; default-src 'none'"),
            ("cross-origin-resource-policy", "cross-origin"),
            ("content-disposition", "inline; filename=\"a.png\"; filename*=UTF-8''a.png"),
            ("content-type", "image/png"),
            ("x-content-type-options", "nosniff"),
        ];
        assert_eq!(response.headers().len(), expected.len());
        for (name, value) in expected {
            assert_eq!(response.headers()[name], value, "{name}");
        }
        assert_eq!(summary(response), (200, String::new(), "0123".to_owned()));
    }

    #[test]
    fn a_part_is_asked_for_by_one_range_of_bytes() {
        let check = |size: &'static str, range: &str, expected: (u16, &str, &str)| {
            let got = summary(ask(&file("a", "a/b", size), &Method::GET, &[(RANGE, range)]));
            let body = if got.0 == 416 { "" } else { &*got.2 };
            assert_eq!((got.0, &*got.1, body), expected, "{range} of {size:?}");
        };
        let ten = "0123456789";
        check(ten, "bytes=0-0", (206, "bytes 0-0/10", "0"));
        check(ten, "bytes=2-4", (206, "bytes 2-4/10", "234"));
        check(ten, "bytes=2-", (206, "bytes 2-9/10", "23456789"));
        check(ten, "bytes=9-99999999999999999999999", (206, "bytes 9-9/10", "9"));
        check(ten, "bytes=0-9", (206, "bytes 0-9/10", ten));
        check(ten, "bytes=-3", (206, "bytes 7-9/10", "789"));
        check(ten, "bytes=-99999999999999999999999", (206, "bytes 0-9/10", ten));
        check(ten, "BYTES=, 1-1 ,", (206, "bytes 1-1/10", "1"));
        for nothing in ["bytes=10-", "bytes=10-11", "bytes=-0", "bytes=99999999999999999999999-"] {
            check(ten, nothing, (416, "bytes */10", ""));
        }
        for whole in [
            "bytes=0-1,3-4",
            "bytes=4-2",
            "bytes=-",
            "bytes=",
            "bytes",
            "",
            "lines=0-1",
            "bytes=a-b",
            "bytes=1",
            "bytes=+1-2",
            "bytes=0x1-2",
            "bytes=1-2-3",
            "bytes=--1",
            "bytes = 0-1",
            "bytes=0 - 1",
        ] {
            check(ten, whole, (200, "", ten));
        }
        check("", "bytes=0-", (416, "bytes */0", ""));
        check("", "bytes=-1", (200, "", ""));
        check("", "bytes=-0", (416, "bytes */0", ""));
    }

    #[test]
    fn a_range_is_for_a_get_of_the_same_file() {
        let check = |method: Method, headers: &[(HeaderName, &str)], status: u16| {
            let response = ask(&file("a", "a/b", "0123456789"), &method, headers);
            assert_eq!(response.status().as_u16(), status, "{method} {headers:?}");
        };
        let range = (RANGE, "bytes=1-2");
        check(Method::GET, std::slice::from_ref(&range), 206);
        check(Method::HEAD, std::slice::from_ref(&range), 200);
        check(Method::GET, &[range.clone(), (IF_RANGE, "\"$ID\"")], 206);
        for other in ["W/\"$ID\"", "\"other\"", "$ID", "", "Wed, 21 Oct 2015 07:28:00 GMT"] {
            check(Method::GET, &[range.clone(), (IF_RANGE, other)], 200);
        }
        check(Method::GET, &[(IF_RANGE, "\"$ID\"")], 200);
        check(Method::GET, &[range.clone(), (IF_NONE_MATCH, "\"$ID\"")], 304);
        let twice = HeaderMap::from_iter([(RANGE, HeaderValue::from_static("bytes=1-2"))]);
        let mut both = twice.clone();
        both.append(RANGE, HeaderValue::from_static("bytes=3-4"));
        assert_eq!((Asked::by(&twice, 10), Asked::by(&both, 10)), (Asked::Part(1..3), Asked::Whole));
    }

    #[test]
    fn who_has_it_gets_no_second_copy() {
        let check = |tags: &str, status: u16| {
            for method in [Method::GET, Method::HEAD] {
                let response = ask(&file("a", "a/b", "0"), &method, &[(IF_NONE_MATCH, tags)]);
                assert_eq!(response.status().as_u16(), status, "{tags}");
                assert_eq!(response.headers()[ETAG].to_str().unwrap(), format!("\"{ID}\""));
                assert_eq!(response.headers()[CACHE_CONTROL], "private, max-age=59, immutable");
                assert_eq!(response.headers().contains_key(CONTENT_TYPE), status == 200);
            }
        };
        for tags in ["\"$ID\"", "W/\"$ID\"", "*", "\"a\", W/\"b\" ,\"$ID\""] {
            check(tags, 304);
        }
        for tags in ["", "$ID", "\"a\"", "w/\"$ID\"", "\"$ID", "\"\""] {
            check(tags, 200);
        }
    }

    #[test]
    fn only_pictures_sound_and_video_are_shown_in_place() {
        let check = |mimetype: &str, kind: &str, sent: &str| {
            let response = ask(&file("a", mimetype, ""), &Method::GET, &[]);
            let disposition = response.headers()[CONTENT_DISPOSITION].to_str().unwrap();
            assert_eq!(disposition.split(';').next(), Some(kind), "{mimetype:?}");
            assert_eq!(response.headers()[CONTENT_TYPE], sent, "{mimetype:?}");
        };
        for shown in [
            "image/png",
            "IMAGE/PNG",
            "image/jpeg",
            "image/gif",
            "image/webp",
            "image/avif",
            "image/bmp",
            "audio/mpeg",
            "video/mp4; codecs=\"avc1.42E01E, mp4a.40.2\"",
            "audio/x",
            "image/png;",
            "image/png ; a=b",
        ] {
            check(shown, "inline", shown);
        }
        for saved in [
            "image/svg+xml",
            "text/html",
            "text/html; charset=shift_jis",
            "text/plain;charset=utf-8",
            "application/pdf",
            "application/xml",
            "text/xml",
            "image/tiff",
            "image/x-png",
            "video/x+xml",
            "audio/a+XML; b=c",
            "a/b; c=\"\\\"\"",
        ] {
            check(saved, "attachment", saved);
        }
        for bad in [
            "",
            "image",
            "image/",
            "/png",
            "image/png/x",
            " image/png",
            "image /png",
            "image/png, text/html",
            "image/png x",
            "image/png; a",
            "image/png; a=",
            "image/png; =b",
            "image/png; a=\"b",
            "image/png; a=\"b\"c",
            "image/png\r\nX: y",
            "image/pn\0g",
            "image/png; a=\"\r\n\"",
            "image/png; a=\"ü\"",
            "bild/ü",
        ] {
            check(bad, "attachment", "application/octet-stream");
        }
    }

    #[test]
    fn no_name_breaks_its_header() {
        let check = |name: &str, plain: &str, encoded: &str| {
            let expected = format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}");
            assert_eq!(disposition("a/b", name), expected, "{name:?}");
        };
        check("a b.txt", "a b.txt", "a%20b.txt");
        check("ü 日.txt", "_ _.txt", "%C3%BC%20%E6%97%A5.txt");
        check("a\r\nSet-Cookie: b=c", "a__Set-Cookie: b=c", "a__Set-Cookie%3A%20b%3Dc");
        check("a\"; filename=\"b.exe", "a_; filename=_b.exe", "a%22%3B%20filename%3D%22b.exe");
        check("../../etc/passwd", ".._.._etc_passwd", ".._.._etc_passwd");
        check("..\\a\\b", ".._a_b", ".._a_b");
        check("%0d%0a'*!#$&+-.^_`|~", "_0d_0a'*!#$&+-.^_`|~", "%250d%250a%27%2A!#$&+-.^_`|~");
        check("\0\u{7f}\u{85}\t\u{202e}", "_____", "_____");
        check("a\u{202e}gnp.exe", "a_gnp.exe", "a_gnp.exe");
        check("\u{61c}\u{200e}\u{200f}\u{2066}\u{2069}\u{2028}", "______", "_____%E2%80%A8");
        check("", "", "");
    }

    #[test]
    fn only_the_id_with_its_own_name_finds_a_file() {
        let engine = Engine::new(EngineSettings { shards: 1, ..EngineSettings::default() });
        let chat = WebChat::new(Arc::new(engine.clone()), BotIdentity::default());
        let channel = crate::id::ChannelId::parse("u").unwrap();
        let send = |name: &str| {
            let url = chat.send_file(&channel, "x".into(), name, None).now_or_never().unwrap().unwrap();
            engine.open_file(&url).unwrap().id
        };
        let status = |method: Method, path: &str| {
            let found = kept_here(&engine, path.strip_prefix("/files/").unwrap(), &method, &HeaderMap::new());
            let Some(response) = found else { return 404 };
            assert_eq!(response.headers()["x-content-type-options"], "nosniff");
            response.status().as_u16()
        };
        for name in ["a.txt", "日 %.txt", "..", "../../etc/passwd", "a\0b", "a\r\nb", "a?b#c"] {
            let id = send(name);
            assert_eq!(status(Method::GET, &file_path(id, name)), 200, "{name:?}");
            assert_eq!(status(Method::HEAD, &file_path(id, name)), 200, "{name:?}");
        }
        let id = send("a.txt");
        for path in [
            "/files/",
            "/files/$ID",
            "/files/$ID/",
            "/files/$ID/b.txt",
            "/files/$ID/A.txt",
            "/files/$ID/a.txt/",
            "/files/$ID//a.txt",
            "/files/$ID/../a.txt",
            "/files/$ID/..",
            "/files/$ID/%2e%2e%2fa.txt",
            "/files/$ID/a.txt%00",
            "/files/$ID/.%2Fa.txt",
            "/files/$ID%2Fa.txt",
            "/files/../files/$ID/a.txt",
            "/files/$ID/a.txt%ff",
            "/files/x/a.txt",
        ] {
            assert_eq!(status(Method::GET, &path.replace("$ID", &id.to_string())), 404, "{path}");
        }
        assert_eq!(status(Method::GET, &file_path(MessageId::random(), "a.txt")), 404);
    }
}
