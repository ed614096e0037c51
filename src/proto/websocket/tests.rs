use proptest::prelude::*;

use super::*;

const LIMITS: ReadLimits = ReadLimits { message_bytes_max: 1000, deflates: false };

/// What a reader delivered, in the order of delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Got {
    Text(String),
    Binary(Vec<u8>),
    Deflated(Vec<u8>),
    DeflatedBinary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
}

impl Got {
    /// Empty fragments are counted by a test of their own.
    fn of(message: &Incoming<'_>) -> Option<Self> {
        Some(match message {
            Incoming::Text(text) => Self::Text(std::str::from_utf8(text).unwrap().to_owned()),
            Incoming::Binary(bytes) => Self::Binary(bytes.to_vec()),
            Incoming::Deflated(bytes) => Self::Deflated(bytes.to_vec()),
            Incoming::EmptyFragment => return None,
            Incoming::DeflatedBinary(bytes) => Self::DeflatedBinary(bytes.to_vec()),
            Incoming::Ping(bytes) => Self::Ping(bytes.to_vec()),
            Incoming::Pong(bytes) => Self::Pong(bytes.to_vec()),
            Incoming::Close(payload) => Self::Close(payload.map(|(code, reason)| (code, reason.to_owned()))),
        })
    }
}

fn text(text: &str) -> Got {
    Got::Text(text.to_owned())
}

const FIN: u8 = 0x80;
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// A client's frame, its length in the shortest form.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..=125 => bytes.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(&MASK);
    bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

fn frames(frames: &[(u8, &[u8])]) -> Vec<u8> {
    frames.iter().flat_map(|(first, payload)| frame(*first, payload)).collect()
}

/// Reads `stream` in the given pieces; checks the bound of memory after each.
fn read_pieces(
    stream: &[u8],
    limits: &ReadLimits,
    pieces: impl IntoIterator<Item = usize>,
) -> (Vec<Got>, Result<(), ReadError>, bool) {
    let (mut partial, mut got) = (None, Vec::new());
    let mut rest = stream;
    for piece in pieces {
        let (now, later) = rest.split_at(piece.min(rest.len()));
        rest = later;
        let mut closed = false;
        let result = read(&mut partial, &mut now.to_vec(), limits, &mut |message| {
            closed |= matches!(message, Incoming::Close(_));
            got.extend(Got::of(&message));
            ControlFlow::Continue(())
        });
        if let Some(partial) = &partial {
            let bound = size_of::<Partial>() + limits.message_bytes_max + CONTROL_BYTES_MAX;
            assert!(partial.bytes() <= bound, "{} bytes are kept", partial.bytes());
        }
        if result.is_err() || closed {
            assert!(partial.is_none());
            return (got, result, true);
        }
    }
    (got, Ok(()), partial.is_none())
}

/// Whole, byte by byte, and cut once at every place, `stream` gives `expected`.
fn check(stream: &[u8], expected: (&[Got], Result<(), ReadError>)) {
    let cuts = (0..=stream.len()).map(|cut| vec![cut, stream.len()]);
    for pieces in cuts.chain([vec![1; stream.len()]]) {
        let (got, result, is_idle) = read_pieces(stream, &LIMITS, pieces.clone());
        assert_eq!((&got[..], result), expected, "in pieces {pieces:?}");
        assert!(is_idle, "something is kept, in pieces {pieces:?}");
    }
}

fn check_ok(stream: &[u8], expected: &[Got]) {
    check(stream, (expected, Ok(())));
}

fn check_err(stream: &[u8], expected: ReadError) {
    check(stream, (&[], Err(expected)));
}

