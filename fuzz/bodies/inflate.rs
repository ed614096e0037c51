//! Whatever a client calls compressed is inflated within its bound, as another inflater does it; and what is compressed
//! here comes back.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
use tabcast::proto::deflate::Inflater;
use tabcast::proto::frame::{Frame, Kind};
use tabcast::proto::websocket::ReadError;

/// The first byte is the limit, in units of 64 bytes; the rest is the payload.
pub(crate) fn run(bytes: &[u8]) {
    let Some((&limit, payload)) = bytes.split_first() else { return };
    let bytes_max = usize::from(limit) * 64;
    let inflate = |inflater: &mut Inflater, payload: &[u8]| inflater.inflate(payload, bytes_max, |text| text.to_vec());
    let result = inflate(&mut Inflater::default(), payload);
    // Whatever it read before, and however that ended.
    let mut used = Inflater::default();
    let _ = inflate(&mut used, &payload[payload.len() / 2..]);
    assert_eq!(inflate(&mut used, payload), result);
    match &result {
        Ok(text) => {
            assert!(text.len() <= bytes_max && std::str::from_utf8(text).is_ok());
            assert_eq!(oracle(payload, bytes_max), *text);
        }
        Err(ReadError::MessageTooBig) => assert!(oracle(payload, bytes_max).len() > bytes_max),
        Err(ReadError::NotUtf8) => assert!(std::str::from_utf8(&oracle(payload, bytes_max)).is_err()),
        Err(error) => assert_eq!(*error, ReadError::NotDeflate),
    }
    if let Ok(text) = std::str::from_utf8(payload) {
        let mut frame = Frame::relay(Kind::Message, None, None, text);
        frame.deflate();
        if let Some(form) = frame.deflated() {
            let header_bytes = match form[1] {
                126 => 4,
                127 => 10,
                _ => 2,
            };
            let read = Inflater::default().inflate(&form[header_bytes..], text.len(), |text| text.to_vec());
            assert!(form.len() < frame.websocket().len() && read.as_deref() == Ok(text.as_bytes()));
        }
    }
}

/// What another inflater makes of it: all streams behind each other, up to a byte over the limit.
fn oracle(payload: &[u8], bytes_max: usize) -> Vec<u8> {
    // The end of the flush, and an empty last block.
    const MESSAGE_END: [u8; 9] = [0, 0, 0xff, 0xff, 1, 0, 0, 0xff, 0xff];
    let whole = [payload, &MESSAGE_END].concat();
    let (mut rest, mut output, mut length) = (&whole[..], vec![0; bytes_max + 1], 0);
    // Less than that, and it went on into what is behind the payload; none of it, and it ended with the payload.
    while !rest.is_empty() && rest.len() != MESSAGE_END.len() {
        let mut state = DecompressorOxide::new();
        let flags = inflate_flags::TINFL_FLAG_HAS_MORE_INPUT | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, consumed, produced) = decompress(&mut state, rest, &mut output[length..], 0, flags);
        rest = &rest[consumed..];
        length += produced;
        if status != TINFLStatus::Done {
            break;
        }
    }
    output.truncate(length);
    output
}
