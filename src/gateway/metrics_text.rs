//! `/metrics`: what is counted, as the text that Prometheus scrapes (OpenMetrics 1.0).
//!
//! Every name, checked against what is exposed:
//!
#![doc = include_str!("metrics_text/METRICS.md")]

mod page;
pub(in crate::gateway) mod process;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

use crate::config::Settings;
use crate::driver::clock;
use crate::gateway::metrics_text::page::Page;
use crate::gateway::metrics_text::process::Process;
use crate::metrics::BrokerMetrics;
use crate::metrics::Metrics;
use crate::proto::event::Timestamp;

/// The `Content-Type` of [`MetricsText::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What levels may rise to: settings, so that whoever watches knows how much of each is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceilings {
    /// Sessions of the node.
    pub sessions_max: usize,
    /// Bytes of frames and queues of the node.
    pub held_bytes_max: usize,
    /// Posts that wait in one shard's inbox.
    pub inbox_posts_max: usize,
    /// Bytes that wait in one shard's inbox.
    pub inbox_bytes_max: usize,
    /// Bytes that wait for Redis.
    pub spool_bytes_max: usize,
}

impl Ceilings {
    /// As they are in effect.
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            sessions_max: settings.tabs_max,
            held_bytes_max: settings.bytes_budget,
            inbox_posts_max: settings.inbox_posts_max,
            inbox_bytes_max: settings.inbox_bytes_max,
            spool_bytes_max: settings.redis_spool_bytes_max,
        }
    }
}

/// Renders an engine's metrics.
#[derive(Debug)]
pub struct MetricsText {
    metrics: Arc<Metrics>,
    broker: Option<Arc<BrokerMetrics>>,
    /// When this was made, as the gateway is.
    begun: Timestamp,
}

impl MetricsText {
    /// Over the metrics of one engine, and of its broker if that counts.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, broker: Option<Arc<BrokerMetrics>>) -> Self {
        Self { metrics, broker, begun: clock::wall() }
    }

    /// The text now; `is_ready` is whether the node takes traffic, and `ceilings` what levels are compared with. It reads every counter once, and costs a few dozen
    /// microseconds for each ten shards.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use tabcast::gateway::metrics_text::MetricsText;
    /// use tabcast::metrics::Metrics;
    ///
    /// let metrics = Arc::new(Metrics::new(2));
    /// metrics.shard(0).sessions.store(3);
    /// assert!(MetricsText::new(metrics, None).render(true, None).contains("\ntabcast_sessions 3\n"));
    /// ```
    #[must_use]
    pub fn render(&self, is_ready: bool, ceilings: Option<Ceilings>) -> String {
        let Self { metrics, broker, begun } = self;
        let now = clock::now();
        let scrape = Scrape { metrics: Arc::clone(metrics), broker: broker.clone(), ceilings, is_ready, now };
        let mut registry = Registry::default();
        registry.sub_registry_with_prefix("tabcast").register_collector(Box::new(scrape));
        registry.register_collector(Box::new(Process::read(*begun)));
        let mut text = String::with_capacity(32 << 10);
        match text::encode(&mut text, &registry) {
            Ok(()) => text,
            // Writing into a string cannot fail; an empty scrape is better than a panic if it ever does.
            Err(fmt::Error) => String::new(),
        }
    }
}

/// What one scrape reads.
#[derive(Debug)]
struct Scrape {
    metrics: Arc<Metrics>,
    broker: Option<Arc<BrokerMetrics>>,
    ceilings: Option<Ceilings>,
    is_ready: bool,
    now: Instant,
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        Page { encoder, metrics: &self.metrics }.write(self)
    }
}

