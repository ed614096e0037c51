//! The gateway's log lines: text or JSON, by rules that may be replaced, and no more of one kind than can be read.
//!
//! What a peer or an outage causes at will is one line of the source over and over. Each such line may write
//! [`BURST`] log lines at once and [`PER_SECOND`] a second after that; what is over is counted, and the count logged. Only
//! `debug` lines are not limited: whoever asks for them wants all.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::LogFormat;
use crate::driver::clock;

/// Log lines that one line of the source may write at once: a reload that changes every setting fits.
pub const BURST: u32 = 128;
/// Those that it may write in a second after that.
pub const PER_SECOND: u32 = 10;
/// How often it is told what was suppressed, while anything is.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// What is logged, to be replaced while the process runs.
#[derive(Debug, Clone)]
pub struct Logs {
    rules: reload::Handle<EnvFilter, Registry>,
}

/// The rules of the setting `log`.
///
/// # Errors
/// What is wrong with them.
pub fn rules(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| format!("log: {error}"))
}

/// Starts logging to standard error, for the whole process.
///
/// # Errors
/// The rules are none, or somebody logs already.
pub fn start(text: &str, format: LogFormat) -> Result<Logs, String> {
    let (filter, rules) = reload::Layer::new(rules(text)?);
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let limit = Limit::default();
    let sites = Arc::clone(&limit.sites);
    let registry = tracing_subscriber::registry().with(filter).with(limit).with(lines);
    registry.try_init().map_err(|error| format!("log: {error}"))?;
    let teller = std::thread::Builder::new().name("log".to_owned()).spawn(move || tell_for_ever(&sites));
    teller.map(|_| Logs { rules }).map_err(|error| format!("log: {error}"))
}

impl Logs {
    /// From now on these rules.
    ///
    /// # Errors
    /// They are none: those before stay.
    pub fn replace(&self, text: &str) -> Result<(), String> {
        self.rules.reload(rules(text)?).map_err(|error| format!("log: {error}"))
    }
}

/// One line of the source that logs.
#[derive(Debug)]
struct Site {
    left: u32,
    filled: Instant,
    suppressed: u64,
    place: String,
}

impl Site {
    fn new(metadata: &Metadata<'_>, now: Instant) -> Self {
        let (file, line) = (metadata.file().unwrap_or_else(|| metadata.target()), metadata.line().unwrap_or(0));
        Self { left: BURST, filled: now, suppressed: 0, place: format!("{file}:{line}") }
    }

    /// Whether one more may be written at `now`.
    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        let more = (passed.as_millis() * u128::from(PER_SECOND) / 1000).min(u128::from(BURST));
        if let Ok(more @ 1..) = u32::try_from(more) {
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled = now;
        }
        let left = self.left.checked_sub(1);
        match left {
            Some(left) => self.left = left,
            None => self.suppressed += 1,
        }
        left.is_some()
    }
}

/// As many as there are lines of the source that log.
#[derive(Debug, Default)]
struct Sites {
    sites: Mutex<HashMap<Identifier, Site>>,
    /// Something was suppressed.
    over: Condvar,
}

/// Lets through what may be written.
#[derive(Debug, Default)]
struct Limit {
    sites: Arc<Sites>,
}

impl<S: Subscriber> Layer<S> for Limit {
    fn register_callsite(&self, _metadata: &'static Metadata<'static>) -> Interest {
        Interest::always()
    }

    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // `Level`s are ordered by how much they let through.
        if *metadata.level() > Level::INFO || metadata.target() == TELLER {
            return true;
        }
        let now = clock::now();
        // What a panic could have left half done is a count.
        let mut sites = self.sites.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let may = sites.entry(metadata.callsite()).or_insert_with(|| Site::new(metadata, now)).take(now);
        if !may {
            self.sites.over.notify_one();
        }
        may
    }
}

/// The target of the lines that tell what was suppressed: they are not suppressed.
const TELLER: &str = "tabcast::suppressed";

/// Takes what was suppressed until now, and waits until something is.
fn taken(sites: &Sites) -> Vec<(String, u64)> {
    let mut held = sites.sites.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let over = held.values_mut().filter(|site| site.suppressed > 0);
        let taken: Vec<_> = over.map(|site| (site.place.clone(), std::mem::take(&mut site.suppressed))).collect();
        if !taken.is_empty() {
            return taken;
        }
        held = sites.over.wait(held).unwrap_or_else(PoisonError::into_inner);
    }
}

fn tell_for_ever(sites: &Sites) {
    loop {
        for (place, count) in taken(sites) {
            tracing::warn!(target: TELLER, %place, count, "… suppressed {} lines like it", grouped(count));
        }
        std::thread::sleep(TELL_INTERVAL);
    }
}

/// `1234` as `1,234`.
#[must_use]
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use tracing::subscriber::with_default;

    use super::*;

    fn site() -> Site {
        Site { left: BURST, filled: clock::now(), suppressed: 0, place: String::new() }
    }

    #[test]
    fn a_burst_and_then_so_many_a_second() {
        let mut site = site();
        let start = site.filled;
        let mut taken = |millis| (0..1_000).filter(|_| site.take(start + Duration::from_millis(millis))).count();
        assert_eq!(taken(0), BURST as usize);
        assert_eq!(taken(99), 0);
        assert_eq!(taken(100), 1);
        assert_eq!(taken(1_100), PER_SECOND as usize);
        assert_eq!(taken(3_600_000), BURST as usize, "silence is saved up to the burst");
        assert_eq!(site.suppressed, 5_000 - 2 * u64::from(BURST) - u64::from(PER_SECOND) - 1);
    }

    #[test]
    fn what_is_over_is_counted_by_its_line_and_debug_lines_are_not_limited() {
        #[derive(Clone, Default)]
        struct Count(Arc<Mutex<HashMap<String, usize>>>);
        impl<S: Subscriber> Layer<S> for Count {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                *self.0.lock().unwrap().entry(event.metadata().level().to_string()).or_default() += 1;
            }
        }
        let (limit, count) = (Limit::default(), Count::default());
        let (sites, counts) = (Arc::clone(&limit.sites), count.clone());
        with_default(tracing_subscriber::registry().with(limit).with(count), || {
            for number in 0..1_000 {
                tracing::warn!(number, "a peer does it");
                tracing::debug!(number, "asked for");
            }
            tracing::error!("another line");
        });
        let counts = counts.0.lock().unwrap();
        let written = counts["WARN"];
        // On a slow machine a few come in while it runs.
        assert!((BURST as usize..500).contains(&written), "{written}");
        assert_eq!((counts["DEBUG"], counts["ERROR"]), (1_000, 1));
        let over = taken(&sites);
        assert_eq!(over.len(), 1);
        assert!(over[0].0.contains("logs.rs:"), "{over:?}");
        assert_eq!(over[0].1, 1_000 - written as u64);
    }

    #[test]
    fn counts_are_in_groups_of_three() {
        for (number, expected) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), expected);
        }
    }
}
