//! Several engines live in one process, each with its own users, rooms, bounds and end; and threads end with their engine.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "its main is the program's")]
#[path = "examples/in_hyper.rs"]
mod in_hyper;
#[allow(dead_code, reason = "its main is the program's")]
#[path = "examples/own_transport.rs"]
mod own_transport;
mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use support::{Client, Seen, handshake, masked, with_lines};
use tabcast::driver::embed::Tabs;
use tabcast::driver::start::DrainPlan;
use tabcast::engine::mailboxes::Mailboxes;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::Identity;
use tabcast::id::{ChannelId, RoomName, UserId};
use tabcast::platform::adapter::{BotIdentity, Outlet, PlatformAdapter, Unanswered};
use tabcast::platform::webchat::{SendOptions, WebChat};
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::limits::{HubLimits, RecoveryLimits, SessionLimits};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

const ANN: &str = "X-User: ann\r\n";
const PATIENCE: Duration = Duration::from_secs(20);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = support::now() + PATIENCE;
    while !is_so() {
        assert!(support::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Names of this process's threads that are an engine's.
fn engine_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        // One that has just ended has none.
        std::fs::read_to_string(entry.ok()?.path().join("comm")).ok()
    };
    threads.filter_map(name).filter(|name| name.starts_with("shard-") || name.starts_with("mailboxes")).count()
}

fn serve(runtime: &Runtime, tabs: &Tabs) -> SocketAddr {
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        #[expect(clippy::disallowed_methods, reason = "it lives as long as the runtime")]
        tokio::spawn(in_hyper::serve(listener, tabs.clone()));
        address
    })
}

fn tab(address: SocketAddr) -> Client {
    let mut client = Client::connect(address);
    client.write(&with_lines(&handshake("hello=1"), ANN));
    client.expect_switch();
    assert_eq!(client.json()["type"], "hello");
    client
}

/// The tests of this file count threads of one process: one after the other.
#[test]
fn engines_share_nothing_and_leave_nothing() {
    two_engines_in_one_process_have_users_rooms_and_ends_of_their_own();
    wait_until("every thread has ended", || engine_threads() == 0);
    an_adapter_that_stops_closes_no_socket_and_still_sends();
    wait_until("every thread has ended", || engine_threads() == 0);
    dropping_the_tabs_ends_their_threads_once_their_sockets_are_closed();
    connections_that_are_no_plain_sockets_are_carried();
    wait_until("every thread has ended", || engine_threads() == 0);
    lines_over_tcp_are_tabs_like_any_other();
    whoever_reads_is_not_cut_for_what_another_engine_holds();
    wait_until("every thread has ended", || engine_threads() == 0);
}

fn two_engines_in_one_process_have_users_rooms_and_ends_of_their_own() {
    let runtime = runtime();
    let tabs = [0, 1].map(|_| runtime.block_on(async { in_hyper::tabs().unwrap() }));
    let bots = tabs.each_ref().map(|tabs| WebChat::new(tabs.engine().clone().into(), BotIdentity::default()));
    let addresses = tabs.each_ref().map(|tabs| serve(&runtime, tabs));
    let mut clients = addresses.map(tab);
    for client in &mut clients {
        client.send(&json!({"type": "join", "room": "lobby", "client_id": "j"}));
        assert_eq!(client.json()["type"], "ack");
    }
    let channels = [ChannelId::parse("ann").unwrap(), ChannelId::Room(RoomName::parse("lobby").unwrap())];
    for channel in &channels {
        for (number, bot) in bots.iter().enumerate() {
            let text = format!("of {number}");
            let report = runtime.block_on(bot.send_report(channel, &text, SendOptions::default())).unwrap();
            assert_eq!(report.delivery.tabs, 1, "{channel} of engine {number}");
            assert_eq!(clients[number].json()["text"], *text);
        }
    }
    // The first drains; the second goes on, threads and all.
    let [first, second] = tabs;
    let threads = 2 * (1 + first.engine().settings().shards);
    wait_until("each has its threads", || engine_threads() == threads);
    let [mut of_first, mut of_second] = clients;
    let mut events = Client::connect(addresses[0]);
    let request = b"GET /events?hello=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    events.write(&with_lines(request, ANN));
    assert!(events.head().starts_with("HTTP/1.1 200 OK\r\n"));
    let shutdown = runtime.spawn({
        let first = first.clone();
        async move { first.shutdown(DrainPlan::within(Duration::from_secs(4))).await }
    });
    assert_eq!(of_first.json()["type"], "draining");
    assert_eq!(of_first.closed().0, 1012);
    drop(of_first);
    // Its last chunk, and then its end.
    let heard = String::from_utf8(events.until_the_end()).unwrap();
    for part in [r#"data: {"type":"hello","#, r#"data: {"type":"draining","#, "retry: ", "\r\n0\r\n\r\n"] {
        assert!(heard.contains(part), "{part} is not in {heard}");
    }
    assert_eq!(runtime.block_on(shutdown).unwrap(), 0);
    drop(first);
    wait_until("its threads have ended", || engine_threads() == threads / 2);
    assert!(!second.is_draining());
    of_second.send(&json!({"type": "message", "text": "still here", "client_id": "m"}));
    let heard: Vec<Value> = (0..3).map(|_| of_second.json()).collect();
    assert_eq!(heard[2]["text"], "ann said: still here", "{heard:?}");
    drop(second);
    // What is left of the runtime holds no tabs.
    runtime.shutdown_background();
    assert_eq!(of_second.json()["type"], "draining");
    assert_eq!(of_second.closed().0, 1012);
}