#[test]
fn messages_of_one_frame_are_delivered() {
    check_ok(&[], &[]);
    check_ok(&frame(FIN | 1, b""), &[text("")]);
    check_ok(&frame(FIN | 1, b"hello"), &[text("hello")]);
    check_ok(&frame(FIN | 1, "κόσμε 😀".as_bytes()), &[text("κόσμε 😀")]);
    check_ok(&frame(FIN | 2, b"\xff\0"), &[Got::Binary(vec![0xff, 0])]);
    for length in [125, 126, 127, 999, 1000] {
        check_ok(&frame(FIN | 1, "a".repeat(length).as_bytes()), &[text(&"a".repeat(length))]);
    }
    check_ok(
        &frames(&[(FIN | 1, b"one"), (FIN | 1, b""), (FIN | 2, b""), (FIN | 1, b"two")]),
        &[text("one"), text(""), Got::Binary(vec![]), text("two")],
    );
}

#[test]
fn lengths_of_sixty_four_bits_are_read() {
    let limits = ReadLimits { message_bytes_max: 1 << 17, deflates: false };
    let payload = "b".repeat(70_000);
    let stream = frame(FIN | 1, payload.as_bytes());
    for pieces in [vec![stream.len()], vec![1; 20], vec![13, 60_000], vec![14, 1]] {
        let (got, result, is_idle) = read_pieces(&stream, &limits, pieces.into_iter().chain([stream.len()]));
        assert_eq!((got.as_slice(), result, is_idle), ([text(&payload)].as_slice(), Ok(()), true));
    }
}

#[test]
fn control_frames_are_delivered_at_once_also_inside_a_message() {
    check_ok(&frame(FIN | 9, b""), &[Got::Ping(vec![])]);
    check_ok(&frame(FIN | 9, &[0xfe; 125]), &[Got::Ping(vec![0xfe; 125])]);
    check_ok(&frame(FIN | 10, b"late"), &[Got::Pong(b"late".to_vec())]);
    check_ok(
        &frames(&[(1, b"frag"), (FIN | 9, b"p1"), (0, b""), (FIN | 9, b"p2"), (FIN | 10, b""), (FIN, b"ment")]),
        &[Got::Ping(b"p1".to_vec()), Got::Ping(b"p2".to_vec()), Got::Pong(vec![]), text("fragment")],
    );
}

#[test]
fn fragments_are_put_together() {
    check_ok(&frames(&[(1, b"a"), (0, b"b"), (FIN, b"c")]), &[text("abc")]);
    check_ok(&frames(&[(2, b""), (0, b""), (FIN, b"")]), &[Got::Binary(vec![])]);
    check_ok(&frames(&[(1, b""), (0, b"middle"), (FIN, b"")]), &[text("middle")]);
    // A character over three fragments.
    check_ok(&frames(&[(1, b"\xf0"), (0, b"\x9f\x98"), (FIN, b"\x80")]), &[text("😀")]);
    check_ok(&frames(&[(1, b"a"), (FIN, b"b"), (FIN | 1, b"c")]), &[text("ab"), text("c")]);
}

#[test]
fn close_ends_reading() {
    check_ok(&frame(FIN | 8, b""), &[Got::Close(None)]);
    check_ok(&frame(FIN | 8, b"\x03\xe8"), &[Got::Close(Some((1000, String::new())))]);
    check_ok(&frame(FIN | 8, b"\x0f\xa8bye"), &[Got::Close(Some((4008, "bye".to_owned())))]);
    check_ok(&frames(&[(FIN | 8, b"\x03\xe8"), (FIN | 1, b"never")]), &[Got::Close(Some((1000, String::new())))]);
    // In the middle of a message, and with something illegal behind it.
    check_ok(&frames(&[(1, b"a"), (FIN | 8, b""), (0x7f, b"")]), &[Got::Close(None)]);
    let longest = [b"\x03\xe8".as_slice(), &[b'r'; 123]].concat();
    check_ok(&frame(FIN | 8, &longest), &[Got::Close(Some((1000, "r".repeat(123))))]);
}

