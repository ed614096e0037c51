//! Signs of life, their absence, and tokens that expire.

use std::time::Duration;

use super::rig::{Got, PONG, Rig, client_frame, close, message};
use crate::fanout::shard::Wire;
use crate::proto::disconnect::Disconnect;
use crate::proto::limits::SessionLimits;

fn pings(rig: &Rig, tab: usize) -> usize {
    rig.got(tab).iter().filter(|got| matches!(got, Got::Ping | Got::KeepAlive)).count()
}

#[test]
fn a_tab_is_pinged_and_lives_as_long_as_it_answers() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.wait(24);
    assert_eq!(pings(&rig, tab), 0);
    for round in 1..=10 {
        rig.wait(1);
        assert_eq!(pings(&rig, tab), round);
        rig.receive(tab, &client_frame(PONG, &[]));
        rig.wait(24);
    }
    assert!(rig.is_open(tab));
}

#[test]
fn a_tab_without_a_sign_of_life_ends_with_4009() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.wait(25 + 19);
    assert!(rig.is_open(tab));
    rig.wait(1);
    assert!(!rig.is_open(tab));
    assert_eq!(rig.got(tab), [Got::Ping, close(Disconnect::HeartbeatTimeout)]);
    assert_eq!(rig.ended(Disconnect::HeartbeatTimeout), 1);
    rig.wait(6);
    assert!(rig.tabs[tab].gone);
}

#[test]
fn any_byte_is_a_sign_of_life_but_not_what_we_write_into_the_kernel() {
    let mut rig = Rig::new(1);
    let (talker, listener) = (rig.tab(0, "talker"), rig.tab(0, "listener"));
    rig.wait(30);
    rig.receive(talker, &[0x81]);
    rig.publish("listener", &message("into the void"));
    rig.wait(15);
    assert!(rig.is_open(talker));
    assert!(!rig.is_open(listener));
}

#[test]
fn progress_in_writing_is_a_sign_of_life() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.stall(tab, 10);
    rig.publish("u", &message(&"x".repeat(100_000)));
    for _ in 0..20 {
        rig.wait(15);
        rig.writable(tab, 10);
    }
    assert!(rig.is_open(tab));
    rig.wait(50);
    assert!(!rig.is_open(tab), "and its absence is not");
    assert_eq!(rig.ended(Disconnect::HeartbeatTimeout), 1);
}

#[test]
fn a_reader_of_events_is_kept_alive_and_ends_when_it_takes_nothing() {
    let mut rig = Rig::new(1);
    let reader = rig.reader(0, "u");
    rig.wait(25 * 10);
    assert_eq!(pings(&rig, reader), 10);
    rig.stall(reader, 3);
    rig.wait(25 + 20);
    assert!(rig.is_open(reader), "three bytes are progress");
    rig.wait(5 + 20);
    assert!(!rig.is_open(reader));
    assert_eq!(rig.ended(Disconnect::HeartbeatTimeout), 1);
    rig.writable(reader, usize::MAX);
    assert_eq!(rig.got(reader)[10..], [Got::KeepAlive, Got::LastChunk]);
    assert!(rig.tabs[reader].gone);
}

#[test]
fn pings_of_tabs_that_came_together_are_spread() {
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..26).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    let mut at_once = Vec::new();
    for _ in 0..25 {
        let before: usize = tabs.iter().map(|tab| pings(&rig, *tab)).sum();
        rig.wait(1);
        at_once.push(tabs.iter().map(|tab| pings(&rig, *tab)).sum::<usize>() - before);
        tabs.iter().for_each(|tab| rig.receive(*tab, &client_frame(PONG, &[])));
    }
    assert!(at_once.iter().all(|count| *count <= 2 + 2), "{at_once:?}");
    assert!(tabs.iter().all(|tab| pings(&rig, *tab) >= 1));
}

#[test]
fn many_pings_may_wait_for_a_stalled_tab_that_talks() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.stall(tab, 1);
    for _ in 0..5 {
        rig.wait(25);
        rig.receive(tab, &client_frame(PONG, &[]));
    }
    assert!(rig.is_open(tab));
    rig.stall(tab, 0);
    rig.wait(45);
    assert!(!rig.is_open(tab), "cut while a ping is partly written and others wait behind it");
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.got(tab), [Got::Ping, close(Disconnect::HeartbeatTimeout)]);
}

#[test]
fn after_a_long_sleep_of_the_process_tabs_get_their_time_to_answer() {
    for seconds in [60, 600, 100_000] {
        let mut rig = Rig::new(1);
        let tabs: Vec<_> = (0..40).map(|n| rig.tab(0, &format!("u{n}"))).collect();
        rig.jump(Duration::from_secs(seconds));
        for tab in &tabs {
            assert!(rig.is_open(*tab), "nobody could have answered within one tick");
            assert_eq!(pings(&rig, *tab), 1);
            rig.receive(*tab, &client_frame(PONG, &[]));
        }
        rig.wait(24);
        assert!(tabs.iter().all(|tab| rig.is_open(*tab)));
    }
}

