//! What cannot be served is said clearly, with an exit code, and does not run half.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::ErrorKind;
use std::net::TcpListener;

use support::shards::Shards;
use support::{Gateway, NotStarted, get};

fn refused(settings: &[(&str, &str)], open_files: Option<usize>) -> NotStarted {
    Gateway::try_start(settings, open_files).err().expect("it must not start")
}

#[test]
fn by_a_second_gateway_and_by_a_gateway_whose_port_is_another_programs() {
    let first = Gateway::start(&[("shards", "2")]);
    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    for address in [first.address, foreign.local_addr().unwrap()] {
        for tables in ["shared", "per_shard"] {
            let listen = address.to_string();
            let NotStarted { code, log } =
                refused(&[("listen", &listen), ("shards", "3"), ("file_tables", tables)], None);
            assert_eq!(code, Some(1), "{log}");
            let says = format!("cannot listen on {address}: ");
            assert!(log.contains(&says) && log.to_lowercase().contains("in use"), "{log}");
        }
    }
    let mut client = first.connect();
    client.write(&get("/healthz"));
    assert_eq!(client.response().status, 200);
}

#[test]
fn by_shards_without_a_gateway() {
    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = Shards::try_start(3, foreign.local_addr().unwrap()).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::AddrInUse);
    let elsewhere = Shards::try_start(3, "192.0.2.1:0".parse().unwrap()).err().unwrap();
    assert_eq!(elsewhere.kind(), ErrorKind::AddrNotAvailable);
}

#[test]
fn a_shard_that_cannot_start_ends_the_process_too() {
    // Enough for the first threads' queues and not for all.
    for limit in [8, 12, 20, 30] {
        let NotStarted { code, log } = refused(&[("shards", "8"), ("tabs_max", "1")], Some(limit));
        assert_eq!(code, Some(1), "{limit}: {log}");
        assert!(log.contains("open files"), "{limit}: {log}");
    }
}
