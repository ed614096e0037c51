//! A WebSocket server that says back what it hears, text and binary: the driver, the reader, the writer and the limits
//! of the gateway, under a protocol of one's own. It is what a conformance suite is run against.
//!
//! `cargo run --release --example echo -- --listen 127.0.0.1:9001`, then `ws://127.0.0.1:9001/`.

use std::error::Error;
use std::io::Write;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fastwebsockets::upgrade::{is_upgrade_request, upgrade};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::SEC_WEBSOCKET_EXTENSIONS;
use hyper::{Method, Request, Response, StatusCode};
use tabcast::driver::listener::{Answer, AnswerFuture, Edge, HttpLimits};
use tabcast::driver::shard_thread::LocalShard;
use tabcast::driver::start::{DrainPlan, EdgeFactory, ShardThreads, Start};
use tabcast::fanout::hub::{Drain, Hub};
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Reaction, Wire};
use tabcast::id::UserId;
use tabcast::proto::deflate;
use tabcast::proto::event::Timestamp;
use tabcast::proto::frame::Frame;
use tabcast::proto::limits::{HubLimits, SessionLimits};

/// The longest message that is said back.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

struct Echo;

impl Inbound for Echo {
    fn text(&mut self, _session: &SessionRef, text: &mut [u8]) -> Reaction {
        // The reader has checked it.
        std::str::from_utf8(text).map_or(Reaction::Nothing, |text| Reaction::ReplyDeflated(Frame::text(text)))
    }

    fn binary(&mut self, _session: &SessionRef, bytes: &mut [u8]) -> Reaction {
        Reaction::ReplyDeflated(Frame::binary(bytes))
    }
}

/// Makes a session of every handshake on `/`.
struct Upgrades(Rc<LocalShard>);

impl Edge for Upgrades {
    fn answer(self: Rc<Self>, request: Request<Incoming>, peer: SocketAddr) -> AnswerFuture {
        Box::pin(std::future::ready(self.upgraded(request, peer)))
    }
}

impl Upgrades {
    fn upgraded(&self, mut request: Request<Incoming>, peer: SocketAddr) -> Answer {
        if request.uri().path() != "/" {
            return refusal(StatusCode::NOT_FOUND);
        }
        if request.method() != Method::GET || !is_upgrade_request(&request) {
            return refusal(StatusCode::UPGRADE_REQUIRED);
        }
        let Ok((response, _never)) = upgrade(&mut request) else { return refusal(StatusCode::BAD_REQUEST) };
        let offers = request.headers().get_all(SEC_WEBSOCKET_EXTENSIONS).iter();
        let extensions = deflate::accept(offers.filter_map(|offer| offer.to_str().ok()));
        let wire = Wire::websocket(extensions.map(|accepted| accepted.window));
        // Each connection is a user of its own.
        let Ok(user) = UserId::parse(&peer.to_string()) else { return refusal(StatusCode::BAD_REQUEST) };
        let identity = Identity::new(user, Timestamp::from_micros(0));
        let Ok(address) = self.0.open(Opening::new(identity, wire), |_| None) else {
            return refusal(StatusCode::SERVICE_UNAVAILABLE);
        };
        let mut head = b"HTTP/1.1 101 Switching Protocols\r\nserver: tabcast-echo\r\n".to_vec();
        let headers = response.headers().iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let extensions = extensions.map(|accepted| (SEC_WEBSOCKET_EXTENSIONS.as_str(), accepted.header.as_bytes()));
        for (name, value) in headers.chain(extensions) {
            head.extend_from_slice(&[name.as_bytes(), b": ", value, b"\r\n"].concat());
        }
        head.extend_from_slice(b"\r\n");
        Answer::Session { address, head, status: 101, place: None }
    }
}

fn refusal(status: StatusCode) -> Answer {
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = status;
    Answer::Respond(response)
}

struct Edges;

impl EdgeFactory for Edges {
    fn inbound(&self, _shard: u16) -> Box<dyn Inbound> {
        Box::new(Echo)
    }

    fn edge(&self, local: Rc<LocalShard>) -> Rc<dyn Edge> {
        Rc::new(Upgrades(local))
    }
}

fn listen_address() -> Result<SocketAddr, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next(), arguments.next()) {
        (None, None, None) => Ok(SocketAddr::from(([127, 0, 0, 1], 9001))),
        (Some("--listen"), Some(address), None) => Ok(address.parse()?),
        _ => Err("usage: echo [--listen ADDRESS:PORT]".into()),
    }
}

fn start(listen: SocketAddr) -> std::io::Result<ShardThreads> {
    // A suite takes a ping of ours for an answer that it did not ask for: none comes in the time that a case may take.
    let heartbeat_interval = Duration::from_secs(3600);
    let sessions = SessionLimits {
        message_bytes_max: MESSAGE_BYTES_MAX,
        heartbeat_interval,
        // The suite talks as fast as it can.
        inbound_messages_per_second_max: 0,
        inbound_bytes_per_second_max: 0,
        ..SessionLimits::default()
    };
    let limits = HubLimits::default();
    let hub = Hub::new(std::thread::available_parallelism().map_or(1, usize::from), &limits, &sessions);
    let start = Start {
        listen,
        own_file_tables: false,
        tls: None,
        sessions,
        http: HttpLimits::default(),
        bytes_budget: limits.bytes_budget,
    };
    let factory: Arc<dyn EdgeFactory> = Arc::new(Edges);
    ShardThreads::start(&hub, &start, &factory)
}

fn main() -> Result<(), Box<dyn Error>> {
    let threads = start(listen_address()?)?;
    writeln!(std::io::stdout(), "ready: ws://{}/", threads.address())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::signal::ctrl_c().await?;
        let time = Duration::from_secs(1);
        let sessions = Drain { spread: time, closes_per_second_max: u32::MAX, latest: time };
        threads.drain(DrainPlan { sessions, answers: time, deadline: 2 * time }, std::future::ready(())).await;
        Ok(())
    })
}
