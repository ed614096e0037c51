//! The client's end of the wire, written from the RFCs and not from the code under test: whatever a client must not accept
//! is an error here.

use std::collections::HashMap;
use std::rc::Rc;

use serde::Deserialize;
use tabcast::fanout::shard::Wire;

/// What is of interest in a frame's JSON.
#[derive(Debug, Deserialize)]
pub(crate) struct Json {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) id: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) filename: Option<String>,
    pub(crate) data: Option<String>,
    pub(crate) size: Option<usize>,
    pub(crate) client_id: Option<String>,
    pub(crate) active: Option<bool>,
    pub(crate) reason: Option<String>,
}

/// One thing that a client got.
#[derive(Debug, Clone)]
pub(crate) enum Got {
    /// A frame, and its position if the wire names one.
    Json(Rc<Json>, Option<String>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16),
    /// An event stream says with which code a WebSocket would be closed.
    EventClose(u16),
    KeepAlive,
    Retry,
    /// The end of an event stream.
    LastChunk,
}

/// Frames that were parsed before: most go to many tabs, and the same bytes mean the same.
#[derive(Default)]
pub(crate) struct Parsed {
    plain: HashMap<Vec<u8>, Rc<Json>>,
    deflated: HashMap<Vec<u8>, Rc<Json>>,
}

/// Reads one connection.
pub(crate) struct Reader {
    wire: Wire,
    rest: Vec<u8>,
    is_ended: bool,
}

impl Reader {
    pub(crate) fn new(wire: Wire) -> Self {
        Self { wire, rest: Vec::new(), is_ended: false }
    }

    /// Whether the end of the stream was read: a close frame, or the last chunk.
    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Bytes of what has begun and is not whole.
    pub(crate) fn torn_bytes(&self) -> usize {
        self.rest.len()
    }

    /// Takes bytes as they come, and gives out what is whole.
    pub(crate) fn feed(&mut self, bytes: &[u8], parsed: &mut Parsed) -> Result<Vec<Got>, String> {
        self.rest.extend_from_slice(bytes);
        let rest = std::mem::take(&mut self.rest);
        let (mut at, mut all) = (0, Vec::new());
        loop {
            if self.is_ended && at < rest.len() {
                return Err("bytes after the end".to_owned());
            }
            let next = match self.wire {
                Wire::EventStream => chunk(&rest[at..], parsed)?,
                wire => frame(&rest[at..], wire == Wire::DeflatedWebSocket, parsed)?,
            };
            let Some((got, length)) = next else { break };
            at += length;
            self.is_ended = matches!(got, Got::Close(_) | Got::LastChunk);
            all.push(got);
        }
        self.rest = rest[at..].to_vec();
        Ok(all)
    }
}

fn json(payload: &[u8], parsed: &mut Parsed) -> Result<Rc<Json>, String> {
    if let Some(json) = parsed.plain.get(payload) {
        return Ok(Rc::clone(json));
    }
    let text = std::str::from_utf8(payload).map_err(|_| "text that is not UTF-8".to_owned())?;
    let json: Json = serde_json::from_str(text).map_err(|error| format!("{error} in {text}"))?;
    let json = Rc::new(json);
    parsed.plain.insert(payload.to_vec(), Rc::clone(&json));
    Ok(json)
}

fn deflated_json(payload: &[u8], parsed: &mut Parsed) -> Result<Rc<Json>, String> {
    if let Some(json) = parsed.deflated.get(payload) {
        return Ok(Rc::clone(json));
    }
    let json = json(&inflate(payload)?, parsed)?;
    parsed.deflated.insert(payload.to_vec(), Rc::clone(&json));
    Ok(json)
}

