//! What a run found, with the unit in every name, and as a table for people.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Latency from the moment at which a message was to be sent to its arrival, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Deliveries in it.
    pub deliveries_count: u64,
    /// Half are faster.
    pub p50_ms: f64,
    /// One in ten is slower.
    pub p90_ms: f64,
    /// One in a hundred is slower.
    pub p99_ms: f64,
    /// One in a thousand is slower.
    pub p999_ms: f64,
    /// The slowest.
    pub max_ms: f64,
    /// The mean.
    pub mean_ms: f64,
}

/// A point of the curve of latencies.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LatencyPoint {
    /// This share of all deliveries …
    pub share_percent: f64,
    /// … took no longer.
    pub latency_ms: f64,
}

/// What a run found. What could not be measured is absent.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// What was measured, for people.
    pub label: String,
    /// `idle`, `closed` or `open`.
    pub shape: String,
    /// `room`, `users` or `mixed`.
    pub target: String,
    /// Clients that were asked for.
    pub tabs_count: u64,
    /// Of these, event streams.
    pub streams_count: u64,
    /// Threads of the client.
    pub client_threads_count: u64,
    /// Connections that publish.
    pub publishers_count: u64,
    /// Messages in a request.
    pub batch_count: u64,
    /// Requests under way, in a closed loop.
    pub in_flight_count: u64,
    /// Messages a second that were asked for, in an open loop.
    pub rate_per_second: f64,
    /// Text of a message.
    pub size_bytes: u64,

    /// Clients that were open when all had been opened.
    pub open_count: u64,
    /// Clients that could not be opened, then or later.
    pub failed_count: u64,
    /// Connections that the server ended though their client wanted to stay.
    pub cut_count: u64,
    /// How long opening took.
    pub opening_seconds: f64,
    /// Handshakes a second.
    pub handshakes_per_second: f64,
    /// The server's CPU for one handshake and what belongs to it.
    pub server_cpu_per_handshake_us: Option<f64>,
    /// The server's memory (Pss) for one idle connection.
    pub server_pss_per_connection_bytes: Option<f64>,
    /// What the system had less, server, kernel and this client, for one idle connection.
    pub system_per_connection_bytes: f64,
    /// This client's memory (Pss) for one idle connection.
    pub client_pss_per_connection_bytes: f64,

    /// Messages that were published.
    pub published_count: u64,
    /// Requests that they were in.
    pub requests_count: u64,
    /// Messages, or whole requests, that the server refused.
    pub refused_count: u64,
    /// Requests whose connection ended first.
    pub unanswered_count: u64,
    /// Deliveries that had to be.
    pub expected_count: u64,
    /// Deliveries that were, each counted once.
    pub delivered_count: u64,
    /// Deliveries that had to be and were not.
    pub lost_count: u64,
    /// Deliveries beyond the first.
    pub doubled_count: u64,
    /// Deliveries after a later one of the same publisher and channel.
    pub misordered_count: u64,
    /// Deliveries to others.
    pub misaddressed_count: u64,
    /// Something that was published did not come within the time that is waited.
    pub is_stalled: bool,
    /// From the first message to the last delivery.
    pub measured_seconds: f64,
    /// Deliveries a second.
    pub deliveries_per_second: f64,
    /// What came from the server.
    pub received_bytes_per_second: f64,
    /// Pings of the server.
    pub pings_count: u64,
    /// From the intended moment of sending to the arrival.
    pub latency: Option<Latency>,
    /// The same in full, finer and finer towards the slowest.
    pub latency_curve: Vec<LatencyPoint>,
    /// The server's CPU for one delivery, everything of publishing in it.
    pub server_cpu_per_delivery_us: Option<f64>,
    /// This client's CPU for one delivery, everything of publishing in it.
    pub client_cpu_per_delivery_us: Option<f64>,

    /// One message to every client of an idle server, until the last had it.
    pub broadcast_ms: Option<f64>,
    /// One message to a single user of an idle server.
    pub direct_ms: Option<f64>,

    /// Clients that left and came back.
    pub churned_count: u64,
    /// Clients that never read.
    pub silent_count: u64,
    /// Of these, how many the server cut.
    pub silent_cut_count: u64,
    /// What those that were cut did not get.
    pub silent_lost_count: u64,

    /// The first remarks about what went wrong.
    pub notes: Vec<String>,
}