#[test]
fn close_codes_are_those_that_may_be_sent() {
    for code in 0..=u16::MAX {
        let stream = frame(FIN | 8, &code.to_be_bytes());
        let (got, result, _) = read_pieces(&stream, &LIMITS, [stream.len()]);
        let is_legal = (1000..=1003).contains(&code) || (1007..=1014).contains(&code) || (3000..=4999).contains(&code);
        if is_legal {
            assert_eq!((got, result), (vec![Got::Close(Some((code, String::new())))], Ok(())));
        } else {
            assert_eq!((got, result), (vec![], Err(ReadError::CloseCode(code))));
        }
    }
    check_err(&frame(FIN | 8, b"\x03"), ReadError::CloseTooShort);
    check_err(&frame(FIN | 8, b"\x03\xe8\xff"), ReadError::NotUtf8);
    check_err(&frame(FIN | 8, b"\x03\xe8\xe2\x82"), ReadError::NotUtf8);
}

#[test]
fn breaches_of_framing_are_refused() {
    for bit in [0x40, 0x20, 0x10, 0x70] {
        check_err(&frame(FIN | bit | 1, b"a"), ReadError::ReservedBit);
        check_err(&frame(FIN | bit | 9, b""), ReadError::ReservedBit);
    }
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        check_err(&frame(FIN | opcode, b""), ReadError::Opcode(opcode));
    }
    check_err(b"\x81\x05hello", ReadError::NotMasked);
    check_err(b"\x89\0", ReadError::NotMasked);
    check_err(b"\x81\xfe\0\x7d", ReadError::LengthNotMinimal);
    check_err(b"\x81\xff\0\0\0\0\0\0\xff\xff", ReadError::LengthNotMinimal);
    check_err(b"\x81\xff\x80", ReadError::LengthTopBit);
    check_err(b"\x89\xfe\0\x7e", ReadError::ControlTooLong);
    check_err(b"\x88\xff", ReadError::ControlTooLong);
    check_err(&frame(9, b""), ReadError::ControlFragmented);
    check_err(&frame(8, b""), ReadError::ControlFragmented);
    check_err(&frame(FIN, b"a"), ReadError::NothingToContinue);
    check_err(&frame(0, b""), ReadError::NothingToContinue);
    check_err(&frames(&[(1, b"a"), (FIN | 1, b"b")]), ReadError::NotContinued);
    check_err(&frames(&[(1, b""), (2, b"")]), ReadError::NotContinued);
    check(&frames(&[(1, b"a"), (FIN, b"b"), (FIN, b"c")]), (&[text("ab")], Err(ReadError::NothingToContinue)));
    check(&frames(&[(FIN | 1, b"first"), (FIN | 3, b"")]), (&[text("first")], Err(ReadError::Opcode(3))));
}

