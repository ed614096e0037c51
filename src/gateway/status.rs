//! How this node is, once a second, for whoever watches: what `/status` shows and `GET /events?watch=status` carries.
//!
//! It is made on the control threads from what is counted anyway, and from what shards tell when they are asked. While
//! nobody watches, only the counters are read, once a second, so that the first rates are of a second too.

mod ended;
mod sample;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use crate::driver::clock;
use crate::fanout::shard::{Ended, Report, Waiting};
use crate::gateway::edge::Gateway;
use crate::gateway::metrics_text::process::Process;
use crate::gateway::status::ended::Endings;
use crate::gateway::status::sample::{Sample, rounded};
use crate::id::UserId;
use crate::metrics::{HandshakeOutcome, Label, Metrics, Refusal};
use crate::platform::adapter::Outlet;
use crate::proto::event::Timestamp;
use crate::proto::frame::{self, Frame, Kind};

/// How often somebody who watches hears of it.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long shards have for an answer; what comes later is in the next frame.
const PATIENCE: Duration = Duration::from_millis(200);
/// Users that are shown.
const TOP_USERS_MAX: usize = 10;
/// Users among whom those with the most tabs are found.
const LOOKED_AT_MAX: usize = 10_000;

/// Tells those who watch how the node is, for as long as it runs. `address` is where it listens.
///
/// # Cancel safety
/// Dropping it ends what is told.
pub(crate) async fn run(gateway: Arc<Gateway>, address: SocketAddr) {
    let mut status = Status::new(gateway, address);
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let sample = Sample::take(status.gateway.engine.metrics(), clock::now());
        if status.gateway.engine.hub().is_status_watched() {
            let frame = status.frame(&sample).await;
            status.gateway.engine.hub().show_status(&frame);
        }
        status.before = sample;
    }
}

struct Status {
    gateway: Arc<Gateway>,
    /// What people call this node: its machine, and the port that it listens at.
    node: String,
    started: Instant,
    begun: Timestamp,
    before: Sample,
    reports: Reports,
    endings: Endings,
}

impl Status {
    fn new(gateway: Arc<Gateway>, address: SocketAddr) -> Self {
        let started = clock::now();
        let begun = gateway.engine.now();
        let metrics = gateway.engine.metrics();
        let before = Sample::take(metrics, started);
        let reports = Reports::new(metrics.shards().count());
        let node = format!("{}:{}", rustix::system::uname().nodename().to_string_lossy(), address.port());
        let endings = Endings::new(&gateway.settings.load());
        Self { node, started, begun, before, reports, endings, gateway }
    }

    async fn frame(&mut self, sample: &Sample) -> Frame {
        let (waiting, ended) = self.reports.gather(&self.gateway).await;
        let now = self.gateway.engine.now();
        self.endings.explain_by(&self.gateway.settings.load());
        self.endings.update(ended, now);
        let metrics = self.gateway.engine.metrics();
        let unhealthy = self.gateway.engine.broker().health().err().map(|unhealthy| unhealthy.to_string());
        let is_development = self.gateway.settings.load().is_development();
        let status = json!({
            "type": "status",
            "node": self.node,
            "version": env!("CARGO_PKG_VERSION"),
            "mode": if is_development { "development" } else { "token" },
            "timestamp": now.as_seconds(),
            "uptime_seconds": rounded((clock::now() - self.started).as_secs_f64()),
            "interval_seconds": sample.seconds_since(&self.before),
            "health": self.health(unhealthy.as_deref()),
            "sessions": self.sessions(),
            "rates": sample.rates(&self.before),
            "latency_micros": sample.latency(&self.before),
            "queues": self.queues(),
            "process": self.process(sample),
            "shards": sample.shards(metrics, &self.before),
            "redis": self.redis(unhealthy.as_deref()),
            "top_users": self.top_users(waiting),
            "ended": self.endings.newest(),
            "ended_total": ended_total(metrics),
            "refusals": refusals(metrics),
        });
        Frame::relay(Kind::Status, None, None, &status.to_string())
    }

