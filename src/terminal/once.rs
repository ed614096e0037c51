//! `tabcast top --once`: how the node is, as plain text.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::time::Duration;

use tokio::sync::mpsc;

use super::connection::{Stream, UPDATES_MAX, Update};
use super::status::{Ended, Status};
use super::text::{bytes, count, micros, percent, rate, seconds, time_of_day};
use super::view::View;
use super::{Failure, Top, tail};

/// How long a first frame may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for one frame and prints it.
pub(super) fn run(top: &Top) -> Result<(), Failure> {
    let stream = Stream::new(&top.node, "status", PATIENCE)?;
    let url = || super::text::clean(&top.node.url);
    let status = tail::runtime()?.block_on(first(&stream)).map_err(|update| match update {
        Some(Update::Refused(reason)) => Failure::Refused { url: url(), reason },
        Some(Update::Lost { reason, .. }) => Failure::Silent { url: url(), reason },
        _ => Failure::Silent { url: url(), reason: format!("no status within {} s", PATIENCE.as_secs()) },
    })?;
    let mut view = View::new(&top.user);
    view.status = Some(status);
    let mut out = String::new();
    // A `String` refuses nothing.
    let _ = write_view(&mut out, &view);
    Ok(io::stdout().lock().write_all(out.as_bytes())?)
}

/// The first frame, or what happened instead: a node that is not there now is not waited for.
async fn first(stream: &Stream) -> Result<Status, Option<Update>> {
    let (sender, mut updates) = mpsc::channel(UPDATES_MAX);
    let find = async {
        loop {
            match updates.recv().await {
                Some(Update::Event(event)) => match Status::read(&event) {
                    Ok(Some(status)) => return Ok(status),
                    Ok(None) => {}
                    Err(error) => {
                        let (reason, pause) = (format!("a frame that cannot be read: {error}"), Duration::ZERO);
                        return Err(Some(Update::Lost { reason, pause }));
                    }
                },
                Some(Update::Open) => {}
                other => return Err(other),
            }
        }
    };
    // Its last word is still to be found when it is over.
    let follow = async {
        stream.follow(sender).await;
        std::future::pending().await
    };
    tokio::select! {
        found = find => found,
        never = follow => never,
        () = tokio::time::sleep(PATIENCE) => Err(None),
    }
}

fn write_view(out: &mut String, view: &View) -> fmt::Result {
    let Some(status) = &view.status else { return Ok(()) };
    let (health, _) = status.health();
    let Status { node, version, mode, sessions, rates, latency_micros: latency, queues, process, .. } = status;
    writeln!(out, "tabcast {version}  node {node}  {mode}  up {}  {health}", seconds(status.uptime_seconds))?;
    writeln!(
        out,
        "sessions    {} of {}, {} users, {} rooms, {} answers",
        count(sessions.now),
        count(sessions.max),
        count(sessions.users),
        count(sessions.rooms),
        count(sessions.streams)
    )?;
    let [publishes, deliveries, writes] = [rates.publishes, rates.deliveries, rates.writes].map(rate);
    writeln!(
        out,
        "a second    {deliveries} deliveries, {publishes} publishes, {writes} writes, {} out, {} in",
        bytes(rates.written_bytes),
        bytes(rates.read_bytes)
    )?;
    let [inbound, handshakes, ended, refused] =
        [rates.inbound_messages, rates.handshakes, rates.ended, rates.refused].map(rate);
    writeln!(out, "            {inbound} messages in, {handshakes} handshakes, {ended} ended, {refused} refused")?;
    let or_none = |micros_of: Option<f64>| micros_of.map_or_else(|| "none".to_owned(), micros);
    writeln!(
        out,
        "latency     p50 {}, p99 {}, {} frames",
        or_none(latency.p50),
        or_none(latency.p99),
        count(latency.count)
    )?;
    writeln!(
        out,
        "queues      {} frames, {} of {}; inboxes {} posts, {}",
        count(queues.frames),
        bytes(queues.bytes),
        bytes(queues.budget_bytes),
        count(queues.inbox_posts),
        bytes(queues.inbox_bytes)
    )?;
    let unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
    writeln!(
        out,
        "process     {} of memory, CPU {}, {} of {} files",
        unknown(process.resident_bytes.map(bytes)),
        unknown(process.cpu_share.map(percent)),
        unknown(process.open_files.map(count)),
        unknown(process.open_files_max.map(count))
    )?;
    for (number, shard) in status.shards.iter().enumerate() {
        writeln!(
            out,
            "shard {number:<5} {} sessions, busy {}, queues {}, inbox {} posts",
            count(shard.sessions),
            percent(shard.busy_share),
            bytes(shard.queue_bytes),
            count(shard.inbox_posts)
        )?;
    }
    writeln!(out, "redis       {}", redis(status))?;
    let refusals = status.refusals.iter().filter(|(_, number)| **number > 0.0);
    let refusals: Vec<String> = refusals.map(|(name, number)| format!("{name} {}", count(*number))).collect();
    if !refusals.is_empty() {
        writeln!(out, "refused     {} since the start", refusals.join(", "))?;
    }
    write_users_and_endings(out, view)
}

