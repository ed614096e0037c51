//! What a message says about itself: `~T=<16 hex ns> S=<8 hex number>`, and ` U=<8 hex user>` if it is for one user's
//! tabs alone. Plain ASCII, so that it is found in a frame of any server without parsing its JSON.

use memchr::memmem::Finder;

/// What a record begins with.
const MARK: &[u8] = b"~T=";
/// Bytes of a record without a user.
pub(super) const RECORD_BYTES: usize = 30;
/// Bytes of a record with a user.
pub(super) const RECORD_WITH_USER_BYTES: usize = 41;

/// One message, as it is seen by whoever gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// When it was to be sent: nanoseconds of [`clock`](super::clock::nanos).
    pub(super) sent_at: u64,
    /// Which one it is of its publisher and channel, times the number of publishers, plus its publisher.
    pub(super) number: u32,
    /// Whose it is; nobody's in particular for a broadcast.
    pub(super) user: Option<u32>,
}

impl Record {
    /// Appends it, filled up with words to `size` bytes.
    pub(super) fn write(&self, out: &mut Vec<u8>, size: usize) {
        let end = out.len() + size;
        out.extend_from_slice(MARK);
        hex(out, self.sent_at, 16);
        out.extend_from_slice(b" S=");
        hex(out, u64::from(self.number), 8);
        if let Some(user) = self.user {
            out.extend_from_slice(b" U=");
            hex(out, u64::from(user), 8);
        }
        if out.len() < end {
            fill(out, end, self.number);
        }
    }
}

/// Appends words up to `end`, in another order for each `seed`: what compresses about as a text does.
fn fill(out: &mut Vec<u8>, end: usize, seed: u32) {
    const WORDS: [&[u8]; 32] = [
        b" the",
        b" tea",
        b" is",
        b" ready",
        b" when",
        b" you",
        b" are",
        b" and",
        b" nobody",
        b" knows",
        b" how",
        b" many",
        b" people",
        b" have",
        b" read",
        b" this",
        b" message",
        b" before",
        b" it",
        b" was",
        b" written",
        b" to",
        b" all",
        b" of",
        b" them",
        b" at",
        b" once",
        b" from",
        b" another",
        b" window",
        b" in",
        b" time",
    ];
    // A linear congruential generator (Knuth's constants): the same message each time, and no two alike.
    let mut state = u64::from(seed);
    while out.len() < end {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(WORDS[(state >> 59) as usize]);
    }
    out.truncate(end);
}

fn hex(out: &mut Vec<u8>, value: u64, digits: u32) {
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(value >> (4 * digit) & 15) as usize]);
    }
}

fn unhex(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    for digit in digits {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u64::from(digit);
    }
    Some(value)
}

/// Finds records in the payloads of frames.
#[derive(Debug)]
pub(super) struct Records {
    mark: Finder<'static>,
}

impl Default for Records {
    fn default() -> Self {
        Self { mark: Finder::new(MARK) }
    }
}

impl Records {
    /// Calls `see` with each record in `payload`, in their order there.
    pub(super) fn each(&self, payload: &[u8], mut see: impl FnMut(Record)) {
        let mut rest = payload;
        while rest.len() >= RECORD_BYTES
            && let Some(at) = self.mark.find(rest)
        {
            rest = &rest[at..];
            let Some((record, length)) = record(rest) else {
                rest = &rest[MARK.len()..];
                continue;
            };
            see(record);
            rest = &rest[length..];
        }
    }
}

/// The record at the beginning of `text`, and its length.
fn record(text: &[u8]) -> Option<(Record, usize)> {
    let fixed: &[u8; RECORD_BYTES] = text.first_chunk()?;
    if &fixed[19..22] != b" S=" {
        return None;
    }
    let sent_at = unhex(&fixed[3..19])?;
    let number = u32::try_from(unhex(&fixed[22..])?).ok()?;
    let user = match text.get(RECORD_BYTES..RECORD_WITH_USER_BYTES) {
        Some([b' ', b'U', b'=', user @ ..]) => Some(u32::try_from(unhex(user)?).ok()?),
        _ => None,
    };
    let length = if user.is_some() { RECORD_WITH_USER_BYTES } else { RECORD_BYTES };
    Some((Record { sent_at, number, user }, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(payload: &[u8]) -> Vec<Record> {
        let mut found = Vec::new();
        Records::default().each(payload, |record| found.push(record));
        found
    }

    #[test]
    fn what_is_written_is_found_again() {
        for user in [None, Some(0), Some(u32::MAX)] {
            for number in [0, 1, 0x1234_5678, u32::MAX] {
                let record = Record { sent_at: u64::from(number) << 20, number, user };
                for size in [0, 30, 31, 41, 42, 128] {
                    let mut text = b"{\"text\":\"".to_vec();
                    let before = text.len();
                    record.write(&mut text, size);
                    let shortest = if user.is_some() { RECORD_WITH_USER_BYTES } else { RECORD_BYTES };
                    assert_eq!(text.len() - before, size.max(shortest), "{record:?} in {size}");
                    text.extend_from_slice(b"\"}");
                    assert_eq!(found(&text), [record], "{size}");
                }
            }
        }
    }

    #[test]
    fn several_records_in_a_frame_are_all_found_and_nothing_else_is() {
        let first = Record { sent_at: 5, number: 1, user: None };
        let second = Record { sent_at: 6, number: 2, user: Some(7) };
        let mut text = b"~T=no~~T=".to_vec();
        first.write(&mut text, 30);
        text.extend_from_slice(b"~T=000000000000000g S=00000000 ");
        second.write(&mut text, 60);
        assert_eq!(found(&text), [first, second]);
        text.clear();
        first.write(&mut text, 30);
        for cut in 0..text.len() {
            assert_eq!(found(&text[..cut]), [], "cut at {cut}");
        }
    }
}
