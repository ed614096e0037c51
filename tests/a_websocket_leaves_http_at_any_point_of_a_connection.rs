//! A handshake may follow other requests on its connection, and frames may follow it at once: not a byte is lost.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::json;
use support::{Client, Gateway, get, handshake, masked, post};

fn ping(client_id: &str) -> Vec<u8> {
    masked(1, json!({"type": "ping", "client_id": client_id}).to_string().as_bytes())
}

fn expect_pong(tab: &mut Client, client_id: &str) {
    assert_eq!(tab.json(), json!({"type": "pong", "client_id": client_id}));
}

fn send() -> Vec<u8> {
    post("/api/send", "application/json", br#"{"channel_id":"nobody","text":"x"}"#)
}

/// The same body in chunks.
fn send_chunked() -> Vec<u8> {
    let head = "POST /api/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    format!("{head}8\r\n{{\"channe\r\n1a\r\nl_id\":\"nobody\",\"text\":\"x\"}}\r\n0\r\n\r\n").into_bytes()
}

#[test]
fn after_requests_on_the_same_connection_with_frames_right_behind_the_handshake() {
    let gateway = Gateway::start(&[("shards", "2")]);
    let earlier: [&[Vec<u8>]; 5] =
        [&[], &[get("/healthz"), get("/healthz")], &[send()], &[send_chunked()], &[get("/"), send(), get("/nothing")]];
    for (round, requests) in earlier.into_iter().enumerate() {
        for is_pipelined in [false, true] {
            let mut client = gateway.connect();
            let frames = [ping("one"), ping("two"), ping("three")].concat();
            // The last frame is cut, in its header or in its payload.
            let cut = frames.len() - [1, 9, 20, 48, 50][round];
            if is_pipelined {
                client.write(&[&requests.concat()[..], &handshake("user=u"), &frames[..cut]].concat());
                for _ in requests {
                    client.response();
                }
            } else {
                for request in requests {
                    client.write(request);
                    client.response();
                }
                client.write(&[&handshake("user=u")[..], &frames[..cut]].concat());
            }
            client.expect_switch();
            client.write(&frames[cut..]);
            for client_id in ["one", "two", "three"] {
                expect_pong(&mut client, client_id);
            }
        }
    }
}

#[test]
fn while_earlier_responses_are_not_flushed() {
    let gateway = Gateway::start(&[]);
    let script = {
        let mut client = gateway.connect();
        client.write(&get("/app.js"));
        client.response().body
    };
    // More than the socket's buffers hold, so that the handshake is read while responses wait.
    let count = (8 << 20) / script.len();
    let mut client = Client::connect_narrow(gateway.address, 16 << 10);
    let requests = get("/app.js").repeat(count);
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        std::io::Write::write_all(&mut sender, &[requests, handshake("user=u"), ping("behind")].concat()).unwrap();
    });
    for _ in 0..count {
        assert!(client.response().body == script);
    }
    client.expect_switch();
    expect_pong(&mut client, "behind");
    sending.join().unwrap();
}

#[test]
fn a_handshake_with_a_body_is_refused() {
    let gateway = Gateway::start(&[]);
    let mut client = gateway.connect();
    let request = String::from_utf8(handshake("user=u")).unwrap();
    client.write(request.replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\n12345").as_bytes());
    let response = client.response();
    assert_eq!((response.status, response.code().as_str()), (400, "bad_handshake"));
}
