//! Many answers at once, each of which grows several times a second: nothing is lost, and order is kept. The same with
//! numbers is `tests/examples/stream_load.rs`.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/stream_load.rs"]
mod stream_load;
mod support;

use std::time::Duration;

use stream_load::{Load, run};
use support::Gateway;

#[test]
fn for_five_seconds() {
    let gateway = Gateway::start(&[("worker", "none"), ("answers_per_user_max", "1000")]);
    let load = Load { streams: 200, rate: 2000, duration: Duration::from_secs(5) };
    let carried = run(gateway.address, load, || {}).unwrap();
    assert_eq!((carried.sent, carried.received, carried.broken), (10_000, 10_000, 0));
    assert!(carried.records > 200 && carried.records <= carried.received, "{}", carried.records);
    // It grew over all that time, and did not come in one heap at its end.
    assert!(carried.took >= Duration::from_millis(4900), "{:?}", carried.took);
    assert!(carried.latency(0.5) < Duration::from_secs(2), "{:?}", carried.latency(0.5));
}
