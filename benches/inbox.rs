//! What does it cost to hand a frame to another thread? Nanoseconds a post, the publisher's own.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use tabcast::fanout::hub::Hub;
use tabcast::fanout::session::Identity;
use tabcast::fanout::shard::{Opening, Shard, Wire};
use tabcast::id::{ChannelId, UserId};
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::Frame;
use tabcast::proto::limits::{HubLimits, SessionLimits};

fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "a bench is an edge")]
    Instant::now()
}

/// A hub; its shards are made by `shard`, where they are to live.
fn hub(shards: usize) -> Arc<Hub> {
    Hub::new(shards, &HubLimits::default(), &SessionLimits::default())
}

/// A shard with one tab of the user `u`, which takes nothing: what it is given is coalesced.
fn shard(hub: &Arc<Hub>, index: u16) -> Shard {
    let mut shard = Shard::new(Arc::clone(hub), index, SessionLimits::default(), usize::MAX, now());
    let identity = Identity::new(UserId::parse("u").expect("a legal id"), Timestamp::from_micros(1));
    shard.open(Opening::new(identity, Wire::WebSocket), |_| None).expect("there is room");
    shard
}

fn typing() -> (ChannelId, Frame) {
    (ChannelId::parse("u").expect("a legal id"), Frame::encode(&Event::Typing { active: true }))
}

fn awake(c: &mut Criterion) {
    const POSTS: u32 = 64;
    let (channel, frame) = typing();
    let mut group = c.benchmark_group("how many ns does a post take, with its taking, if the consumer is awake");
    for count in [1, 2] {
        let hub = hub(count);
        let mut shards: Vec<_> =
            (0..count).map(|index| shard(&hub, u16::try_from(index).unwrap_or_default())).collect();
        let start = now();
        group.bench_function(format!("to {count} of our shards"), |b| {
            b.iter_custom(|posts| {
                let begin = now();
                for _ in 0..posts.div_ceil(u64::from(POSTS)) {
                    for _ in 0..POSTS {
                        hub.post(&channel, &frame).expect("there is room");
                    }
                    for shard in &mut shards {
                        shard.handle_inbox(start);
                    }
                }
                begin.elapsed()
            });
        });
    }
    group.bench_function("to a tokio mpsc channel", |b| {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(1024);
        b.iter_custom(|posts| {
            let begin = now();
            for _ in 0..posts.div_ceil(u64::from(POSTS)) {
                for _ in 0..POSTS {
                    sender.try_send((channel.clone(), frame.clone())).expect("there is room");
                }
                while receiver.try_recv().is_ok() {}
            }
            begin.elapsed()
        });
    });
    group.finish();
}

/// A consumer on a thread and runtime of its own. `count` says how often it went to sleep.
struct Sleeper {
    sleeps: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sleeper {
    fn spawn(poll: impl FnOnce() -> Box<dyn FnMut(&mut std::task::Context<'_>)> + Send + 'static) -> Self {
        let (sleeps, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stop) = (Arc::clone(&sleeps), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let mut poll = poll();
            runtime.block_on(poll_fn(|context| {
                poll(context);
                counted.fetch_add(1, Ordering::Release);
                if stop.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
            }));
        });
        Self { sleeps, over, thread: Some(thread) }
    }

    fn wait(&self, sleeps: usize) {
        while self.sleeps.load(Ordering::Acquire) < sleeps {
            std::thread::yield_now();
        }
        // From the future's return to the runtime's own sleep.
        std::thread::sleep(Duration::from_micros(50));
    }

    fn stop(mut self, ring: impl Fn()) {
        self.over.store(true, Ordering::Release);
        ring();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it ends");
        }
    }
}

fn time_rings(posts: u64, sleepers: &[Sleeper], post: impl Fn()) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..posts {
        let before: Vec<_> = sleepers.iter().map(|sleeper| sleeper.sleeps.load(Ordering::Acquire)).collect();
        let begin = now();
        post();
        spent += begin.elapsed();
        sleepers.iter().zip(before).for_each(|(sleeper, before)| sleeper.wait(before + 1));
    }
    spent
}

fn parked(c: &mut Criterion) {
    let (channel, frame) = typing();
    let mut group = c.benchmark_group("how many ns does a post take if the consumer's thread sleeps");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for count in [1_u16, 2] {
        let hub = hub(usize::from(count));
        let sleeper = |index| {
            let hub = Arc::clone(&hub);
            Sleeper::spawn(move || {
                let (mut shard, start) = (shard(&hub, index), now());
                Box::new(move |context| while shard.handle_inbox(start) || !shard.park(context.waker()) {})
            })
        };
        let sleepers: Vec<_> = (0..count).map(sleeper).collect();
        sleepers.iter().for_each(|sleeper| sleeper.wait(1));
        let post = || {
            hub.post(&channel, &frame).expect("there is room");
        };
        group.bench_function(format!("to {count} of our shards"), |b| {
            b.iter_custom(|posts| time_rings(posts, &sleepers, post));
        });
        sleepers.into_iter().for_each(|sleeper| sleeper.stop(post));
    }
    group.bench_function("to a tokio mpsc channel", |b| {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(1024);
        let sleeper = Sleeper::spawn(move || Box::new(move |context| while receiver.poll_recv(context).is_ready() {}));
        sleeper.wait(1);
        let sleepers = [sleeper];
        let post = || drop(sender.try_send((channel.clone(), frame.clone())));
        b.iter_custom(|posts| time_rings(posts, &sleepers, post));
        sleepers.into_iter().for_each(|sleeper| sleeper.stop(post));
    });
    group.finish();
}

criterion_group!(benches, awake, parked);
criterion_main!(benches);
