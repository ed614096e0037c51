//! Shards on threads without a gateway above them, as an embedder of the driver would have them.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test's helper fails the test")]

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tabcast::driver::listener::{Answer, AnswerFuture, Edge, HttpLimits};
use tabcast::driver::shard_thread::LocalShard;
use tabcast::driver::start::{DrainPlan, EdgeFactory, ShardThreads, Start};
use tabcast::fanout::hub::{Drain, Hub};
use tabcast::fanout::session::{Identity, RoomGrant, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Reaction, Wire};
use tabcast::id::{RoomName, UserId};
use tabcast::proto::event::{Notice, Timestamp};
use tabcast::proto::frame::Frame;
use tabcast::proto::limits::{HubLimits, SessionLimits};

/// Holds up the shards that read `{"pause":true}`, for as long as a test holds it.
pub(crate) static PAUSE: Mutex<()> = Mutex::new(());
/// Shards that have read it, ever.
pub(crate) static PAUSES: AtomicUsize = AtomicUsize::new(0);

/// Texts are `{"join":"room"}`, answered with a pong, and `{"pause":true}`.
struct Joins;

impl Inbound for Joins {
    fn text(&mut self, _session: &SessionRef, text: &mut [u8]) -> Reaction {
        let text: serde_json::Value = serde_json::from_slice(text).unwrap();
        if text["pause"] == true {
            PAUSES.fetch_add(1, Ordering::Release);
            drop(PAUSE.lock().unwrap_or_else(PoisonError::into_inner));
            return Reaction::Nothing;
        }
        let room = RoomName::parse(text["join"].as_str().unwrap()).unwrap();
        let pong = || Frame::notice(&Notice::Pong { client_id: None });
        Reaction::Join { room, ack: Some(pong()), full: pong() }
    }
}

const SWITCHED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
const STREAMS: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Every request for `/ws?user=…` becomes that user's session, whatever its headers; for `/events?user=…` one that is
/// read as an event stream.
struct Opens(Rc<LocalShard>);

impl Edge for Opens {
    fn answer(self: Rc<Self>, request: Request<Incoming>, _peer: SocketAddr) -> AnswerFuture {
        let user = request.uri().query().and_then(|query| query.strip_prefix("user=")).map(UserId::parse);
        let Some(Ok(user)) = user else {
            return Box::pin(std::future::ready(Answer::Respond(Response::new(Full::new(Bytes::from("no session"))))));
        };
        let identity = Identity { rooms: RoomGrant::Any, ..Identity::new(user, Timestamp::from_micros(0)) };
        let (wire, head) = match request.uri().path() {
            "/events" => (Wire::EventStream, STREAMS),
            _ => (Wire::WebSocket, SWITCHED),
        };
        let answer = match self.0.open(Opening::new(identity, wire), |_| None) {
            Ok(address) => Answer::Session { address, head: head.to_vec(), status: 200, place: None },
            Err(error) => Answer::Respond(Response::new(Full::new(Bytes::from(error.to_string())))),
        };
        Box::pin(std::future::ready(answer))
    }
}

struct Edges;

impl EdgeFactory for Edges {
    fn inbound(&self, _shard: u16) -> Box<dyn Inbound> {
        Box::new(Joins)
    }

    fn edge(&self, local: Rc<LocalShard>) -> Rc<dyn Edge> {
        Rc::new(Opens(local))
    }
}

pub(crate) struct Shards {
    pub(crate) hub: Arc<Hub>,
    threads: ShardThreads,
}

impl Shards {
    pub(crate) fn start(shards: usize) -> Self {
        Self::try_start(shards, "127.0.0.1:0".parse().unwrap()).unwrap()
    }

    pub(crate) fn try_start(shards: usize, listen: SocketAddr) -> std::io::Result<Self> {
        let sessions = SessionLimits {
            queue_frames_max: 100_000,
            queue_bytes_max: 64 << 20,
            // Long enough for a reader that a busy machine, or a sanitizer, holds up.
            close_timeout: Duration::from_secs(5),
            // Tests talk as fast as they can.
            inbound_messages_per_second_max: 0,
            inbound_bytes_per_second_max: 0,
            ..SessionLimits::default()
        };
        let hub_limits = HubLimits { tabs_per_user_max: usize::MAX, ..HubLimits::default() };
        let hub = Hub::new(shards, &hub_limits, &sessions);
        let start = Start {
            listen,
            own_file_tables: false,
            tls: None,
            sessions,
            http: HttpLimits::default(),
            bytes_budget: 256 << 20,
        };
        let factory: Arc<dyn EdgeFactory> = Arc::new(Edges);
        let threads = ShardThreads::start(&hub, &start, &factory)?;
        Ok(Self { hub, threads })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.threads.address()
    }

    pub(crate) fn drain(self, spread: Duration, deadline: Duration) -> usize {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let sessions = Drain { spread, closes_per_second_max: u32::MAX, latest: deadline };
        let plan = DrainPlan { sessions, answers: spread, deadline };
        runtime.block_on(self.threads.drain(plan, std::future::ready(())))
    }
}
