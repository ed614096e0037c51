//! One run: threads are started, clients opened, messages published, and what all that cost is taken at the right
//! moments.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::{Poll, Waker};

use super::clock;
use super::interval_log::IntervalLog;
use super::plan::{Plan, Shape, Target};
use super::process::{self, Cpu};
use super::reader::{Reader, WAKER};
use super::report::{Latency, LatencyPoint, Report};
use super::shared::{Count, Latencies, Phase, Shared, Tally, latencies};
use crate::driver::start::unshare_files;

/// The main thread looks around so often.
const LOOK: Duration = Duration::from_millis(50);
/// Between two progress lines, in nanoseconds.
const PROGRESS_NANOS: u64 = 250_000_000;
/// Between two intervals of the log of latencies, in nanoseconds.
const INTERVAL_NANOS: u64 = 1_000_000_000;
/// What was opened is given so long to come to rest before memory is looked at.
const REST: Duration = Duration::from_millis(700);

/// Runs `plan` to its end.
///
/// # Errors
/// If threads, sockets or the log cannot be had. What the server does wrong is in the report.
pub(super) fn run(plan: &Plan, log: Option<&mut IntervalLog>) -> io::Result<Report> {
    let mut run = Run::start(plan, log)?;
    let result = run.go();
    let tally = run.finish()?;
    result?;
    Ok(run.report(&tally))
}

struct Run<'a> {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<io::Result<Tally>>>,
    log: Option<&'a mut IntervalLog>,
    latencies: Latencies,
    interval_began: u64,
    progress: Progress,
    server: Cpu,
    client: Cpu,
    report: Report,
    before: Tally,
}

impl<'a> Run<'a> {
    /// Polls and wakers are made while all threads share one file table; sockets only after each has its own.
    fn start(plan: &Plan, log: Option<&'a mut IntervalLog>) -> io::Result<Self> {
        let plan = Arc::new(plan.clone());
        let polls: Vec<Poll> = (0..plan.threads).map(|_| Poll::new()).collect::<io::Result<_>>()?;
        let wakers = polls.iter().map(|poll| Waker::new(poll.registry(), WAKER)).collect::<io::Result<_>>()?;
        let shared = Arc::new(Shared::new(&plan, wakers));
        let barrier = Arc::new(Barrier::new(plan.threads));
        let mut run = Self {
            server: Cpu::new(&plan.pids),
            client: Cpu::new(&[std::process::id()]),
            report: about(&plan),
            threads: Vec::with_capacity(plan.threads),
            log,
            latencies: latencies(),
            interval_began: clock::nanos(),
            progress: Progress { is_shown: io::stderr().is_terminal(), last: 0, delivered: 0, p99_ms: 0.0 },
            before: Tally::default(),
            plan,
            shared,
        };
        run.opening(|run| {
            for (thread, poll) in polls.into_iter().enumerate() {
                let reader = Reader::new(Arc::clone(&run.plan), Arc::clone(&run.shared), thread, poll);
                let (barrier, has_own) = (Arc::clone(&barrier), run.plan.own_file_tables);
                let body = move || {
                    barrier.wait();
                    let unshared = if has_own { unshare_files() } else { Ok(()) };
                    barrier.wait();
                    unshared.and_then(|()| reader.run())
                };
                run.threads.push(std::thread::Builder::new().name(format!("clients-{thread}")).spawn(body)?);
            }
            run.wait(|run| run.shared.sum(Count::Opened) + run.shared.sum(Count::Failed) >= run.plan.mix.tabs as u64)
        })?;
        Ok(run)
    }

    /// Opens all clients, and measures what that takes.
    fn opening(&mut self, open: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        let pids = self.plan.pids.clone();
        let here = [std::process::id()];
        let (pss, available, own) = (process::pss_bytes(&pids), process::available_bytes(), process::pss_bytes(&here));
        let (began, cpu) = (clock::nanos(), self.server.nanos());
        open(self)?;
        let seconds = seconds(clock::nanos() - began);
        let spent = self.server.nanos() - cpu;
        self.shared.enter(Phase::Resting);
        std::thread::sleep(REST);
        let opened = self.shared.sum(Count::Opened);
        let each = |bytes: u64, before: u64| ratio(bytes.saturating_sub(before), opened);
        let report = &mut self.report;
        report.open_count = self.shared.sum(Count::Open) + self.shared.sum(Count::SilentOpen);
        report.opening_seconds = seconds;
        report.handshakes_per_second = opened as f64 / seconds;
        report.client_pss_per_connection_bytes = each(process::pss_bytes(&here), own);
        report.system_per_connection_bytes = each(available, process::available_bytes());
        if !pids.is_empty() {
            report.server_cpu_per_handshake_us = Some(ratio(spent, opened) / 1e3);
            report.server_pss_per_connection_bytes = Some(each(process::pss_bytes(&pids), pss));
        }
        Ok(())
    }

