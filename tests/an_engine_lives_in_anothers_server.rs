//! An engine in the servers of others: axum's and hyper's, with their own authentication, as the examples have them.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "its main is the program's")]
#[path = "examples/in_axum.rs"]
mod in_axum;
mod support;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use in_axum::App;
use serde_json::json;
use support::{Client, Response, Seen, handshake, masked, with_lines};
use tabcast::driver::embed::{EventsBody, Tabs, TabsSettings};
use tabcast::driver::start::DrainPlan;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::Identity;
use tabcast::id::{ChannelId, UserId};
use tabcast::metrics::{HandshakeOutcome, Refusal};
use tabcast::platform::adapter::{BotIdentity, Outlet, PlatformAdapter, Unanswered};
use tabcast::platform::webchat::WebChat;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::limits::HubLimits;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

const ANN: &str = "Cookie: theme=dark; session=s-ann\r\n";
const BEN: &str = "Cookie: session=s-ben\r\n";

/// The example's app, served as its main serves it.
struct Served {
    runtime: Runtime,
    app: App,
    address: SocketAddr,
}

impl Served {
    fn start() -> Self {
        Self::start_app(|| App::start().unwrap())
    }

    fn start_app(app: impl FnOnce() -> App) -> Self {
        Self::start_routed(app, App::router)
    }