impl Report {
    /// True if everything came to everybody that it was for, once and in order, and nobody was turned away.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let faults = [
            self.failed_count,
            self.cut_count,
            self.refused_count,
            self.unanswered_count,
            self.lost_count,
            self.doubled_count,
            self.misordered_count,
            self.misaddressed_count,
        ];
        faults.iter().all(|count| *count == 0) && !self.is_stalled && self.open_count > 0
    }

    /// The table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut rows: Vec<(&str, String)> = vec![
            ("clients", format!("{} open, {} failed, {} cut", self.open_count, self.failed_count, self.cut_count)),
            (
                "handshakes",
                format!(
                    "{:.0}/s{}",
                    self.handshakes_per_second,
                    given(self.server_cpu_per_handshake_us, |us| format!(", server {us:.1} µs CPU each"))
                ),
            ),
            (
                "idle connection",
                format!(
                    "{}client {:.0} B, system {:.2} KiB",
                    given(self.server_pss_per_connection_bytes, |bytes| format!("server {:.2} KiB, ", bytes / 1024.0)),
                    self.client_pss_per_connection_bytes,
                    self.system_per_connection_bytes / 1024.0
                ),
            ),
        ];
        if self.published_count > 0 {
            rows.extend(self.delivery_rows());
        }
        for (name, value) in [("one message to all", self.broadcast_ms), ("one message to one user", self.direct_ms)] {
            if let Some(ms) = value {
                rows.push((name, format!("{ms:.3} ms")));
            }
        }
        if self.churned_count > 0 {
            rows.push(("churn", format!("{} left and came back", self.churned_count)));
        }
        if self.silent_count > 0 {
            let (silent, cut, lost) = (self.silent_count, self.silent_cut_count, self.silent_lost_count);
            rows.push(("silent", format!("{silent} never read, {cut} of them cut, {lost} deliveries lost to those")));
        }
        let mut table = format!("{}: {} {}, {} tabs\n", self.label, self.shape, self.target, self.tabs_count);
        for (name, value) in rows {
            // Writing to a string does not fail.
            let _ = writeln!(table, "  {name:<24} {value}");
        }
        for note in &self.notes {
            let _ = writeln!(table, "  ! {note}");
        }
        table
    }

    fn delivery_rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            (
                "published",
                format!(
                    "{} messages of {} B in {} requests, {} refused",
                    self.published_count, self.size_bytes, self.requests_count, self.refused_count
                ),
            ),
            (
                "delivered",
                format!(
                    "{} of {}: {} lost, {} doubled, {} out of order, {} to others{}",
                    self.delivered_count,
                    self.expected_count,
                    self.lost_count,
                    self.doubled_count,
                    self.misordered_count,
                    self.misaddressed_count,
                    if self.is_stalled { ", STALLED" } else { "" }
                ),
            ),
            (
                "rate",
                format!(
                    "{:.0} deliveries/s for {:.2} s, {:.1} MB/s",
                    self.deliveries_per_second,
                    self.measured_seconds,
                    self.received_bytes_per_second / 1e6
                ),
            ),
        ];
        if let Some(latency) = &self.latency {
            let Latency { p50_ms, p90_ms, p99_ms, p999_ms, max_ms, .. } = latency;
            let text =
                format!("p50 {p50_ms:.3}  p90 {p90_ms:.3}  p99 {p99_ms:.3}  p99.9 {p999_ms:.3}  max {max_ms:.3} ms");
            rows.push(("latency", text));
        }
        let cpu = [("server", self.server_cpu_per_delivery_us), ("client", self.client_cpu_per_delivery_us)];
        let cpu: Vec<String> = cpu.iter().filter_map(|(who, us)| us.map(|us| format!("{who} {us:.3} µs"))).collect();
        if !cpu.is_empty() {
            rows.push(("CPU a delivery", cpu.join(", ")));
        }
        rows
    }
}

fn given(value: Option<f64>, text: impl FnOnce(f64) -> String) -> String {
    value.map(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_wrong_is_not_clean() {
        let clean = Report { open_count: 1, ..Report::default() };
        assert!(clean.is_clean());
        assert!(!Report::default().is_clean(), "nobody was there");
        let faults: [fn(&mut Report); 9] = [
            |report| report.failed_count = 1,
            |report| report.cut_count = 1,
            |report| report.refused_count = 1,
            |report| report.unanswered_count = 1,
            |report| report.lost_count = 1,
            |report| report.doubled_count = 1,
            |report| report.misordered_count = 1,
            |report| report.misaddressed_count = 1,
            |report| report.is_stalled = true,
        ];
        for (at, fault) in faults.iter().enumerate() {
            let mut report = clean.clone();
            fault(&mut report);
            assert!(!report.is_clean(), "{at}");
        }
    }

    #[test]
    fn every_number_in_the_json_has_its_unit_in_its_name() {
        let units = ["_count", "_seconds", "_per_second", "_us", "_ms", "_bytes"];
        let report = Report { latency: Some(Latency::default()), ..Report::default() };
        let json = serde_json::to_value(&report).unwrap();
        let latency = json["latency"].as_object().unwrap();
        for (name, value) in json.as_object().unwrap().iter().chain(latency) {
            let has_unit = units.iter().any(|unit| name.ends_with(unit));
            let is_word = value.is_string() || value.is_boolean() || value.is_array() || value.is_object();
            assert!(is_word || has_unit, "{name}");
        }
        let back: Report = serde_json::from_value(json).unwrap();
        assert_eq!(back, report);
    }
}
