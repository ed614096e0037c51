use flate2::{Compress, Compression, FlushCompress};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use proptest::prelude::*;

use super::*;

const BYTES_MAX: usize = 100_000;

/// A client's payload for `text`, cut off as RFC 7692 §7.2.1 says: compressed at a level, with a window and a last flush.
fn compressed(text: &[u8], level: u32, window_bits: u8, flush: FlushCompress) -> Vec<u8> {
    let mut state = Compress::new_with_window_bits(Compression::new(level), false, window_bits);
    let mut payload = Vec::with_capacity(text.len() + text.len() / 1000 + 100);
    state.compress_vec(text, &mut payload, flush).unwrap();
    assert_eq!(state.total_in(), text.len() as u64);
    if flush == FlushCompress::Finish {
        payload.push(0);
    } else {
        assert_eq!(payload.split_off(payload.len() - FLUSH_END.len()), FLUSH_END);
    }
    payload
}

fn sync(text: &[u8]) -> Vec<u8> {
    compressed(text, 6, 15, FlushCompress::Sync)
}

fn inflate_to(payload: &[u8], bytes_max: usize) -> Result<Vec<u8>, ReadError> {
    Inflater::default().inflate(payload, bytes_max, |text| text.to_vec())
}

fn inflate(payload: &[u8]) -> Result<Vec<u8>, ReadError> {
    inflate_to(payload, BYTES_MAX)
}

fn deflate(message: &[u8]) -> Option<Vec<u8>> {
    with_deflater(message.len(), Window::FULL, |deflater| deflater.deflate(message).map(<[u8]>::to_vec))
}

#[test]
fn the_examples_of_the_rfc_are_read() {
    let check = |payload: &[u8], expected: &[u8]| assert_eq!(inflate(payload).as_deref(), Ok(expected), "{payload:x?}");
    // RFC 7692 §7.2.3.1, §7.2.3.3, §7.2.3.4, §7.2.3.5, §7.2.3.6.
    check(&[0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00], b"Hello");
    check(&[0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00], b"Hello");
    check(&[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00], b"Hello");
    check(&[0xf2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xff, 0xff, 0xca, 0xc9, 0xc9, 0x07, 0x00], b"Hello");
    check(&[0x00], b"");
    // What some send for nothing, and behind a last block.
    check(&[], b"");
    check(&[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00], b"Hello");
}

#[test]
fn a_window_is_as_small_as_its_bits_and_no_smaller_than_512_bytes() {
    assert_eq!(Window::of_bits(9), Some(Window::SMALLEST));
    assert_eq!(Window::of_bits(15), Some(Window::FULL));
    assert_eq!([0, 8, 16, 255].map(Window::of_bits), [None; 4]);
    let check = |bytes: usize, bits: u8| assert_eq!(Window::around(bytes).bits(), bits, "{bytes}");
    for (bytes, bits) in [(0, 9), (1, 9), (512, 9), (513, 10), (1 << 14, 14), ((1 << 14) + 1, 15), (1 << 30, 15)] {
        check(bytes, bits);
    }
}

/// Inflates into a ring of that size: whatever refers further back fails.
fn inflate_within(payload: &[u8], window: Window) -> Option<Vec<u8>> {
    let payload = [payload, &MESSAGE_END].concat();
    let (mut state, mut ring, mut text) = (DecompressorOxide::new(), vec![0; 1 << window.bits()], Vec::new());
    let (mut at, mut place) = (0, 0);
    loop {
        let (status, consumed, produced) = decompress(&mut state, &payload[at..], &mut ring, place, 0);
        text.extend_from_slice(&ring[place..place + produced]);
        at += consumed;
        place = (place + produced) % ring.len();
        match status {
            TINFLStatus::Done => return Some(text),
            TINFLStatus::HasMoreOutput => {}
            _ => return None,
        }
    }
}