    fn go(&mut self) -> io::Result<()> {
        if self.report.open_count == 0 {
            return Ok(());
        }
        match self.plan.shape {
            Shape::Idle { duration } => {
                self.shared.enter(Phase::Holding);
                let end = clock::nanos() + clock::nanos_of(duration);
                self.wait(|_| clock::nanos() >= end)?;
            }
            _ => {
                self.shared.enter(Phase::WarmUp);
                self.wait(|run| run.shared.phase() == Phase::Warm)?;
            }
        }
        self.measure()
    }

    fn measure(&mut self) -> io::Result<()> {
        self.shared.measure_from(clock::nanos());
        self.shared.enter(Phase::Ready);
        self.wait(|run| run.shared.are_ready())?;
        self.before = self.shared.tally();
        self.interval_began = clock::nanos();
        let (server, client) = (self.server.nanos(), self.client.nanos());
        self.shared.enter(Phase::Measuring);
        self.wait(|run| run.shared.phase() == Phase::Measured)?;
        let (server, client) = (self.server.nanos() - server, self.client.nanos() - client);
        let measured = self.shared.measured();
        let delivered = self.shared.tally().since(&self.before).of(Count::Delivered);
        let report = &mut self.report;
        report.is_stalled = measured.is_stalled;
        let probes = [measured.broadcast_nanos, measured.direct_nanos];
        let probed = probes.into_iter().flatten().sum();
        report.measured_seconds = seconds(if probed > 0 { probed } else { measured.nanos });
        report.broadcast_ms = measured.broadcast_nanos.map(|nanos| nanos as f64 / 1e6);
        report.direct_ms = measured.direct_nanos.map(|nanos| nanos as f64 / 1e6);
        if delivered > 0 {
            report.client_cpu_per_delivery_us = Some(ratio(client, delivered) / 1e3);
            if !self.plan.pids.is_empty() {
                report.server_cpu_per_delivery_us = Some(ratio(server, delivered) / 1e3);
            }
        }
        Ok(())
    }

    /// Waits, and does meanwhile what has to be done now and then.
    fn wait(&mut self, is_over: impl Fn(&Self) -> bool) -> io::Result<()> {
        loop {
            if is_over(self) {
                return Ok(());
            }
            if let Some(at) = self.threads.iter().position(JoinHandle::is_finished) {
                // Threads end by themselves only when they cannot go on.
                let ended = self.threads.swap_remove(at).join();
                let ended = ended.unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")));
                return Err(ended.err().unwrap_or_else(|| io::Error::other("a thread has ended")));
            }
            std::thread::park_timeout(LOOK);
            let now = clock::nanos();
            if now - self.interval_began >= INTERVAL_NANOS {
                self.take_latencies(now)?;
            }
            self.progress.show(&self.shared, now);
        }
    }

    /// Everything that was delivered since the last time, as one interval.
    fn take_latencies(&mut self, now: u64) -> io::Result<()> {
        let taken = self.shared.take_latencies();
        if !taken.is_empty() {
            self.progress.p99_ms = milliseconds(taken.value_at_quantile(0.99));
            // Both have the same bounds.
            let _ = self.latencies.add(&taken);
            if let Some(log) = &mut self.log {
                log.write(self.interval_began, now, &taken)?;
            }
        }
        self.interval_began = now;
        Ok(())
    }

