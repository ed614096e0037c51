//! One address cannot take what is for all: sessions, connections, handshakes. Proxies that are trusted say whose address
//! counts, and nobody else does.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::json;
use support::tls::{Authority, over};
use support::{
    Client, Gateway, KEYS, PATIENCE, Response, Seen, bearer, get, handshake, masked, now, post, token, with_lines,
};

const TRUSTED: (&str, &str) = ("trusted_proxies", "127.0.0.1");

fn start(settings: &[(&str, &str)]) -> Gateway {
    Gateway::start(&[&KEYS[..], &[("worker", "none")], settings].concat())
}

/// A client on another loopback address.
fn connect_from(gateway: &Gateway, from: [u8; 4]) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(Ipv4Addr::from(from).into(), 0).into()).unwrap();
    socket.connect(&gateway.address.into()).unwrap();
    socket.into()
}

/// A header of the PROXY protocol, version 2.
fn proxied(client: IpAddr) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    match client {
        IpAddr::V4(client) => {
            header.extend_from_slice(&[0x11, 0, 12]);
            header.extend_from_slice(&client.octets());
            header.extend_from_slice(&[127, 0, 0, 1]);
        }
        IpAddr::V6(client) => {
            header.extend_from_slice(&[0x21, 0, 36]);
            header.extend_from_slice(&client.octets());
            header.extend_from_slice(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
        }
    }
    header.extend_from_slice(&[0x12, 0x34, 0, 80]);
    header
}

/// A request for a session, each of another kind.
fn session_requests() -> [Vec<u8>; 3] {
    let question = json!({"messages": [{"role": "user", "content": "x"}], "stream": true}).to_string();
    [
        with_lines(&handshake(""), &bearer(&token("ann"))),
        with_lines(&get("/events"), &bearer(&token("bob"))),
        with_lines(&post("/v1/chat/completions", "application/json", question.as_bytes()), &bearer("openai-ann")),
    ]
}

/// The status of what is answered, with the connection if that has become a session.
fn ask(gateway: &Gateway, request: &[u8], forwarded: &str) -> Result<Client, Response> {
    let mut client = gateway.connect();
    client.write(&with_lines(request, &format!("X-Forwarded-For: {forwarded}\r\n")));
    let head = client.head();
    if head.starts_with("HTTP/1.1 101 ") || head.contains("text/event-stream") {
        return Ok(client);
    }
    let mut response = Response { status: head[9..12].parse().unwrap(), head, body: Vec::new() };
    response.body = client.take(response.header("content-length").unwrap().parse().unwrap());
    Err(response)
}

#[track_caller]
fn expect_refusal(asked: Result<Client, Response>, status: u16, code: &str) {
    let Err(response) = asked else { panic!("a session was opened") };
    let found: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((response.status, found["error"]["code"].as_str()), (status, Some(code)), "{}", response.text());
    let retry_after: u64 = response.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=10).contains(&retry_after), "{retry_after}");
}

#[test]
fn sessions_of_one_address_are_counted_whatever_they_are() {
    let gateway = start(&[TRUSTED, ("tabs_per_address_max", "3")]);
    let requests = session_requests();
    let mut open: Vec<_> = requests.iter().map(|request| ask(&gateway, request, "198.51.100.7").unwrap()).collect();
    for request in &requests {
        expect_refusal(ask(&gateway, request, "198.51.100.7"), 429, "limit_reached");
        // What the client itself put in front changes nothing; what is behind came from a proxy that is trusted.
        expect_refusal(ask(&gateway, request, "203.0.113.9, 198.51.100.7"), 429, "limit_reached");
        expect_refusal(ask(&gateway, request, "198.51.100.7, 127.0.0.1"), 429, "limit_reached");
        assert!(ask(&gateway, request, "203.0.113.9").is_ok());
    }
    assert_eq!(gateway.metric("tabcast_refusals_total{reason=\"tabs_of_address\"}"), 9);
    // Those of one /64 are one.
    let addresses = ["2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:0:9::"];
    let six: Vec<_> = addresses.map(|address| ask(&gateway, &requests[0], address).unwrap()).into();
    expect_refusal(ask(&gateway, &requests[0], "2001:db8::1234"), 429, "limit_reached");
    assert!(ask(&gateway, &requests[0], "2001:db8:0:1::1").is_ok());
    drop(six);
    // Whoever leaves makes room for the next.
    for _ in 0..3 {
        drop(open.remove(0));
        let deadline = now() + PATIENCE;
        open.push(loop {
            match ask(&gateway, &requests[open.len() % 3], "198.51.100.7") {
                Ok(client) => break client,
                Err(_) => assert!(now() < deadline, "a place is never free again"),
            }
        });
    }
}

