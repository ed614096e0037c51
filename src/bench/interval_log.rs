//! Latencies by the second, as HdrHistogram's own tools read them: an interval log of compressed histograms, version 2,
//! in nanoseconds.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError, Tag};

use super::clock;

/// See the module. One file may hold several runs, each under a tag of its own.
pub(super) struct IntervalLog<W = BufWriter<File>> {
    out: W,
    serializer: V2DeflateSerializer,
    /// What the clock said when the log was begun.
    began: u64,
    tag: String,
}

impl IntervalLog {
    /// Begins a file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Self::new(BufWriter::new(File::create(path)?))
    }
}

impl<W: Write> IntervalLog<W> {
    fn new(mut out: W) -> io::Result<Self> {
        let mut serializer = V2DeflateSerializer::new();
        let now = SystemTime::now();
        IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment("[Latencies in nanoseconds, from the intended moment of sending]")
            .with_base_time(now)
            .with_start_time(now)
            .begin_log_with(&mut out, &mut serializer)?;
        Ok(Self { out, serializer, began: clock::nanos(), tag: String::new() })
    }

    /// What the following intervals are of.
    pub(super) fn begin(&mut self, label: &str) {
        self.tag = label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    }

    /// Writes what came between two moments of [`clock::nanos`], and flushes it: an interrupted run leaves its log.
    pub(super) fn write(&mut self, from: u64, to: u64, latencies: &Histogram<u64>) -> io::Result<()> {
        let start = Duration::from_nanos(from.saturating_sub(self.began));
        let length = Duration::from_nanos(to.saturating_sub(from));
        let mut log = IntervalLogWriterBuilder::new().begin_log_with(&mut self.out, &mut self.serializer)?;
        log.write_histogram(latencies, start, length, Tag::new(&self.tag)).map_err(|error| match error {
            IntervalLogWriterError::IoError(error) => error,
            IntervalLogWriterError::SerializeError(error) => io::Error::other(error.to_string()),
        })?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::bench::shared::latencies;

    #[test]
    fn what_is_written_is_read_again_with_its_times_and_tags() {
        let mut bytes = Vec::new();
        let mut log = IntervalLog::new(&mut bytes).unwrap();
        let mut interval = latencies();
        let began = log.began;
        for (run, second) in [("a closed run, 1", 0u64), ("b", 1)] {
            log.begin(run);
            interval.record(1_000_000 * (second + 1)).unwrap();
            log.write(began + second * 1_000_000_000, began + (second + 1) * 1_000_000_000, &interval).unwrap();
        }
        let mut read = Vec::new();
        for entry in IntervalLogIterator::new(&bytes).map(Result::unwrap) {
            if let LogEntry::Interval(interval) = entry {
                let tag = interval.tag().unwrap().as_str().to_owned();
                use base64::Engine as _;
                let bytes = base64::engine::general_purpose::STANDARD.decode(interval.encoded_histogram()).unwrap();
                let histogram: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
                read.push((tag, interval.start_timestamp().as_secs(), interval.duration().as_secs(), histogram.len()));
            }
        }
        assert_eq!(read, [("a-closed-run--1".to_owned(), 0, 1, 1), ("b".to_owned(), 1, 1, 2)]);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("#[Histogram log format version 1.3]\n") && text.contains("#[BaseTime: "), "{text}");
        // What compressed histograms begin with, in base64.
        assert!(text.contains(",HISTFAAA"), "{text}");
    }
}