#[test]
fn a_heartbeat_may_be_slower_than_the_longest_timer() {
    let (interval, timeout) = (Duration::from_secs(1000), Duration::from_secs(600));
    let limits = SessionLimits { heartbeat_interval: interval, heartbeat_timeout: timeout, ..SessionLimits::default() };
    let mut rig = Rig::with(1, limits, usize::MAX);
    let tab = rig.tab(0, "u");
    rig.wait(999);
    assert_eq!(pings(&rig, tab), 0);
    rig.wait(1 + 599);
    assert_eq!(pings(&rig, tab), 1);
    assert!(rig.is_open(tab));
    rig.wait(1);
    assert!(!rig.is_open(tab));
}

#[test]
fn a_timeout_longer_than_the_interval_is_kept() {
    let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(30));
    let limits = SessionLimits { heartbeat_interval: interval, heartbeat_timeout: timeout, ..SessionLimits::default() };
    let mut rig = Rig::with(1, limits, usize::MAX);
    let tab = rig.tab(0, "u");
    rig.wait(10 + 29);
    assert!(rig.is_open(tab));
    rig.wait(1);
    assert!(!rig.is_open(tab));
}

#[test]
fn endless_times_are_no_fault() {
    let limits = SessionLimits {
        heartbeat_interval: Duration::MAX,
        heartbeat_timeout: Duration::MAX,
        close_timeout: Duration::MAX,
        ..SessionLimits::default()
    };
    let mut rig = Rig::with(1, limits, usize::MAX);
    rig.wait(5);
    let tab = rig.open_for(0, "u", Wire::WebSocket, Some(Duration::MAX)).unwrap();
    rig.writable(tab, usize::MAX);
    rig.wait(1000);
    assert!(rig.is_open(tab));
    assert_eq!(rig.got(tab), []);
}

#[test]
fn an_expired_token_ends_the_session_with_4001_after_what_is_queued() {
    let mut rig = Rig::new(1);
    let hour = Duration::from_secs(3600);
    let tab = rig.open_for(0, "u", Wire::WebSocket, Some(hour)).unwrap();
    rig.writable(tab, usize::MAX);
    for _ in 0..3600 {
        rig.wait(1);
        rig.receive(tab, &client_frame(PONG, &[]));
    }
    assert!(rig.is_open(tab));
    rig.stall(tab, 0);
    rig.publish("u", &message("last words"));
    rig.wait(1);
    assert!(!rig.is_open(tab));
    rig.writable(tab, usize::MAX);
    let got = rig.got(tab);
    assert_eq!(got[got.len() - 2].text(), Some("last words"));
    assert_eq!(got[got.len() - 1], close(Disconnect::TokenExpired));
}

#[test]
fn a_token_that_expires_while_a_pong_is_awaited_is_what_counts() {
    let mut rig = Rig::new(1);
    let tab = rig.open_for(0, "u", Wire::WebSocket, Some(Duration::from_secs(30))).unwrap();
    rig.writable(tab, usize::MAX);
    rig.wait(31);
    assert_eq!(rig.got(tab), [Got::Ping, close(Disconnect::TokenExpired)]);
}

#[test]
fn no_token_is_cut_before_its_time_wherever_in_a_tick_its_tab_came() {
    for millis in [0, 1, 500, 970, 999] {
        let mut rig = Rig::new(1);
        rig.jump(Duration::from_millis(millis));
        let tab = rig.open_for(0, "u", Wire::WebSocket, Some(Duration::from_secs(2))).unwrap();
        rig.writable(tab, usize::MAX);
        for _ in 0..19 {
            rig.jump(Duration::from_millis(100));
            assert!(rig.is_open(tab), "{millis}");
        }
        rig.jump(Duration::from_millis(1_100));
        assert!(!rig.is_open(tab), "nor more than a second after it");
    }
}

#[test]
fn two_weeks_of_idling_leave_everything_as_it_was() {
    const SECONDS: u64 = 14 * 24 * 3600;
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..3).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    let reader = rig.reader(0, "reader");
    let mut pinged = 0;
    for _ in 0..SECONDS {
        rig.wait(1);
        for tab in &tabs {
            if !std::mem::take(&mut rig.tabs[*tab].received).is_empty() {
                rig.receive(*tab, &client_frame(PONG, &[]));
                pinged += 1;
            }
        }
        rig.tabs[reader].received.clear();
    }
    assert!(tabs.iter().chain([&reader]).all(|tab| rig.is_open(*tab)));
    assert!((3 * (SECONDS / 25 - 1)..=3 * (SECONDS / 25 + 1)).contains(&pinged), "{pinged}");
}
