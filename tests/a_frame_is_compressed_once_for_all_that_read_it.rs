//! permessage-deflate over real sockets: tabs with it and without it see the same, it is compressed once, and what they
//! compress themselves is inflated within its bounds.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::{Value, json};
use support::{Client, Gateway, deflated, get, masked, post};

const OFFER: &str = "permessage-deflate; client_max_window_bits";

const PUBLISHERS: usize = 4;
const PER_PUBLISHER: usize = 30;

fn gateway(deflate: &str) -> Gateway {
    Gateway::start(&[("deflate", deflate), ("shards", "2"), ("worker", "none")])
}

fn offering(gateway: &Gateway, query: &str) -> Client {
    gateway.connect().offering(query, OFFER)
}

/// In the room once this returns.
fn joined(mut tab: Client) -> Client {
    tab.send(&json!({"type": "join", "room": "r", "client_id": "j"}));
    assert_eq!(tab.json()["type"], "ack");
    tab
}

fn metric(gateway: &Gateway, name: &str) -> u64 {
    let mut client = gateway.connect();
    client.write(&get("/metrics"));
    let text = client.response().text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

/// Every third is too short to be compressed, every fifth so long that it is compressed on a thread apart.
fn text(publisher: usize, number: usize) -> String {
    let times = match number {
        _ if number.is_multiple_of(3) => 1,
        _ if number.is_multiple_of(5) => 4_000,
        _ => 60,
    };
    format!("{publisher} {number} {}", "and again “so”, ".repeat(times))
}

#[test]
fn all_tabs_of_a_room_see_the_same_in_one_order() {
    let gateway = gateway("on");
    let tabs: Vec<Client> = (0..8)
        .map(|tab| {
            let query = format!("user=u{}", tab % 3);
            joined(if tab % 2 == 0 { offering(&gateway, &query) } else { gateway.tab(&query) })
        })
        .collect();
    let address = gateway.address;
    let publish = move |publisher: usize| {
        let mut worker = Client::connect(address);
        for number in 0..PER_PUBLISHER {
            let body = json!({"channel_id": "room:r", "text": text(publisher, number)}).to_string();
            worker.write(&post("/api/send", "application/json", body.as_bytes()));
            let answer: Value = serde_json::from_slice(&worker.response().body).unwrap();
            assert_eq!(answer["tabs"], 8, "{answer}");
        }
    };
    let read = |mut tab: Client| -> (Vec<Value>, usize) {
        let frames = (0..PUBLISHERS * PER_PUBLISHER).map(|_| tab.json()).collect();
        (frames, tab.compressed_texts)
    };
    let seen: Vec<(Vec<Value>, usize)> = std::thread::scope(|threads| {
        let readers: Vec<_> = tabs.into_iter().map(|tab| threads.spawn(move || read(tab))).collect();
        (0..PUBLISHERS).for_each(|publisher| drop(threads.spawn(move || publish(publisher))));
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    for (tab, (frames, compressed_texts)) in seen.iter().enumerate() {
        assert!(*frames == seen[0].0, "tab {tab} saw something else");
        // Large ones may stay plain while many are compressed: here at most four are under way.
        let expected = if tab % 2 == 0 { PUBLISHERS * PER_PUBLISHER * 2 / 3 } else { 0 };
        assert_eq!(*compressed_texts, expected, "tab {tab}");
    }
    for publisher in 0..PUBLISHERS {
        let own = format!("{publisher} ");
        let texts = seen[0].0.iter().filter_map(|frame| frame["text"].as_str()).filter(|text| text.starts_with(&own));
        assert!(
            texts.eq((0..PER_PUBLISHER).map(|number| text(publisher, number))),
            "the order of publisher {publisher}"
        );
    }
    // Once a frame, for all tabs on both shards.
    let frames = (PUBLISHERS * PER_PUBLISHER * 2 / 3) as u64;
    assert_eq!(metric(&gateway, "tabcast_deflated_frames_total"), frames);
    let bytes = metric(&gateway, "tabcast_deflated_json_bytes_total");
    assert!(metric(&gateway, "tabcast_deflated_form_bytes_total") < bytes / 5);
}

#[test]
fn it_is_off_unless_it_is_switched_on_and_offered() {
    for (deflate, offer, expected) in [
        ("off", OFFER, 0),
        ("on", "x-webkit-deflate-frame", 0),
        ("on", "permessage-deflate; server_max_window_bits=8", 0),
        ("on", "permessage-deflate; server_max_window_bits=10, permessage-deflate", 1),
        ("on", OFFER, 1),
    ] {
        let gateway = gateway(deflate);
        let mut tab = gateway.connect().offering("user=u", offer);
        gateway.post("/api/send", &json!({"channel_id": "u", "text": text(0, 1)}));
        assert_eq!(tab.json()["text"], text(0, 1));
        assert_eq!(tab.compressed_texts, expected, "{deflate} {offer}");
        if expected == 0 {
            tab.write(&deflated(br#"{"type":"ping"}"#));
            assert_eq!(tab.closed().0, 1002, "{deflate} {offer}");
        }
    }
}

#[test]
fn a_tab_that_reads_with_a_smaller_window_gets_what_fits_into_it() {
    let gateway = gateway("on");
    let mut narrow = gateway.connect().offering("user=u", "permessage-deflate; server_max_window_bits=10");
    let mut full = offering(&gateway, "user=u");
    let texts = [60, 200].map(|times| "again and ".repeat(times));
    for text in &texts {
        gateway.post("/api/send", &json!({"channel_id": "u", "text": text}));
        assert_eq!([narrow.json()["text"].clone(), full.json()["text"].clone()], [text.as_str(), text.as_str()]);
    }
    assert_eq!((narrow.compressed_texts, full.compressed_texts), (1, 2));
    assert_eq!(metric(&gateway, "tabcast_deflated_frames_total"), 2);
    // What it compresses itself is heard.
    narrow.write(&deflated(br#"{"type":"ping"}"#));
    assert_eq!(narrow.json()["type"], "pong");
}

#[test]
fn what_tabs_compress_is_understood_within_its_bounds() {
    let gateway = gateway("on");
    let mut tab = offering(&gateway, "user=u");
    let long = json!({"type": "message", "text": "again ".repeat(2_000), "client_id": "c"}).to_string();
    tab.write(&deflated(long.as_bytes()));
    let got = [tab.json(), tab.json()];
    assert_eq!((&got[0]["type"], &got[0]["client_id"]), (&json!("ack"), &json!("c")));
    assert_eq!(got[1]["text"], "again ".repeat(2_000), "its echo");
    // A mebibyte and a half of the same is over the limit of a message; so is thirty times as much.
    for bytes in [3 << 19, 48 << 20] {
        let mut tab = offering(&gateway, "user=u");
        let bomb = deflated(&vec![b' '; bytes]);
        assert!(bomb.len() < bytes / 500);
        tab.write(&bomb);
        assert_eq!(tab.closed(), (1009, "message too big".to_owned()));
    }
    let resident = resident_bytes(gateway.pid());
    assert!(resident < 100 << 20, "{resident} bytes");
    for (bytes, code) in [
        (masked(0x41, b"not compressed"), 1007),
        (deflated(b"\xff\xfe"), 1007),
        (masked(0x42, b""), 1003),
        (masked(0x49, b""), 1002),
        ([masked(0x41, b"").as_slice(), &masked(0x40, b"")].concat(), 1002),
    ] {
        let mut tab = offering(&gateway, "user=v");
        tab.write(&bytes);
        let mut ending = tab.frame();
        if let support::Seen::Text(error) = &ending {
            // An empty text is a bad frame, and no reason to end.
            assert!(error.starts_with(br#"{"type":"error""#), "{error:?}");
            ending = tab.frame();
        }
        assert!(matches!(ending, support::Seen::Close(found, _) if found == code), "{ending:?} instead of {code}");
    }
}

fn resident_bytes(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}
