//! The files say what the gateway does: names of metrics, labels and their values, settings, times.

mod promql;

use std::collections::BTreeSet;
use std::time::Duration;

use saphyr::{LoadableYamlNode, Yaml};
use serde_json::Value;

use super::DeployFile;
use crate::config::{Machine, Settings, Sources};
use crate::gateway::deploy::tests::promql::{Expression, check};
use crate::gateway::metrics_text::exposed::{Exposed, exposed, text};

/// What an expression shows: its text, and the labels that what is written beside it names.
struct Shown {
    place: String,
    expression: String,
    named: BTreeSet<String>,
}

fn settings() -> Settings {
    Sources::new().load(Machine { cores: 2, open_files_max: 20_000 }).unwrap()
}

/// Labels in `{{label}}` or `{{ $labels.label }}`.
fn templates(text: &str) -> BTreeSet<String> {
    let inner = text.split("{{").skip(1).filter_map(|rest| rest.split_once("}}")).map(|(inner, _)| inner.trim());
    let label =
        |inner: &str| inner.strip_prefix("$labels.").or((!inner.starts_with('$')).then_some(inner)).map(str::to_owned);
    inner.filter_map(label).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(DeployFile::Dashboard.text()).unwrap()
}

fn shown_on_the_dashboard() -> Vec<Shown> {
    let dashboard = dashboard();
    let mut shown = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            shown.push(Shown {
                place: panel["title"].as_str().unwrap().to_owned(),
                expression: target["expr"].as_str().unwrap().to_owned(),
                named: templates(target["legendFormat"].as_str().unwrap()),
            });
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        let (expression, named) = (&annotation["expr"], &annotation["titleFormat"]);
        shown.push(Shown {
            place: annotation["name"].as_str().unwrap().to_owned(),
            expression: expression.as_str().unwrap().to_owned(),
            named: templates(named.as_str().unwrap()),
        });
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(query) = variable["definition"].as_str() else { continue };
        let inner = query.strip_prefix("label_values(").unwrap().strip_suffix(')').unwrap();
        let (selector, label) = inner.rsplit_once(", ").unwrap();
        let named = BTreeSet::from([label.to_owned()]);
        shown.push(Shown { place: query.to_owned(), expression: selector.to_owned(), named });
    }
    shown
}

/// The rules, each with its name.
fn rules(yaml: &str) -> Vec<(String, Shown)> {
    let documents = Yaml::load_from_str(yaml).unwrap();
    let groups = documents[0]["groups"].as_sequence().unwrap();
    let rules = groups.iter().flat_map(|group| group["rules"].as_sequence().unwrap());
    let shown = |rule: &Yaml| {
        let field = |node: &Yaml, name: &str| {
            let text = node.as_mapping_get(name).and_then(Yaml::as_str);
            text.unwrap_or_else(|| panic!("{rule:?} has no {name}")).to_owned()
        };
        let (alert, annotations) = (field(rule, "alert"), &rule["annotations"]);
        assert!(["warning", "critical"].contains(&field(&rule["labels"], "severity").as_str()), "{alert}");
        assert!(humantime::parse_duration(&field(rule, "for")).unwrap() >= Duration::from_secs(60), "{alert}");
        let texts = ["summary", "description", "action"].map(|name| field(annotations, name));
        assert!(texts.iter().all(|text| text.len() > 20), "{alert}: {texts:?}");
        let named = templates(&texts.concat());
        (alert.clone(), Shown { place: alert, expression: field(rule, "expr"), named })
    };
    rules.map(shown).collect()
}

/// What Prometheus itself knows of every target.
fn with_up(mut all: Exposed) -> Exposed {
    all.insert("up".to_owned(), Default::default());
    all
}

fn all_shown() -> Vec<Shown> {
    let rules = rules(DeployFile::Alerts.text()).into_iter().map(|(_, shown)| shown);
    shown_on_the_dashboard().into_iter().chain(rules).collect()
}

#[test]
fn every_expression_names_what_a_gateway_exposes() {
    let (alone, all) = (with_up(exposed(&text(false))), with_up(exposed(&text(true))));
    let shown = all_shown();
    assert!(shown.len() > 70, "{} expressions", shown.len());
    for Shown { place, expression, named } in &shown {
        let found = check(expression, named, &all).unwrap_or_else(|error| panic!("{place}: {error}"));
        // A node without Redis has all of it but what is about Redis.
        if !found.metrics().any(|metric| metric.starts_with("tabcast_broker_")) {
            check(expression, named, &alone).unwrap_or_else(|error| panic!("{place}, without Redis: {error}"));
        } else {
            assert!(check(expression, named, &alone).is_err(), "{place}");
        }
    }
}