fn an_adapter_that_stops_closes_no_socket_and_still_sends() {
    let runtime = runtime();
    let tabs = runtime.block_on(async { in_hyper::tabs().unwrap() });
    let bot = WebChat::new(tabs.engine().clone().into(), BotIdentity::default());
    let mut ann = tab(serve(&runtime, &tabs));
    let channel = ChannelId::parse("ann").unwrap();
    for (step, running) in [("before", true), ("stopped", false), ("stopped again", false), ("started", true)] {
        match step {
            "before" => {}
            "started" => bot.start(),
            _ => bot.stop(),
        }
        assert_eq!(bot.is_running(), running, "{step}");
        let report = runtime.block_on(bot.send_report(&channel, step, SendOptions::default())).unwrap();
        assert_eq!(report.delivery.tabs, 1, "{step}");
        assert_eq!(ann.json()["text"], *step);
        // Both ways: the tab is a session still.
        ann.send(&json!({"type": "ping", "client_id": step}));
        assert_eq!(ann.json(), json!({"type": "pong", "client_id": step}));
    }
    assert!(!tabs.is_draining());
    assert_eq!(tabs.engine().hub().registry().total_connections(), 1);
    drop(ann);
}

fn dropping_the_tabs_ends_their_threads_once_their_sockets_are_closed() {
    let runtime = runtime();
    let settings = EngineSettings { shards: 2, ..EngineSettings::default() };
    let tabs = runtime.block_on(async { Tabs::start(&Engine::new(settings), Unanswered).unwrap() });
    wait_until("there are a thread for each shard and one more", || engine_threads() == 3);
    // An engine's shards are started once.
    let again = runtime.block_on(async { Tabs::start(tabs.engine(), Unanswered) });
    assert!(again.is_err());
    let address = serve(&runtime, &tabs);
    let mut client = tab(address);
    let engine = tabs.engine().clone();
    drop(tabs);
    drop(runtime);
    assert_eq!(client.json()["type"], "draining");
    assert_eq!(client.closed().0, 1012);
    client.write(&masked(8, &1012_u16.to_be_bytes()));
    assert_eq!(client.frame(), Seen::End);
    wait_until("its threads have ended", || engine_threads() == 0);
    assert_eq!(engine.hub().registry().total_connections(), 0);
}

/// What a server would have under its HTTP that speaks TLS itself.
struct Opaque(tokio::net::UnixStream);

