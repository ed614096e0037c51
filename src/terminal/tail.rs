//! `tabcast tail`: the frames of a channel, one a line.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::connection::{Stream, UPDATES_MAX, Update};
use super::text::{clean, cut, grouped, time_of_day};
use super::{Failure, Tail};
use crate::driver::clock;

/// A stream without frames has a comment every `heartbeat_interval`: some of those may be missed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Characters of a text on its line.
const TEXT_CHARS_MAX: usize = 200;

/// What asks a node, and nothing else.
pub(super) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Runs until it is ended.
pub(super) fn run(tail: &Tail) -> Result<(), Failure> {
    if tail.channel == "status" {
        let reason = "`status` is how the node is (tabcast top); a user of that name is webchat:status";
        return Err(Failure::Argument(reason.to_owned()));
    }
    let stream = Stream::new(&tail.node, &tail.channel, SILENCE_MAX)?;
    runtime()?.block_on(print(tail, &stream))
}

async fn print(tail: &Tail, stream: &Stream) -> Result<(), Failure> {
    let (sender, mut updates) = mpsc::channel(UPDATES_MAX);
    let mut follow = std::pin::pin!(stream.follow(sender));
    let mut is_over = false;
    loop {
        let update = tokio::select! {
            biased;
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
            Some(update) = updates.recv() => update,
            () = &mut follow, if !is_over => {
                is_over = true;
                continue;
            }
            else => return Ok(()),
        };
        match update {
            Update::Event(event) => {
                let line = if tail.json { json_line(&event) } else { line(&event, clock::wall().as_micros()) };
                // Standard output holds a line back until it is whole.
                writeln!(io::stdout(), "{line}")?;
            }
            Update::Open => say(format_args!("{} is followed", clean(&tail.channel))),
            Update::Lost { reason, pause } => {
                say(format_args!("lost: {reason}; again in {:.1} s", pause.as_secs_f64()));
            }
            Update::Refused(reason) => return Err(Failure::Refused { url: clean(&tail.node.url), reason }),
        }
    }
}

/// On standard error, where it is not taken for a frame. If that is gone, nobody wants to know.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "tabcast tail: {text}");
}

/// A frame as it came. JSON may have DEL and C1 characters in the clear, which a terminal obeys, and what a hostile node
/// sends need not be JSON and may have C0 too: all are written as JSON writes them within a text.
fn json_line(event: &str) -> String {
    let mut out = String::with_capacity(event.len());
    for character in event.chars() {
        match character {
            // JSON's white space between values; within a text there is none. A tab would move a column, so it goes too.
            '\n' | '\r' | '\t' => out.push(' '),
            _ if character.is_control() => drop(write!(out, "\\u{:04x}", u32::from(character))),
            _ => out.push(character),
        }
    }
    out
}

/// A frame for people: when, what, whose, and what it says.
fn line(event: &str, now_micros: u64) -> String {
    let Ok(Value::Object(frame)) = serde_json::from_str(event) else {
        return format!("{} ? {}", time_of_day(at(None, now_micros)), cut(&clean(event), TEXT_CHARS_MAX));
    };
    let text_of = |name: &str| frame.get(name).and_then(Value::as_str);
    let mut out = time_of_day(at(frame.get("timestamp"), now_micros));
    let kind = clean(text_of("type").unwrap_or("?"));
    let _ = write!(out, " {kind:<8}");
    if let Some(sender) = text_of("sender") {
        let _ = write!(out, " {}:", clean(sender));
    }
    if let Some(text) = text_of("text").or_else(|| text_of("delta")) {
        let _ = write!(out, " {}", cut(&clean(text), TEXT_CHARS_MAX));
    }
    write_rest(&mut out, &frame);
    out
}

/// What else is in it, in its order.
fn write_rest(out: &mut String, frame: &Map<String, Value>) {
    for (name, value) in frame {
        if matches!(name.as_str(), "type" | "sender" | "text" | "delta" | "timestamp") || value.is_null() {
            continue;
        }
        let shown = match value {
            // Base64 of a file.
            Value::String(data) if name == "data" => format!("({} characters)", grouped(data.len() as u64)),
            Value::String(text) => cut(&clean(text), TEXT_CHARS_MAX),
            other => cut(&clean(&other.to_string()), TEXT_CHARS_MAX),
        };
        let _ = write!(out, " {}={shown}", clean(name));
    }
}

/// When: what the frame says (a number of seconds, or a text of RFC 3339), else now.
fn at(timestamp: Option<&Value>, now_micros: u64) -> f64 {
    let told = match timestamp {
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(text)) => humantime::parse_rfc3339_weak(text)
            .ok()
            .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
            .map(|time| time.as_secs_f64()),
        _ => None,
    };
    told.unwrap_or_else(|| Duration::from_micros(now_micros).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(event: &str, expected: &str) {
        assert_eq!(line(event, 1_764_115_199_500_000), expected);
    }

    #[test]
    fn a_frame_is_a_line_of_when_what_who_and_what_it_says() {
        check(
            r#"{"type":"message","id":"m1","text":"hello\nyou","sender":"star","timestamp":1764115100.25,"reply_to":null}"#,
            "23:58:20 message  star: hello\\nyou id=m1",
        );
        check(r#"{"type":"typing","active":true}"#, "23:59:59 typing   active=true");
        let file = format!(r#"{{"type":"file","id":"f","filename":"a.png","data":"{}"}}"#, "A".repeat(123_456));
        check(&file, "23:59:59 file     data=(123,456 characters) filename=a.png id=f");
        check(&format!("\"{}\"", "x".repeat(1_000)), &format!("23:59:59 ? \"{}…", "x".repeat(198)));
        let long = format!(r#"{{"type":"message","text":"{}"}}"#, "猫".repeat(1_000));
        check(&long, &format!("23:59:59 message  {}…", "猫".repeat(199)));
    }

    #[test]
    fn nothing_hostile_reaches_a_terminal() {
        let hostile = "{\"type\":\"message\\u001b[2J\",\"sender\":\"\\u001b]0;x\\u0007\",\"text\":\"a\u{9b}2Jb\\r\",\"\u{202e}k\":\"\u{85}v\"}";
        let shown = line(hostile, 0);
        assert!(!shown.chars().any(char::is_control) && shown.contains("\\u{1b}]0;x"), "{shown}");
        let json = json_line(hostile);
        assert!(!json.chars().any(char::is_control), "{json}");
        let (read, came): (Value, Value) =
            (serde_json::from_str(&json).unwrap(), serde_json::from_str(hostile).unwrap());
        assert_eq!(read, came);
        // What is no JSON, as it has ESC and BEL in the clear, becomes JSON that a terminal can be shown.
        let raw = json_line("\t{\"text\":\"\u{1b}]0;x\u{7}\0\u{7f}\"}\r\n");
        assert_eq!(raw, r#" {"text":"\u001b]0;x\u0007\u0000\u007f"}  "#);
        assert_eq!(serde_json::from_str::<Value>(&raw).unwrap()["text"], "\u{1b}]0;x\u{7}\0\u{7f}");
        assert!(!line("\u{1b}c not JSON \u{7}", 0).chars().any(char::is_control));
    }
}
