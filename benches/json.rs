//! How fast is text escaped and a client's message read? Bytes a second.

use std::hint::black_box;
use std::ops::ControlFlow;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tabcast::proto::json::{Buffer, escape};
use tabcast::proto::websocket::{ReadLimits, read, unmask};

fn texts() -> [(&'static str, String); 4] {
    [
        ("1 KiB of ASCII", "The quick brown fox jumps over the lazy dog. ".repeat(23)),
        ("1 KiB of markdown", "## Title\n\n* one \"quoted\" point\n* `code` and more text here\n\n".repeat(17)),
        ("1 KiB of code", "if (a == \"b\\\\n\") {\n\t\"x\";\n}\n".repeat(36)),
        ("1 KiB of Japanese", "吾輩は猫である。名前はまだ無い。".repeat(21)),
    ]
}

fn escapes(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many bytes of text are escaped a second");
    let mut out = Buffer::with_room(64 << 10);
    for (name, text) in texts() {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                escape(&mut out, black_box(&text))
            });
        });
    }
    group.finish();
}

/// `serde_json` on the same texts: what the numbers above are compared with.
fn reference(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many bytes of text does serde_json escape a second");
    let mut out = Vec::with_capacity(64 << 10);
    for (name, text) in texts() {
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                serde_json::to_writer(&mut out, black_box(&text)).expect("a Vec takes all");
            });
        });
    }
    group.finish();
}

fn inbound(c: &mut Criterion) {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let limits = ReadLimits { message_bytes_max: 1 << 16, deflates: false };
    let mut group = c.benchmark_group("how many bytes of WebSocket messages are read a second");
    for (name, bytes) in [("of 100 B", 100_u8), ("of 125 B", 125)] {
        let mut stream = vec![0x81, 0x80 | bytes, MASK[0], MASK[1], MASK[2], MASK[3]];
        let mut payload = vec![b'a'; usize::from(bytes)];
        unmask(&mut payload, MASK);
        stream.extend_from_slice(&payload);
        let stream = stream.repeat(16);
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
    group.finish();
}

criterion_group!(benches, escapes, reference, inbound);
criterion_main!(benches);
