//! How fast is text escaped, and what a client sends read? Bytes a second, beside what others and a copy take.

use std::hint::black_box;
use std::ops::ControlFlow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use tabcast::platform::inbound::{InboundLimits, Scratch, parse};
use tabcast::proto::json::{Buffer, escape};
use tabcast::proto::websocket::{ReadLimits, read, unmask};

/// What 1 MiB has room for.
const ROOM: usize = 2 << 20;

fn texts() -> [(&'static str, String); 5] {
    [
        ("1 KiB of ASCII", "The quick brown fox jumps over the lazy dog. ".repeat(23)),
        ("1 KiB of markdown", "## Title\n\n* one \"quoted\" point\n* `code` and more text here\n\n".repeat(17)),
        ("1 KiB of code", "if (a == \"b\\\\n\") {\n\t\"x\";\n}\n".repeat(36)),
        ("1 KiB of Japanese", "吾輩は猫である。名前はまだ無い。".repeat(21)),
        ("1 MiB of ASCII", "The quick brown fox jumps over the lazy dog. ".repeat(23 << 10)),
    ]
}

/// A copy of the same bytes: what nothing that reads and writes them can beat.
fn copy(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, bytes: &[u8]) {
    let mut out = vec![0; bytes.len()];
    group.bench_function(format!("{name}, copied by memcpy"), |b| {
        b.iter(|| {
            out.copy_from_slice(black_box(bytes));
            black_box(&mut out);
        });
    });
}

fn escapes(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many bytes of text are escaped a second");
    let mut ours = Buffer::with_room(ROOM);
    let mut theirs = Vec::with_capacity(ROOM);
    for (name, text) in texts() {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("{name}, by ours"), |b| {
            b.iter(|| {
                ours.clear();
                escape(&mut ours, black_box(&text))
            });
        });
        group.bench_function(format!("{name}, by serde_json"), |b| {
            b.iter(|| {
                theirs.clear();
                serde_json::to_writer(&mut theirs, black_box(&text)).expect("a Vec takes all");
            });
        });
        copy(&mut group, name, text.as_bytes());
    }
    group.finish();
}

/// Frames of one message of a client, masked.
fn message(payload: &[u8], frames: usize) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let mut stream = Vec::new();
    let parts: Vec<_> = payload.chunks(payload.len().div_ceil(frames)).collect();
    for (number, part) in parts.iter().enumerate() {
        // RFC 6455 §5.2 and §5.4: text in the first frame, FIN in the last.
        let (opcode, last) = (u8::from(number == 0), if number + 1 == parts.len() { 0x80 } else { 0 });
        stream.push(last | opcode);
        match u16::try_from(part.len()) {
            Ok(short @ 0..126) => stream.push(0x80 | short.to_be_bytes()[1]),
            Ok(length) => {
                stream.push(0x80 | 126);
                stream.extend_from_slice(&length.to_be_bytes());
            }
            Err(_) => {
                stream.push(0x80 | 127);
                stream.extend_from_slice(&(part.len() as u64).to_be_bytes());
            }
        }
        stream.extend_from_slice(&MASK);
        let start = stream.len();
        stream.extend_from_slice(part);
        unmask(&mut stream[start..], MASK);
    }
    stream
}

fn frames(c: &mut Criterion) {
    let limits = ReadLimits { message_bytes_max: 1 << 20, deflates: false };
    let mut group = c.benchmark_group("how many bytes of WebSocket messages are read a second");
    let text = "a client's text ".repeat(4 << 10);
    let inputs = [
        ("16 of 100 B", message(&text.as_bytes()[..100], 1).repeat(16)),
        ("one of 64 KiB", message(text.as_bytes(), 1)),
        ("one of 64 KiB in 16 frames", message(text.as_bytes(), 16)),
    ];
    // Reading unmasks in place: each round begins with a copy, as a read from a socket does.
    for (name, stream) in inputs {
        let mut input = stream.clone();
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                input.copy_from_slice(&stream);
                read(&mut None, black_box(&mut input), &limits, &mut |message| {
                    black_box(message);
                    ControlFlow::Continue(())
                })
            });
        });
    }
    let mut payload = text.into_bytes();
    group.throughput(Throughput::Bytes(payload.len() as u64));
    group.bench_function("64 KiB, only unmasked", |b| {
        b.iter(|| unmask(black_box(&mut payload), [0x37, 0xfa, 0x21, 0x3d]));
    });
    copy(&mut group, "64 KiB", &payload);
    group.finish();
}

fn messages(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many bytes of what a client says are parsed a second");
    let said = |text: usize, attachment: usize| {
        let text = "What is “Ça va ?” in English?\\n".repeat(text / 32);
        let data = STANDARD.encode(vec![0x5a; attachment]);
        let attachments = match attachment {
            0 => String::new(),
            _ => format!(r#","attachments":[{{"filename":"a.png","mimetype":"image/png","data":"{data}"}}]"#),
        };
        format!(r#"{{"type":"message","client_id":"3f2a","text":"{text}"{attachments}}}"#).into_bytes()
    };
    let (mut scratch, limits) = (Scratch::default(), InboundLimits::default());
    for (name, message) in
        [("200 B", said(200, 0)), ("4 KiB", said(4 << 10, 0)), ("200 B with a file of 64 KiB", said(200, 64 << 10))]
    {
        let mut input = message.clone();
        group.throughput(Throughput::Bytes(message.len() as u64));
        group.bench_function(format!("{name}, by ours into a command"), |b| {
            b.iter(|| {
                input.copy_from_slice(&message);
                parse(black_box(&mut input), &mut scratch, &limits).expect("a legal message")
            });
        });
        group.bench_function(format!("{name}, by serde_json into a value, files left in base64"), |b| {
            b.iter(|| serde_json::from_slice::<serde_json::Value>(black_box(&message)).expect("legal JSON"));
        });
        copy(&mut group, name, &message);
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = escapes, frames, messages
}
criterion_main!(benches);