#[test]
fn a_message_over_the_limit_is_refused_by_its_header() {
    check_err(b"\x81\xfe\x03\xe9", ReadError::MessageTooBig);
    check_err(b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff", ReadError::MessageTooBig);
    let half = [b'a'; 500];
    check_ok(&frames(&[(1, &half), (FIN, &half)]), &[text(&"a".repeat(1000))]);
    let mut stream = frames(&[(1, &half), (0, &half)]);
    stream.extend_from_slice(b"\x80\x81");
    check_err(&stream, ReadError::MessageTooBig);
}

#[test]
fn text_fails_as_early_as_it_is_certainly_wrong() {
    for bad in [
        &b"\xff"[..],
        b"\xc0",
        b"\xed\xa0",
        b"\xf4\x90",
        b"\xe0\x80",
        b"\xf0\x80",
        b"a\x80",
        "\u{fe}κόσμε\u{d7ff}".as_bytes().split_at(1).1,
    ] {
        check_err(&frame(FIN | 1, bad), ReadError::NotUtf8);
        // Only the start of a longer frame, and of a message of several.
        let mut stream = frame(FIN | 1, &[bad, &[b'a'; 20]].concat());
        stream.truncate(stream.len() - 20);
        check_err(&stream, ReadError::NotUtf8);
        check_err(&frames(&[(1, b"fine"), (0, bad)]), ReadError::NotUtf8);
    }
    // The end of a message inside a character.
    check_err(&frame(FIN | 1, b"\xe2\x82"), ReadError::NotUtf8);
    check_err(&frames(&[(1, b"\xe2\x82"), (FIN, b"")]), ReadError::NotUtf8);
    // A control frame between the halves of a character changes nothing.
    check_ok(&frames(&[(1, b"\xe2\x82"), (FIN | 10, b""), (FIN, b"\xac")]), &[Got::Pong(vec![]), text("€")]);
}

#[test]
fn memory_grows_with_what_was_received_and_not_with_what_is_claimed() {
    let limits = ReadLimits { message_bytes_max: 1 << 30, deflates: false };
    let mut partial = None;
    let mut none = |_: Incoming<'_>| panic!("nothing is complete");
    read(&mut partial, &mut b"\x81\xff\0\0\0\0\x40\0\0\0\0\0\0\0abc".to_vec(), &limits, &mut none).unwrap();
    assert!(partial.as_ref().unwrap().bytes() < 256);
    read(&mut partial, &mut vec![b'a'; 10_000], &limits, &mut none).unwrap();
    assert!(partial.unwrap().bytes() < 20_300);
}

#[test]
fn a_sink_that_breaks_drops_the_rest() {
    let mut stream = frames(&[(FIN | 1, b"one"), (FIN | 1, b"two"), (0x7f, b"")]);
    let (mut partial, mut count) = (None, 0);
    let result = read(&mut partial, &mut stream, &LIMITS, &mut |_| {
        count += 1;
        ControlFlow::Break(())
    });
    assert_eq!((result, count, partial.is_none()), (Ok(()), 1, true));
}

#[test]
fn a_whole_message_is_delivered_from_the_input() {
    let mut stream = frame(FIN | 1, b"in place");
    let place = stream.as_ptr_range();
    read(&mut None, &mut stream, &LIMITS, &mut |message| {
        let Incoming::Text(text) = message else { panic!("{message:?}") };
        assert!(place.contains(&text.as_ptr()));
        ControlFlow::Continue(())
    })
    .unwrap();
}

/// The same as [`check`], with permessage-deflate.
fn check_deflates(stream: &[u8], expected: (&[Got], Result<(), ReadError>)) {
    let limits = ReadLimits { deflates: true, ..LIMITS };
    for cut in 0..=stream.len() {
        let (got, result, is_idle) = read_pieces(stream, &limits, [cut, stream.len()]);
        assert_eq!((&got[..], result, is_idle), (expected.0, expected.1, true), "cut at {cut}");
    }
}

#[test]
fn the_first_reserved_bit_of_a_message_says_that_it_is_compressed() {
    let deflated = |payload: &[u8]| Got::Deflated(payload.to_vec());
    let ok = |stream: &[u8], expected: &[Got]| check_deflates(stream, (expected, Ok(())));
    let err = |stream: &[u8], expected: ReadError| check_deflates(stream, (&[], Err(expected)));
    // Its bytes are not looked at: they need not be UTF-8.
    ok(&frame(FIN | 0x41, b"\xff\xfe"), &[deflated(b"\xff\xfe")]);
    ok(&frame(FIN | 0x41, b""), &[deflated(b"")]);
    ok(
        &frames(&[(0x41, b"\xff"), (FIN | 9, b"p"), (FIN, b"\xfe")]),
        &[Got::Ping(b"p".to_vec()), deflated(b"\xff\xfe")],
    );
    ok(&frames(&[(FIN | 0x41, b"a"), (FIN | 1, b"b")]), &[deflated(b"a"), text("b")]);
    ok(&frame(FIN | 0x42, b"\xff"), &[Got::DeflatedBinary(vec![0xff])]);
    ok(&frames(&[(0x42, b"a"), (0, b"b"), (FIN, b"")]), &[Got::DeflatedBinary(b"ab".to_vec())]);
    ok(&frame(FIN | 2, b"\xff"), &[Got::Binary(vec![0xff])]);
    // Not on what goes on, nor on control frames, and no other bit.
    err(&frames(&[(0x41, b"\xff"), (FIN | 0x40, b"")]), ReadError::ReservedBit);
    err(&frames(&[(1, b"a"), (FIN | 0x40, b"")]), ReadError::ReservedBit);
    for control in [8, 9, 10] {
        err(&frame(FIN | 0x40 | control, b""), ReadError::ReservedBit);
    }
    for bits in [0x20, 0x10, 0x60, 0x50, 0x70] {
        err(&frame(FIN | bits | 1, b""), ReadError::ReservedBit);
    }
    // What has no such bit is as before, and so is the limit of bytes that come.
    err(&frame(FIN | 1, b"\xff"), ReadError::NotUtf8);
    err(b"\xc1\xfe\x03\xe9", ReadError::MessageTooBig);
    err(&[&frames(&[(0x41, &[0xff; 1000])])[..], b"\x80\x81"].concat(), ReadError::MessageTooBig);
}

/// Memory is what the fragments of a message are limited by; who reads them may count the empty ones.
#[test]
fn a_million_empty_fragments_hold_no_memory() {
    const FRAGMENTS: usize = 1_000_000;
    let flood = frame(0, b"").repeat(10_000);
    let (mut partial, mut got) = (None, Vec::new());
    let mut sink = |message: Incoming<'_>| {
        got.extend(Got::of(&message));
        ControlFlow::Continue(())
    };
    read(&mut partial, &mut frame(1, "κ".as_bytes()), &LIMITS, &mut sink).unwrap();
    let before = partial.as_ref().map(|partial| partial.bytes());
    for _ in 0..FRAGMENTS / 10_000 {
        read(&mut partial, &mut flood.clone(), &LIMITS, &mut sink).unwrap();
        assert_eq!(partial.as_ref().map(|partial| partial.bytes()), before);
    }
    read(&mut partial, &mut frame(FIN, b"!"), &LIMITS, &mut sink).unwrap();
    assert!(partial.is_none());
    assert_eq!(got, [text("κ!")]);
}

