//! Whatever frames an event stream is made of, a reader that knows nothing of us finds each of them, whole and in order.

use std::time::Duration;

use serde_json::Value;
use tabcast::id::MessageId;
use tabcast::proto::event::{Button, Event, GapReason, Notice, Timestamp};
use tabcast::proto::frame::Frame;
use tabcast::proto::sse;

/// What a reader is told.
#[derive(Debug, PartialEq)]
struct Told {
    /// The reader's position from then on.
    id: Option<String>,
    data: Value,
}

/// The bytes are lines, a frame each: which kind, which message, what goes between it and the next, and its text.
pub(crate) fn run(bytes: &[u8]) {
    let (mut stream, mut expected, mut position, mut retry) = (Vec::new(), Vec::new(), None, None);
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(([kind, message, between], rest)) = line.split_first_chunk() else { continue };
        let id = MessageId::parse(&format!("00000000-0000-4000-8000-{message:012}")).expect("an id");
        let frame = frame(*kind, id, &String::from_utf8_lossy(rest), rest);
        match frame.event_stream() {
            Some(form) => {
                stream.extend_from_slice(form.prefix);
                stream.extend_from_slice(form.body);
                let is_position = frame.message_id().is_some() && !matches!(kind % 9, 3 | 4);
                position = if is_position { Some(id.to_string()) } else { position };
                let data = serde_json::from_slice(frame.json()).expect("JSON");
                expected.push(Told { id: position.clone(), data });
            }
            None => assert!(frame.json().is_empty()),
        }
        match between % 4 {
            1 => stream.extend_from_slice(sse::KEEP_ALIVE),
            2 => {
                let after = Duration::from_millis(u64::from(*between) * 1_000);
                retry = Some(after);
                stream.extend_from_slice(&sse::retry(after));
            }
            _ => {}
        }
    }
    stream.extend_from_slice(sse::LAST_CHUNK);
    let mut reader = Reader::default();
    let text = content(&stream);
    assert!(!text.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}']), "some readers end lines there");
    text.split('\n').for_each(|line| reader.line(line));
    assert_eq!((reader.told, reader.retry), (expected, retry));
}

fn frame(kind: u8, id: MessageId, text: &str, data: &[u8]) -> Frame {
    let timestamp = Timestamp::from_micros(1_700_000_000_000_000);
    let buttons = [Button { label: text.to_owned(), custom_id: text.to_owned(), ..Button::default() }];
    let event = match kind % 9 {
        0 => Event::Message { id, text, sender: "s", reply_to: None, timestamp },
        1 => Event::Buttons { id, text, sender: text, reply_to: Some(id), buttons: &buttons, timestamp },
        2 => Event::File { id, filename: text, mimetype: text, data, timestamp },
        3 => Event::Edit { id, text, timestamp },
        4 => Event::Typing { active: text.is_empty() },
        5 => return Frame::notice(&Notice::Ack { client_id: text, id: Some(id) }),
        6 => return Frame::notice(&Notice::Gap { reason: GapReason::UnknownPosition, count: None }),
        7 => return Frame::text(text),
        _ => return Frame::pong(data),
    };
    Frame::encode(&event)
}

/// The content of an HTTP/1.1 body in chunks (RFC 9112 §7.1), which must end where it says.
fn content(mut rest: &[u8]) -> String {
    let mut content = Vec::new();
    loop {
        let end = rest.windows(2).position(|bytes| bytes == b"\r\n").expect("a size");
        let size = std::str::from_utf8(&rest[..end]).expect("ASCII");
        assert!(!size.is_empty() && size.bytes().all(|digit| digit.is_ascii_hexdigit()), "{size:?}");
        let size = usize::from_str_radix(size, 16).expect("a size");
        let (chunk, after) = rest[end + 2..].split_at(size);
        let (line_end, after) = after.split_at(2);
        assert_eq!(line_end, b"\r\n");
        if size == 0 {
            assert!(after.is_empty());
            return String::from_utf8(content).expect("UTF-8");
        }
        content.extend_from_slice(chunk);
        rest = after;
    }
}

/// The reader of the HTML standard (§9.2.6), as it is written there.
#[derive(Default)]
struct Reader {
    data: String,
    last_event_id: Option<String>,
    retry: Option<Duration>,
    told: Vec<Told>,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if line.is_empty() {
            return self.dispatch();
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            // A comment.
            "" => {}
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "id" => self.last_event_id = Some(value.to_owned()),
            "retry" => self.retry = Some(Duration::from_millis(value.parse().expect("digits"))),
            other => panic!("a field called {other:?}"),
        }
    }

    fn dispatch(&mut self) {
        let data = std::mem::take(&mut self.data);
        if let Some(data) = data.strip_suffix('\n') {
            assert!(!data.contains('\n'), "an event is one line");
            let data = serde_json::from_str(data).expect("JSON");
            self.told.push(Told { id: self.last_event_id.clone(), data });
        }
    }
}
