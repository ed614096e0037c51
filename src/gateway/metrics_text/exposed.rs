//! For tests: what a page exposes, read as a scraper does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::sync::Arc;

use crate::gateway::metrics_text::{Ceilings, MetricsText};
use crate::metrics::Metrics;

/// What is known of a family by each of its series' names, without labels.
#[derive(Debug, Clone, Default)]
pub(crate) struct Family {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) help: String,
    /// With the values that they have.
    pub(crate) labels: BTreeMap<String, BTreeSet<String>>,
}

pub(crate) type Exposed = BTreeMap<String, Family>;

/// A page as a gateway renders it: of one node on its own, or of one of many.
pub(crate) fn text(has_redis: bool) -> String {
    let ceilings =
        Ceilings { sessions_max: 1, held_bytes_max: 1, inbox_posts_max: 1, inbox_bytes_max: 1, spool_bytes_max: 1 };
    let broker = has_redis.then(Arc::default);
    MetricsText::new(Arc::new(Metrics::new(2)), broker).render(true, Some(ceilings))
}

/// Values by name and labels.
///
/// # Panics
/// If the text is not well formed.
pub(crate) fn values(text: &str) -> HashMap<String, f64> {
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut series = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line} is there twice");
    }
    series
}

/// Series by name.
///
/// # Panics
/// If the text is not well formed, a family comes twice, or a series has none.
pub(crate) fn exposed(text: &str) -> Exposed {
    let (mut found, mut family, mut seen) = (Exposed::new(), Family::default(), BTreeSet::new());
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            match comment.splitn(3, ' ').collect::<Vec<_>>()[..] {
                ["HELP", name, help] => {
                    assert!(seen.insert(name.to_owned()), "{name} is described twice");
                    family = Family { name: name.to_owned(), help: help.to_owned(), ..Family::default() };
                }
                ["TYPE", name, kind] => {
                    assert_eq!(name, family.name, "a type without a help");
                    family.kind = kind.to_owned();
                }
                ["EOF"] => {}
                _ => panic!("{line}"),
            }
            continue;
        }
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        assert!(!family.kind.is_empty() && name.starts_with(&family.name), "{line} has no family");
        let entry = found.entry(name.to_owned()).or_insert_with(|| family.clone());
        assert_eq!(entry.name, family.name, "{line} is in two families");
        let names = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
        for (name, value) in names {
            entry.labels.entry(name.to_owned()).or_default().insert(value.trim_matches('"').to_owned());
        }
    }
    found
}

/// The table of the documentation.
pub(crate) fn table(text: &str) -> String {
    let mut table = "| name | type | labels | what |\n|---|---|---|---|\n".to_owned();
    let all = exposed(text);
    let mut families = BTreeMap::new();
    for (series, family) in &all {
        let name = if family.kind == "counter" { series } else { &family.name };
        families.insert(name.clone(), family);
    }
    for (name, family) in families {
        let labels: Vec<_> = family.labels.keys().filter(|label| *label != "le").map(|l| format!("`{l}`")).collect();
        let help = family.help.trim_end_matches('.');
        writeln!(table, "| `{name}` | {} | {} | {help} |", family.kind, labels.join(", ")).unwrap();
    }
    table
}