#[test]
fn a_message_of_as_many_fragments_as_it_has_bytes_is_one_message() {
    let whole = "é".repeat(32 << 10);
    let limits = ReadLimits { message_bytes_max: whole.len(), ..LIMITS };
    let mut stream = frame(1, b"");
    stream.extend(whole.as_bytes().chunks(1).flat_map(|byte| frame(0, byte)));
    let rest = stream.len();
    let (got, result, _) = read_pieces(&stream, &limits, [rest / 2, rest]);
    assert_eq!((got.len(), result), (0, Ok(())));
    stream.extend(frame(FIN, b""));
    for piece in [997, 64 << 10, stream.len()] {
        let (got, result, is_idle) =
            read_pieces(&stream, &limits, std::iter::repeat_n(piece, stream.len() / piece + 1));
        assert_eq!((got, result, is_idle), (vec![text(&whole)], Ok(()), true), "{piece}");
    }
    // A byte over the limit is one too many, however it comes.
    stream.truncate(rest);
    stream.extend(frame(0, b"x"));
    assert_eq!(read_pieces(&stream, &limits, [stream.len()]).1, Err(ReadError::MessageTooBig));
}

#[test]
fn errors_end_with_their_close_code() {
    assert_eq!(ReadError::NotUtf8.disconnect().close_code(), 1007);
    assert_eq!(ReadError::NotDeflate.disconnect().close_code(), 1007);
    assert_eq!(ReadError::MessageTooBig.disconnect().close_code(), 1009);
    assert_eq!(ReadError::NotMasked.disconnect().close_code(), 1002);
    assert_eq!(ReadError::CloseCode(1005).disconnect().close_code(), 1002);
}

#[test]
fn unmasking_equals_the_rfcs_definition_at_every_length() {
    for length in 0..70_u8 {
        let bytes: Vec<u8> = (0..length).map(|index| index.wrapping_mul(37)).collect();
        let mut payload = bytes.clone();
        unmask(&mut payload, MASK);
        let expected: Vec<u8> = bytes.iter().enumerate().map(|(index, byte)| byte ^ MASK[index % 4]).collect();
        assert_eq!(payload, expected);
    }
}

