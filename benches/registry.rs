//! What do connecting, disconnecting and looking a user up cost? Nanoseconds each.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tabcast::fanout::hub::Hub;
use tabcast::fanout::session::Identity;
use tabcast::fanout::shard::{Opening, Shard, Wire};
use tabcast::id::UserId;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::event::Timestamp;
use tabcast::proto::limits::{HubLimits, SessionLimits};

fn opening(user: &UserId) -> Opening {
    let identity = Identity::new(user.clone(), Timestamp::from_micros(1));
    Opening::new(identity, Wire::WebSocket)
}

fn world(users: usize, tabs: usize) -> (Arc<Hub>, Shard, Vec<UserId>) {
    #[expect(clippy::disallowed_methods, reason = "a bench is an edge")]
    let start = Instant::now();
    let limits = SessionLimits::default();
    let hub = Hub::new(1, &HubLimits::default(), &limits);
    let mut shard = Shard::new(Arc::clone(&hub), 0, limits, usize::MAX, start);
    let users: Vec<_> = (0..users).map(|n| UserId::parse(&format!("user-{n}")).expect("a legal id")).collect();
    for _ in 0..tabs {
        for user in &users {
            shard.open(opening(user), |_| None).expect("there is room");
        }
    }
    (hub, shard, users)
}

fn registry(c: &mut Criterion) {
    let mut group = c.benchmark_group("how many ns does it take");
    for (users, tabs) in [(1_000, 1), (1_000, 8), (1_000_000, 1), (125_000, 8)] {
        let (hub, mut shard, names) = world(users, tabs);
        // A stride that visits users in no order of memory.
        let mut next = (0..).map(|n: usize| n.wrapping_mul(0x9e37_79b9) % users);
        group.bench_function(format!("to look up one of {users} users with {tabs} tabs"), |b| {
            let mut pick = || next.next().unwrap_or_default();
            b.iter_batched(
                || &names[pick()],
                |user| black_box(hub.registry().get_sessions(user)),
                BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("to connect and disconnect beside {users} users with {tabs} tabs"), |b| {
            let mut pick = || next.next().unwrap_or_default();
            b.iter_batched(
                || opening(&names[pick()]),
                |opening| {
                    let slot = shard.open(opening, |_| None).expect("there is room").slot();
                    shard.handle_lost(slot, Disconnect::ConnectionLost);
                    shard.poll_disconnect()
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, registry);
criterion_main!(benches);
