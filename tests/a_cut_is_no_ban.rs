//! What cutting a user does, and what it cannot do: a token that is good until its `exp` is good until its `exp`.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::{Duration, SystemTime};

use serde_json::json;
use support::{Client, Gateway};

const SECRET: &str = "a secret for tests only: more than 32 bytes";

fn token(sub: &str, seconds: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    let claims = json!({ "sub": sub, "exp": (now + Duration::from_secs(seconds)).as_secs() });
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

fn handshake(token: &str) -> Vec<u8> {
    format!(
        "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {token}\r\n\r\n"
    )
    .into_bytes()
}

fn tab(gateway: &Gateway, token: &str) -> Client {
    let mut client = gateway.connect();
    client.write(&handshake(token));
    client.expect_switch();
    client
}

#[test]
fn a_token_is_good_until_it_expires() {
    let keys = format!("kid=main,alg=HS256,secret={SECRET}");
    let settings =
        [("token_keys", keys.as_str()), ("operator_keys", "operator"), ("token_leeway", "0s"), ("shards", "1")];
    let gateway = Gateway::start(&settings);
    let good = token("ann", 600);
    let mut first = tab(&gateway, &good);
    let mut other = tab(&gateway, &token("bob", 600));
    let mut operator = gateway.connect();
    operator.write(b"DELETE /api/users/ann HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer operator\r\n\r\n");
    assert_eq!(operator.response().status, 200);
    assert_eq!(first.closed(), (4010, "kicked".to_owned()));
    // The same token again: nothing remembers that it was cut.
    tab(&gateway, &good).send(&json!({ "type": "ping" }));
    other.send(&json!({ "type": "ping" }));
    assert_eq!(other.json()["type"], "pong", "nobody else was cut");
    // Its own end is kept to.
    let mut short = gateway.connect();
    short.write(&handshake(&token("ann", 0)));
    let refused = short.response();
    assert_eq!((refused.status, refused.code().as_str()), (401, "token_expired"));
    // Another key is another word: what was signed by a key that is gone is nothing any more.
    let other_keys = keys.replace("secret=a", "secret=A");
    let restarted = Gateway::start(&[("token_keys", other_keys.as_str()), ("shards", "1")]);
    let mut refused = restarted.connect();
    refused.write(&handshake(&good));
    assert_eq!(refused.response().status, 401);
}