#[test]
fn a_smaller_window_is_kept_to_whatever_is_compressed() {
    // Noise does not shrink: its form is larger than it is, and made all the same.
    let mut state = 7_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(100_000)
    .collect();
    // What repeats itself after 3,000 bytes.
    let repeated = noise[..3_000].repeat(40);
    for bits in Window::SMALLEST.bits()..=Window::FULL.bits() {
        let window = Window::of_bits(bits).unwrap();
        for text in [&b"a"[..], &[b'a'; 2_000], &repeated, &noise[..300], &noise] {
            let form = with_deflater(text.len(), window, |deflater| deflater.deflate_anyway(text).map(<[u8]>::to_vec));
            let form = form.unwrap_or_else(|| panic!("{bits}: {} bytes", text.len()));
            assert!(inflate_within(&form, window).as_deref() == Some(text), "{bits}: {} bytes", text.len());
            assert_eq!(Inflater::default().inflate_binary(&form, text.len(), |bytes| bytes == text), Ok(true));
        }
    }
    // It does not hold for the full window.
    let full = deflate(&repeated).unwrap();
    assert!(inflate_within(&full, Window::SMALLEST).is_none());
    // A text as long as a window stays within it, with whatever window it was compressed.
    for bits in 9..=14 {
        let half = &noise[..1 << (bits - 1)];
        let text = half.repeat(2);
        let form = deflate(&text).unwrap();
        assert!(form.len() < half.len() * 3 / 2, "the second half refers to the first");
        assert!(inflate_within(&form, Window::around(text.len())) == Some(text), "{bits}");
    }
}

#[test]
fn every_way_to_compress_a_text_is_read() {
    let text = "one block and another, again and again: κόσμε 😀. ".repeat(300);
    for level in 0..=9 {
        for window_bits in 9..=15 {
            for flush in [FlushCompress::Sync, FlushCompress::Full, FlushCompress::Finish] {
                let payload = compressed(text.as_bytes(), level, window_bits, flush);
                assert_eq!(inflate(&payload).as_deref(), Ok(text.as_bytes()), "{level} {window_bits} {flush:?}");
            }
        }
    }
    // Several flushes, and several streams, each after a last block.
    let flushed = [&sync(b"one ")[..], &FLUSH_END, &sync(b"two")].concat();
    assert_eq!(inflate(&flushed).as_deref(), Ok(&b"one two"[..]));
    let ended = compressed(b"x", 6, 15, FlushCompress::Finish);
    let [one, another] = [[&ended[..], &FLUSH_END].concat(), ended.clone()];
    assert_eq!(inflate(&[one, another].concat()).as_deref(), Ok(&b"xx"[..]));
}

#[test]
fn what_does_not_inflate_is_refused() {
    let check = |payload: &[u8], expected: ReadError| assert_eq!(inflate(payload), Err(expected), "{payload:x?}");
    check(b"Hello", ReadError::NotDeflate);
    check(&[0xff], ReadError::NotDeflate);
    check(&[0x07], ReadError::NotDeflate);
    check(&[0x00, 0x05, 0x00, 0xfa, 0xfe, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00], ReadError::NotDeflate);
    // Further back than there is anything.
    check(&[0x02, 0x61, 0x00], ReadError::NotDeflate);
    check(&sync(b"\xff\xfe"), ReadError::NotUtf8);
    check(&sync("€".as_bytes().split_at(2).0), ReadError::NotUtf8);
    // A text that stops early, at whatever byte, never passes for a whole one.
    let text = "again and again, ".repeat(20);
    let payload = sync(text.as_bytes());
    for length in 1..payload.len() {
        assert!(inflate(&payload[..length]).is_err(), "{length} of {}", payload.len());
    }
}

