//! What the kernel knows of the process, under the names that all exporters use.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::proto::event::Timestamp;

/// Read once, for one scrape or one look at the status. What the kernel does not tell is left out.
#[derive(Debug)]
pub(in crate::gateway) struct Process {
    begun: Timestamp,
    cpu_seconds: f64,
    pub(in crate::gateway) resident_bytes: Option<u64>,
    threads: Option<u64>,
    pub(in crate::gateway) open_files: Option<u64>,
    pub(in crate::gateway) open_files_max: Option<u64>,
}

impl Process {
    /// As it is now; it began at `begun`. A few reads of `/proc` for each thread, none of which grows with the number of
    /// files.
    pub(in crate::gateway) fn read(begun: Timestamp) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches("kB").trim_end().parse::<u64>().ok()
        };
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Self {
            begun,
            cpu_seconds: seconds(cpu.tv_sec, cpu.tv_nsec),
            resident_bytes: field("VmRSS:").map(|kibibytes| kibibytes << 10),
            threads: field("Threads:"),
            open_files: fullest_table(),
            open_files_max: getrlimit(Resource::Nofile).current,
        }
    }
}

/// Open files of the fullest table: with a table for each shard, the limit holds for each. Linux before 6.2 does not tell
/// without a walk through all of them, which is too much for a scrape.
fn fullest_table() -> Option<u64> {
    let tasks = fs::read_dir("/proc/self/task").ok()?.flatten();
    tasks.filter_map(|task| fs::metadata(task.path().join("fd")).ok()).map(|table| table.len()).max().filter(|n| *n > 0)
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus counts in floats")]
fn seconds(whole: i64, nanos: i64) -> f64 {
    whole as f64 + nanos as f64 / 1e9
}

impl Collector for Process {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus counts in floats")]
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let cpu = "CPU time of all threads, in seconds";
        let descriptor = encoder.encode_descriptor("process_cpu_seconds", cpu, None, MetricType::Counter)?;
        ConstCounter::new(self.cpu_seconds).encode(descriptor)?;
        let start = "When the process began, in seconds since 1970";
        let descriptor = encoder.encode_descriptor("process_start_time_seconds", start, None, MetricType::Gauge)?;
        ConstGauge::new(self.begun.as_micros() as f64 / 1e6).encode(descriptor)?;
        let levels = [
            ("process_resident_memory_bytes", "Memory that is in RAM", self.resident_bytes),
            ("process_threads", "Threads", self.threads),
            ("process_open_fds", "Open files, of the fullest table if each shard has its own", self.open_files),
            ("process_max_fds", "Files that may be open, in each table", self.open_files_max),
        ];
        for (name, help, level) in levels {
            let Some(level) = level else { continue };
            ConstGauge::new(level).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_time_memory_threads_and_files() {
        let before = Process::read(Timestamp::from_micros(1));
        assert!(before.cpu_seconds > 0.0 && before.resident_bytes > Some(100_000), "{before:?}");
        assert!(before.threads >= Some(1) && before.open_files_max > Some(10), "{before:?}");
        let files: Vec<_> = (0..100).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = Process::read(Timestamp::from_micros(1));
        // A kernel that is too old for this tells neither.
        assert!(after.open_files.is_none_or(|open| open >= files.len() as u64), "{after:?}");
        assert!(after.open_files <= after.open_files_max, "{after:?}");
    }
}
