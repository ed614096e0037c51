//! `tabcast bench`: a load generator that believes nothing. It opens clients, publishes, and checks every delivery.
//!
//! ```text
//!            main: phases, /proc, intervals of latencies ──► report ─► table, JSON, picture
//!              │                    ▲ counts, once a turn
//!              ▼                    │
//!  clients-0 ─ publishers ─► server ─► clients (48 bytes each) ─► frames ─► records ─► lanes
//!  clients-1 …                     └─► a poll, a buffer and, for many, a file table a thread
//! ```
//!
//! - A message says when it was to be sent and which one it is (`record`), so that a client finds both in any
//!   server's frame, and knows what it did not get (`lanes`). What the server spends is read by its process id.
//! - No thread waits for another, none allocates per delivery, and nothing that threads share is touched per delivery.
//! - Latency is from the moment at which a message *was to be* sent: a server that holds up the publishers does not get
//!   better figures for it.
//! - More clients than one file table holds are spread over threads with tables of their own, in the order that
//!   [`driver::start`](crate::driver::start) explains: every poll and waker is made before, every socket after.
//!
//! # What out of order means
//! One publisher sends its next message when the last one was answered, so its messages have an order, channel by
//! channel. Messages of several publishers that are under way at the same time have none. A delivery is out of order if
//! a later one of the same publisher and channel was there before it, whatever the number of publishers.

mod arguments;
mod chart;
mod client;
mod clock;
mod http;
mod interval_log;
mod lanes;
mod load;
mod plan;
mod process;
mod publisher;
mod reader;
mod record;
mod report;
mod run;
mod self_test;
mod shared;
mod socket;
mod svg;
mod template;
mod tls;
mod websocket;

pub use arguments::{Arguments, BadArgument, Task};
pub use report::{Latency, LatencyPoint, Report};

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use interval_log::IntervalLog;

/// Everything was delivered.
pub const CLEAN: u8 = 0;
/// Something was lost, doubled, out of order or stalled; or could not be measured at all.
pub const UNCLEAN: u8 = 1;
/// The arguments cannot be.
pub const BAD_ARGUMENTS: u8 = 2;

/// Does what the arguments say, and returns the exit code.
pub fn main(arguments: &Arguments) -> u8 {
    match go(arguments) {
        Ok(true) => CLEAN,
        Ok(false) => UNCLEAN,
        Err(error) => {
            // Where standard error is gone, the exit code still tells.
            let _ = writeln!(io::stderr(), "tabcast bench: {error}");
            if error.is::<BadArgument>() { BAD_ARGUMENTS } else { UNCLEAN }
        }
    }
}

fn go(arguments: &Arguments) -> Result<bool, Box<dyn std::error::Error>> {
    if let Some(Task::Chart { files, svg }) = &arguments.task {
        return draw(files, svg).map(|()| true);
    }
    let open_files_max = raise_open_files();
    if arguments.self_test {
        let reports = self_test::run(arguments, open_files_max)?;
        return finish(arguments, &reports);
    }
    let plans = arguments.plans(open_files_max)?;
    if let Some(cpu) = arguments.pin {
        pin(cpu)?;
    }
    let mut log = arguments.histogram.as_deref().map(IntervalLog::create).transpose()?;
    let mut reports = Vec::with_capacity(plans.len());
    for plan in &plans {
        if let Some(log) = &mut log {
            log.begin(&format!("{}-{}", plan.label, plan.mix.tabs));
        }
        let report = run::run(plan, log.as_mut())?;
        io::stdout().write_all(report.table().as_bytes())?;
        reports.push(report);
    }
    finish(arguments, &reports)
}

/// Writes what was asked for, and says whether everything was delivered.
fn finish(arguments: &Arguments, reports: &[Report]) -> Result<bool, Box<dyn std::error::Error>> {
    if let Some(path) = &arguments.json {
        write_json(path, reports)?;
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, chart::of(reports).to_svg())?;
    }
    Ok(reports.iter().all(Report::is_clean))
}

/// What `--json` wrote.
#[derive(Debug, serde::Deserialize)]
struct Written {
    runs: Vec<Report>,
}

/// Draws what several servers cost.
fn draw(files: &[PathBuf], svg: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut reports = Vec::new();
    for file in files {
        let bad = |error: &dyn std::fmt::Display| BadArgument {
            flag: "chart",
            reason: format!("{}: {error}", file.display()),
        };
        let text = std::fs::read_to_string(file).map_err(|error| bad(&error))?;
        let written: Written = serde_json::from_str(&text).map_err(|error| bad(&error))?;
        reports.extend(written.runs);
    }
    let reason = "no run has the server's CPU: measure with --pid".to_owned();
    let chart = chart::cost(&reports).ok_or(BadArgument { flag: "chart", reason })?;
    Ok(std::fs::write(svg, chart.to_svg())?)
}

fn write_json(path: &Path, reports: &[Report]) -> io::Result<()> {
    let json = serde_json::json!({ "tabcast_version": env!("CARGO_PKG_VERSION"), "runs": reports });
    std::fs::write(path, format!("{json:#}\n"))
}

/// As many descriptors as the hard limit allows; that many.
fn raise_open_files() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let current = getrlimit(Resource::Nofile).current;
    current.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

/// Keeps this thread, and those that it starts, on one processor.
fn pin(cpu: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}
