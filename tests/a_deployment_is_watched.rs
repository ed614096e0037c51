//! What watches a gateway sees what happens in it: its numbers, the image's health check, and what `print` prints.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::{Command, Stdio};

use serde_json::json;
use support::{Gateway, bearer, get, metric_in, with_lines};
use tabcast::gateway::deploy::DeployFile;

/// What `/metrics` says now.
fn page(gateway: &Gateway) -> String {
    let mut client = gateway.connect();
    client.write(&with_lines(&get("/metrics"), &bearer("operator")));
    client.response().text()
}

#[test]
fn a_delivery_is_seen_in_every_number_that_it_has_part_in() {
    let gateway = Gateway::start(&[("shards", "2")]);
    let mut tabs = ["ann", "ann", "bob"].map(|user| gateway.tab(&format!("user={user}")));
    for n in 0..5 {
        gateway.post("/api/send", &json!({ "channel_id": "ann", "text": n.to_string() }));
        for tab in &mut tabs[..2] {
            assert_eq!(tab.json()["text"], n.to_string());
        }
    }
    let mut idle = gateway.connect();
    idle.write(&get("/healthz"));
    assert_eq!(idle.response().status, 200);
    // A shard times a write when it has handed on all that it had: that may be after the tab has read it.
    gateway.wait_for_metric("tabcast_accepted_to_written_micros_count", 10);
    let page = page(&gateway);
    let is = |name: &str, expected: u64| assert_eq!(metric_in(&page, name), expected, "{name}");
    is("tabcast_accepted_to_written_micros_count", 10);
    is("tabcast_accepted_to_written_micros_bucket{le=\"+Inf\"}", 10);
    is("tabcast_offered_frames_total{kind=\"message\",class=\"ordered\"}", 10);
    is("tabcast_sessions", 3);
    is("tabcast_shard_sessions", 3);
    is("tabcast_ready", 1);
    assert!((5..=10).contains(&metric_in(&page, "tabcast_accepted_to_posted_micros_count")), "once for each shard");
    assert!(metric_in(&page, "tabcast_http_connections") >= 2, "the idle one, and that which asks");
    assert!(metric_in(&page, "tabcast_shard_busy_micros_total") > 0);
    assert!(metric_in(&page, "tabcast_sessions_max") > 3);
    assert!(metric_in(&page, "process_resident_memory_bytes") > 1_000_000);
    let sum = page.lines().find_map(|line| line.strip_prefix("tabcast_accepted_to_written_micros_sum "));
    assert!(sum.is_some_and(|micros| (1.0..1e8).contains(&micros.parse::<f64>().unwrap())), "{sum:?}");
}

/// The command of the image's health check, as the file has it.
fn health_check() -> Vec<String> {
    let text = DeployFile::Dockerfile.text();
    let (_, check) = text.split_once("HEALTHCHECK ").unwrap();
    let (_, command) = check.split_once("CMD ").unwrap();
    serde_json::from_str(command.lines().next().unwrap()).unwrap()
}

/// Whether the health check finds the gateway on that port well.
fn is_healthy(port: u16) -> bool {
    let command = health_check();
    let mut check = Command::new(&command[0]);
    check.args(&command[1..]).env("TABCAST_LISTEN", format!("0.0.0.0:{port}"));
    check.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn the_images_health_check_knows_a_gateway_from_none() {
    let mut gateway = Gateway::start(&[("shards", "1")]);
    let port = gateway.address.port();
    assert!(is_healthy(port));
    gateway.terminate();
    assert!(gateway.wait().success());
    assert!(!is_healthy(port), "nobody listens there any more");
}

#[test]
fn print_prints_each_file_as_it_is() {
    for file in DeployFile::ALL {
        let output = Command::new(env!("CARGO_BIN_EXE_tabcast")).args(["print", file.name()]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), file.text());
    }
    let output = Command::new(env!("CARGO_BIN_EXE_tabcast")).args(["print", "nothing"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