fn write_users_and_endings(out: &mut String, view: &View) -> fmt::Result {
    writeln!(out, "top users")?;
    for user in view.users() {
        let (tabs, frames, waiting) = (count(user.tabs), count(user.queue_frames), bytes(user.queue_bytes));
        writeln!(out, "  {}: {tabs} tabs, {frames} frames and {waiting} waiting", user.user_id)?;
    }
    writeln!(out, "last disconnects, newest first, in UTC")?;
    for ended in view.endings() {
        writeln!(out, "  {} {}: {}", time_of_day(ended.at), ended.user(), why(ended))?;
        if let Some(detail) = &ended.detail {
            writeln!(out, "           {detail}")?;
        }
    }
    Ok(())
}

/// Redis in one line.
pub(super) fn redis(status: &Status) -> String {
    let Some(redis) = &status.redis else { return "none".to_owned() };
    let reason = redis.reason.as_deref().map_or_else(String::new, |reason| format!(": {reason}"));
    let mut line = if redis.healthy { "healthy".to_owned() } else { format!("NOT HEALTHY{reason}") };
    let parts = [
        redis.canary_micros.map(|time| format!("canary {}", micros(time))),
        redis.nodes.map(|nodes| format!("{} nodes", count(nodes))),
        redis.spool_bytes.map(|spool| format!("spool {}", bytes(spool))),
    ];
    for part in parts.into_iter().flatten() {
        line.push_str(", ");
        line.push_str(&part);
    }
    line
}

/// Why a session ended, with everything but the sentence.
pub(super) fn why(ended: &Ended) -> String {
    let mut line = ended.reason.to_string();
    if let Some(code) = ended.code {
        line = format!("{line} ({code})");
    }
    let comes_back = |may: bool| if may { "its page comes back" } else { "its page stays away" }.to_owned();
    let queue = match (ended.queue_frames, ended.queue_bytes) {
        (None, None) => None,
        (frames, waiting) => {
            Some(format!("{} frames and {} waited", count(frames.unwrap_or(0.0)), bytes(waiting.unwrap_or(0.0))))
        }
    };
    let parts = [
        ended.wire.as_deref().map(str::to_owned),
        ended.connected_seconds.map(|time| format!("after {}", seconds(time))),
        queue,
        ended.retryable.map(comes_back),
        ended.session.as_deref().map(|session| format!("session {session}")),
    ];
    for part in parts.into_iter().flatten() {
        line.push_str(", ");
        line.push_str(&part);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::super::status::tests::WHOLE;
    use super::super::view::tests::view;
    use super::*;

    fn text(event: &str, filter: &str) -> String {
        let (mut view, _) = view(&[event]);
        view.filter = filter.to_owned();
        let mut out = String::new();
        write_view(&mut out, &view).unwrap();
        out
    }

    #[test]
    fn it_says_why_ann_was_cut() {
        let out = text(WHOLE, "ann");
        for line in [
            "tabcast 0.1.0  node n1  development  up 12.5 s  READY",
            "sessions    5 of 10,000, 3 users, 1 rooms, 0 answers",
            "a second    5.0 deliveries, 1.0 publishes, 5.0 writes, 1.2 KiB out, 10 B in",
            "latency     p50 40 µs, p99 120 µs, 5 frames",
            "queues      7 frames, 2.0 KiB of 256 MiB; inboxes 0 posts, 0 B",
            "shard 1     3 sessions, busy 50 %, queues 2.0 KiB, inbox 4 posts",
            "redis       healthy, canary 140 µs, 2 nodes, spool 0 B",
            "refused     tabs 3 since the start",
            "  ann: 2 tabs, 7 frames and 2.0 KiB waiting",
            "  23:59:59 ann: slow consumer (4008), websocket, after 12.0 s, 1,024 frames and 1.0 MiB waited, its page comes \
             back, session 123",
            "           its queue held 1,024 frames, 1,048,576 bytes; the limit is 1,024 frames",
        ] {
            assert!(out.lines().any(|shown| shown == line), "{line}\n{out}");
        }
        assert!(!out.contains("bob"));
        assert!(text(WHOLE, "").contains("bob: kicked (4003)"));
    }

    #[test]
    fn what_is_not_known_is_said_and_nothing_hostile_is_printed() {
        let out = text(r#"{"type":"status","health":{"ready":false,"reason":"redis is away"}}"#, "");
        assert!(
            out.contains("NOT READY: redis is away") && out.contains("p99 none") && out.contains("redis       none")
        );
        let hostile = WHOLE.replace("ann", r"\u001b[2J\u001b]0;x\u0007\nann");
        let out = text(&hostile, "");
        assert!(out.contains("\\u{1b}[2J") && !out.chars().any(|c| c.is_control() && c != '\n'), "{out}");
    }
}
