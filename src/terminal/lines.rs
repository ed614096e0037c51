//! Event streams as a reader sees them: bytes in, the data of events out.

/// Bytes of one event: the largest file in base64 with its names is well below.
const EVENT_BYTES_MAX: usize = 64 << 20;

/// An event is larger than any of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {} MiB", EVENT_BYTES_MAX >> 20)]
pub(super) struct TooLong;

/// What has come of the next event.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// It has a name: it is no frame, but says that the stream is over.
    is_named: bool,
}

impl Events {
    /// Takes the next bytes, in any pieces, and hands out the data of every event that is whole. Lines end in LF or CR LF;
    /// what is no `data:` is passed over (comments, ids, pauses), and so is an event with a name. What is not UTF-8 is replaced.
    ///
    /// # Errors
    /// [`TooLong`]: the stream cannot be followed any further.
    pub(super) fn read(&mut self, mut bytes: &[u8], out: &mut Vec<String>) -> Result<(), TooLong> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.line_is_whole(line.strip_suffix(b"\r").unwrap_or(&line), out);
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() + self.data.len() > EVENT_BYTES_MAX { Err(TooLong) } else { Ok(()) }
    }

    fn line_is_whole(&mut self, line: &[u8], out: &mut Vec<String>) {
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            let is_named = std::mem::take(&mut self.is_named);
            if std::mem::take(&mut self.has_data) && !is_named {
                out.push(String::from_utf8_lossy(&data).into_owned());
            }
        } else if line.starts_with(b"event:") {
            self.is_named = true;
        } else if let Some(data) = line.strip_prefix(b"data:") {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stream: &str, expected: &[&str]) {
        for piece in [1, 2, 3, 7, stream.len().max(1)] {
            let (mut events, mut out) = (Events::default(), Vec::new());
            for bytes in stream.as_bytes().chunks(piece) {
                events.read(bytes, &mut out).unwrap();
            }
            assert_eq!(out, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn events_are_whole_in_whatever_pieces_they_come() {
        check("data: {\"a\":1}\n\n", &["{\"a\":1}"]);
        check(": keep-alive\n\nretry: 500\n\nid: 7\ndata: x\n\ndata:y\r\n\r\n", &["x", "y"]);
        check("data: a\ndata: b\n\n", &["a\nb"]);
        check("data\n\ndata: \n\nevent: z\n\ndata: not yet\n", &[""]);
        check("event: close\ndata: {\"code\":4001}\n\ndata: x\n\n", &["x"]);
        check("data: zoë 猫\n\n", &["zoë 猫"]);
        check("", &[]);
    }

    #[test]
    fn an_event_without_an_end_is_given_up() {
        let (mut events, mut out) = (Events::default(), Vec::new());
        let piece = vec![b'x'; 1 << 20];
        let last = (0..100).find(|_| events.read(&piece, &mut out).is_err());
        assert_eq!(last, Some(64));
        let mut events = Events::default();
        let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
        assert_eq!((0..100).find(|_| events.read(&line, &mut out).is_err()), Some(63));
    }
}
