//! A short tour of everything against a gateway of its own: this very program as a child process, in development mode
//! on a free port, ended with SIGTERM.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};

use super::arguments::Arguments;
use super::clock;
use super::interval_log::IntervalLog;
use super::report::Report;
use super::run;

/// A gateway that has nobody left leaves within that time.
const LEAVES: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The stages: a name, and what `tabcast bench` would be told.
const STAGES: [(&str, &[&str]); 8] = [
    ("idle", &["--idle", "--duration", "1s"]),
    ("one at a time", &["--messages", "100"]),
    ("16 in flight", &["--messages", "320", "--in-flight", "16"]),
    ("open loop", &["--rate", "100", "--duration", "2s"]),
    ("users, in batches", &["--to", "users", "--batch", "50", "--messages", "5000", "--in-flight", "2"]),
    ("event streams", &["--to", "users", "--sse", "--messages", "500", "--in-flight", "4"]),
    ("both, half of each", &["--to", "mixed", "--sse", "0.5", "--messages", "200", "--in-flight", "4"]),
    ("coming and going", &["--rate", "100", "--duration", "2s", "--churn", "100"]),
];

/// Takes the tour and prints its table.
///
/// # Errors
/// If the gateway does not start, or does not leave well.
pub(super) fn run(arguments: &Arguments, open_files_max: usize) -> Result<Vec<Report>, Box<dyn std::error::Error>> {
    let gateway = Gateway::start()?;
    let tabs = arguments.tabs.first().copied().unwrap_or(100).to_string();
    let (address, pid) = (gateway.address.clone(), gateway.child.id().to_string());
    let mut log = arguments.histogram.as_deref().map(IntervalLog::create).transpose()?;
    let mut reports = Vec::with_capacity(STAGES.len());
    for (label, flags) in STAGES {
        let fixed = ["tabcast bench", "--address", &address, "--pid", &pid, "--tabs", &tabs, "--label", label];
        let stage = Arguments::try_parse_from(fixed.iter().chain(flags))?;
        for plan in stage.plans(open_files_max)? {
            if let Some(log) = &mut log {
                log.begin(label);
            }
            reports.push(run::run(&plan, log.as_mut())?);
        }
    }
    let mut out = io::stdout().lock();
    out.write_all(table(&reports).as_bytes())?;
    let status = gateway.stop()?;
    if !status.success() {
        return Err(format!("the gateway ended with {status}").into());
    }
    Ok(reports)
}

fn table(reports: &[Report]) -> String {
    let mut table = format!(
        "{:<20} {:>6} {:>10} {:>10} {:>6} {:>8} {:>8} {:>9} {:>9} {:>11} {:>11}\n",
        "", "tabs", "published", "delivered", "lost", "doubled", "order", "p50 ms", "p99 ms", "server µs", "client µs"
    );
    for report in reports {
        let latency = report.latency.unwrap_or_default();
        let us = |us: Option<f64>| us.map_or_else(String::new, |us| format!("{us:.3}"));
        // Writing to a string does not fail.
        let _ = writeln!(
            table,
            "{:<20} {:>6} {:>10} {:>10} {:>6} {:>8} {:>8} {:>9.3} {:>9.3} {:>11} {:>11}",
            report.label,
            report.open_count,
            report.published_count,
            report.delivered_count,
            report.lost_count,
            report.doubled_count,
            report.misordered_count,
            latency.p50_ms,
            latency.p99_ms,
            us(report.server_cpu_per_delivery_us),
            us(report.client_cpu_per_delivery_us)
        );
        for note in &report.notes {
            let _ = writeln!(table, "  ! {note}");
        }
        if !report.is_clean() {
            let _ = writeln!(table, "  ! not clean: {}", report.table());
        }
    }
    table
}

/// The gateway. Dropped before it has been stopped, it is killed.
struct Gateway {
    child: Child,
    address: String,
}

impl Gateway {
    fn start() -> Result<Self, Box<dyn std::error::Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        // The settings of whoever tests are not this gateway's.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TABCAST_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--listen", "127.0.0.1:0", "--log", "info"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let stderr = child.stderr.take();
        let mut gateway = Self { child, address: String::new() };
        let mut stderr = BufReader::new(stderr.ok_or("the gateway has no standard error")?);
        gateway.address = ready(&mut stderr)?;
        // What it says from now on is of no interest, but it must be able to say it.
        std::thread::Builder::new().name("log".to_owned()).spawn(move || io::copy(&mut stderr, &mut io::sink()))?;
        Ok(gateway)
    }

    /// SIGTERM, and its exit status.
    fn stop(mut self) -> io::Result<ExitStatus> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or(io::ErrorKind::NotFound)?, Signal::TERM)?;
        let deadline = clock::nanos() + clock::nanos_of(LEAVES);
        while clock::nanos() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the gateway does not end"))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address that the gateway says it listens on.
fn ready(stderr: &mut BufReader<ChildStderr>) -> Result<String, Box<dyn std::error::Error>> {
    let mut said = String::new();
    loop {
        let before = said.len();
        if stderr.read_line(&mut said)? == 0 {
            return Err(format!("the gateway does not start: {said}").into());
        }
        if let Some((_, rest)) = said[before..].split_once("ready: http://") {
            return Ok(rest.split('/').next().unwrap_or_default().trim().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_a_legal_plan() {
        for (label, flags) in STAGES {
            let arguments = Arguments::try_parse_from(["bench"].iter().chain(flags)).unwrap();
            assert_eq!(arguments.plans(1024).unwrap().len(), 1, "{label}");
        }
    }
}