/// RFC 6455 §5.2 as a client reads it; None if it is not whole yet.
fn frame(bytes: &[u8], deflates: bool, parsed: &mut Parsed) -> Result<Option<(Got, usize)>, String> {
    let Some((&[first, second], after)) = bytes.split_first_chunk() else { return Ok(None) };
    if second & 0x80 != 0 {
        return Err("a server masks (§5.1)".to_owned());
    }
    let is_control = first & 0x08 != 0;
    let is_deflated = first & 0x40 != 0;
    if first & 0x30 != 0 || (is_deflated && (!deflates || first & 0x0f != 1)) {
        return Err(format!("a reserved bit (§5.2) in {first:#x}"));
    }
    if first & 0x80 == 0 {
        return Err("a fragment, which this server never makes".to_owned());
    }
    let (length, head) = match second {
        126 => match after.first_chunk() {
            Some(length) => (usize::from(u16::from_be_bytes(*length)), 4),
            None => return Ok(None),
        },
        127 => match after.first_chunk() {
            Some(length) => (usize::try_from(u64::from_be_bytes(*length)).map_err(|e| e.to_string())?, 10),
            None => return Ok(None),
        },
        short => (usize::from(short), 2),
    };
    let shortest = if length < 126 {
        2
    } else if length <= 0xffff {
        4
    } else {
        10
    };
    if head != shortest {
        return Err(format!("a length of {length} in {head} bytes (§5.2)"));
    }
    if is_control && length > 125 {
        return Err("a control frame over 125 bytes (§5.5)".to_owned());
    }
    if length > 32 << 20 {
        return Err(format!("a frame of {length} bytes"));
    }
    let Some(payload) = bytes.get(head..head + length) else { return Ok(None) };
    let got = match first & 0x0f {
        1 if is_deflated => Got::Json(deflated_json(payload, parsed)?, None),
        1 => Got::Json(json(payload, parsed)?, None),
        9 => Got::Ping(payload.to_vec()),
        10 => Got::Pong(payload.to_vec()),
        8 => {
            let (code, reason) = payload.split_first_chunk().ok_or("a close without a code")?;
            std::str::from_utf8(reason).map_err(|_| "a reason that is not UTF-8 (§5.5.1)".to_owned())?;
            Got::Close(u16::from_be_bytes(*code))
        }
        opcode => return Err(format!("opcode {opcode}")),
    };
    Ok(Some((got, head + length)))
}

/// RFC 7692 §7.2.2, by another implementation than the server's. The stored block behind it ends the stream.
fn inflate(payload: &[u8]) -> Result<Vec<u8>, String> {
    let mut stream = payload.to_vec();
    stream.extend_from_slice(&[0, 0, 0xff, 0xff, 1, 0, 0, 0xff, 0xff]);
    miniz_oxide::inflate::decompress_to_vec_with_limit(&stream, 1 << 24).map_err(|error| format!("{error:?}"))
}

/// A chunk (RFC 9112 §7.1) with one record of an event stream; None if it is not whole yet.
fn chunk(bytes: &[u8], parsed: &mut Parsed) -> Result<Option<(Got, usize)>, String> {
    let Some(line) = bytes.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
    let digits = std::str::from_utf8(&bytes[..line]).map_err(|_| "a chunk's size that is no text".to_owned())?;
    let length = usize::from_str_radix(digits, 16).map_err(|_| format!("a chunk of size {digits:?}"))?;
    let Some(content) = bytes.get(line + 2..line + 2 + length) else { return Ok(None) };
    let Some(end) = bytes.get(line + 2 + length..line + 4 + length) else { return Ok(None) };
    if end != b"\r\n" {
        return Err("a chunk that does not end where its size says".to_owned());
    }
    let got = if content.is_empty() { Got::LastChunk } else { record(content, parsed)? };
    Ok(Some((got, line + 4 + length)))
}

fn record(content: &[u8], parsed: &mut Parsed) -> Result<Got, String> {
    let text = std::str::from_utf8(content).map_err(|_| "a record that is not UTF-8".to_owned())?;
    let lines = text.strip_suffix("\n\n").ok_or("a record without its end")?;
    if lines.contains('\r') {
        return Err("CR in a record".to_owned());
    }
    if let Some(close) = lines.strip_prefix("event: close\ndata: ") {
        let code = serde_json::from_str::<serde_json::Value>(close).ok().and_then(|close| close["code"].as_u64());
        let code = code.and_then(|code| u16::try_from(code).ok()).ok_or(format!("an end without a code: {close}"))?;
        return Ok(Got::EventClose(code));
    }
    let (mut position, mut data) = (None, None);
    for line in lines.split('\n') {
        match line.split_once(": ") {
            Some(("", "keep-alive")) => return Ok(Got::KeepAlive),
            Some(("retry", millis)) if millis.bytes().all(|byte| byte.is_ascii_digit()) => return Ok(Got::Retry),
            Some(("id", id)) if position.is_none() => position = Some(id.to_owned()),
            Some(("data", payload)) if data.is_none() => data = Some(payload),
            _ => return Err(format!("a line {line:?} in a record")),
        }
    }
    let data = data.ok_or("an event without data")?;
    Ok(Got::Json(json(data.as_bytes(), parsed)?, position))
}