    fn start_routed(app: impl FnOnce() -> App, router: impl FnOnce(App) -> axum::Router) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (app, address) = runtime.block_on(async {
            let app = app();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let serving = axum::serve(listener, router(app.clone()));
            #[expect(clippy::disallowed_methods, reason = "it lives as long as the runtime")]
            tokio::spawn(async { serving.await.unwrap() });
            (app, address)
        });
        Self { runtime, app, address }
    }

    fn tab(&self, query: &str, lines: &str) -> Client {
        let mut client = Client::connect(self.address);
        client.write(&with_lines(&handshake(query), lines));
        client.expect_switch();
        client
    }

    fn answer(&self, request: &[u8]) -> Response {
        let mut client = Client::connect(self.address);
        client.write(request);
        client.response()
    }

    fn notify(&self, user: &str, text: &str) -> String {
        let length = text.len();
        let request = format!(
            "POST /notify/{user} HTTP/1.1\r\nHost: localhost\r\n{BEN}Content-Type: text/plain\r\n\
             Content-Length: {length}\r\n\r\n{text}"
        );
        self.answer(request.as_bytes()).text()
    }

    /// Waits until a user has so many tabs: a 101 is written before the shard has the tab.
    fn wait_for_tabs(&self, count: usize) {
        let registry = self.app.tabs.engine().hub().registry();
        let deadline = support::now() + Duration::from_secs(20);
        while registry.total_connections() != count {
            assert!(support::now() < deadline, "{} tabs, not {count}", registry.total_connections());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn axum_makes_tabs_of_whom_its_own_sessions_name() {
    let served = Served::start();
    assert_eq!(served.answer(&with_lines(&handshake(""), "Cookie: session=nobodys\r\n")).status, 401);
    let mut ann = served.tab("hello=1", ANN);
    let mut another = served.tab("hello=1", ANN);
    let mut ben = served.tab("hello=1", BEN);
    for tab in [&mut ann, &mut another, &mut ben] {
        assert_eq!(tab.json()["type"], "hello");
    }
    served.wait_for_tabs(3);
    assert_eq!(served.notify("ann", "for ann"), "2 tabs");
    for tab in [&mut ann, &mut another] {
        assert_eq!(tab.json()["text"], "for ann");
    }
    // Answered by the handler; the echo goes to the tabs of whoever said it, and to nobody else's.
    ben.send(&json!({"type": "message", "text": "hi", "client_id": "1"}));
    let seen: Vec<_> = std::iter::from_fn(|| Some(ben.json())).take(3).collect();
    assert_eq!(seen[0]["type"], "ack");
    assert_eq!((&seen[1]["text"], &seen[1]["sender"]), (&json!("hi"), &json!("ben")));
    assert_eq!((&seen[2]["text"], &seen[2]["sender"]), (&json!("ben said: hi"), &json!("star")));
    ann.send(&json!({"type": "ping"}));
    assert_eq!(ann.json(), json!({"type": "pong"}), "nothing came between");
    // The router goes on as it was.
    assert_eq!(served.answer(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").text(), "an app of one's own");
}

#[test]
fn what_a_client_sends_with_its_handshake_and_what_it_missed_are_not_lost() {
    let served = Served::start();
    let mut client = Client::connect(served.address);
    let ping = masked(1, br#"{"type":"ping","client_id":"early"}"#);
    client.write(&[with_lines(&handshake(""), ANN), ping].concat());
    client.expect_switch();
    assert_eq!(client.json(), json!({"type": "pong", "client_id": "early"}));
    served.notify("ann", "one");
    let position = client.json()["id"].as_str().unwrap().to_owned();
    client.write(&masked(8, &1000_u16.to_be_bytes()));
    assert_eq!(client.closed().0, 1000);
    served.wait_for_tabs(0);
    served.notify("ann", "two");
    let mut back = served.tab(&format!("after={position}"), ANN);
    assert_eq!(back.json()["text"], "two");
    let mut unknown = served.tab("after=4d7e1b1c-0000-4000-8000-000000000000", ANN);
    assert_eq!(unknown.json()["type"], "gap");
}

/// The next chunk's content; empty for the last one.
fn chunk(client: &mut Client) -> String {
    let mut size = String::new();
    while !size.ends_with("\r\n") {
        size.push(char::from(client.take(1)[0]));
    }
    let bytes = usize::from_str_radix(size.trim_end(), 16).unwrap();
    let content = client.take(bytes + 2);
    String::from_utf8(content[..bytes].to_vec()).unwrap()
}

fn reader(served: &Served, query: &str, lines: &str) -> Client {
    let mut client = Client::connect(served.address);
    let request = format!("GET /events?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    client.write(&with_lines(request.as_bytes(), lines));
    let head = client.head();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("content-type: text/event-stream; charset=utf-8\r\n"), "{head}");
    client
}

#[test]
fn axum_answers_readers_of_events_with_what_tabs_hear() {
    let served = Served::start();
    let mut events = reader(&served, "hello=1", ANN);
    let mut tab = served.tab("hello=1", ANN);
    assert!(chunk(&mut events).starts_with(r#"data: {"type":"hello","#));
    tab.json();
    assert_eq!(served.notify("ann", "one\u{2028}line"), "2 tabs");
    let record = chunk(&mut events);
    let id = tab.json()["id"].as_str().unwrap().to_owned();
    let data = record.strip_prefix(&format!("id: {id}\ndata: ")).and_then(|rest| rest.strip_suffix("\n\n")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(data).unwrap()["text"], "one\u{2028}line");
    assert!(!data.contains('\u{2028}'), "some clients split lines there");
    // Who goes away is no tab any more; who comes back gets what it missed.
    drop(events);
    served.wait_for_tabs(1);
    served.notify("ann", "two");
    let mut back = reader(&served, "", &format!("{ANN}Last-Event-ID: {id}\r\n"));
    assert!(chunk(&mut back).contains(r#""text":"two""#));
    assert_eq!(served.answer(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 401);
    let shutdown = {
        let tabs = served.app.tabs.clone();
        served.runtime.spawn(async move { tabs.shutdown(DrainPlan::within(Duration::from_secs(8))).await })
    };
    assert!(chunk(&mut back).starts_with(r#"data: {"type":"draining","#));
    assert!(chunk(&mut back).starts_with("retry: "));
    assert_eq!(chunk(&mut back), "", "its end is the body's");
    let mut rest = tab.json();
    assert_eq!(std::mem::take(&mut rest["text"]), "two");
    assert_eq!(tab.json()["type"], "draining");
    assert_eq!(tab.closed().0, 1012);
    drop(tab);
    assert_eq!(served.runtime.block_on(shutdown).unwrap(), 0);
}

#[test]
fn a_reader_that_is_not_to_come_back_is_told_so() {
    let served = Served::start();
    let mut events = reader(&served, "", ANN);
    let engine = served.app.tabs.engine();
    served.runtime.block_on(engine.end_sessions(&UserId::parse("ann").unwrap(), Disconnect::Kicked)).unwrap();
    assert_eq!(chunk(&mut events), "event: close\ndata: {\"code\":4010,\"reason\":\"kicked\"}\n\n");
    assert_eq!(chunk(&mut events), "", "its end is the body's");
}

#[test]
fn a_user_may_have_as_many_tabs_as_are_allowed_now() {
    let hub = HubLimits { tabs_per_user_max: 1, ..HubLimits::default() };
    let engine = Engine::new(EngineSettings { shards: 1, hub, ..EngineSettings::default() });
    let served = Served::start_app(|| App::new(Tabs::start(&engine, Unanswered).unwrap()));
    let _first = reader(&served, "", ANN);
    let request = with_lines(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n", ANN);
    assert_eq!(served.answer(&request).status, 429);
    engine.hub().registry().limit_tabs_per_user(2);
    let _second = reader(&served, "", ANN);
    assert_eq!(served.answer(&request).status, 429);
}

/// The parts of a body's next record.
async fn record(body: &mut EventsBody) -> Vec<Bytes> {
    let mut parts: Vec<Bytes> = Vec::new();
    while parts.last().is_none_or(|part| !part.ends_with(b"\n\n")) {
        let frame = tokio::time::timeout(Duration::from_secs(20), body.frame()).await.expect("in time");
        parts.push(frame.expect("it goes on").unwrap().into_data().unwrap());
    }
    parts
}

#[tokio::test]
async fn readers_of_a_large_record_share_its_one_buffer() {
    let engine = Engine::new(EngineSettings { shards: 1, ..EngineSettings::default() });
    let tabs = Tabs::start(&engine, Unanswered).unwrap();
    let bot = WebChat::new(engine.clone().into(), BotIdentity::default());
    let mut bodies = Vec::new();
    for _ in 0..3 {
        let ann = Identity::new(UserId::parse("ann").unwrap(), engine.now());
        let response = tabs.events(&http::Request::new(()), ann).await;
        assert_eq!(response.status(), 200);
        bodies.push(response.into_body());
    }
    let channel = ChannelId::parse("ann").unwrap();
    // With a separator that its form for event streams has to escape, and without.
    for text in ["x".repeat(100_000), "\u{2028}".repeat(50_000)] {
        let id = bot.send(&channel, &text).await.unwrap();
        let mut places = Vec::new();
        for body in &mut bodies {
            let parts = record(body).await;
            let whole = String::from_utf8(parts.concat()).unwrap();
            let start = format!("id: {id}\ndata: ");
            let data = whole.strip_prefix(&start).and_then(|rest| rest.strip_suffix("\n\n")).unwrap();
            assert_eq!(serde_json::from_str::<serde_json::Value>(data).unwrap()["text"], text);
            // Kept, so that no other may lie there.
            places.push(parts.into_iter().max_by_key(Bytes::len).unwrap());
        }
        assert!(places.iter().all(|part| part.len() > 100_000 && part.as_ptr() == places[0].as_ptr()));
    }
}

#[test]
fn readers_of_events_that_come_at_once_are_no_more_than_there_may_be() {
    let engine = Engine::new(EngineSettings { shards: 1, ..EngineSettings::default() });
    let settings = TabsSettings { tabs_max: 2, ..TabsSettings::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let tabs = Tabs::start_with(&engine, Unanswered, settings).unwrap();
        let request = axum::http::Request::new(());
        let asked = |user: usize| {
            tabs.events(&request, Identity::new(UserId::parse(&format!("u{user}")).unwrap(), engine.now()))
        };
        // Each is asked for before any is open.
        let answers = futures_util::future::join_all((0..5).map(asked).collect::<Vec<_>>()).await;
        let statuses: Vec<_> = answers.iter().map(|answer| answer.status().as_u16()).collect();
        assert_eq!(statuses, [200, 200, 503, 503, 503]);
        assert_eq!(engine.hub().registry().total_connections(), 2);
        // Who reads no more leaves its place, and so has everybody whom nobody let in.
        drop(answers);
        let deadline = support::now() + Duration::from_secs(20);
        while engine.hub().registry().total_connections() > 0 {
            assert!(support::now() < deadline, "a reader is never gone");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(asked(5).await.status(), 200);
    });
}

#[test]
fn who_is_on_the_way_counts_among_the_tabs() {
    let engine = Engine::new(EngineSettings { shards: 1, ..EngineSettings::default() });
    let settings = TabsSettings { tabs_max: 1, ..TabsSettings::default() };
    let tabs = || App::new(Tabs::start_with(&engine, Unanswered, settings).unwrap());
    let served = Served::start_routed(tabs, |app| {
        let tabs = app.tabs.clone();
        let held = async move |mut request: axum::extract::Request| -> axum::response::Response {
            let ann = Identity::new(UserId::parse("ann").unwrap(), tabs.engine().now());
            let _switched = tabs.websocket(&mut request, ann);
            // What is never answered is never upgraded.
            std::future::pending().await
        };
        app.router().route("/held", axum::routing::any(held))
    });
    let mut held = Client::connect(served.address);
    let request = String::from_utf8(handshake("")).unwrap();
    held.write(request.replace("/ws", "/held").as_bytes());
    let deadline = support::now() + Duration::from_secs(20);
    while engine.metrics().engine.handshakes.of(HandshakeOutcome::WebSocket).value() == 0 {
        assert!(support::now() < deadline, "nobody is on the way");
        std::thread::sleep(Duration::from_millis(2));
    }
    let events = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for request in [with_lines(&handshake(""), BEN), with_lines(events, BEN)] {
        let refused = served.answer(&request);
        assert_eq!((refused.status, &*refused.code()), (503, "limit_reached"));
    }
    // Who has gone on the way leaves its place.
    drop(held);
    while engine.hub().registry().total_connections() == 0 {
        assert!(support::now() < deadline, "the place stays taken");
        let mut ben = Client::connect(served.address);
        ben.write(&with_lines(&handshake(""), BEN));
        if ben.head().starts_with("HTTP/1.1 101 ") {
            served.wait_for_tabs(1);
            break;
        }
    }
}

#[test]
fn a_handshake_that_is_none_is_answered_as_at_the_gateway() {
    let served = Served::start();
    let check = |from: &str, to: &str, status: u16, code: &str| {
        let request = String::from_utf8(with_lines(&handshake(""), ANN)).unwrap();
        assert!(request.contains(from), "{from}");
        let response = served.answer(request.replace(from, to).as_bytes());
        assert_eq!((response.status, &*response.code()), (status, code), "{from} became {to}");
    };
    check("Upgrade: websocket", "Upgrade: h2c", 426, "upgrade_required");
    check("Connection: Upgrade", "Connection: keep-alive", 426, "upgrade_required");
    check("Version: 13", "Version: 8", 426, "websocket_version");
    check("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=", 400, "bad_handshake");
    check("GET", "POST", 405, "method_not_allowed");
    assert_eq!(served.app.tabs.engine().hub().registry().total_connections(), 0);
}

#[test]
fn one_tab_too_many_is_refused_before_or_after_the_handshake() {
    let hub = HubLimits { tabs_per_user_max: 1, ..HubLimits::default() };
    let engine = Engine::new(EngineSettings { shards: 2, hub, ..EngineSettings::default() });
    let settings = TabsSettings { tabs_max: 2, ..TabsSettings::default() };
    let served = Served::start_app(|| App::new(Tabs::start_with(&engine, Unanswered, settings).unwrap()));
    // All at once: which of them is the one is the shards' to say.
    let mut clients: Vec<Client> = (0..8).map(|_| Client::connect(served.address)).collect();
    for client in &mut clients {
        client.write(&with_lines(&handshake("hello=1"), ANN));
    }
    let mut tabs = Vec::new();
    for mut client in clients {
        let head = client.head();
        if head.starts_with("HTTP/1.1 101 ") {
            match client.frame() {
                Seen::Text(hello) => {
                    assert!(hello.starts_with(br#"{"type":"hello""#));
                    tabs.push(client);
                }
                refused => assert_eq!(refused, Seen::Close(1013, "over budget".to_owned())),
            }
        } else {
            // Of its user's, or of all: those that are on the way count there.
            let is_full = head.starts_with("HTTP/1.1 429 ") || head.starts_with("HTTP/1.1 503 ");
            assert!(is_full && head.contains("retry-after: 5"), "{head}");
        }
    }
    assert_eq!(tabs.len(), 1);
    let refusals = &engine.metrics().engine.refusals;
    let refused = refusals.of(Refusal::Tabs).value();
    let check = |request: &[u8], status: u16| {
        let response = served.answer(request);
        assert_eq!((response.status, &*response.code()), (status, "limit_reached"));
    };
    let events = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    check(&with_lines(&handshake(""), ANN), 429);
    check(&with_lines(events, ANN), 429);
    let _ben = reader(&served, "", BEN);
    served.wait_for_tabs(2);
    check(&with_lines(&handshake(""), BEN), 503);
    check(&with_lines(events, BEN), 503);
    assert_eq!(refusals.of(Refusal::Tabs).value(), refused + 2);
}

#[test]
fn a_shutdown_writes_what_is_queued_closes_and_waits_for_the_sockets() {
    let served = Served::start();
    let mut tabs: Vec<Client> = (0..20).map(|_| served.tab("", ANN)).collect();
    served.wait_for_tabs(20);
    assert_eq!(served.notify("ann", "last words"), "20 tabs");
    let shutdown = {
        let tabs = served.app.tabs.clone();
        served.runtime.spawn(async move { tabs.shutdown(DrainPlan::within(Duration::from_secs(8))).await })
    };
    for tab in &mut tabs {
        assert_eq!(tab.json()["text"], "last words");
        assert_eq!(tab.json()["type"], "draining");
        assert_eq!(tab.closed(), (1012, "service restart".to_owned()));
        tab.write(&masked(8, &1012_u16.to_be_bytes()));
        assert_eq!(tab.frame(), Seen::End);
    }
    assert_eq!(served.runtime.block_on(shutdown).unwrap(), 0);
    assert!(served.app.tabs.is_draining());
    let refused = served.answer(&with_lines(&handshake(""), ANN));
    assert_eq!((refused.status, &*refused.code()), (503, "draining"));
}