/// What a user has open on `/events` is a tab like any other.
#[test]
fn event_streams_are_tabs_of_their_user() {
    let gateway = start(&[("tabs_per_user_max", "2")]);
    let requests = [handshake(""), get("/events")].map(|request| with_lines(&request, &bearer(&token("ann"))));
    let _open = [&requests[0], &requests[1]].map(|request| ask(&gateway, request, "").unwrap());
    requests.iter().for_each(|request| expect_refusal(ask(&gateway, request, ""), 429, "limit_reached"));
    assert_eq!(gateway.metric("tabcast_refusals_total{reason=\"tabs_of_user\"}"), 2);
}

#[test]
fn nobody_but_a_trusted_proxy_is_believed() {
    let gateway = start(&[("trusted_proxies", "10.0.0.0/8"), ("tabs_per_address_max", "3")]);
    let requests = session_requests();
    let _open: Vec<_> =
        (1..=3).map(|last| ask(&gateway, &requests[0], &format!("198.51.100.{last}")).unwrap()).collect();
    expect_refusal(ask(&gateway, &requests[0], "198.51.100.4"), 429, "limit_reached");
    // Whoever runs it and forgot a proxy is told, once.
    let told = "none of trusted_proxies";
    assert!(gateway.wait_for_log(told).contains("peer=127.0.0.1"));
    assert!(!gateway.log().contains(told));
    let mut other = Client::new(connect_from(&gateway, [127, 0, 0, 2]));
    other.write(&requests[0]);
    other.expect_switch();
    // `Forwarded` is not looked at.
    let mut client = gateway.connect();
    client.write(&with_lines(&requests[1], "Forwarded: for=198.51.100.5\r\n"));
    assert_eq!(client.response().status, 429);
}

#[test]
fn one_address_cannot_take_all_connections() {
    let gateway = start(&[("connections_per_address_max", "4"), ("shards", "1"), ("header_timeout", "60s")]);
    let idle: Vec<_> = (0..4)
        .map(|_| {
            let mut client = gateway.connect();
            client.write(&get("/healthz"));
            assert_eq!(client.response().status, 200);
            client
        })
        .collect();
    for _ in 0..3 {
        let mut client = gateway.connect();
        client.write(&get("/healthz"));
        let response = client.response();
        assert_eq!((response.status, response.code().as_str()), (429, "limit_reached"));
        assert_eq!(response.header("retry-after"), Some("5"));
        assert!(client.until_the_end().is_empty());
    }
    let mut other = Client::new(connect_from(&gateway, [127, 0, 0, 9]));
    other.write(&with_lines(&get("/metrics"), &bearer("operator")));
    let text = other.response().text();
    assert_eq!(support::metric_in(&text, "tabcast_refusals_total{reason=\"connections_of_address\"}"), 3);
    assert_eq!(support::metric_in(&text, "tabcast_http_responses_total{status=\"4xx\"}"), 3);
    drop(idle);
    let deadline = now() + PATIENCE;
    loop {
        let mut client = gateway.connect();
        client.write(&get("/healthz"));
        if client.response().status == 200 {
            break;
        }
        assert!(now() < deadline, "a place is never free again");
    }
    // A session is no connection that waits for a request.
    let _tabs: Vec<_> = (0..10).map(|_| ask(&gateway, &session_requests()[0], "").unwrap()).collect();
}

#[test]
fn a_connection_that_waits_for_a_request_makes_room_the_longest_first() {
    let gateway = Gateway::start(&[("http_connections_max", "4"), ("shards", "1"), ("header_timeout", "60s")]);
    let health = |client: &mut Client| {
        client.write(&get("/healthz"));
        assert_eq!(client.response().status, 200);
    };
    let mut clients: Vec<_> = (0..4).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(health);
    // The first has asked last.
    health(&mut clients[0]);
    // Half a head takes nobody's place.
    clients[1].write(b"GET /healthz HTTP/1.1\r\n");
    std::thread::sleep(Duration::from_millis(100));
    let start = now();
    let mut next: Vec<_> = (0..2).map(|_| gateway.connect()).collect();
    next.iter_mut().for_each(health);
    assert!(start.elapsed() < PATIENCE, "nobody waits for header_timeout");
    assert!(clients[1].until_the_end().is_empty() && clients[2].until_the_end().is_empty());
    health(&mut clients[3]);
    health(&mut clients[0]);
    next.iter_mut().for_each(health);
    let mut client = gateway.connect();
    client.write(&get("/metrics"));
    assert_eq!(support::metric_in(&client.response().text(), "tabcast_evicted_connections_total"), 3);
}

