//! How many frames does a node pass through Redis in a second of its CPU, and how long do they take? Starts a
//! `redis-server` of its own, and a second process that receives; prints one line a question.
//!
//! A naive publish, one `PUBLISH` a frame and each awaited, is measured in the same run.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use rustix::time::{ClockId, clock_gettime};
use tabcast::broker::Broker;
use tabcast::broker::redis::{RedisBroker, RedisServer, RedisSettings};
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::Identity;
use tabcast::fanout::shard::{Opening, Outcome, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RequestId, UserId};
use tabcast::platform::adapter::Outlet;
use tabcast::proto::delivery::PublishError;
use tabcast::proto::event::Event;
use tabcast::proto::limits::{RecoveryLimits, SessionLimits};
use tokio::runtime::{Builder, Runtime};

type Failed = Box<dyn Error>;

/// The binary's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a frame says: 200 bytes of JSON in all.
const TEXT: &str = "The quick brown fox jumps over the lazy dog, and then once more over the same dog.";

struct Server {
    child: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Result<Self, Failed> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let directory = tempfile::tempdir()?;
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"])
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .spawn()?;
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { child, port, _directory: directory })
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench is an edge")]
fn now() -> Instant {
    Instant::now()
}

/// What was spent on processors: by this process, or by this thread of it.
fn spent_by(clock: ClockId) -> Duration {
    clock_gettime(clock).try_into().expect("a clock that does not go below nothing")
}

fn spent() -> Duration {
    spent_by(ClockId::ProcessCPUTime)
}

fn node(runtime: &Runtime, url: &str, recovery: Option<RecoveryLimits>) -> Result<Engine, Failed> {
    let server = RedisServer { urls: vec![url.to_owned()], ..RedisServer::default() };
    let settings = RedisSettings { server, recovery, ..RedisSettings::default() };
    let broker = RedisBroker::new(settings, runtime.handle().clone())?;
    let settings = EngineSettings { shards: 1, ..EngineSettings::default() };
    let engine = Engine::with_broker(settings, Arc::clone(&broker) as Arc<dyn Broker>);
    assert!(runtime.block_on(broker.joined(Duration::from_secs(15))), "Redis does not answer: {broker:?}");
    Ok(engine)
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

fn event(engine: &Engine) -> Event<'static> {
    Event::Message { id: MessageId::random(), text: TEXT, sender: "star", reply_to: None, timestamp: engine.now() }
}

