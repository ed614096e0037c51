//! An embedder's own messages: text and bytes that are no event, both ways.

use super::rig::{RSV1, Rig, TEXT, client_frame, close, deflated_client_frame, message};
use crate::fanout::session::SessionRef;
use crate::fanout::shard::{Inbound, Reaction, Wire};
use crate::proto::deflate::{Inflater, Window};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

const BINARY: u8 = 0x82;

/// Says back what it hears; ends whoever says `leave`.
struct Echo;

impl Inbound for Echo {
    fn text(&mut self, _session: &SessionRef, text: &mut [u8]) -> Reaction {
        match std::str::from_utf8(text).unwrap() {
            "leave" => Reaction::End(Disconnect::PolicyViolation),
            text => Reaction::ReplyDeflated(Frame::text(text)),
        }
    }

    fn binary(&mut self, _session: &SessionRef, bytes: &mut [u8]) -> Reaction {
        Reaction::ReplyDeflated(Frame::binary(bytes))
    }
}

fn hear(rig: &mut Rig, tab: usize, mut bytes: Vec<u8>) -> Vec<u8> {
    let (shard, slot) = rig.shard_of(tab);
    shard.handle_readable(slot, &mut bytes, &mut Echo);
    rig.flush();
    std::mem::take(&mut rig.tabs[tab].received)
}

#[test]
fn text_and_bytes_go_both_ways_as_they_are() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    assert_eq!(hear(&mut rig, tab, client_frame(TEXT, b"a\nb")), b"\x81\x03a\nb");
    assert_eq!(hear(&mut rig, tab, client_frame(TEXT, b"")), b"\x81\0");
    assert_eq!(hear(&mut rig, tab, client_frame(BINARY, b"\0\xff")), b"\x82\x02\0\xff");
    let fragments = [client_frame(2, b"\xff"), client_frame(0, b""), client_frame(0x80, b"\xfe")].concat();
    assert_eq!(hear(&mut rig, tab, fragments), b"\x82\x02\xff\xfe");
    let large = vec![0xfe; 60_000];
    let echoed = hear(&mut rig, tab, client_frame(BINARY, &large));
    assert_eq!((&echoed[..4], &echoed[4..]), (&[BINARY, 126, 0xea, 0x60][..], &large[..]));
}

#[test]
fn compressed_bytes_are_heard_and_answered_as_bytes() {
    for bits in Window::SMALLEST.bits()..=Window::FULL.bits() {
        let mut rig = Rig::new(1);
        let tab = rig.try_open(0, "u", Wire::websocket(Window::of_bits(bits))).unwrap();
        rig.writable(tab, usize::MAX);
        let bytes = b"\xff\0 again and ".repeat(100);
        let mut request = deflated_client_frame(&bytes);
        request[0] = BINARY | RSV1;
        let echoed = hear(&mut rig, tab, request);
        assert_eq!((echoed[0], usize::from(echoed[1])), (BINARY | RSV1, echoed.len() - 2));
        assert!(echoed.len() < 100);
        let inflated = Inflater::default().inflate_binary(&echoed[2..], bytes.len(), |bytes| bytes.to_vec());
        assert_eq!(inflated, Ok(bytes));
        // What is no smaller as well, for the answer is to be compressed.
        assert_eq!(hear(&mut rig, tab, client_frame(TEXT, b"a"))[0], TEXT | RSV1);
        assert_eq!(rig.hub.metrics().engine.deflates.frames.value(), 2);
    }
}

#[test]
fn a_tab_with_a_smaller_window_is_written_what_fits_into_it() {
    let mut rig = Rig::new(1);
    let tab = rig.try_open(0, "u", Wire::websocket(Window::of_bits(10))).unwrap();
    rig.writable(tab, usize::MAX);
    // The frames of others are compressed once, and without it in mind.
    let texts = [40, 400].map(|times| "again and ".repeat(times));
    for text in &texts {
        let mut frame = message(text);
        assert!(frame.deflate());
        rig.publish("u", &frame);
        rig.check_gauges();
    }
    let received = &rig.tabs[tab].received;
    let (small, large) = (received[0], received[2 + usize::from(received[1])]);
    assert_eq!((small, large), (TEXT | RSV1, TEXT));
    assert_eq!(rig.texts(tab), texts);
    assert_eq!(rig.hub.deflating().sessions(), 0, "nothing is compressed for its sake alone");
}

#[test]
fn whoever_is_ended_was_answered_before_and_is_not_heard_after() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    let said = ["first", "leave", "after"].map(|text| client_frame(TEXT, text.as_bytes())).concat();
    rig.stall(tab, 0);
    assert_eq!(hear(&mut rig, tab, said), b"");
    rig.writable(tab, usize::MAX);
    assert!(rig.tabs[tab].received.starts_with(b"\x81\x05first"));
    rig.tabs[tab].received.drain(..7);
    assert_eq!(rig.got(tab), [close(Disconnect::PolicyViolation)]);
    assert_eq!(rig.ended(Disconnect::PolicyViolation), 1);
}