    fn health(&self, unhealthy: Option<&str>) -> Value {
        let draining = self.gateway.is_draining();
        let reason = if draining { Some("this node is shutting down") } else { unhealthy };
        json!({ "ready": reason.is_none(), "draining": draining, "reason": reason })
    }

    fn sessions(&self) -> Value {
        let hub = self.gateway.engine.hub();
        // Who only watches is no session of anybody's.
        let held = self.gateway.engine.metrics().sum(|shard| &shard.sessions);
        json!({
            "now": held.saturating_sub(hub.watcher_count() as u64),
            "max": self.gateway.settings.load().tabs_max,
            "users": hub.registry().user_count(),
            "rooms": hub.room_count(),
            "streams": hub.stream_count(),
            "watchers": hub.watcher_count(),
        })
    }

    fn queues(&self) -> Value {
        let metrics = self.gateway.engine.metrics();
        json!({
            "frames": metrics.sum(|shard| &shard.queue_frames),
            "bytes": metrics.sum(|shard| &shard.queue_bytes),
            // What counts against the budget: each frame once, and what queues cost beside them.
            "budget_used_bytes": frame::live_bytes() as u64 + metrics.sum(|shard| &shard.queue_entry_bytes),
            "budget_bytes": self.gateway.settings.load().bytes_budget,
            "inbox_posts": metrics.sum(|shard| &shard.inbox_posts),
            "inbox_bytes": metrics.sum(|shard| &shard.inbox_bytes),
        })
    }

    fn process(&self, sample: &Sample) -> Value {
        let process = Process::read(self.begun);
        json!({
            "resident_bytes": process.resident_bytes,
            "cpu_share": sample.cpu_share(&self.before),
            "open_files": process.open_files,
            "open_files_max": process.open_files_max,
        })
    }

    /// Null for a node on its own.
    fn redis(&self, unhealthy: Option<&str>) -> Value {
        let Some(metrics) = self.gateway.engine.broker().metrics() else { return Value::Null };
        json!({
            "healthy": unhealthy.is_none(),
            "reason": unhealthy,
            "canary_micros": metrics.canary_micros.value(),
            "canary_age_seconds": rounded(metrics.canary_age(clock::now()).as_secs_f64()),
            "nodes": metrics.nodes.value(),
            "spool_bytes": metrics.spool_bytes.value(),
        })
    }

    /// By what waits for them, then by their tabs. The latter are looked for among some thousand users.
    fn top_users(&self, waiting: Vec<Waiting>) -> Value {
        let registry = self.gateway.engine.hub().registry();
        let mut users = by_user(waiting);
        users.truncate(TOP_USERS_MAX);
        for (user, _) in registry.with_most_tabs(TOP_USERS_MAX, LOOKED_AT_MAX) {
            if users.len() < TOP_USERS_MAX && users.iter().all(|other| other.user != user) {
                users.push(Waiting { user, queue_frames: 0, queue_bytes: 0 });
            }
        }
        let row = |waiting: Waiting| {
            let tabs = registry.get_sessions(&waiting.user).map_or(0, |sessions| sessions.len());
            json!({
                "user_id": waiting.user.as_str(), "tabs": tabs,
                "queue_frames": waiting.queue_frames, "queue_bytes": waiting.queue_bytes,
            })
        };
        users.into_iter().map(row).collect()
    }
}

/// What waits for each user in all sessions, the most first.
fn by_user(waiting: Vec<Waiting>) -> Vec<Waiting> {
    let mut users: Vec<Waiting> = Vec::new();
    for session in waiting {
        match users.iter_mut().find(|other| other.user == session.user) {
            Some(user) => {
                user.queue_frames += session.queue_frames;
                user.queue_bytes += session.queue_bytes;
            }
            None => users.push(session),
        }
    }
    users.sort_by_key(|user: &Waiting| std::cmp::Reverse(user.queue_bytes));
    users
}

