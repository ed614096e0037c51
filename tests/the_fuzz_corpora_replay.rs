//! What the fuzzers have learnt is run again by every test run, through the same bodies.

use std::path::Path;

#[path = "../fuzz/bodies/channel_id.rs"]
mod channel_id;
#[path = "../fuzz/bodies/completion.rs"]
mod completion;
#[cfg(feature = "gateway")]
#[path = "../fuzz/bodies/config.rs"]
mod config;
#[cfg(all(feature = "gateway", feature = "redis"))]
#[path = "../fuzz/bodies/envelope.rs"]
mod envelope;
#[path = "../fuzz/bodies/event_stream.rs"]
mod event_stream;
#[path = "../fuzz/bodies/inbound.rs"]
mod inbound;
#[path = "../fuzz/bodies/inflate.rs"]
mod inflate;
#[path = "../fuzz/bodies/json_writer.rs"]
mod json_writer;
#[path = "../fuzz/bodies/openai_request.rs"]
mod openai_request;
#[cfg(feature = "redis")]
#[path = "../fuzz/bodies/packed.rs"]
mod packed;
#[path = "../fuzz/bodies/websocket_reader.rs"]
mod websocket_reader;

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&corpus).expect("the corpus is committed") {
        let path = entry.expect("a readable directory").path();
        let bytes = std::fs::read(&path).expect("a readable file");
        // Named before it runs: a failure shows which one it was.
        println!("{}", path.display());
        run(&bytes);
        count += 1;
    }
    assert!(count >= 5, "{} has {count} entries", corpus.display());
}

#[test]
fn channel_ids_replay() {
    replay("channel_id", channel_id::run);
}

#[test]
fn completions_replay() {
    replay("completion", completion::run);
}

#[test]
#[cfg(feature = "gateway")]
fn settings_replay() {
    replay("config", config::run);
}

#[test]
fn event_streams_replay() {
    replay("event_stream", event_stream::run);
}

#[test]
#[cfg(all(feature = "gateway", feature = "redis"))]
fn envelopes_replay() {
    replay("envelope", envelope::run);
}

#[test]
fn inbound_frames_replay() {
    replay("inbound", inbound::run);
}

#[test]
fn what_clients_compress_replays() {
    replay("inflate", inflate::run);
}

#[test]
fn the_json_writer_replays() {
    replay("json_writer", json_writer::run);
}

#[test]
fn openai_requests_replay() {
    replay("openai_request", openai_request::run);
}

#[test]
#[cfg(feature = "redis")]
fn packed_messages_replay() {
    replay("packed", packed::run);
}

#[test]
fn the_websocket_reader_replays() {
    replay("websocket_reader", websocket_reader::run);
}
