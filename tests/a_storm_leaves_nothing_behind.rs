//! 15,000 tabs come, join rooms, get frames and leave, more than once: what stays is what the crate's documentation says, and it
//! does not grow.
#![cfg(all(feature = "cli", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/allocations.rs"]
mod counted;
#[path = "support/memory_contract.rs"]
mod documented;
#[path = "support/in_process.rs"]
mod in_process;
mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use counted::live_bytes;
use documented::most;
use in_process::{handshake, open, settle, start};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use support::{Client, Gateway, get, masked, post};

/// Tabs of a storm, where the limit of open files allows so many.
const TABS: usize = 15_000;
/// Descriptors that are nobody's tab.
const OTHERS: usize = 1_000;
/// Messages to everybody, in one go.
const MESSAGES: usize = 16;

/// One storm at a time: each of them takes most of the process's descriptors.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As many tabs as the hard limit of open files allows a process that has one end of each.
fn tabs() -> usize {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let allowed = maximum.map_or(usize::MAX, |maximum| usize::try_from(maximum).unwrap()).saturating_sub(OTHERS);
    let tabs = TABS.min(allowed);
    if tabs < TABS {
        println!("the limit of open files allows {tabs} tabs, and not {TABS}");
    }
    assert!(tabs > 0, "a limit of open files below {OTHERS}");
    tabs
}

/// Sends all of it by one request, so that tabs have many frames waiting at once.
fn send(api: &mut Client, messages: impl Iterator<Item = (String, String)>) {
    let line = |(channel, text)| json!({"op": "send", "channel_id": channel, "text": text}).to_string();
    let lines: Vec<_> = messages.map(line).collect();
    api.write(&post("/api/batch", "application/x-ndjson", lines.join("\n").as_bytes()));
    let response = api.response();
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.text().matches("\"delivered\":true").count(), lines.len(), "{}", response.text());
}

/// Reads until `text` has come.
fn read_to(client: &mut TcpStream, text: &str) {
    let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&seen).contains(text) {
        let bytes = client.read(&mut chunk).unwrap();
        assert!(bytes > 0, "it ended: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&chunk[..bytes]);
    }
}

/// `count` tabs come, join a room for all and one for two, get what is said there and to themselves, and leave in one of
/// three ways.
fn storm(gateway: SocketAddr, count: usize) {
    let mut tabs = Vec::with_capacity(count);
    open(gateway, &mut tabs, count, 101, handshake);
    for (number, tab) in tabs.iter_mut().enumerate() {
        let [all, pair] = ["all".to_owned(), format!("pair-{}", number / 2)]
            .map(|room| masked(1, json!({"type": "join", "room": room}).to_string().as_bytes()));
        tab.write_all(&[all, pair, masked(1, br#"{"type":"ping"}"#)].concat()).unwrap();
    }
    tabs.iter_mut().for_each(|tab| read_to(tab, "pong"));
    let mut api = Client::connect(gateway);
    send(&mut api, (0..count).step_by(10).map(|number| (format!("user-{number}"), "for you".to_owned())));
    send(&mut api, (0..=MESSAGES).map(|number| ("room:all".to_owned(), format!("message {number}."))));
    let last = format!("message {MESSAGES}.");
    tabs.iter_mut().for_each(|tab| read_to(tab, &last));
    for (number, mut tab) in tabs.into_iter().enumerate() {
        match number % 3 {
            0 => tab.write_all(&masked(8, &1000_u16.to_be_bytes())).unwrap(),
            1 => tab.shutdown(Shutdown::Write).unwrap(),
            _ => socket2::SockRef::from(&tab).set_linger(Some(Duration::ZERO)).unwrap(),
        }
    }
    let left = || {
        api.write(&get("/api/users"));
        let users: Value = serde_json::from_slice(&api.response().body).unwrap();
        usize::try_from(users["tab_count"].as_u64().unwrap()).unwrap()
    };
    assert_eq!(settle(0, left), 0, "tabs that do not go");
}

/// Storms after the first one, of which one must leave no more resident than it did.
const STORMS_MAX: usize = 4;

/// What a storm may leave beside the slots of its tabs: what pools and tables keep, and the runtimes.
const KEPT_BYTES: usize = 4 << 20;

#[test]
fn in_the_heap() {
    let _alone = alone();
    let count = tabs();
    // A table of descriptors of its own for the shard, so that both ends of all connections fit one process.
    let tabs_max = count.to_string();
    let settings = [
        ("worker", "none"),
        ("shards", "1"),
        ("file_tables", "per_shard"),
        ("tabs_max", &tabs_max),
        // What is kept for tabs that come back is kept for a while when they have gone: a bound of its own.
        ("recovery", "off"),
    ];
    let gateway = start(&settings);
    let before = settle(usize::MAX, live_bytes);
    let mut left = [0; 2];
    for left in &mut left {
        storm(gateway, count);
        *left = settle(usize::MAX, live_bytes) - before;
    }
    println!("{left:?} bytes are left of {count} tabs: {} each", left[0] / count);
    let most = count * most("a tab that has left");
    assert!(left[0] <= most + KEPT_BYTES, "{left:?} bytes, and {most} with {KEPT_BYTES} are documented");
    assert!(left[1] <= left[0] + left[0] / 100, "it grows: {left:?}");
}

/// The least resident memory of a gateway, in bytes, while it has next to nothing to do: an allocator gives pages back
/// when it is called again.
fn resident(gateway: &Gateway) -> usize {
    let look = || {
        let mut client = gateway.connect();
        client.write(&get("/healthz"));
        assert_eq!(client.response().status, 200);
        std::thread::sleep(Duration::from_millis(20));
        let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
    };
    (0..100).map(|_| look()).min().unwrap()
}

#[test]
fn in_the_process() {
    let _alone = alone();
    let count = tabs();
    let gateway = Gateway::start(&[("worker", "none"), ("recovery", "off")]);
    storm(gateway.address, count);
    let mut before = resident(&gateway);
    // How much an allocator keeps depends on who was served at once, and has an end; what is lost is lost each time.
    for number in 1..=STORMS_MAX {
        storm(gateway.address, count);
        let left = resident(&gateway);
        println!("{before} bytes were resident after a storm of {count} tabs, {left} are after {number} more");
        if left <= before + before / 50 {
            return;
        }
        before = left;
    }
    panic!("it grows with each storm");
}