/// Sessions that ended since the start, by reason; those that there are.
fn ended_total(metrics: &Metrics) -> Value {
    totals(|reason| metrics.sum(|shard| shard.ended_sessions.of(reason)))
}

fn totals<L: Label>(count: impl Fn(L) -> u64) -> Value {
    let count = |label: &L| Some((label.name().to_owned(), count(*label).into())).filter(|(_, count)| *count != 0);
    Value::Object(L::VALUES.iter().filter_map(count).collect())
}

/// Why something was not let in since the start; what there was of it.
fn refusals(metrics: &Metrics) -> Value {
    let engine = &metrics.engine;
    let mut refusals = totals(|refusal: Refusal| engine.refusals.of(refusal).value());
    for outcome in sample::REFUSED {
        let count = engine.handshakes.of(outcome).value();
        if count > 0 {
            refusals[HandshakeOutcome::name(outcome)] = count.into();
        }
    }
    refusals
}

/// What shards were asked and have told.
struct Reports {
    asked: Vec<Option<oneshot::Receiver<Report>>>,
}

impl Reports {
    fn new(shards: usize) -> Self {
        Self { asked: (0..shards).map(|_| None).collect() }
    }

    /// Asks each shard that owes no answer, and takes the answers that come in time.
    async fn gather(&mut self, gateway: &Gateway) -> (Vec<Waiting>, Vec<Ended>) {
        for (shard, asked) in (0u16..).zip(&mut self.asked) {
            if asked.is_none() {
                let (answer, told) = oneshot::channel();
                // Nobody may want it any more.
                let answer = Box::new(move |report| drop(answer.send(report)));
                gateway.engine.hub().ask_report(shard, answer);
                *asked = Some(told);
            }
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let (mut waiting, mut ended) = (Vec::new(), Vec::new());
        for asked in &mut self.asked {
            let Some(told) = asked else { continue };
            match tokio::time::timeout_at(deadline, told).await {
                Ok(Ok(report)) => {
                    waiting.extend(report.waiting);
                    ended.extend(report.ended);
                    *asked = None;
                }
                // The shard is gone.
                Ok(Err(_)) => *asked = None,
                // It is busy: its answer is for the next frame.
                Err(_) => {}
            }
        }
        (waiting, ended)
    }
}

/// For those who ask who a session was.
fn name_of(user: Option<&UserId>) -> Value {
    user.map_or(Value::Null, |user| user.as_str().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_user_is_the_sum_of_its_tabs_the_most_first() {
        let waiting = |user: &str, queue_frames, queue_bytes| Waiting {
            user: UserId::parse(user).unwrap(),
            queue_frames,
            queue_bytes,
        };
        let sums = by_user(vec![waiting("a", 1, 100), waiting("b", 2, 150), waiting("a", 1, 100)]);
        assert_eq!(sums, [waiting("a", 2, 200), waiting("b", 2, 150)]);
    }

    #[test]
    fn only_what_there_was_is_in_the_totals() {
        let metrics = Metrics::new(1);
        assert_eq!((refusals(&metrics), ended_total(&metrics)), (json!({}), json!({})));
        metrics.engine.refusals.of(Refusal::TabsOfUser).add(2);
        metrics.engine.handshakes.of(HandshakeOutcome::Unauthorized).increment();
        metrics.engine.handshakes.of(HandshakeOutcome::Events).increment();
        metrics.shard(0).ended_sessions.of(crate::proto::disconnect::Disconnect::SlowConsumer).increment();
        assert_eq!(refusals(&metrics), json!({ "tabs_of_user": 2, "unauthorized": 1 }));
        assert_eq!(ended_total(&metrics), json!({ "slow consumer": 1 }));
    }
}