#[cfg(test)]
pub(crate) mod exposed;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::metrics_text::exposed::{exposed, text, values};
    use crate::metrics::EncodeKind;
    use crate::metrics::InboundKind;
    use crate::metrics::PublishOutcome;
    use crate::proto::disconnect::Disconnect;
    use crate::proto::frame::Kind;

    /// As it is in the documentation.
    const TABLE: &str = include_str!("metrics_text/METRICS.md");

    #[test]
    fn the_text_has_every_sum_under_its_name() {
        let metrics = Arc::new(Metrics::new(2));
        for at in 0..2u64 {
            let shard = metrics.shard(usize::from(at == 1));
            shard.sessions.store(at + 1);
            shard.offered_frames.of(Kind::Edit).add(10);
            shard.ended_sessions.of(Disconnect::SlowConsumer).add(2);
            shard.inbound_messages.of(InboundKind::Button).increment();
            shard.write_frames.record(3);
            shard.write_frames.record(1000);
            shard.turn_micros.record(40 + at);
        }
        metrics.engine.encodes.of(EncodeKind::Edit).add(5);
        metrics.engine.publishes.of(PublishOutcome::Overloaded).increment();
        let series = values(&MetricsText::new(Arc::clone(&metrics), None).render(false, None));
        let check = |name: &str, expected: f64| assert_eq!(series.get(name), Some(&expected), "{name}: {series:#?}");
        check("tabcast_shards", 2.0);
        check("tabcast_ready", 0.0);
        check("tabcast_sessions", 3.0);
        check("tabcast_shard_sessions{shard=\"1\"}", 2.0);
        check("tabcast_shard_busy_micros_total{shard=\"1\"}", 41.0);
        check("tabcast_offered_frames_total{kind=\"edit\",class=\"latest\"}", 20.0);
        check("tabcast_ended_sessions_total{reason=\"slow_consumer\"}", 4.0);
        check("tabcast_ended_sessions_total{reason=\"kicked\"}", 0.0);
        check("tabcast_inbound_messages_total{kind=\"button\"}", 2.0);
        check("tabcast_encodes_events_total{kind=\"edit\"}", 5.0);
        check("tabcast_publishes_events_total{outcome=\"overloaded\"}", 1.0);
        check("tabcast_write_frames_bucket{le=\"2.0\"}", 0.0);
        check("tabcast_write_frames_bucket{le=\"4.0\"}", 2.0);
        check("tabcast_write_frames_bucket{le=\"256.0\"}", 2.0);
        check("tabcast_write_frames_bucket{le=\"+Inf\"}", 4.0);
        check("tabcast_write_frames_sum", 2006.0);
        check("tabcast_write_frames_count", 4.0);
    }

    #[test]
    fn what_redis_does_and_what_levels_may_rise_to_is_there_only_if_there_is_any() {
        let (alone, all) = (exposed(&text(false)), exposed(&text(true)));
        assert!(!alone.keys().any(|name| name.starts_with("tabcast_broker_")));
        for name in ["tabcast_broker_canary_age_seconds", "tabcast_broker_round_trip_micros_bucket"] {
            assert!(all.contains_key(name), "{name}");
        }
        let without = exposed(&MetricsText::new(Arc::new(Metrics::new(1)), Some(Arc::default())).render(true, None));
        let maxima = |names: &exposed::Exposed| names.keys().filter(|name| name.ends_with("_max")).count();
        assert_eq!((maxima(&without), maxima(&alone), maxima(&all)), (0, 4, 5));
    }

    #[test]
    fn names_and_labels_are_in_the_house_form() {
        for (name, family) in exposed(&text(true)) {
            let own = name.strip_prefix("tabcast_");
            assert!(own.is_some() || name.starts_with("process_"), "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert_eq!(family.kind == "counter", name.ends_with("_total"), "{name}");
            // What is counted comes last: many of them.
            let counted = name.trim_end_matches("_total").trim_end_matches("_max");
            let counted = ["_bucket", "_sum", "_count"].iter().fold(counted, |name, end| name.trim_end_matches(end));
            let is_state = ["tabcast_ready", "tabcast_build_info"].contains(&name.as_str());
            assert!(own.is_none() || is_state || counted.ends_with('s'), "{name} counts nothing");
            assert!(family.help.len() > 6, "{name} has no help");
            for label in family.labels.keys() {
                let closed = ["class", "kind", "le", "outcome", "reason", "shard", "status", "version"];
                assert!(closed.contains(&label.as_str()), "{name} has the label {label}");
            }
        }
    }

    #[test]
    fn the_readme_names_what_there_is() {
        let readme = include_str!("../../README.md");
        let all = exposed(&text(true));
        let families: Vec<_> =
            all.values().map(|family| family.name.as_str()).chain(all.keys().map(String::as_str)).collect();
        let section = readme.split_once("\n## Metrics and alerts\n").unwrap().1.split_once("\n## ").unwrap().0;
        let mut words = 0;
        for word in
            section.split(['`', ' ', '\'']).filter(|word| word.starts_with("tabcast_") || word.starts_with("process_"))
        {
            assert!(families.contains(&word), "{word}");
            words += 1;
        }
        assert!(words > 12, "{words}");
        for counter in readme.split('`').filter(|word| word.starts_with("tabcast_") && word.ends_with("_total")) {
            assert!(families.contains(&counter), "{counter}");
        }
    }

    #[test]
    fn every_name_is_in_the_table_of_the_documentation() {
        let expected = exposed::table(&text(true));
        // What this kernel does not tell of the process is in the table all the same.
        let is_here = |row: &&str| !row.starts_with("| `process_") || expected.lines().any(|other| other == *row);
        let rows: Vec<_> = TABLE.lines().filter(is_here).collect();
        let is_same = rows == expected.lines().collect::<Vec<_>>();
        assert!(is_same, "src/gateway/metrics_text/METRICS.md is to be:\n{expected}");
    }
}
