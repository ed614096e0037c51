//! Escapes text for a JSON string: a quote, a backslash and whatever is below U+0020; nothing else.
//!
//! Three versions of one function: byte by byte ([`plain`], which the others are tested against), eight bytes at a
//! time (any processor), and 32 at a time (AVX2, chosen at run time).

/// The most bytes that one byte of text becomes (`\u00xx`).
pub(super) const GROWTH_MAX: usize = 6;

/// Room that a version may use as scratch behind what it has written.
pub(super) const SLACK_BYTES: usize = 64;

/// What a version has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Escaped {
    /// Bytes written to the front of the output.
    pub(super) written: usize,
    /// Whether the text was ASCII.
    pub(super) is_ascii: bool,
}

/// For each ASCII byte: what stands for it in six bytes, and its length in the last; 0 if it stands for itself.
static ESCAPES: [[u8; 8]; 128] = escapes();

const fn escapes() -> [[u8; 8]; 128] {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    let mut table = [[0; 8]; 128];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = [b'\\', b'u', b'0', b'0', HEX[byte >> 4], HEX[byte & 15], 0, 6];
        byte += 1;
    }
    let short = [(8, b'b'), (9, b't'), (10, b'n'), (12, b'f'), (13, b'r'), (b'"', b'"'), (b'\\', b'\\')];
    let mut index = 0;
    while index < short.len() {
        let (byte, letter) = short[index];
        table[byte as usize] = [b'\\', letter, 0, 0, 0, 0, 0, 2];
        index += 1;
    }
    table
}

/// Writes `text`, escaped, to the front of `out`, by the fastest version that this processor has.
///
/// # Panics
/// `out` is shorter than `GROWTH_MAX * text.len() + SLACK_BYTES`.
pub(super) fn fastest(text: &[u8], out: &mut [u8]) -> Escaped {
    assert!(out.len() >= GROWTH_MAX * text.len() + SLACK_BYTES, "the output has room for the worst case");
    #[cfg(target_arch = "x86_64")]
    if text.len() >= avx2::WORTHWHILE_BYTES_MIN && is_x86_feature_detected!("avx2") {
        #[expect(unsafe_code, reason = "a function of a processor feature is called where the feature was found")]
        // SAFETY: the processor has AVX2; the condition above asked it.
        return unsafe { avx2::escape(text, out) };
    }
    words(text, out)
}

/// Appends `text`, escaped, to `out`, byte by byte: the meaning of this module, which the others must equal.
pub fn plain(text: &str, out: &mut Vec<u8>) {
    for &byte in text.as_bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x09 => out.extend_from_slice(b"\\t"),
            0x0a => out.extend_from_slice(b"\\n"),
            0x0c => out.extend_from_slice(b"\\f"),
            0x0d => out.extend_from_slice(b"\\r"),
            0x00..0x20 => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(byte),
        }
    }
}

fn one(byte: u8, out: &mut [u8], at: usize) -> usize {
    let escape = ESCAPES[usize::from(byte & 127)];
    if byte >= 128 || escape[7] == 0 {
        out[at] = byte;
        at + 1
    } else {
        out[at..at + 8].copy_from_slice(&escape);
        at + usize::from(escape[7])
    }
}

