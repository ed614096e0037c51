//! Tabs in another's HTTP server: functions from request to response, for hyper, axum or whatever speaks `http`.
//!
//! The server keeps its router, its middleware and its own idea of who asks. A WebSocket leaves it with its socket: once
//! the server has written the 101, the connection is handed to one of the engine's shard threads, and from then on it
//! costs what it costs in the binary, which is its slot, and no task and no buffer. That is so where the server's own
//! connection is a [`TcpStream`](tokio::net::TcpStream) or a [`UnixStream`](tokio::net::UnixStream) in a
//! [`TokioIo`](hyper_util::rt::TokioIo), as with `axum::serve` and hyper's own examples. What else a server has under
//! its HTTP (TLS of its own) cannot be handed on, and is carried: such a tab costs a task, 20 KiB of buffers and a pair
//! of Unix sockets more, and two copies of each byte.
//!
//! The server must let its connections be upgraded: `serve_connection(…).with_upgrades()` of hyper's `http1`,
//! `serve_connection_with_upgrades` of hyper-util, `axum::serve` as it is. WebSockets are HTTP/1.1 only.

mod carry;
mod events;
mod threads;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER, SEC_WEBSOCKET_EXTENSIONS};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Body;
use hyper::upgrade::OnUpgrade;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use crate::driver::embed::events::EventsBody;
use crate::driver::embed::threads::{Arrival, Threads};
use crate::driver::handshake;
use crate::driver::response::{Answered, draining, error, error_with, method_not_allowed};
use crate::driver::start::{DrainPlan, end_answers};
use crate::engine::Engine;
use crate::engine::mailboxes::{self, ConnectError, Mailboxes};
use crate::engine::worker::{NoRuntime, Worker, WorkerSettings};
use crate::fanout::hub::Drain;
use crate::fanout::registry::TooManyTabs;
use crate::fanout::session::Identity;
use crate::fanout::shard::{OpenError, Resume, Wire};
use crate::metrics::{HandshakeOutcome, Refusal};
use crate::platform::adapter::MessageHandler;

/// What the tabs of an embedded engine are started with.
#[derive(Debug, Clone)]
pub struct TabsSettings {
    /// Tabs of this engine, those that are on their way included. Default 100,000; each costs what
    /// [the crate's table](crate#memory) says. One more is answered 503.
    pub tabs_max: usize,
    /// Connections that are on their way from the server to a shard: a request was answered 101 and its client has not
    /// taken that yet; and readers of events whose tab is not open yet. Default 1,024; each costs a task of up to 4 KiB
    /// beside what it costs the server. One more is answered 503.
    pub arriving_max: usize,
    /// How long one may be on its way. Default 10 s.
    pub arrival_timeout: Duration,
    /// How people's messages reach the handler.
    pub worker: WorkerSettings,
}

impl Default for TabsSettings {
    fn default() -> Self {
        Self {
            tabs_max: 100_000,
            arriving_max: 1_024,
            arrival_timeout: Duration::from_secs(10),
            worker: WorkerSettings::default(),
        }
    }
}

impl TabsSettings {
    /// What a semaphore, and a queue, can count of that.
    fn arrivals_max(&self) -> usize {
        self.arriving_max.clamp(1, Semaphore::MAX_PERMITS)
    }
}