#[test]
fn what_is_misspelt_is_found() {
    let all = with_up(exposed(&text(true)));
    let refused = |expression: &str, named: &[&str], word: &str| {
        let named = named.iter().map(|name| (*name).to_owned()).collect();
        let error = check(expression, &named, &all).expect_err(expression);
        assert!(error.contains(word), "{expression}: {error}");
    };
    assert!(check("sum by (le) (rate(tabcast_turn_micros_bucket[1m])) / 2", &BTreeSet::new(), &all).is_ok());
    refused("sum(rate(tabcast_turn_micros[1m]))", &[], "tabcast_turn_micros");
    refused("tabcast_sesions > 1", &[], "tabcast_sesions");
    refused("up == 0 and on (job) tabcast_raedy", &[], "tabcast_raedy");
    refused("tabcast_ended_sessions_total{raeson=\"kicked\"}", &[], "raeson");
    refused("tabcast_ended_sessions_total{reason=~\"kicked|slow consumer\"}", &[], "slow consumer");
    refused("sum by (outcome) (tabcast_ended_sessions_total)", &[], "outcome");
    refused("sum by (job) (tabcast_ended_sessions_total)", &["reason"], "reason");
    refused("max without (shrad) (tabcast_shard_sessions)", &[], "shrad");
}

#[test]
fn every_rule_says_how_bad_it_is_and_what_to_do() {
    let rules = rules(DeployFile::Alerts.text());
    let names: BTreeSet<_> = rules.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), rules.len());
    assert!(names.iter().all(|name| name.starts_with("Tabcast")), "{names:?}");
    for (name, shown) in &rules {
        assert!(Expression::parse(&shown.expression).unwrap().metrics().next().is_some(), "{name} looks at nothing");
    }
}

#[test]
fn every_panel_has_a_unit_and_says_what_it_shows() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut rows, mut places) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        let number = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        for x in number("x")..number("x") + number("w") {
            for y in number("y")..number("y") + number("h") {
                assert!(x < 24 && places.insert((x, y)), "{title} lies over another");
            }
        }
        let kind = panel["type"].as_str().unwrap();
        if kind == "row" {
            rows.push(title);
            continue;
        }
        // The others are of an older Grafana, or need a plugin.
        assert!(["timeseries", "stat", "heatmap"].contains(&kind), "{title} is a {kind}");
        let unit = if kind == "heatmap" { &panel["options"]["yAxis"] } else { &panel["fieldConfig"]["defaults"] };
        assert!(unit["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "{title} has no unit");
        assert!(panel["description"].as_str().is_some_and(|text| text.len() > 10), "{title}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
    }
    assert_eq!(rows, ["Overview", "Deliveries and latency", "Queues and cuts", "Shards", "Redis", "Edge"]);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "job", "instance"]);
}

/// A directive of the unit.
fn directive(name: &str) -> &'static str {
    let line = DeployFile::Systemd.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("the unit has no {name}"))
}

#[test]
fn the_unit_leaves_time_for_a_drain_and_files_for_tabs() {
    let timeout = Duration::from_secs(directive("TimeoutStopSec").parse().unwrap());
    assert!(timeout > settings().drain_deadline + settings().close_timeout, "{timeout:?}");
    assert!(directive("LimitNOFILE").parse::<usize>().unwrap() > 500_000);
    assert_eq!((directive("KillSignal"), directive("RestartPreventExitStatus")), ("SIGTERM", "2"));
    assert!(directive("ExecReload").contains("-HUP"));
    for (name, value) in [("DynamicUser", "yes"), ("ProtectSystem", "strict"), ("NoNewPrivileges", "yes")] {
        assert_eq!(directive(name), value);
    }
}

#[test]
fn the_image_is_built_by_the_compiler_that_the_crate_asks_for_and_runs_as_nobody() {
    let text = DeployFile::Dockerfile.text();
    let compiler = format!("FROM rust:{}-", env!("CARGO_PKG_RUST_VERSION"));
    assert!(text.contains(&compiler), "{compiler}");
    for line in ["USER 65532:65532", "STOPSIGNAL SIGTERM", "HEALTHCHECK ", "EXPOSE 8080"] {
        assert!(text.lines().any(|other| other.starts_with(line)), "{line}");
    }
    assert_eq!(settings().listen.port(), 8080);
    let names = text.split("TABCAST_").skip(1).map(|rest| {
        rest.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect::<String>().to_ascii_lowercase()
    });
    for name in names {
        assert!(Settings::ALL.iter().any(|setting| setting.name == name), "there is no setting {name}");
    }
}