impl AsyncRead for Opaque {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Opaque {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

fn connections_that_are_no_plain_sockets_are_carried() {
    let runtime = runtime();
    let tabs = runtime.block_on(async { in_hyper::tabs().unwrap() });
    let bot = WebChat::new(tabs.engine().clone().into(), BotIdentity::default());
    let channel = ChannelId::parse("ann").unwrap();
    let mut clients = [false, true].map(|is_opaque| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let served = tabs.clone();
        runtime.spawn(async move {
            let stream = tokio::net::UnixStream::from_std(theirs).unwrap();
            if is_opaque {
                in_hyper::serve_one(Opaque(stream), served).await;
            } else {
                in_hyper::serve_one(stream, served).await;
            }
        });
        let mut client = Client::over(ours);
        client.write(&[with_lines(&handshake("hello=1"), ANN), masked(1, br#"{"type":"ping"}"#)].concat());
        client.expect_switch();
        assert_eq!(client.json()["type"], "hello");
        assert_eq!(client.json(), json!({"type": "pong"}));
        client
    });
    // More than all buffers on the way hold at once.
    let large = "x".repeat(1 << 20);
    for text in [&*large, "small"] {
        runtime.block_on(bot.send(&channel, text)).unwrap();
        for client in &mut clients {
            assert_eq!(client.json()["text"], *text);
        }
    }
    let [mut plain, mut opaque] = clients;
    // The client goes, and the tab with it; the server goes, and the client is told.
    opaque.write(&masked(8, &1000_u16.to_be_bytes()));
    assert_eq!(opaque.closed().0, 1000);
    assert_eq!(opaque.frame(), Seen::End);
    wait_until("the carried tab is gone", || tabs.engine().hub().registry().total_connections() == 1);
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let served = tabs.clone();
    runtime.spawn(async move {
        in_hyper::serve_one(Opaque(tokio::net::UnixStream::from_std(theirs).unwrap()), served).await;
    });
    let mut carried = Client::over(ours);
    carried.write(&with_lines(&handshake("hello=1"), ANN));
    carried.expect_switch();
    assert_eq!(carried.json()["type"], "hello");
    let shutdown = runtime.spawn(async move { tabs.shutdown(DrainPlan::within(Duration::from_secs(8))).await });
    for client in [&mut plain, &mut carried] {
        assert_eq!(client.json()["type"], "draining");
        assert_eq!(client.closed().0, 1012);
        client.write(&masked(8, &1012_u16.to_be_bytes()));
        assert_eq!(client.frame(), Seen::End);
    }
    assert_eq!(runtime.block_on(shutdown).unwrap(), 0);
}

fn lines_over_tcp_are_tabs_like_any_other() {
    let runtime = runtime();
    let engine = Engine::new(EngineSettings::default());
    let address = runtime.block_on(async {
        let mailboxes = own_transport::start(&engine).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        #[expect(clippy::disallowed_methods, reason = "it lives as long as the runtime")]
        tokio::spawn(own_transport::serve(listener, mailboxes, engine.clone()));
        address
    });
    // A thread names itself when it runs.
    wait_until("there is one thread", || engine_threads() == 1);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"ann\n{\"type\":\"join\",\"room\":\"lobby\",\"client_id\":\"1\"}\n").unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next(), json!({"type": "ack", "client_id": "1"}));
    assert_eq!(engine.hub().registry().total_connections(), 1);
    let bot = WebChat::new(engine.clone().into(), BotIdentity::default());
    for channel in ["room:lobby", "ann"].map(|name| ChannelId::parse(name).unwrap()) {
        runtime.block_on(bot.send(&channel, "to all")).unwrap();
        assert_eq!(next()["text"], "to all");
    }
    stream.write_all(b"{\"type\":\"message\",\"text\":\"hi\",\"client_id\":\"2\"}\n").unwrap();
    assert_eq!(next()["type"], "ack");
    assert_eq!((next()["text"].clone(), next()["text"].clone()), (json!("hi"), json!("ann said: hi")));
    drop(runtime);
    wait_until("the tab is gone", || engine.hub().registry().total_connections() == 0);
}

/// The budget is of the process's memory, and is kept by those who do not read, whichever engine's they are.
fn whoever_reads_is_not_cut_for_what_another_engine_holds() {
    let runtime = runtime();
    let settings = || EngineSettings {
        sessions: SessionLimits { queue_bytes_max: 256 << 20, ..SessionLimits::default() },
        hub: HubLimits {
            bytes_budget: 8 << 20,
            recovery: RecoveryLimits { frames_max: 0, ..RecoveryLimits::default() },
            ..HubLimits::default()
        },
        ..EngineSettings::default()
    };
    let ann = |engine: &Engine| Identity::new(UserId::parse("ann").unwrap(), engine.now());
    runtime.block_on(async {
        let engines = [0, 1].map(|_| Engine::new(settings()));
        let mailboxes = engines.each_ref().map(|engine| Mailboxes::start(engine, Unanswered).unwrap());
        let bots = engines.each_ref().map(|engine| WebChat::new(engine.clone().into(), BotIdentity::default()));
        let mut stalled = mailboxes[0].connect(ann(&engines[0])).await.unwrap();
        let mut reader = mailboxes[1].connect(ann(&engines[1])).await.unwrap();
        let channel = ChannelId::parse("ann").unwrap();
        let large = "x".repeat(512 << 10);
        for n in 0..40 {
            bots[0].send(&channel, &large).await.unwrap();
            bots[1].send(&channel, &n.to_string()).await.unwrap();
            let heard = tokio::time::timeout(PATIENCE, reader.next()).await.unwrap().unwrap();
            assert!(String::from_utf8_lossy(heard.json()).contains(&format!(r#""text":"{n}""#)));
        }
        while tokio::time::timeout(PATIENCE, stalled.next()).await.unwrap().is_some() {}
        assert_eq!(stalled.ending(), Some(Disconnect::OverBudget));
        assert_eq!(reader.ending(), None);
    });
}
