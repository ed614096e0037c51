//! What does it cost to build a frame, and to compress it? Nanoseconds a frame, or bytes of the file a second.

mod cpu;

use std::hint::black_box;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cpu::CpuTime;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;
use tabcast::id::{ChannelId, MessageId};
use tabcast::proto::event::{Button, Event, Timestamp};
use tabcast::proto::frame::Frame;

const AT: Timestamp = Timestamp::from_micros(1_763_836_800_123_456);

fn message(id: MessageId, text: &str) -> Event<'_> {
    Event::Message { id, text, sender: "star", reply_to: None, timestamp: AT }
}

fn small_frames(c: &mut Criterion) {
    let id = MessageId::random();
    let ascii = "The quick brown fox jumps over the lazy dog. ".repeat(5)[..200].to_owned();
    let code = "fn main() {\n\tprintln!(\"{}\", \"a\\\\b\");\n}\n".repeat(6)[..200].to_owned();
    let japanese = "吾輩は猫である。名前はまだ無い。".repeat(5)[..198].to_owned();
    let button = |label: &str| Button { label: label.to_owned(), custom_id: label.to_owned(), ..Button::default() };
    let buttons = ["Tea", "Coffee", "Nothing"].map(button);
    let mut group = c.benchmark_group("how many ns does it take to build and drop a frame");
    let events = [
        ("of a 200 B ASCII message", message(id, &ascii)),
        ("of a 200 B message of code", message(id, &code)),
        ("of a 198 B Japanese message", message(id, &japanese)),
        (
            "of 200 B with three buttons",
            Event::Buttons { id, text: &ascii, sender: "star", reply_to: None, buttons: &buttons, timestamp: AT },
        ),
        ("of an edit of 200 B", Event::Edit { id, text: &ascii, timestamp: AT }),
        (
            "of a file of 200 B",
            Event::File { id, filename: "a.txt", mimetype: "text/plain", data: ascii.as_bytes(), timestamp: AT },
        ),
    ];
    for (name, event) in &events {
        group.bench_function(*name, |b| b.iter(|| Frame::encode(black_box(event))));
    }
    let channel = ChannelId::parse("webchat:someone").expect("a legal id");
    group.bench_function("of typing", |b| {
        b.iter(|| Frame::encode_for(&Event::Typing { active: black_box(true) }, &channel));
    });
    group.bench_function("of a WebSocket ping", |b| b.iter(Frame::ping));
    // What others would send: the JSON alone.
    let mut out = Vec::with_capacity(1 << 10);
    group.bench_function("of the same ASCII message, by serde_json into a buffer", |b| {
        let id = id.to_string();
        b.iter(|| {
            out.clear();
            let text = black_box(&*ascii);
            let event = json!({"type": "message", "id": &id, "text": text, "sender": "star", "timestamp": 1.5});
            serde_json::to_writer(&mut out, &event).expect("a Vec takes all");
        });
    });
    group.finish();
}

fn files(c: &mut Criterion) {
    let id = MessageId::random();
    let mut group = c.benchmark_group("how many bytes a second of a file become a frame");
    for (name, bytes) in [("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("16 MiB", 16 << 20)] {
        let data = vec![0x5a; bytes];
        let event = Event::File { id, filename: "a.png", mimetype: "image/png", data: &data, timestamp: AT };
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("{name}, by ours"), |b| b.iter(|| Frame::encode(black_box(&event))));
        let mut text = vec![0; bytes.div_ceil(3) * 4];
        group.bench_function(format!("{name}, only base64, by the crate base64"), |b| {
            b.iter(|| STANDARD.encode_slice(black_box(&data), &mut text).expect("there is room"));
        });
        let mut copy = vec![0; bytes];
        group.bench_function(format!("{name}, copied by memcpy"), |b| {
            b.iter(|| {
                copy.copy_from_slice(black_box(&data));
                black_box(&mut copy);
            });
        });
    }
    group.finish();
}

fn delivery(c: &mut Criterion) {
    let id = MessageId::random();
    let frame = Frame::encode(&message(id, "a text"));
    let mut group = c.benchmark_group("how many ns does a delivery spend on the frame");
    group.bench_function("cloning and dropping it", |b| b.iter(|| black_box(&frame).clone()));
    group.bench_function("finding its WebSocket form", |b| b.iter(|| black_box(&frame).websocket().len()));
    group.bench_function("finding its event-stream form", |b| {
        b.iter(|| black_box(&frame).event_stream().map(|stream| stream.prefix.len() + stream.body.len()));
    });
    group.finish();
}

/// Text as people and models write it: this crate's own.
fn chat(bytes: usize) -> String {
    let prose: String = include_str!("../README.md").chars().filter(|c| !"|`*#".contains(*c)).collect();
    prose.chars().cycle().skip(500).take(bytes).collect()
}

fn code(bytes: usize) -> String {
    let files =
        [include_str!("../src/config.rs"), include_str!("../src/fanout/hub.rs"), include_str!("../src/engine/mod.rs")];
    files.concat().chars().skip(500).take(bytes).collect()
}

fn compressed_forms(c: &mut Criterion<CpuTime>) {
    let id = MessageId::random();
    let mut group = c.benchmark_group("how many ns does it take to compress a frame, once for all tabs");
    for (name, text) in [("chat", chat as fn(usize) -> String), ("code", code)] {
        for (size, bytes) in [("512 B", 512), ("4 KiB", 4 << 10), ("64 KiB", 64 << 10)] {
            let text = text(bytes);
            let plain = || Frame::encode(&message(id, black_box(&text)));
            let mut frame = plain();
            assert!(frame.deflate(), "it becomes smaller");
            let (form, whole) = (frame.deflated().map_or(0, <[u8]>::len), frame.websocket().len());
            println!("{size} of {name}: {whole} bytes become {form}, {:.2}", form as f64 / whole as f64);
            // Frames are made beforehand: what they cost is asked above.
            group.bench_function(format!("of {size} of {name}"), |b| {
                b.iter_batched_ref(plain, |frame| frame.deflate(), BatchSize::LargeInput);
            });
        }
    }
    let data: Vec<u8> = (0..1 << 16).flat_map(|_| MessageId::random().as_u128().to_be_bytes()).collect();
    let file = || {
        let event = Event::File { id, filename: "a.png", mimetype: "image/png", data: &data, timestamp: AT };
        Frame::encode(&event)
    };
    let mut frame = file();
    frame.deflate();
    let (form, whole) = (frame.deflated().map_or(0, <[u8]>::len), frame.websocket().len());
    println!("a file of 1 MiB: {whole} bytes become {form}, {:.2}", form as f64 / whole as f64);
    group.sample_size(10);
    group.bench_function("of a file of 1 MiB, which is why files are not", |b| {
        b.iter_batched_ref(file, |frame| frame.deflate(), BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = small_frames, files, delivery
}
criterion_group! {
    name = compressed;
    config = Criterion::default().with_measurement(CpuTime);
    targets = compressed_forms
}
criterion_main!(benches, compressed);