fn words(text: &[u8], out: &mut [u8]) -> Escaped {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const TOPS: u64 = ONES << 7;
    let (mut at, mut seen) = (0, 0);
    let (words, rest) = text.as_chunks::<8>();
    for bytes in words {
        let word = u64::from_ne_bytes(*bytes);
        let (quote, backslash) = (word ^ (ONES * 0x22), word ^ (ONES * 0x5c));
        // The top bit of a byte is set if it is below 0x20, or a quote, or a backslash; after the first such byte
        // others may be set wrongly, which only costs the slow way for this word.
        let special = (word.wrapping_sub(ONES * 0x20) & !word)
            | (quote.wrapping_sub(ONES) & !quote)
            | (backslash.wrapping_sub(ONES) & !backslash);
        if special & TOPS == 0 {
            out[at..at + 8].copy_from_slice(bytes);
            at += 8;
        } else {
            for &byte in bytes {
                at = one(byte, out, at);
            }
        }
        seen |= word;
    }
    for &byte in rest {
        at = one(byte, out, at);
        seen |= u64::from(byte);
    }
    Escaped { written: at, is_ascii: seen & TOPS == 0 }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_max_epu8, _mm256_movemask_epi8, _mm256_or_si256,
        _mm256_set1_epi8, _mm256_storeu_si256,
    };

    use super::{ESCAPES, Escaped};

    /// Shorter texts are faster by words.
    pub(super) const WORTHWHILE_BYTES_MIN: usize = 16;

    const BLOCK: usize = 32;

    #[target_feature(enable = "avx2")]
    fn load(bytes: &[u8; BLOCK]) -> __m256i {
        #[expect(unsafe_code, reason = "std has no safe unaligned load")]
        // SAFETY: the reference is to exactly the 32 bytes that are read; the load may be unaligned.
        unsafe {
            _mm256_loadu_si256(bytes.as_ptr().cast())
        }
    }

    #[target_feature(enable = "avx2")]
    fn store(bytes: &mut [u8; BLOCK], block: __m256i) {
        #[expect(unsafe_code, reason = "std has no safe unaligned store")]
        // SAFETY: the reference is to exactly the 32 bytes that are written; the store may be unaligned.
        unsafe {
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), block);
        }
    }

    fn window<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
        bytes[at..].first_chunk().expect("the caller keeps two blocks in sight")
    }

    fn window_mut<const N: usize>(bytes: &mut [u8], at: usize) -> &mut [u8; N] {
        bytes[at..].first_chunk_mut().expect("the output has room for the worst case and a block")
    }

    /// Bits of the bytes that must be escaped, and of those that are not ASCII.
    #[target_feature(enable = "avx2")]
    fn classify(block: __m256i) -> (u32, u32) {
        let control = _mm256_set1_epi8(0x1f);
        let below = _mm256_cmpeq_epi8(_mm256_max_epu8(block, control), control);
        let quote = _mm256_cmpeq_epi8(block, _mm256_set1_epi8(0x22));
        let backslash = _mm256_cmpeq_epi8(block, _mm256_set1_epi8(0x5c));
        let special = _mm256_or_si256(below, _mm256_or_si256(quote, backslash));
        (_mm256_movemask_epi8(special).cast_unsigned(), _mm256_movemask_epi8(block).cast_unsigned())
    }

    /// Escapes the first `length` bytes of a block (the others must not need it) and returns where the output ends.
    ///
    /// Every store is of a whole block: what it writes too far is overwritten by the next.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn escape_block(source: &[u8; 2 * BLOCK], length: usize, out: &mut [u8], at: usize, seen: &mut u32) -> usize {
        let block = load(window(source, 0));
        let (mut special, high) = classify(block);
        *seen |= high;
        store(window_mut(out, at), block);
        let (mut at, mut from) = (at, 0);
        while special != 0 {
            let index = special.trailing_zeros() as usize;
            special &= special - 1;
            at += index - from;
            let escape = &ESCAPES[usize::from(source[index] & 127)];
            *window_mut(out, at) = *escape;
            at += usize::from(escape[7]);
            from = index + 1;
            store(window_mut(out, at), load(window(source, from)));
        }
        at + length - from
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn escape(text: &[u8], out: &mut [u8]) -> Escaped {
        let (mut at, mut read, mut seen) = (0, 0, 0);
        // A block is read with the one after it in sight, so that no load passes the end of the text.
        while text.len() - read >= 2 * BLOCK {
            at = escape_block(window(text, read), BLOCK, out, at, &mut seen);
            read += BLOCK;
        }
        let rest = &text[read..];
        let mut padded = [b' '; 3 * BLOCK];
        padded[..rest.len()].copy_from_slice(rest);
        let mut read = 0;
        while read < rest.len() {
            let length = BLOCK.min(rest.len() - read);
            at = escape_block(window(&padded, read), length, out, at, &mut seen);
            read += BLOCK;
        }
        Escaped { written: at, is_ascii: seen == 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str) {
        let mut expected = Vec::new();
        plain(text, &mut expected);
        for version in [fastest, words] {
            // Room for exactly the worst case: a version that used more would panic.
            let mut out = vec![0xaa; GROWTH_MAX * text.len() + SLACK_BYTES];
            let escaped = version(text.as_bytes(), &mut out);
            assert_eq!(out[..escaped.written].escape_ascii().to_string(), expected.escape_ascii().to_string());
            assert_eq!(escaped.is_ascii, text.is_ascii());
        }
        assert_eq!(String::from_utf8(expected).unwrap(), serde_json::to_string(text).unwrap().trim_matches_once());
    }

    trait TrimOnce {
        fn trim_matches_once(&self) -> &str;
    }

    impl TrimOnce for String {
        fn trim_matches_once(&self) -> &str {
            &self[1..self.len() - 1]
        }
    }

    #[test]
    fn every_character_of_one_byte_is_escaped_as_the_oracle_does() {
        for byte in 0..128_u8 {
            check(&char::from(byte).to_string());
            check(&char::from(byte).to_string().repeat(100));
        }
    }

    #[test]
    fn an_escape_at_every_place_of_every_length_is_found() {
        for length in 0..140 {
            for place in 0..length {
                for special in ["\"", "\\", "\u{1f}", "\n", " ", "\u{7f}"] {
                    let mut text = "a".repeat(length);
                    text.replace_range(place..=place, special);
                    check(&text);
                }
            }
        }
    }

    #[test]
    fn text_that_is_not_ascii_is_copied_and_known() {
        for length in 0..70 {
            check(&format!("{}é", "a".repeat(length)));
            check(&format!("{}😀\"日本", "a".repeat(length)));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_escaped_as_the_oracle_does(text in r#"([ -~]|["\\\x00-\x1f]|\PC|[a-z]{30}){0,80}"#) {
            check(&text);
        }
    }
}