#[test]
fn every_empty_fragment_that_ends_no_message_is_told() {
    let stream = [frame(1, b"he"), frame(0, b""), frame(FIN | 9, b""), frame(0, b"llo"), frame(FIN, b"")].concat();
    for pieces in [vec![stream.len()], vec![1; stream.len()]] {
        let (mut partial, mut rest, mut fragments) = (None, &stream[..], 0);
        for piece in pieces {
            let (now, later) = rest.split_at(piece);
            rest = later;
            let result = read(&mut partial, &mut now.to_vec(), &LIMITS, &mut |message| {
                fragments += usize::from(message == Incoming::EmptyFragment);
                ControlFlow::Continue(())
            });
            assert_eq!(result, Ok(()));
        }
        assert_eq!(fragments, 1);
    }
}

/// A legal message in one to four frames, with control frames between them.
fn messages() -> impl Strategy<Value = (Vec<(u8, Vec<u8>)>, Vec<Got>)> {
    let control = (prop_oneof![Just(9_u8), Just(10)], prop::collection::vec(any::<u8>(), 0..126));
    let body = prop_oneof!["\\PC{0,60}".prop_map(Ok), prop::collection::vec(any::<u8>(), 0..300).prop_map(Err)];
    let cuts = prop::collection::vec((any::<prop::sample::Index>(), prop::option::of(control)), 0..4);
    (body, cuts).prop_map(|(body, cuts)| {
        let (opcode, bytes) = match &body {
            Ok(text) => (1, text.as_bytes().to_vec()),
            Err(bytes) => (2, bytes.clone()),
        };
        let mut places: Vec<usize> = cuts.iter().map(|(index, _)| index.index(bytes.len() + 1)).collect();
        places.sort_unstable();
        let (mut frames, mut got, mut from) = (Vec::new(), Vec::new(), 0);
        for (number, (place, (_, control))) in places.iter().zip(&cuts).enumerate() {
            frames.push((if number == 0 { opcode } else { 0 }, bytes[from..*place].to_vec()));
            from = *place;
            if let Some((opcode, payload)) = control {
                frames.push((FIN | opcode, payload.clone()));
                let payload = payload.clone();
                got.push(if *opcode == 9 { Got::Ping(payload) } else { Got::Pong(payload) });
            }
        }
        frames.push((FIN | if places.is_empty() { opcode } else { 0 }, bytes[from..].to_vec()));
        got.push(match body {
            Ok(text) => Got::Text(text),
            Err(bytes) => Got::Binary(bytes),
        });
        (frames, got)
    })
}

proptest! {
    #[test]
    fn any_messages_in_any_pieces_are_delivered_as_they_were_sent(
        sent in prop::collection::vec(messages(), 0..6),
        pieces in prop::collection::vec(1_usize..200, 0..40),
    ) {
        let stream: Vec<u8> = sent.iter().flat_map(|(frames, _)| frames).flat_map(|(first, p)| frame(*first, p)).collect();
        let expected: Vec<Got> = sent.into_iter().flat_map(|(_, got)| got).collect();
        let (got, result, is_idle) = read_pieces(&stream, &LIMITS, pieces.into_iter().chain([stream.len()]));
        prop_assert_eq!(got, expected);
        prop_assert_eq!((result, is_idle), (Ok(()), true));
    }

    #[test]
    fn any_bytes_in_any_pieces_end_as_they_do_whole(
        stream in prop::collection::vec(prop_oneof![Just(0x81_u8), Just(0x80), Just(1), Just(0), Just(0x89), any::<u8>()], 0..60),
        pieces in prop::collection::vec(1_usize..20, 0..30),
    ) {
        let whole = read_pieces(&stream, &LIMITS, [stream.len()]);
        let cut = read_pieces(&stream, &LIMITS, pieces.into_iter().chain([stream.len()]));
        prop_assert_eq!(whole, cut);
    }
}