/// Publishes as fast as the spool takes it, and waits for the last to be gone. Frames a second of CPU: of all, and of
/// what the broker does behind the spool; and a second of time.
fn flood(engine: &Engine, channel: &ChannelId, frames: usize) -> Result<String, Failed> {
    let broker = engine.broker().metrics().ok_or("no metrics")?;
    let (before, here, start) = (spent(), spent_by(ClockId::ThreadCPUTime), now());
    let sent = || broker.packed_frames.value() + broker.stream_frames.value();
    let goal = sent() + frames as u64;
    for _ in 0..frames {
        while let Err(error) = engine.try_publish(channel, event(engine)) {
            assert_eq!(error, PublishError::SpoolFull);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    while sent() < goal {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (all, here, time) = (spent() - before, spent_by(ClockId::ThreadCPUTime) - here, start.elapsed());
    let million = |time: Duration| frames as f64 / time.as_secs_f64() / 1e6;
    let (behind, time) = (million(all.saturating_sub(here)), million(time));
    Ok(format!(
        "{:.3} million a CPU-second with encoding and fan-out, {behind:.3} behind the spool; {time:.3} a second",
        million(all)
    ))
}

/// A shard on a thread of its own, with one tab of `user`, which tells of each frame.
fn drain(engine: &Engine, user: &str, mut heard: impl FnMut(usize) + Send + 'static) -> Result<(), Failed> {
    let user = UserId::parse(user)?;
    let engine = engine.clone();
    let (opened, is_open) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let start = now();
        let limits = SessionLimits { queue_frames_max: 1 << 16, queue_bytes_max: 1 << 30, ..SessionLimits::default() };
        let mut shard = Shard::new(Arc::clone(engine.hub()), 0, limits, usize::MAX, start);
        let opening = Opening::new(Identity::new(user, engine.now()), Wire::WebSocket);
        let slot = shard.open(opening, |_| None).expect("there is room").slot();
        shard.handle_writable(slot);
        let _ = opened.send(());
        loop {
            let before = shard.metrics().offered_frames.total();
            if !shard.handle_inbox(now()) {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            heard(usize::try_from(shard.metrics().offered_frames.total() - before).unwrap_or_default());
            loop {
                let Some(transmit) = shard.poll_transmit() else { break };
                let (slot, bytes) = (transmit.slot, transmit.slices.iter().map(|slice| slice.len()).sum());
                drop(transmit);
                shard.handle_written(slot, Outcome::Taken(bytes));
            }
        }
    });
    is_open.recv()?;
    Ok(())
}

/// The second process: has a tab of `u` until its input ends.
fn receive(url: &str) -> Result<(), Failed> {
    let runtime = runtime()?;
    let engine = node(&runtime, url, None)?;
    let user = ChannelId::parse("u")?;
    runtime.block_on(engine.expect(&user));
    drain(&engine, "u", |_| ())?;
    println!("ready");
    std::io::stdout().flush()?;
    let _ = std::io::stdin().read_line(&mut String::new());
    Ok(())
}

fn naive(runtime: &Runtime, url: &str, frames: usize) -> Result<(f64, f64), Failed> {
    let client = redis::Client::open(url)?;
    runtime.block_on(async {
        let mut connection = client.get_multiplexed_async_connection().await?;
        let payload = [b'x'; 200];
        let (before, start) = (spent(), now());
        for _ in 0..frames {
            redis::cmd("PUBLISH").arg("sg:sse:naive").arg(&payload[..]).exec_async(&mut connection).await?;
        }
        let (cpu, time) = (spent() - before, start.elapsed());
        Ok((frames as f64 / cpu.as_secs_f64(), frames as f64 / time.as_secs_f64()))
    })
}

/// Latency from the publish on one node to the reader on another, at a steady rate, from the intended time.
fn latency(runtime: &Runtime, from: &Engine, to: &Engine, rate: u64, seconds: u64) -> Result<(), Failed> {
    let request = RequestId::random();
    let channel = ChannelId::Stream(request.clone());
    runtime.block_on(to.expect(&channel));
    let mut reader = to.open_stream(&request)?;
    let start = now();
    let count = rate * seconds;
    let heard = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&heard);
    let reading = runtime.spawn(async move {
        let mut latencies = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        while latencies.len() < latencies.capacity() {
            let Some(_) = reader.next().await else { break };
            let place = latencies.len() as u64;
            let intended = Duration::from_nanos(place * 1_000_000_000 / rate);
            latencies.push(start.elapsed().saturating_sub(intended));
            counted.fetch_add(1, Ordering::Relaxed);
        }
        latencies.sort_unstable();
        latencies
    });
    for place in 0..count {
        let intended = Duration::from_nanos(place * 1_000_000_000 / rate);
        while let Some(early) = intended.checked_sub(start.elapsed()) {
            std::thread::sleep(early.min(Duration::from_micros(200)));
        }
        from.try_publish(&channel, event(from))?;
    }
    let latencies = runtime.block_on(tokio_timeout(reading))?;
    let at = |part: usize| latencies[latencies.len() * part / 1000].as_secs_f64() * 1e3;
    println!("through Redis at {rate}/s: p50 {:.2} ms, p99 {:.2} ms of {}", at(500), at(990), latencies.len());
    Ok(())
}

async fn tokio_timeout(reading: tokio::task::JoinHandle<Vec<Duration>>) -> Result<Vec<Duration>, Failed> {
    let latencies = tokio::time::timeout(Duration::from_secs(20), reading).await??;
    if latencies.is_empty() { Err("nothing came".into()) } else { Ok(latencies) }
}

fn main() -> Result<(), Failed> {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(place) = arguments.iter().position(|argument| argument == "receive") {
        return receive(&arguments[place + 1]);
    }
    // Without a name all questions are asked.
    let named: Vec<_> = arguments.iter().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let asks = |name: &str| named.is_empty() || named.iter().any(|named| *named == name);
    let server = Server::start()?;
    let (runtime, url) = (runtime()?, server.url());
    let million =
        |(cpu, time): (f64, f64)| format!("{:.3} million a CPU-second, {:.3} a second", cpu / 1e6, time / 1e6);
    let alone = node(&runtime, &url, None)?;
    if asks("naive") {
        println!("naive PUBLISH, each awaited: {}", million(naive(&runtime, &url, 100_000)?));
    }
    if asks("streams") {
        let stream = ChannelId::parse("sse:load")?;
        flood(&alone, &stream, 50_000)?;
        println!("sg:sse publishes: {}", flood(&alone, &stream, 1_000_000)?);
    }
    if asks("packed") {
        let mut receiver = Command::new(std::env::current_exe()?)
            .args(["receive", &url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = receiver.stdout.take().ok_or("no output")?;
        BufReader::new(output).read_line(&mut String::new())?;
        let user = ChannelId::parse("u")?;
        flood(&alone, &user, 50_000)?;
        println!("packed frames for a node: {}", flood(&alone, &user, 2_000_000)?);
        let recovering = node(&runtime, &url, Some(RecoveryLimits::default()))?;
        println!("the same, kept for recovery too: {}", flood(&recovering, &user, 200_000)?);
        drop(receiver.stdin.take());
        receiver.wait()?;
    }
    if asks("latency") {
        let other = node(&runtime, &url, None)?;
        for rate in [1_000, 50_000] {
            latency(&runtime, &alone, &other, rate, 5)?;
        }
    }
    Ok(())
}