    /// Ends the threads, and takes what they counted.
    fn finish(&mut self) -> io::Result<Tally> {
        self.shared.enter(Phase::Finishing);
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")));
            result = result.and(ended.map(drop));
        }
        self.take_latencies(clock::nanos())?;
        self.progress.clear();
        result.map(|()| self.shared.tally())
    }

    fn report(mut self, tally: &Tally) -> Report {
        let measured = tally.since(&self.before);
        let report = &mut self.report;
        report.failed_count = tally.of(Count::Failed);
        report.cut_count = tally.of(Count::Cut);
        report.published_count = measured.of(Count::Published);
        report.requests_count = measured.of(Count::Requests);
        report.refused_count = tally.of(Count::Refused);
        report.unanswered_count = tally.of(Count::Unanswered);
        report.delivered_count = measured.of(Count::Delivered);
        // Whenever it was lost: nothing may be.
        report.lost_count = tally.of(Count::Lost);
        report.expected_count = report.delivered_count + report.lost_count;
        report.doubled_count = tally.of(Count::Doubled);
        report.misordered_count = tally.of(Count::Misordered);
        report.misaddressed_count = tally.of(Count::Misaddressed);
        report.pings_count = tally.of(Count::Pings);
        report.churned_count = tally.of(Count::Left);
        report.silent_cut_count = tally.of(Count::SilentCut);
        report.silent_lost_count = tally.of(Count::SilentLost);
        if report.measured_seconds > 0.0 {
            report.deliveries_per_second = report.delivered_count as f64 / report.measured_seconds;
            report.received_bytes_per_second = measured.of(Count::BytesIn) as f64 / report.measured_seconds;
        }
        let at = |quantile: f64| milliseconds(self.latencies.value_at_quantile(quantile));
        report.latency = (!self.latencies.is_empty()).then(|| Latency {
            deliveries_count: self.latencies.len(),
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: milliseconds(self.latencies.max()),
            mean_ms: self.latencies.mean() / 1e6,
        });
        report.latency_curve = curve(&self.latencies);
        report.notes = self.shared.notes();
        self.report
    }
}

/// Ten points for each nine of the percentile, as far as there are deliveries.
fn curve(latencies: &Latencies) -> Vec<LatencyPoint> {
    let nines = (latencies.len().max(1) as f64).log10();
    let points = (0..).map(|point| f64::from(point) / 10.0).take_while(|at| *at <= nines);
    let point = |nines: f64| {
        let quantile = 1.0 - 10f64.powf(-nines);
        let latency_ms = milliseconds(latencies.value_at_quantile(quantile));
        LatencyPoint { share_percent: quantile * 100.0, latency_ms }
    };
    if latencies.is_empty() { Vec::new() } else { points.map(point).collect() }
}

/// What is known before anything has happened.
fn about(plan: &Plan) -> Report {
    let (shape, in_flight, rate) = match plan.shape {
        Shape::Idle { .. } => ("idle", 0, 0.0),
        Shape::Closed { in_flight, .. } => ("closed", in_flight, 0.0),
        Shape::Open { rate, .. } => ("open", 0, rate),
    };
    let target = match plan.target {
        Target::Room => "room",
        Target::Users => "users",
        Target::Mixed => "mixed",
    };
    let streams = (0..plan.mix.tabs).filter(|index| plan.mix.is_stream(*index)).count();
    Report {
        label: plan.label.clone(),
        shape: shape.to_owned(),
        target: target.to_owned(),
        tabs_count: plan.mix.tabs as u64,
        streams_count: streams as u64,
        client_threads_count: plan.threads as u64,
        publishers_count: plan.publishing.as_ref().map_or(0, |publishing| publishing.publishers as u64),
        batch_count: plan.publishing.as_ref().map_or(0, |publishing| publishing.batch as u64),
        in_flight_count: in_flight as u64,
        rate_per_second: rate,
        size_bytes: plan.size as u64,
        silent_count: plan.mix.silent as u64,
        ..Report::default()
    }
}

/// The line on a terminal that says how it goes.
struct Progress {
    is_shown: bool,
    last: u64,
    delivered: u64,
    p99_ms: f64,
}

impl Progress {
    fn show(&mut self, shared: &Shared, now: u64) {
        if !self.is_shown || now - self.last < PROGRESS_NANOS {
            return;
        }
        let tally = shared.tally();
        let delivered = tally.of(Count::Delivered);
        let rate = (delivered - self.delivered) as f64 / seconds(now - self.last);
        let (open, lost) = (tally.of(Count::Open), tally.of(Count::Lost) + tally.of(Count::Missing));
        // Where standard error is gone, nobody misses it.
        let _ = write!(
            io::stderr(),
            "\r\x1b[K{:?}: {open} open, {rate:.0} deliveries/s, {lost} lost, p99 {:.3} ms ",
            shared.phase(),
            self.p99_ms
        );
        (self.last, self.delivered) = (now, delivered);
    }

    fn clear(&self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

fn milliseconds(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

fn ratio(sum: u64, count: u64) -> f64 {
    sum as f64 / count.max(1) as f64
}
