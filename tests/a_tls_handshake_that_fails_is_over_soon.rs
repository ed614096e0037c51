//! What is no TLS, or no TLS of ours, is counted, told so, and gone; settings that could never work are refused.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::Duration;

use rcgen::date_time_ymd;
use rustls::pki_types::ServerName;
use support::tls::{Authority, over};
use support::{Client, Gateway, get, now};

const FAILED: &str = "tabcast_tls_handshakes_total{outcome=\"failed\"}";

#[test]
fn garbage_half_a_handshake_and_plain_http() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("header_timeout", "4s"), ("http_connections_max", "8"), ("shards", "1")]);
    // An alert of TLS, or nothing; and the end.
    for garbage in [&b"\x16\x03\x01\x00\x05hello"[..], b"\x80\x2e\x01\x00\x02", b"\x00\x00\x00", &[22, 3, 1, 255, 255]]
    {
        let mut client = Client::connect(gateway.address);
        client.write(garbage);
        let said = client.until_the_end();
        assert!(said.is_empty() || said[0] == 21, "{said:?}");
    }
    authority.wait_for_metric(&gateway, FAILED, 4);
    let mut client = Client::connect(gateway.address);
    client.write(&get("/healthz"));
    let response = client.response();
    assert_eq!((response.status, response.code().as_str()), (400, "tls_required"));
    assert!(client.until_the_end().is_empty());
    authority.wait_for_metric(&gateway, FAILED, 5);
    // All places are taken by those who do not go on: who came first makes room, and the others end in time.
    let start = now();
    let mut hello = Vec::new();
    let mut connection =
        rustls::ClientConnection::new(authority.client(), ServerName::try_from("localhost").unwrap()).unwrap();
    connection.write_tls(&mut hello).unwrap();
    let stuck: Vec<_> = (0..8)
        .map(|number| {
            let mut client = Client::connect(gateway.address);
            client.write(&hello[..hello.len() * number / 8]);
            client
        })
        .collect();
    let mut next = authority.connect(&gateway);
    next.write(&get("/healthz"));
    assert_eq!(next.response().status, 200);
    assert!(start.elapsed() < Duration::from_secs(3), "it had to wait: {:?}", start.elapsed());
    for mut client in stuck {
        client.until_the_end();
    }
    assert_eq!(authority.metric(&gateway, "tabcast_evicted_connections_total"), 1);
    authority.wait_for_metric(&gateway, FAILED, 13);
    // Nothing of all that is a line in the log.
    assert_eq!(gateway.log(), "");
}

#[test]
fn clients_with_nothing_in_common_or_no_trust() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("shards", "1")]);
    let mut config = (*authority.client()).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connect = |config| {
        let mut client = over(&std::sync::Arc::new(config), Client::connect(gateway.address));
        std::io::Write::write_all(&mut client.stream, &get("/healthz")).unwrap_err().to_string()
    };
    let refused = connect(config);
    assert!(refused.contains("NoApplicationProtocol"), "{refused}");
    let refused = connect((*Authority::new().client()).clone());
    assert!(refused.contains("UnknownIssuer") || refused.contains("BadSignature"), "{refused}");
    authority.wait_for_metric(&gateway, FAILED, 2);
    // A client without ALPN speaks what is spoken here.
    let mut config = (*authority.client()).clone();
    config.alpn_protocols.clear();
    let mut client = over(&std::sync::Arc::new(config), Client::connect(gateway.address));
    client.write(&get("/healthz"));
    assert_eq!(client.response().status, 200);
}

#[test]
fn a_client_that_comes_back_is_not_shown_the_certificate_again() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("shards", "2")]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = authority.client_of(&[version]);
        for round in 0..3 {
            let mut client = over(&config, Client::connect(gateway.address));
            client.write(&get("/healthz"));
            assert_eq!(client.response().status, 200);
            let is_resumed = client.stream.conn.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
            assert_eq!(is_resumed, round > 0, "{version:?} {round}");
        }
    }
    assert_eq!(authority.metric(&gateway, "tabcast_tls_handshakes_total{outcome=\"resumed\"}"), 4);
}

#[test]
fn certificates_that_nobody_would_accept_are_refused_at_the_start() {
    let authority = Authority::new();
    let good = authority.issue(|_| ());
    let other = authority.issue(|_| ());
    let past = authority.issue(|params| params.not_after = date_time_ymd(2020, 1, 1));
    let future = authority.issue(|params| params.not_before = date_time_ymd(3020, 1, 1));
    let check = |certificate: &str, key: &str, expected: &str| {
        std::fs::write(authority.path("cert.pem"), certificate).unwrap();
        std::fs::write(authority.path("key.pem"), key).unwrap();
        let paths = ["cert.pem", "key.pem"].map(|name| authority.path(name).to_str().unwrap().to_owned());
        let refused = Gateway::try_start(&[("tls_cert", &paths[0]), ("tls_key", &paths[1])], None).err().unwrap();
        assert_eq!(refused.code, Some(2), "{}", refused.log);
        assert!(
            refused.log.starts_with("tabcast: tls_") && refused.log.contains(expected),
            "{expected}: {}",
            refused.log
        );
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tabcast"));
        let checked = command.args(["check-config", "--tls-cert", &paths[0], "--tls-key", &paths[1]]).output().unwrap();
        assert_eq!(checked.status.code(), Some(2));
        assert_eq!(String::from_utf8(checked.stderr).unwrap(), refused.log);
    };
    check(&past.0, &past.1, "has expired");
    check(&future.0, &future.1, "is not valid before");
    check(&good.0, &other.1, "tls_key");
    check(&good.0, &other.1, "is not that of the certificate");
    check(&good.0, "", "the key is not usable");
    check("", &good.1, "the certificate is not usable: there is none in the file");
    check("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &good.1, "the certificate is not usable");
    check(&good.1, &good.0, "tls_cert");
    let missing = Gateway::try_start(&[("tls_cert", "/nowhere/cert.pem"), ("tls_key", "/nowhere/key.pem")], None);
    let missing = missing.err().unwrap();
    assert!(missing.log.contains("tls_cert: cannot read /nowhere/cert.pem"), "{}", missing.log);
}
