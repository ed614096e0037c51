//! `tabcast bench` finds what a server does wrong and says so by its exit code; with a server that does nothing wrong it
//! counts exactly what another client counts.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};

use faulty::Fault;
use serde_json::Value;
use support::Gateway;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tabcast")).arg("bench").args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn runs(json: &Path) -> Vec<Value> {
    let json: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    json["runs"].as_array().unwrap().clone()
}

/// A closed loop against a server, its exit code and what it found.
fn run(address: SocketAddr, more: &[&str]) -> (i32, Value) {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("out.json");
    let address = address.to_string();
    let fixed = ["--address", &address, "--json", json.to_str().unwrap(), "--stall", "1s"];
    let output = bench(&[fixed.as_slice(), more].concat());
    let code = output.status.code().unwrap();
    assert!(json.exists(), "{}", text(&output));
    (code, runs(&json).remove(0))
}

#[test]
fn the_self_test_passes_and_writes_what_it_found() {
    let dir = tempfile::tempdir().unwrap();
    let [json, svg, log] = ["out.json", "out.svg", "out.hlog"].map(|name| dir.path().join(name));
    let files = [json.to_str().unwrap(), svg.to_str().unwrap(), log.to_str().unwrap()];
    let output =
        bench(&["--self-test", "--tabs", "60", "--json", files[0], "--svg", files[1], "--histogram", files[2]]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let runs = runs(&json);
    assert!(runs.len() >= 7, "{}", text(&output));
    for run in &runs {
        let of = |name: &str| run[name].as_u64().unwrap_or_else(|| panic!("{name}: {run}"));
        assert_eq!(of("open_count"), 60, "{run}");
        assert!(of("delivered_count") > 0 && of("published_count") > 0, "{run}");
        assert_eq!(of("delivered_count"), of("expected_count"), "{run}");
        assert!(run["server_cpu_per_delivery_us"].as_f64().unwrap() > 0.0, "{run}");
        assert!(text(&output).contains(run["label"].as_str().unwrap()), "{run}");
    }
    assert!(runs.iter().any(|run| run["churned_count"].as_u64().unwrap() > 0), "nobody came and went");
    assert!(runs.iter().any(|run| run["streams_count"].as_u64().unwrap() == 60), "no event streams");
    assert!(runs[0]["broadcast_ms"].as_f64().unwrap() > 0.0 && runs[0]["direct_ms"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read_to_string(&svg).unwrap().contains("</svg>"));
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.matches("Tag=").count() >= runs.len(), "{log}");
}

#[test]
fn what_a_server_does_wrong_is_found() {
    let faults = [
        "failed_count",
        "cut_count",
        "refused_count",
        "lost_count",
        "doubled_count",
        "misordered_count",
        "misaddressed_count",
    ];
    for (fault, found) in [
        (Fault::None, [].as_slice()),
        (Fault::Loses, &[("lost_count", 1)]),
        (Fault::Doubles, &[("doubled_count", 1)]),
        (Fault::Reorders, &[("misordered_count", 1)]),
        (Fault::Misaddresses, &[("misaddressed_count", 1), ("lost_count", 1)]),
        (Fault::Refuses, &[("refused_count", 1)]),
    ] {
        let address = faulty::serve(fault);
        // In an open loop nothing waits for what will not come.
        let (code, run) = run(address, &["--tabs", "5", "--rate", "200", "--duration", "500ms", "--publishers", "1"]);
        assert_eq!(code, i32::from(fault != Fault::None), "{fault:?}: {run}");
        for name in faults {
            let expected = found.iter().find(|(found, _)| *found == name).map_or(0, |(_, count)| *count);
            assert_eq!(run[name].as_u64(), Some(expected), "{fault:?}, {name}: {run}");
        }
        let expected = 500 - u64::from(matches!(fault, Fault::Loses | Fault::Misaddresses));
        assert_eq!(run["delivered_count"].as_u64(), Some(expected), "{fault:?}: {run}");
    }
}

#[test]
fn a_cut_tab_and_a_closed_loop_that_waits_for_ever_are_found() {
    let (code, run) = run(faulty::serve(Fault::Cuts), &["--tabs", "5", "--messages", "100"]);
    assert_eq!(code, 1, "{run}");
    assert_eq!((run["cut_count"].as_u64(), run["is_stalled"].as_bool()), (Some(1), Some(true)), "{run}");
    assert!(run["lost_count"].as_u64().unwrap() >= 1, "{run}");
}

#[test]
fn a_server_that_does_nothing_is_not_waited_for() {
    let shapes =
        [["--messages", "10"].as_slice(), &["--rate", "100", "--duration", "200ms"], &["--idle", "--duration", "1ms"]];
    for shape in shapes {
        let (code, run) = run(faulty::serve(Fault::Sleeps), &[&["--tabs", "3"], shape].concat());
        assert_eq!((code, run["is_stalled"].as_bool()), (1, Some(true)), "{shape:?}: {run}");
        assert!(run["lost_count"].as_u64().unwrap() > 0, "{shape:?}: {run}");
    }
}

#[test]
fn bad_arguments_and_absent_servers_have_their_exit_codes() {
    for arguments in [["--tabs", "0"].as_slice(), &["--nonsense"], &["chart", "/nowhere.json", "--svg", "/nowhere.svg"]]
    {
        let output = bench(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output));
    }
    let late = Command::new(env!("CARGO_BIN_EXE_tabcast")).args(["--rooms-max", "3", "bench"]).output().unwrap();
    assert_eq!(late.status.code(), Some(2), "{}", text(&late));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, run) = run(free, &["--tabs", "3"]);
    assert_eq!((code, run["failed_count"].as_u64()), (1, Some(3)), "{run}");
}

