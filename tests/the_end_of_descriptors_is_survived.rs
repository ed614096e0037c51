//! Without descriptors left a gateway serves the tabs it has, rests, and lets new ones in as others leave.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;
use support::{Client, Gateway, PATIENCE, handshake, now};

const OPEN_FILES: usize = 64;

fn expect_pong(tab: &mut Client) {
    tab.send(&json!({"type": "ping"}));
    assert_eq!(tab.json(), json!({"type": "pong"}));
}

/// A client that has asked to become a tab.
fn ask_in(gateway: &Gateway) -> Client {
    let mut client = gateway.connect();
    client.write(&handshake("user=u"));
    client
}

/// Whether something came, in a moment.
fn has_answer(client: &Client) -> bool {
    client.stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let answer = client.stream.peek(&mut [0]);
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match answer {
        Ok(_) => true,
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
            false
        }
    }
}

#[test]
fn by_one_table_for_all() {
    let settings = [("shards", "1"), ("file_tables", "shared"), ("tabs_per_user_max", "1000"), ("tabs_max", "57")];
    let gateway = Gateway::try_start(&settings, Some(OPEN_FILES)).unwrap();
    let (mut tabs, mut log) = (Vec::new(), String::new());
    // The gateway says it when it fails to take the next one, who may not have come yet.
    let mut last = 'full: loop {
        assert!(tabs.len() < OPEN_FILES, "the limit of open files is not there");
        let mut client = ask_in(&gateway);
        let deadline = now() + PATIENCE;
        while !has_answer(&client) {
            log += &gateway.log();
            if log.contains("cannot accept") {
                break 'full client;
            }
            assert!(now() < deadline, "neither an answer nor a word in the log: {log}");
        }
        client.expect_switch();
        tabs.push(client);
    };
    assert!(tabs.len() > 10);
    // In the backlog, for want of a descriptor.
    let mut waiting = ask_in(&gateway);
    let (before, start) = (gateway.cpu(), now());
    std::thread::sleep(Duration::from_secs(1));
    let (spent, passed) = (gateway.cpu() - before, start.elapsed());
    assert!(spent < passed / 20, "{spent:?} of CPU in {passed:?}");
    tabs.iter_mut().for_each(expect_pong);
    log += &gateway.log();
    assert_eq!(log.matches("cannot accept").count(), 1, "said once");
    assert!(!has_answer(&waiting), "there was a descriptor left");
    drop(tabs.drain(..3));
    last.expect_switch();
    waiting.expect_switch();
    expect_pong(&mut waiting);
    let mut late = gateway.tab("user=u");
    expect_pong(&mut late);
    tabs.iter_mut().for_each(expect_pong);
}

/// Each shard has a table of its own. One that is almost full leaves the port to the others and comes back: whoever
/// connects gets in, or is refused at once when all are full.
#[test]
fn by_tables_of_their_own() {
    let settings = [("shards", "4"), ("file_tables", "per_shard"), ("tabs_per_user_max", "1000"), ("tabs_max", "300")];
    let gateway = Gateway::try_start(&settings, Some(100)).unwrap();
    let connect = || -> Option<Client> {
        match TcpStream::connect(gateway.address) {
            Ok(stream) => Some(Client::new(stream).upgraded("user=u")),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                None
            }
        }
    };
    let mut tabs: Vec<_> = std::iter::from_fn(connect).collect();
    assert!((120..4 * 95).contains(&tabs.len()), "{} tabs", tabs.len());
    tabs.iter_mut().for_each(expect_pong);
    let full = tabs.len();
    drop(tabs.drain(..full / 2));
    let deadline = now() + PATIENCE;
    while tabs.len() < full - 20 {
        assert!(now() < deadline, "the shards do not come back");
        match connect() {
            Some(tab) => tabs.push(tab),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    tabs.iter_mut().for_each(expect_pong);
}
