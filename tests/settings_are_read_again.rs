//! SIGHUP: new keys and limits count from then on, the log says which, and settings that are wrong change nothing.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::json;
use support::{Client, Gateway};
use tempfile::TempDir;

struct Reloaded {
    folder: TempDir,
    gateway: Gateway,
}

impl Reloaded {
    fn start(file: &str, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tabcast.toml");
        std::fs::write(folder.path().join("api.key"), "worker-1\n").unwrap();
        std::fs::write(&path, file.replace("FOLDER", folder.path().to_str().unwrap())).unwrap();
        let settings = [&[("config", path.to_str().unwrap())], variables].concat();
        Self { gateway: Gateway::start(&settings), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes the file and says so; the line with `said` is the answer.
    fn reload(&self, file: &str, said: &str) -> String {
        let file = file.replace("FOLDER", self.folder.path().to_str().unwrap());
        std::fs::write(self.path("tabcast.toml"), file).unwrap();
        self.gateway.signal(Signal::HUP);
        self.gateway.wait_for_log(said)
    }

    /// The status of a request with a key.
    fn status(&self, path: &str, key: &str) -> u16 {
        let mut client = self.gateway.connect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n");
        client.write(request.as_bytes());
        client.response().status
    }

    /// The status of a handshake with a token that `secret` signed.
    fn handshake(&self, kid: &str, secret: &[u8]) -> u16 {
        let header = jsonwebtoken::Header { kid: Some(kid.to_owned()), ..jsonwebtoken::Header::default() };
        let claims = json!({ "sub": "ann", "exp": 4_102_444_800_u64 });
        let key = jsonwebtoken::EncodingKey::from_secret(secret);
        let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
        let mut client = self.gateway.connect();
        let head = String::from_utf8(support::handshake("")).unwrap();
        let head = head.replace("\r\n\r\n", &format!("\r\nAuthorization: Bearer {token}\r\n\r\n"));
        client.write(head.as_bytes());
        status(&mut client)
    }
}

/// The status of an answer that may be no response with a body.
fn status(client: &mut Client) -> u16 {
    client.head().split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn keys_come_and_go_and_no_key_is_in_the_log() {
    let one = [b'1'; 32];
    let two = [b'2'; 32];
    let token_key = |kid: &str, secret: &[u8]| {
        format!("[[token_keys]]\nkid = '{kid}'\nalg = 'HS256'\nsecret = '{}'\n", String::from_utf8_lossy(secret))
    };
    let file = format!("api_keys = ['file:FOLDER/api.key']\noperator_keys = ['operator-1']\n{}", token_key("a", &one));
    let reloaded = Reloaded::start(&file, &[]);
    assert_eq!([reloaded.status("/metrics", "operator-1"), reloaded.status("/metrics", "operator-2")], [200, 401]);
    assert_eq!([reloaded.status("/api/users", "worker-1"), reloaded.status("/api/users", "worker-2")], [200, 401]);
    assert_eq!([reloaded.handshake("a", &one), reloaded.handshake("b", &two)], [101, 401]);
    let mut watcher = reloaded.gateway.connect();
    watcher.write(
        b"GET /events?watch=webchat:ann HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer operator-1\r\n\r\n",
    );
    assert_eq!(status(&mut watcher), 200);
    // The worker's key in its own file, the others in the file of settings.
    std::fs::write(reloaded.path("api.key"), "worker-2\nworker-3\n").unwrap();
    let keys = format!("api_keys = ['file:FOLDER/api.key']\noperator_keys = ['operator-2']\n{}", token_key("b", &two));
    let mut said = vec![
        reloaded.reload(&keys, "SIGHUP: token_keys: 1 → 1 (1 added, 1 taken away)"),
        reloaded.gateway.wait_for_log("SIGHUP: api_keys: 1 → 2 (2 added, 1 taken away)"),
        reloaded.gateway.wait_for_log("SIGHUP: operator_keys: 1 → 1 (1 added, 1 taken away)"),
    ];
    said.push(reloaded.gateway.log());
    for secret in ["worker-2", "operator-2", "2222"] {
        assert!(said.iter().all(|line| !line.contains(secret)), "{said:?}");
    }
    assert_eq!([reloaded.status("/metrics", "operator-1"), reloaded.status("/metrics", "operator-2")], [401, 200]);
    // Who watched with the old key is asked for one again.
    let last = String::from_utf8(watcher.until_the_end()).unwrap();
    assert!(last.contains("event: close\ndata: {\"code\":4001"), "{last}");
    assert_eq!([reloaded.status("/api/users", "worker-1"), reloaded.status("/api/users", "worker-3")], [401, 200]);
    assert_eq!([reloaded.handshake("a", &one), reloaded.handshake("b", &two)], [401, 101]);
    // Without the last key everything would be open.
    reloaded.reload("", "SIGHUP: no setting has changed: the first key ends development mode");
    assert_eq!([reloaded.status("/api/users", ""), reloaded.status("/api/users", "worker-3")], [401, 200]);
}

#[test]
fn limits_change_for_open_tabs_and_new_ones_and_what_is_wrong_changes_nothing() {
    let reloaded = Reloaded::start("tabs_per_user_max = 2\nworker = 'none'", &[("rooms_max", "3")]);
    let gateway = &reloaded.gateway;
    let handshake = |user: &str| {
        let mut client = gateway.connect();
        client.write(&support::handshake(&format!("user={user}")));
        let status = status(&mut client);
        (client, status)
    };
    let mut tab = gateway.tab("user=u");
    let second = gateway.tab("user=u");
    assert_eq!(handshake("u").1, 429);
    let said =
        reloaded.reload("tabs_per_user_max = 3\ntext_chars_max = 5\nworker = 'demo'", "tabs_per_user_max: 2 → 3");
    assert!(said.contains("INFO"), "{said}");
    gateway.wait_for_log("SIGHUP: text_chars_max: 16384 → 5");
    let said = gateway.wait_for_log("SIGHUP: worker: \"none\" → \"demo\" needs a restart");
    assert!(said.contains("WARN"), "{said}");
    let (_third, status) = handshake("u");
    assert_eq!(status, 101);
    tab.send(&json!({"type": "message", "text": "too long", "client_id": "1"}));
    assert_eq!(tab.json()["code"], "too_large");
    // Below what there is: who is here stays.
    reloaded.reload("tabs_per_user_max = 1", "tabs_per_user_max: 3 → 1");
    assert_eq!(handshake("u").1, 429);
    tab.send(&json!({"type": "message", "text": "long enough again", "client_id": "2"}));
    assert_eq!(tab.json()["type"], "ack");
    for (file, said) in [
        ("tabs_per_user_max = 5\nrooms_max = 0x", "line 2"),
        ("tabs_per_user_max = 5\nrooms = 1", "rooms in "),
        ("tabs_per_user_max = 0", "must be more than 0"),
        ("tabs_per_user_max = 5\nlog = 'a=b=c'", "log: "),
        ("tabs_per_user_max = 5\napi_keys = ['file:/nowhere']", "/nowhere"),
    ] {
        let line = reloaded.reload(file, "SIGHUP: no setting has changed: ");
        assert!(line.contains(said) && line.contains("ERROR"), "{line}");
        assert_eq!(handshake("u").1, 429, "{file}");
    }
    std::fs::remove_file(reloaded.path("tabcast.toml")).unwrap();
    gateway.signal(Signal::HUP);
    assert!(gateway.wait_for_log("no setting has changed: ").contains("cannot read"));
    // A variable is what it was at the start, and wins.
    reloaded.reload("rooms_max = 9\ntabs_per_user_max = 1\nworker = 'none'", "SIGHUP: no setting has changed");
    drop(second);
}

#[test]
fn connections_of_an_address_are_counted_before_there_is_a_limit() {
    let file = |max: u32| format!("operator_keys = ['operator']\nconnections_per_address_max = {max}");
    let reloaded = Reloaded::start(&file(0), &[]);
    let idle: Vec<_> = (0..3)
        .map(|_| {
            let mut client = reloaded.gateway.connect();
            client.write(&support::get("/healthz"));
            assert_eq!(client.response().status, 200);
            client
        })
        .collect();
    reloaded.reload(&file(3), "connections_per_address_max: 0 → 3");
    assert_eq!(reloaded.status("/healthz", ""), 429);
    reloaded.reload(&file(4), "connections_per_address_max: 3 → 4");
    assert_eq!(reloaded.status("/healthz", ""), 200);
    drop(idle);
}

#[test]
fn what_is_logged_changes() {
    let reloaded = Reloaded::start("log = 'info'", &[]);
    let said = reloaded.reload("log = 'info,tabcast=debug'", "SIGHUP: log: \"info\" → \"info,tabcast=debug\"");
    assert!(said.contains("INFO"));
    reloaded.reload("log = 'error'", "SIGHUP: log: \"info,tabcast=debug\" → \"error\"");
    // Only errors are logged now, and the changes that make it speak again.
    reloaded.reload("log = 'error'\nrooms_max = 1x", "line 2");
    reloaded.reload("log = 'info'\nrooms_max = 7", "rooms_max: 64 → 7");
    let said = reloaded.gateway.wait_for_log("SIGHUP: log: \"error\" → \"info\"");
    assert!(said.contains("INFO"));
}

#[test]
fn under_load_nothing_is_lost() {
    const MESSAGES: usize = 2_000;
    let reloaded = Reloaded::start("worker = 'none'", &[]);
    let gateway = &reloaded.gateway;
    let mut tab = gateway.tab("user=u");
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        while seen.len() < MESSAGES {
            seen.push(tab.json()["text"].as_str().unwrap().parse::<usize>().unwrap());
        }
        seen
    });
    let mut publisher = gateway.connect();
    for number in 0..MESSAGES {
        if number % 100 == 0 {
            let rooms_max = 1 + number / 100;
            std::fs::write(reloaded.path("tabcast.toml"), format!("rooms_max = {rooms_max}\nworker = 'none'")).unwrap();
            gateway.signal(Signal::HUP);
        }
        let body = json!({"channel_id": "u", "text": number.to_string()}).to_string();
        publisher.write(&support::post("/api/send", "application/json", body.as_bytes()));
        assert_eq!(publisher.response().status, 200);
    }
    assert_eq!(reader.join().unwrap(), (0..MESSAGES).collect::<Vec<_>>());
    gateway.wait_for_log("SIGHUP: rooms_max: ");
}