#[test]
fn no_more_is_inflated_than_the_limit_allows() {
    let text = "a".repeat(50_000);
    let payload = sync(text.as_bytes());
    assert!(payload.len() < 100);
    assert_eq!(inflate_to(&payload, 50_000).map(|text| text.len()), Ok(50_000));
    assert_eq!(inflate_to(&payload, 49_999), Err(ReadError::MessageTooBig));
    assert_eq!(inflate_to(&payload, 0), Err(ReadError::MessageTooBig));
    assert_eq!(inflate_to(&[0], 0), Ok(Vec::new()));

    // A thousand times the limit: what is held meanwhile is bounded by the limit, and let go.
    let bomb = compressed(&vec![b'a'; 100 << 20], 9, 15, FlushCompress::Sync);
    let mut inflater = Inflater::default();
    assert_eq!(inflater.read(&bomb, 100 << 10), Err(ReadError::MessageTooBig));
    assert!(inflater.output.capacity() <= (100 << 10) + 1, "{}", inflater.output.capacity());
    assert!(inflater.state.as_ref().is_some_and(|state| state.total_out() <= (100 << 10) + 1));
    assert_eq!(inflater.inflate(&bomb, 100 << 10, |_| ()), Err(ReadError::MessageTooBig));
    assert_eq!(inflater.output.capacity(), 0, "a large buffer is not kept");
    assert_eq!(inflater.inflate(&sync(b"fine"), 100 << 10, |text| text.to_vec()), Ok(b"fine".to_vec()));
    assert!(inflater.output.capacity() <= KEPT_BYTES_MAX);
}

#[test]
fn a_message_of_last_blocks_only_is_cut_short() {
    // An empty last block each.
    let blocks = |count: usize| [3, 0].repeat(count);
    assert_eq!(inflate(&blocks(STREAMS_MAX)), Ok(Vec::new()));
    assert_eq!(inflate(&blocks(STREAMS_MAX + 1)), Err(ReadError::NotDeflate));
}

#[test]
fn one_inflater_reads_message_after_message_whatever_became_of_the_last() {
    let mut inflater = Inflater::default();
    let good = sync(b"good");
    for bad in [&b"Hello"[..], &[0xff], &sync(&[0xff; 3]), &sync(&[b'a'; 1000]), &good[..3]] {
        assert!(inflater.inflate(bad, 500, |_| ()).is_err());
        assert_eq!(inflater.inflate(&good, 500, |text| text.to_vec()), Ok(b"good".to_vec()));
    }
}

#[test]
fn only_what_becomes_smaller_is_compressed() {
    let text = "a text that says the same, and says the same again. ".repeat(4);
    assert!(deflate(text.as_bytes()).is_some_and(|payload| payload.len() < text.len() / 2));
    assert_eq!(deflate(b""), None);
    assert_eq!(deflate(b"short"), None);
    let noise: Vec<u8> = (0..40_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for length in [100, 1000, LARGE_BYTES_MIN - 1, LARGE_BYTES_MIN, 40_000] {
        let payload = deflate(&noise[..length]);
        assert!(payload.is_none_or(|payload| payload.len() < length), "{length}");
    }
    // The thread's compressor goes on as if nothing had been.
    assert_eq!(deflate(text.as_bytes()), deflate(text.as_bytes()));
    // One inside the other, as a thread that is ending has none.
    let nested = with_deflater(1, Window::FULL, |_| deflate(text.as_bytes()));
    assert_eq!(nested, deflate(text.as_bytes()));
}

proptest! {
    #[test]
    fn what_is_compressed_here_inflates_to_itself(text in prop_oneof!["[a-z ]{0,3000}", "(ab|cd|“é){0,900}", "\\PC{0,300}"]) {
        if let Some(payload) = deflate(text.as_bytes()) {
            prop_assert!(payload.len() < text.len());
            prop_assert_eq!(inflate(&payload), Ok(text.into_bytes()));
        }
    }

    #[test]
    fn any_bytes_end_in_a_text_or_an_error(payload in prop::collection::vec(prop_oneof![0_u8..8, any::<u8>()], 0..300), bytes_max in 0_usize..2000) {
        if let Ok(text) = inflate_to(&payload, bytes_max) {
            prop_assert!(text.len() <= bytes_max && std::str::from_utf8(&text).is_ok());
        }
    }
}