/// Why tabs were not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is nothing to run the handler.
    #[error(transparent)]
    NoRuntime(#[from] NoRuntime),
    /// The engine's shards were started before, and are not started twice: it takes a new engine.
    #[error("the engine's shards were started before, and are not started twice")]
    Started,
    /// Its mailboxes cannot be started.
    #[error(transparent)]
    Mailboxes(#[from] mailboxes::StartError),
    /// The kernel has no threads or descriptors left.
    #[error("cannot start the shards' threads: {0}")]
    Io(#[from] io::Error),
}

/// Why there is no tab: what is counted, and what is answered.
type Refused = (HandshakeOutcome, Answered);

/// What a reader of events wants, and its place among those that are on their way.
struct Wanted {
    resume: Resume,
    wants_hello: bool,
    room: OwnedSemaphorePermit,
}

/// The tabs of an engine inside of another's HTTP server. Clones are the same tabs.
///
/// There is a thread for each shard of the engine. [`Tabs::shutdown`] ends them in an orderly way; dropping the last clone
/// ends them too: tabs are told to come back (1012), what they have queued is written, and the threads are gone once the
/// tabs have closed, or a [`close_timeout`](crate::proto::limits::SessionLimits::close_timeout) later; and once nobody is
/// on the way to them. A handler that has a clone keeps them for as long as the engine runs: then it takes
/// [`Tabs::shutdown`].
///
/// ```no_run
/// use axum::extract::{Request, State};
/// use tabcast::driver::embed::Tabs;
/// use tabcast::engine::{Engine, EngineSettings};
/// use tabcast::fanout::session::Identity;
/// use tabcast::id::UserId;
/// use tabcast::platform::adapter::{Outlet, Unanswered};
///
/// async fn ws(State(tabs): State<Tabs>, mut request: Request) -> impl axum::response::IntoResponse {
///     // Whoever the router's own authentication says it is.
///     let ann = UserId::parse("ann").expect("an id");
///     let identity = Identity::new(ann, tabs.engine().now());
///     tabs.websocket(&mut request, identity)
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tabs = Tabs::start(&Engine::new(EngineSettings::default()), Unanswered)?;
/// let router = axum::Router::new().route("/ws", axum::routing::any(ws)).with_state(tabs);
/// axum::serve(tokio::net::TcpListener::bind("127.0.0.1:8080").await?, router).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Tabs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engine: Engine,
    worker: Worker,
    threads: Threads,
    mailboxes: Mailboxes,
    arriving: Arc<Semaphore>,
    settings: TabsSettings,
    next: AtomicUsize,
    is_draining: AtomicBool,
}

impl Tabs {
    /// Starts the shards of `engine`, whose people's messages go to `handler`: to
    /// [`Unanswered`](crate::platform::adapter::Unanswered) if they are nobody's.
    ///
    /// # Errors
    /// [`StartError`]: nothing runs.
    pub fn start(engine: &Engine, handler: impl MessageHandler) -> Result<Self, StartError> {
        Self::start_with(engine, handler, TabsSettings::default())
    }

    /// The same with settings of one's own.
    ///
    /// # Errors
    /// As [`Tabs::start`].
    pub fn start_with(
        engine: &Engine,
        handler: impl MessageHandler,
        settings: TabsSettings,
    ) -> Result<Self, StartError> {
        if engine.hub().is_claimed() {
            return Err(StartError::Started);
        }
        let worker = Worker::start_with(engine, handler, settings.worker.clone())?;
        let mailboxes = Mailboxes::start_with(engine, worker.texts())?;
        let threads = Threads::start(engine, worker.texts(), &settings)?;
        let arriving = Arc::new(Semaphore::new(settings.arrivals_max()));
        let (next, is_draining) = (AtomicUsize::new(0), AtomicBool::new(false));
        let engine = engine.clone();
        let shared = Shared { engine, worker, threads, mailboxes, arriving, settings, next, is_draining };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The engine whose tabs these are.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Answers a WebSocket handshake (RFC 6455 §4.2): with 101, and then the connection becomes a tab of `identity`; or
    /// with why it does not. Who asks, and whether from an origin that may, was decided before. A subprotocol is the
    /// caller's to choose, by a header of the response.
    ///
    /// `?after=` and `?hello=1` mean what they do at the gateway, and permessage-deflate is negotiated (RFC 7692). What
    /// only the shard finds out, after the 101, is told by a close frame.
    #[must_use = "the handshake is answered by it"]
    pub fn websocket<B: Body>(&self, request: &mut Request<B>, identity: Identity) -> Response<Full<Bytes>> {
        let outcome = self.switch(request, identity);
        self.count(outcome.as_ref().map_or_else(|(counted, _)| *counted, |_| HandshakeOutcome::WebSocket));
        outcome.unwrap_or_else(|(_, refusal)| refusal)
    }

    fn switch<B: Body>(&self, request: &mut Request<B>, identity: Identity) -> Result<Answered, Refused> {
        let bad = |response| (HandshakeOutcome::BadRequest, response);
        if let Some(response) = handshake::fault(request) {
            return Err(bad(response));
        }
        self.refuse_if_draining()?;
        let room = self.admit(&identity)?;
        let upgrading = request.extensions().get::<OnUpgrade>().is_some().then(|| hyper::upgrade::on(&mut *request));
        // It writes the answer's headers; the connection is taken in our own way.
        let (Some(upgrading), Ok((head, _))) = (upgrading, fastwebsockets::upgrade::upgrade(&mut *request)) else {
            let message = "the server in front does not let connections be upgraded";
            return Err(bad(error(StatusCode::INTERNAL_SERVER_ERROR, "no_upgrade", message)));
        };
        let extensions = handshake::extensions(request.headers());
        let parameter = |name| handshake::parameter(request.uri().query(), name);
        let arrival = Arrival {
            upgrading,
            engine: self.shared.engine.clone(),
            identity,
            wire: Wire::websocket(extensions.map(|accepted| accepted.window)),
            resume: Resume::from_position(parameter("after").as_deref()),
            wants_hello: parameter("hello").is_some_and(|value| value == "1"),
            _room: room,
        };
        // Ordering: Relaxed: any shard will do.
        let shard = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.threads.hand_over(shard, arrival).map_err(|_| (HandshakeOutcome::Draining, draining()))?;
        let mut response = head.map(|_| Full::default());
        if let Some(accepted) = extensions {
            let header = HeaderValue::from_static(accepted.header);
            response.headers_mut().insert(SEC_WEBSOCKET_EXTENSIONS, header);
        }
        Ok(response)
    }

    /// Answers a reader of events: with the records of a tab of `identity`, or with why there are none. Over HTTP/1.1 and
    /// HTTP/2 alike. `Last-Event-ID` or `?after=`, and `?hello=1`, mean what they do at the gateway; CORS is the caller's.
    ///
    /// It is a [`mailbox`](Mailboxes), which the server reads and writes: it costs what the server takes for a response.
    /// A reader that stalls is cut, and what was handed over goes; but what the server has taken stays until it gives the
    /// response up, so it should have a timeout for writes.
    ///
    /// # Cancel safety
    /// Dropped, it leaves no tab behind.
    pub fn events<B>(
        &self,
        request: &Request<B>,
        identity: Identity,
    ) -> impl Future<Output = Response<EventsBody>> + Send + use<B> {
        // Nothing of the request is kept: bodies need not be shared between threads.
        let (tabs, wanted) = (self.clone(), self.wanted(request, &identity));
        async move {
            let outcome = match wanted {
                Ok(wanted) => tabs.open_events(wanted, identity).await,
                Err(refused) => Err(refused),
            };
            tabs.count(outcome.as_ref().map_or_else(|(counted, _)| *counted, |_| HandshakeOutcome::Events));
            outcome.unwrap_or_else(|(_, refusal)| refusal.map(EventsBody::refusal))
        }
    }

    /// What a reader wants, if it may have it.
    fn wanted<B>(&self, request: &Request<B>, identity: &Identity) -> Result<Wanted, Refused> {
        if request.method() != Method::GET {
            return Err((HandshakeOutcome::BadRequest, method_not_allowed("GET")));
        }
        self.refuse_if_draining()?;
        let room = self.admit(identity)?;
        let parameter = |name| handshake::parameter(request.uri().query(), name);
        let resume = handshake::resume_of_reader(request.headers(), parameter("after"));
        let wants_hello = parameter("hello").is_some_and(|value| value == "1");
        Ok(Wanted { resume, wants_hello, room })
    }

    async fn open_events(&self, wanted: Wanted, identity: Identity) -> Result<Response<EventsBody>, Refused> {
        let Wanted { resume, wants_hello, room } = wanted;
        let opened = self.shared.mailboxes.open_events(identity, resume, wants_hello).await;
        // From here on it is one of the tabs, or none.
        drop(room);
        let tab = opened.map_err(|error| match error {
            ConnectError::Open(OpenError::TooManyTabs(limit)) => {
                self.full(StatusCode::TOO_MANY_REQUESTS, Refusal::TabsOfUser, &limit.to_string())
            }
            ConnectError::Open(OpenError::Draining) | ConnectError::Ended => (HandshakeOutcome::Draining, draining()),
            ConnectError::Open(error) => self.full(StatusCode::SERVICE_UNAVAILABLE, Refusal::Tabs, &error.to_string()),
        })?;
        let mut response = Response::new(EventsBody::of(tab));
        let lines = [
            (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (CACHE_CONTROL, "no-cache"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        response.headers_mut().extend(lines.map(|(name, value)| (name, HeaderValue::from_static(value))));
        Ok(response)
    }

    /// Tabs for a transport of one's own, beside those of this server.
    #[must_use]
    pub fn mailboxes(&self) -> &Mailboxes {
        &self.shared.mailboxes
    }

    fn refuse_if_draining(&self) -> Result<(), Refused> {
        if self.is_draining() { Err((HandshakeOutcome::Draining, draining())) } else { Ok(()) }
    }

    /// A place among those that are on their way, if with it there are no more tabs than there may be, of that user and of
    /// all. It is taken first: of two that come at once, each sees the other.
    fn admit(&self, identity: &Identity) -> Result<OwnedSemaphorePermit, Refused> {
        let Shared { engine, settings, arriving, .. } = &*self.shared;
        let room = Arc::clone(arriving).try_acquire_owned().map_err(|_| {
            let message = "too many connections are on their way; try again later";
            self.full(StatusCode::SERVICE_UNAVAILABLE, Refusal::Tabs, message)
        })?;
        let registry = engine.hub().registry();
        let arriving = settings.arrivals_max() - arriving.available_permits();
        if registry.total_connections() + arriving > settings.tabs_max {
            let message = "this node has as many tabs as it may have";
            return Err(self.full(StatusCode::SERVICE_UNAVAILABLE, Refusal::Tabs, message));
        }
        let tabs_max = registry.tabs_per_user_max();
        if registry.get_sessions(&identity.user).is_some_and(|sessions| sessions.len() >= tabs_max) {
            let message = TooManyTabs { tabs_max }.to_string();
            return Err(self.full(StatusCode::TOO_MANY_REQUESTS, Refusal::TabsOfUser, &message));
        }
        Ok(room)
    }

    fn full(&self, status: StatusCode, refusal: Refusal, message: &str) -> Refused {
        self.shared.engine.metrics().engine.refusals.of(refusal).increment();
        (HandshakeOutcome::LimitReached, error_with(status, "limit_reached", message, (RETRY_AFTER, "5")))
    }

    fn count(&self, outcome: HandshakeOutcome) {
        self.shared.engine.metrics().engine.handshakes.of(outcome).increment();
    }

    /// Whether [`Tabs::shutdown`] has begun: no tab is opened any more.
    ///
    /// # Ordering
    /// Relaxed: who sees it late asks a shard, which refuses.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.shared.is_draining.load(Ordering::Relaxed)
    }

    /// Opens no tab any more, lets the handler finish what it was given, tells all tabs to come back later, writes what
    /// they have queued and waits until their connections are closed. Returns how many shards were still busy at the
    /// deadline: 0 if all is over. Then the server itself can be stopped.
    ///
    /// # Cancel safety
    /// Dropped once it has begun, it leaves tabs that are not told until the last clone is dropped.
    pub async fn shutdown(&self, plan: DrainPlan) -> usize {
        let Shared { engine, worker, threads, mailboxes, is_draining, .. } = &*self.shared;
        is_draining.store(true, Ordering::Relaxed);
        let hub = engine.hub();
        let time = plan.sessions.time_for(hub.registry().total_connections());
        let closing = engine.session_limits().load().close_timeout;
        let patience = plan.deadline.saturating_sub(time).saturating_sub(closing);
        let drained = async {
            // Whoever waits for an answer still gets it, if it comes in time.
            let _ = tokio::time::timeout(patience, worker.finish()).await;
            hub.drain(plan.sessions);
            tokio::join!(end_answers(hub, plan.answers), threads.ended(), mailboxes.ended());
        };
        let _ = tokio::time::timeout(plan.deadline, drained).await;
        threads.running() + usize::from(mailboxes.is_running())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let at_once = Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest: Duration::ZERO };
        self.engine.hub().drain(at_once);
    }
}