/// The neutral client in C, which knows nothing of this crate.
struct Neutral {
    dir: tempfile::TempDir,
}

impl Neutral {
    fn compile() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/wsload.c");
        let output = Command::new("cc").arg("-O2").arg("-o").arg(dir.path().join("wsload")).arg(source).output();
        let output = output.expect("a C compiler");
        assert!(output.status.success(), "{}", text(&output));
        Self { dir }
    }

    /// Deliveries, and the server's CPU for each.
    fn run(&self, gateway: &Gateway, in_flight: &str, messages: &str) -> (u64, f64) {
        let (port, pid) = (gateway.address.port().to_string(), gateway.pid().to_string());
        let request = format!(
            "POST /api/send HTTP/1.1\\r\\nHost: localhost:{port}\\r\\nContent-Type: application/json\\r\\n\
             Content-Length: {{len}}\\r\\n\\r\\n{{\"channel_id\":\"room:all\",\"text\":\"{{text}}\"}}"
        );
        let join = r#"{"type":"join","room":"all"}"#;
        let fixed = ["-p", &port, "-P", "/ws?user=u{i}", "-S", join, "-T", &request, "-X", &port, "-z", &pid];
        let shape = ["-n", TABS, "-m", "closed", "-w", in_flight, "-k", in_flight, "-M", messages];
        let output = Command::new(self.dir.path().join("wsload")).args(fixed).args(shape).output().unwrap();
        let text = text(&output);
        assert!(output.status.success() && text.contains("(lost 0, gaps 0,"), "{text}");
        let after = |mark: &str| text.split_once(mark).and_then(|(_, rest)| rest.split_whitespace().next()).unwrap();
        (after("delivered ").parse().unwrap(), after("server ").parse().unwrap())
    }
}

const TABS: &str = "200";
const MESSAGES: &str = "150";

#[test]
fn it_agrees_with_a_client_that_shares_no_code_with_it() {
    let (neutral, gateway) = (Neutral::compile(), Gateway::start(&[("shards", "1")]));
    let pid = gateway.pid().to_string();
    let fixed = ["--tabs", TABS, "--messages", MESSAGES, "--in-flight", "1", "--size", "128", "--pid", &pid];
    let median_ratio = || {
        let mut ratios: Vec<f64> = (0..5)
            .map(|_| {
                let (deliveries, us) = neutral.run(&gateway, "1", MESSAGES);
                let (code, run) = run(gateway.address, &fixed);
                assert_eq!(code, 0, "{run}");
                assert_eq!(run["delivered_count"].as_u64(), Some(deliveries), "{run}");
                run["server_cpu_per_delivery_us"].as_f64().unwrap() / us
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    // Machines are noisy: once more before it is believed.
    let is_near = |ratio: &f64| (0.7..1.4).contains(ratio);
    let (first, mut second) = (median_ratio(), None);
    assert!(is_near(&first) || is_near(second.insert(median_ratio())), "CPU a delivery differs: {first}, {second:?}");
}