#[test]
fn who_says_nothing_makes_room_before_a_request_too() {
    let few = [TRUSTED, ("http_connections_max", "4"), ("shards", "1"), ("header_timeout", "60s")];
    let authority = Authority::new();
    let gateway = authority.gateway(&[&KEYS[..], &few, &[("proxy_protocol", "v2")]].concat());
    let header = proxied("198.51.100.7".parse().unwrap());
    let start = now();
    let mut open = Vec::new();
    let mut silent: Vec<_> = (0..4).map(|_| gateway.connect()).collect();
    // Two have shown who they are, and not begun with TLS.
    silent[..2].iter_mut().for_each(|client| client.write(&header));
    for evicted in &mut silent {
        let mut client = gateway.connect();
        client.write(&header);
        let mut client = over(&authority.client(), client);
        client.write(&get("/healthz"));
        assert_eq!(client.response().status, 200);
        open.push(client);
        assert!(evicted.until_the_end().is_empty());
    }
    assert!(start.elapsed() < PATIENCE, "nobody waits for header_timeout");
}

/// Whoever says nothing, or nothing right, gets nothing.
fn expect_nothing(client: &mut Client) {
    assert!(client.until_the_end().is_empty());
}

#[test]
fn with_the_proxy_protocol_a_connection_is_whose_its_header_says() {
    let more = [TRUSTED, ("proxy_protocol", "v2"), ("connections_per_address_max", "2"), ("header_timeout", "1s")];
    let gateway = start(&more);
    let healthy = |client: &mut Client| {
        client.write(&get("/healthz"));
        client.response().status
    };
    let of = |address: &str| {
        let mut client = gateway.connect();
        client.write(&proxied(address.parse().unwrap()));
        client
    };
    let one = "198.51.100.7";
    let mut both = [of(one), of("::ffff:198.51.100.7")];
    assert_eq!(both.each_mut().map(healthy), [200, 200]);
    let mut third = of(one);
    third.write(&get("/healthz"));
    assert_eq!((third.response().status, healthy(&mut of("198.51.100.8"))), (429, 200));
    assert_eq!(healthy(&mut of("2001:db8::1")), 200);
    // Byte by byte, and with more behind the addresses.
    let mut slow = gateway.connect();
    let header = proxied("198.51.100.9".parse().unwrap());
    header.iter().for_each(|byte| slow.write(&[*byte]));
    assert_eq!(healthy(&mut slow), 200);
    let mut local = gateway.connect();
    local.write(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\x03\x04\0\0");
    assert_eq!(healthy(&mut local), 200);
    // No header, another one, half of one, and from somebody who is not trusted.
    for bytes in [&get("/healthz")[..], b"PROXY TCP4 198.51.100.7 127.0.0.1 1 2\r\n", &header[..20], b""] {
        let (mut client, start) = (gateway.connect(), now());
        client.write(bytes);
        expect_nothing(&mut client);
        assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    }
    let mut stranger = Client::new(connect_from(&gateway, [127, 0, 0, 2]));
    expect_nothing(&mut stranger);
    let mut asks = of("198.51.100.10");
    asks.write(&with_lines(&get("/metrics"), &bearer("operator")));
    let text = asks.response().text();
    let count = |reason: &str| support::metric_in(&text, &format!("tabcast_refusals_total{{reason=\"{reason}\"}}"));
    assert_eq!((count("no_introduction"), count("untrusted_peer"), count("connections_of_address")), (4, 1, 1));
}

#[test]
fn the_proxy_protocols_header_comes_before_tls() {
    let authority = Authority::new();
    let more = [TRUSTED, ("proxy_protocol", "v2"), ("tabs_per_address_max", "1"), ("worker", "none")];
    let gateway = authority.gateway(&[&KEYS[..], &more].concat());
    let connect = |address: &str| {
        let mut client = gateway.connect();
        client.write(&proxied(address.parse().unwrap()));
        over(&authority.client(), client)
    };
    let tab = with_lines(&handshake(""), &bearer(&token("ann")));
    let mut first = connect("198.51.100.7");
    first.write(&tab);
    first.expect_switch();
    let mut second = connect("198.51.100.7");
    // It is not a proxy: what it says of itself is not believed.
    second.write(&with_lines(&tab, "X-Forwarded-For: 198.51.100.9\r\n"));
    assert_eq!(second.response().status, 429);
    let mut other = connect("198.51.100.8");
    other.write(&tab);
    other.expect_switch();
}

#[test]
fn a_flood_of_handshakes_is_refused_before_anything_is_verified() {
    let check = |setting: &str, status: u16, reason: &str| {
        let gateway = start(&[(setting, "2")]);
        let mut client = gateway.connect();
        // On one connection: no busy machine makes seconds of it.
        client.write(&get("/events").repeat(40));
        let statuses: Vec<u16> = (0..40)
            .map(|_| {
                let response = client.response();
                if response.status != 401 {
                    assert_eq!((response.code().as_str(), response.header("retry-after")), ("rate_limited", Some("1")));
                }
                response.status
            })
            .collect();
        assert_eq!(statuses[..2], [401, 401]);
        let refused = statuses.iter().filter(|found| **found == status).count();
        assert!(refused >= 20 && statuses.iter().all(|found| [401, status].contains(found)), "{statuses:?}");
        assert_eq!(gateway.metric(&format!("tabcast_refusals_total{{reason=\"{reason}\"}}")), refused as u64);
    };
    check("handshakes_per_second_max", 503, "handshakes");
    check("handshakes_per_address_per_second_max", 429, "handshakes_of_address");
}

/// Anybody can have a signature looked at: for that the head of a token is enough.
#[test]
fn a_flood_of_signatures_gets_few_threads_and_leaves_room_for_others() {
    let key = concat!("kid=main,alg=ES256,public_key_file=", env!("CARGO_MANIFEST_DIR"), "/tests/keys/es256.pub.pem");
    let gateway = Gateway::start(&[
        ("token_keys", key),
        ("operator_keys", "operator"),
        ("connections_per_address_max", "0"),
        ("handshakes_per_second_max", "0"),
        ("handshakes_per_address_per_second_max", "0"),
        ("shards", "1"),
        ("worker", "none"),
    ]);
    let signed = |user: &str| {
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        header.kid = Some("main".to_owned());
        let key = jsonwebtoken::EncodingKey::from_ec_pem(include_bytes!("keys/es256.pem")).unwrap();
        jsonwebtoken::encode(&header, &json!({ "sub": user, "exp": 9_999_999_999_u64 }), &key).unwrap()
    };
    let (ann, mallory) = (signed("ann"), signed("mallory"));
    // Ann's claims under another's signature.
    let forged = format!("{}.{}", ann.rsplit_once('.').unwrap().0, mallory.rsplit_once('.').unwrap().1);
    let threads = || std::fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap().count();
    let before = threads();
    const FLOODERS: usize = 400;
    const REQUESTS: usize = 5;
    let mut flood: Vec<_> = (0..FLOODERS).map(|_| gateway.connect()).collect();
    let requests = with_lines(&get("/events"), &bearer(&forged)).repeat(REQUESTS);
    flood.iter_mut().for_each(|client| client.write(&requests));
    let mut other = gateway.connect();
    other.write(&get("/healthz"));
    assert_eq!(other.response().status, 200);
    let (mut most, mut answered) = (before, [0_usize; 2]);
    for client in &mut flood {
        for _ in 0..REQUESTS {
            let response = client.response();
            most = most.max(threads());
            match response.status {
                401 => answered[0] += 1,
                503 => {
                    assert_eq!((response.code().as_str(), response.header("retry-after")), ("overloaded", Some("1")));
                    answered[1] += 1;
                }
                other => panic!("{other}: {}", response.text()),
            }
        }
    }
    assert!(most <= before + 2, "{most} threads, and {before} before");
    assert!(answered[0] > 0, "{answered:?}");
    assert_eq!(gateway.metric("tabcast_refusals_total{reason=\"checks\"}"), answered[1] as u64);
    let mut tab = gateway.connect();
    tab.write(&with_lines(&handshake(""), &bearer(&ann)));
    tab.expect_switch();
}

#[test]
fn a_tab_that_says_too_much_is_told_by_its_own_ids_and_then_cut() {
    let gateway = start(&[("inbound_messages_per_second_max", "1"), ("bad_frames_max", "3")]);
    let mut tab = gateway.connect();
    tab.write(&session_requests()[0]);
    tab.expect_switch();
    // At once: a busy machine makes a few more of the ten that are allowed.
    let pings: Vec<u8> = (0..60)
        .flat_map(|n| masked(1, json!({"type": "ping", "client_id": n.to_string()}).to_string().as_bytes()))
        .collect();
    tab.write(&pings);
    let mut answers = Vec::new();
    let close = loop {
        match tab.frame() {
            Seen::Text(text) => answers.push(serde_json::from_slice::<serde_json::Value>(&text).unwrap()),
            Seen::Close(code, reason) => break (code, reason),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close, (1008, "policy violation".to_owned()));
    for (n, answer) in answers.iter().enumerate() {
        assert_eq!(answer["client_id"], n.to_string());
    }
    let pongs = answers.iter().filter(|answer| answer["type"] == "pong").count();
    let errors = answers.iter().filter(|answer| answer["code"] == "rate_limited").count();
    assert!((10..30).contains(&pongs) && errors == 3 && pongs + errors == answers.len(), "{pongs} {errors}");
    assert_eq!(gateway.metric("tabcast_limited_frames_total"), 4);
    // Pings of the protocol itself.
    let mut tab = gateway.connect();
    tab.write(&session_requests()[0]);
    tab.expect_switch();
    tab.write(&masked(9, b"").repeat(1_000));
    let code = loop {
        match tab.frame_or_pong() {
            Some(Seen::Close(code, _)) => break code,
            None => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(code, 1008);
}
