//! SIGHUP: the next handshake gets what is in the files, open tabs notice nothing, and a bad pair changes nothing.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::tls::{Authority, Stream};
use support::{Client, Gateway};

/// The certificate that a new connection is shown.
fn shown(authority: &Authority, gateway: &Gateway) -> Vec<u8> {
    let client = authority.tab(gateway, "user=other");
    client.stream.conn.peer_certificates().unwrap()[0].to_vec()
}

fn reaches(authority: &Authority, gateway: &Gateway, tab: &mut Client<Stream>, text: &str) {
    authority.post(gateway, "/api/send", &json!({"channel_id": "u", "text": text}));
    assert_eq!(tab.json()["text"], text);
}

#[test]
fn with_open_tabs() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("file_tables", "per_shard"), ("shards", "2"), ("worker", "none")]);
    let first = shown(&authority, &gateway);
    let mut tab = authority.tab(&gateway, "user=u");
    authority.write(&authority.issue(|_| ()));
    gateway.signal(Signal::HUP);
    gateway.wait_for_log("new handshakes get the certificate that is in the files now");
    let second = shown(&authority, &gateway);
    assert_ne!(second, first);
    reaches(&authority, &gateway, &mut tab, "after the second");
    // A key that is not the certificate's, an expired certificate, no file.
    let (certificate, key) = (authority.issue(|_| ()).0, authority.issue(|_| ()).1);
    authority.write(&(certificate, key));
    gateway.signal(Signal::HUP);
    let said = gateway.wait_for_log("the certificate stays as it was");
    assert!(said.contains("ERROR") && said.contains("is not that of the certificate"), "{said}");
    authority.write(&authority.issue(|params| params.not_after = rcgen::date_time_ymd(2020, 1, 1)));
    gateway.signal(Signal::HUP);
    assert!(gateway.wait_for_log("the certificate stays as it was").contains("has expired"));
    std::fs::remove_file(authority.path("key.pem")).unwrap();
    gateway.signal(Signal::HUP);
    assert!(gateway.wait_for_log("the certificate stays as it was").contains("tls_key: cannot read"));
    assert_eq!(shown(&authority, &gateway), second);
    reaches(&authority, &gateway, &mut tab, "after the bad ones");
    authority.write(&authority.issue(|_| ()));
    gateway.signal(Signal::HUP);
    gateway.wait_for_log("new handshakes get the certificate");
    assert!(![first, second].contains(&shown(&authority, &gateway)));
    reaches(&authority, &gateway, &mut tab, "at last");
}

#[test]
fn without_tls_nothing_changes() {
    let gateway = Gateway::start(&[]);
    gateway.signal(Signal::HUP);
    gateway.wait_for_log("SIGHUP: no setting has changed");
    gateway.tab("user=u").send(&json!({"type": "ping"}));
}
