//! What do connecting, disconnecting and looking a user up cost? Nanoseconds each.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tabcast::fanout::hub::Hub;
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Opening, Shard, Wire};
use tabcast::id::UserId;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::event::Timestamp;
use tabcast::proto::limits::{HubLimits, SessionLimits};

/// Users, and the tabs of each. A million tabs is what fits.
const SIZES: [(usize, usize); 6] = [(1, 1), (1, 8), (1_000, 1), (1_000, 8), (1_000_000, 1), (125_000, 8)];

fn opening(user: &UserId) -> Opening {
    let identity = Identity::new(user.clone(), Timestamp::from_micros(1));
    Opening::new(identity, Wire::WebSocket)
}

struct World {
    hub: Arc<Hub>,
    shard: Shard,
    users: Vec<UserId>,
    /// One of each user's sessions.
    sessions: Vec<SessionRef>,
}

impl World {
    fn new(users: usize, tabs: usize) -> Self {
        #[expect(clippy::disallowed_methods, reason = "a bench is an edge")]
        let start = Instant::now();
        let limits = SessionLimits::default();
        let hub = Hub::new(1, &HubLimits::default(), &limits);
        let mut shard = Shard::new(Arc::clone(&hub), 0, limits, usize::MAX, start);
        let users: Vec<_> = (0..users).map(|n| UserId::parse(&format!("user-{n}")).expect("a legal id")).collect();
        let mut sessions = Vec::new();
        for _ in 0..tabs {
            let open = |user| shard.open(opening(user), |_| None).expect("there is room").slot();
            let slots: Vec<_> = users.iter().map(open).collect();
            sessions = slots.into_iter().filter_map(|slot| shard.session(slot)).collect();
        }
        Self { hub, shard, users, sessions }
    }
}

/// A stride that visits users in no order of memory.
fn strides(users: usize) -> impl FnMut() -> usize {
    let mut next = 0_usize;
    move || {
        next = next.wrapping_add(0x9e37_79b9);
        next % users
    }
}

fn name(users: usize, tabs: usize) -> String {
    format!("of {users} users with {tabs} tabs")
}

fn lookups(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many ns does it take to look a user up");
    for (users, tabs) in SIZES {
        let world = World::new(users, tabs);
        let mut pick = strides(users);
        group.bench_function(format!("{}, by ours", name(users, tabs)), |b| {
            b.iter(|| black_box(world.hub.registry().get_sessions(&world.users[pick()])));
        });
        let list = |user: &UserId| (user.clone(), Arc::<[SessionRef]>::from(vec![world.sessions[0].clone(); tabs]));
        let map: HashMap<_, _> = world.users.iter().map(list).collect();
        let map = RwLock::new(map);
        group.bench_function(format!("{}, in a HashMap behind a RwLock", name(users, tabs)), |b| {
            b.iter(|| {
                let map = map.read().unwrap_or_else(PoisonError::into_inner);
                black_box(map.get(&world.users[pick()]).cloned())
            });
        });
    }
    group.finish();
}

/// The registry's own part: one of a user's sessions goes, and comes.
fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many ns does it take to take a session out of the registry and put it in");
    for (users, tabs) in SIZES {
        let world = World::new(users, tabs);
        let mut pick = strides(users);
        group.bench_function(name(users, tabs), |b| {
            b.iter(|| {
                let session = &world.sessions[pick()];
                assert!(world.hub.registry().disconnect(session));
                world.hub.registry().connect(session.clone()).expect("there is room");
            });
        });
    }
    group.finish();
}

/// All of it: a slot, who it is, timers, the registry; and back.
fn sessions(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many ns does it take to open a session and to lose it");
    for (users, tabs) in SIZES {
        let mut world = World::new(users, tabs);
        let mut pick = strides(users);
        group.bench_function(format!("beside those {}", name(users, tabs)), |b| {
            b.iter_batched(
                || opening(&world.users[pick()]),
                |opening| {
                    let slot = world.shard.open(opening, |_| None).expect("there is room").slot();
                    world.shard.handle_lost(slot, Disconnect::ConnectionLost);
                    world.shard.poll_disconnect()
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500));
    targets = lookups, changes, sessions
}
criterion_main!(benches);
