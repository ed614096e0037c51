//! HTTP until a request becomes a session: accepting, hyper, and the way out of it.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1::{Builder, Connection};
use hyper::{Request, Response};
use hyper_util::rt::TokioTimer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Sleep;

use crate::driver::addresses::{AddressCounts, Place};
use crate::driver::clock;
use crate::driver::connections::{Connections, SeatRef, Waits};
use crate::driver::exit::{EdgeService, Exit, Io, Opened};
use crate::driver::group::{self, FileTable};
use crate::driver::loan;
use crate::driver::pace::Pace;
use crate::driver::proxies::{self, Introduction, Proxies};
use crate::driver::shard_thread::LocalShard;
use crate::driver::stream::Stream;
use crate::driver::tls::ThreadAcceptor;
use crate::fanout::session::Address;
use crate::fanout::shard::Shard;
use crate::metrics::{Metrics, Refusal, StatusClass};

/// After the last response: how long, and how many bytes, a client may still send before the connection is dropped.
const LINGER_TIME: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 256 << 10;
/// How long accepting rests after an error that will not go away by itself (no descriptors left).
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// Unsent bytes that the kernel may hold for one socket before it says "full": lag then stays in our bounded queue.
pub(super) const NOTSENT_BYTES_MAX: u32 = 64 << 10;
/// What a client gets that began a request's head and did not end it in time.
const SLOW_HEAD: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 85\r\n\
    connection: close\r\ncache-control: no-store\r\n\r\n\
    {\"error\":{\"code\":\"timeout\",\"message\":\"the head of the request did not come in time\"}}";
/// What a client gets whose address has as many connections as it may have.
const TOO_MANY: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: 152\r\n\
    connection: close\r\ncache-control: no-store\r\nretry-after: 5\r\n\r\n\
    {\"error\":{\"code\":\"limit_reached\",\"message\":\"this address has as many connections as it may have \
    (see connections_per_address_max and trusted_proxies)\"}}";
/// Clients that are told so at one time, a shard; the others are dropped.
const TOLD_MAX: usize = 32;

/// What the edge makes of a request.
#[derive(Debug)]
pub enum Answer {
    /// An ordinary response.
    Respond(Response<Full<Bytes>>),
    /// The connection becomes this session, which the edge has opened; `head` is the response that says so.
    Session {
        /// The session that was opened for it.
        address: Address,
        /// The response's head, its empty line included, and what of the body goes with it.
        head: Vec<u8>,
        /// The head's status, for who counts it.
        status: u16,
        /// What its address has one more of, for as long as the session lives.
        place: Option<Place>,
    },
}

/// The future of an answer. It runs on the shard's thread.
pub type AnswerFuture = Pin<Box<dyn Future<Output = Answer>>>;

/// Answers HTTP requests on a shard's thread.
pub trait Edge {
    /// Answers one request of the client at `peer`. Bodies are bounded by whoever reads them. Its head has one Host at
    /// most, which is one (in HTTP/1.1 exactly one), a target that names no other, and no transfer coding but `chunked`.
    fn answer(self: Rc<Self>, request: Request<Incoming>, peer: SocketAddr) -> AnswerFuture;
}

/// Limits of HTTP before a request is anybody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLimits {
    /// How long a client may take to send a request's head, counted from the end of the one before, and for the TLS
    /// handshake before the first. Default 10 s.
    pub header_timeout: Duration,
    /// Bytes of a request's head. Default 16 KiB; held only while the request is read.
    pub header_bytes_max: usize,
    /// Connections that are no sessions (yet), of all shards together. Default 1,024; each costs up to
    /// `header_bytes_max` and 16 KiB. Past it the one that has waited longest for a request is closed; if none does, the one
    /// whose client has taken nothing of a response for longest, and for a second at least; and if there is none either,
    /// nobody is let in until one of them is over. As many requests are under way at the most.
    pub connections_max: usize,
    /// Those of one address, or of one /64 of IPv6, in all shards together; not of a trusted proxy. Default 256; 0: no
    /// limit. Past it a connection is answered 429 and closed; over TLS, and if there are many, just closed. Each address
    /// costs up to 40 bytes.
    pub connections_per_address_max: usize,
    /// Who stands in front.
    pub proxies: Proxies,
    /// How long a client may take none of a response's bytes before its connection is dropped. Default 60 s.
    pub write_timeout: Duration,
    /// Bytes of responses in a second that a client has to take while any wait for it. Default 1 KiB; 0: any. It may be
    /// slower for as long as it would take to be `write_timeout` behind; then its connection is dropped.
    pub write_bytes_per_second_min: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            header_bytes_max: 16 << 10,
            connections_max: 1_024,
            connections_per_address_max: 256,
            proxies: Proxies::default(),
            write_timeout: Duration::from_secs(60),
            write_bytes_per_second_min: 1 << 10,
        }
    }
}

/// Everything that serving a connection needs.
pub(crate) struct Serving {
    pub(crate) local: Rc<LocalShard>,
    pub(crate) edge: Rc<dyn Edge>,
    /// If TLS is spoken, and nothing else.
    pub(crate) tls: Option<ThreadAcceptor>,
    pub(crate) limits: HttpLimits,
    pub(crate) connections: Rc<Connections>,
    /// Those of each address, in all shards together.
    pub(crate) by_address: Option<Arc<AddressCounts>>,
    pub(crate) metrics: Arc<Metrics>,
    /// Clients that are being told that they are too many.
    pub(crate) told: Rc<Cell<usize>>,
    /// The log says that an address has had too many.
    pub(crate) is_limit_told: Cell<bool>,
    /// True once the shard has drained: accepting stops, and connections end after the request that they are in.
    pub(crate) closing: watch::Receiver<bool>,
    /// This shard's part of [`HttpLimits::connections_max`].
    pub(crate) connections_max: usize,
    /// The thread's own file table, if it has one.
    pub(crate) table: Option<FileTable>,
}

impl Serving {
    /// Whether the thread's own file table is filled to so many percent.
    pub(super) fn is_filled(&self, percent: usize) -> bool {
        let connections = || self.connections.open() + self.local.with_shard(Shard::session_count);
        self.table.is_some_and(|table| table.is_filled(connections(), percent))
    }

    /// Serves a connection once there is room for it, if it may be. Breaks if the shard has drained before.
    pub(super) async fn take(
        self: &Rc<Self>,
        (stream, peer): (TcpStream, SocketAddr),
        closing: &mut watch::Receiver<bool>,
    ) -> ControlFlow<()> {
        let Some((stream, place)) = self.admit(stream, peer) else { return ControlFlow::Continue(()) };
        tokio::select! {
            biased;
            () = self.connections.make_room(self.connections_max, clock::now) => {}
            _ = closing.wait_for(|closing| *closing) => return ControlFlow::Break(()),
        }
        self.spawn(stream, peer, place);
        ControlFlow::Continue(())
    }

    /// Serves a connection, if it may be: it has its place among the others of its address.
    fn spawn(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, place: Option<Place>) {
        let serving = Rc::clone(self);
        let counted = serving.connections.enter();
        tokio::task::spawn_local(async move {
            let seat = counted.seat();
            let ready = tokio::select! {
                biased;
                ready = prepare(&serving, stream, (peer, place)) => ready,
                () = seat.wanted() => {
                    serving.count_evicted();
                    None
                }
            };
            let Some((stream, client, place)) = ready else { return };
            serve(&serving, stream, client, seat).await;
            drop((place, counted));
        });
    }

    /// Looks at who connects, before anything is read. None if it may not; then it is told, or dropped.
    fn admit(&self, stream: TcpStream, peer: SocketAddr) -> Option<(TcpStream, Option<Place>)> {
        match self.limits.proxies.introduction {
            Introduction::ProxyV2 if self.limits.proxies.trusts(peer.ip()) => Some((stream, None)),
            Introduction::ProxyV2 => {
                self.refuse(Refusal::UntrustedPeer);
                None
            }
            // A proxy has the connections of all its clients.
            Introduction::None if self.limits.proxies.trusts(peer.ip()) => Some((stream, None)),
            Introduction::None => match self.place(peer) {
                Ok(place) => Some((stream, place)),
                Err(()) => {
                    self.tell_too_many(stream);
                    None
                }
            },
        }
    }

    /// A place among the connections of the client's address.
    fn place(&self, client: SocketAddr) -> Result<Option<Place>, ()> {
        let Some(by_address) = &self.by_address else { return Ok(None) };
        by_address.take(client.ip()).map(Some).map_err(|_| {
            self.refuse(Refusal::ConnectionsOfAddress);
            // Once: anybody can cause it, and somebody may wonder.
            if !self.is_limit_told.replace(true) {
                tracing::warn!(%client, "an address has more connections than connections_per_address_max");
            }
        })
    }

    fn refuse(&self, refusal: Refusal) {
        self.metrics.engine.refusals.of(refusal).increment();
    }

    /// Counts a connection that has made room.
    fn count_evicted(&self) {
        self.metrics.engine.evicted_connections.increment();
    }

    /// Counts a response that no edge has made.
    fn count_response(&self, status: u16) {
        self.metrics.engine.http_responses.of(StatusClass::of(status)).increment();
    }

    /// Without a place among the connections, and so only a few at one time.
    fn tell_too_many(&self, mut stream: TcpStream) {
        if self.tls.is_some() || self.told.get() >= TOLD_MAX {
            return;
        }
        self.count_response(429);
        let told = Rc::clone(&self.told);
        told.set(told.get() + 1);
        tokio::task::spawn_local(async move {
            // An empty socket takes it as soon as the runtime knows of it.
            let written = tokio::time::timeout(LINGER_TIME, stream.write_all(TOO_MANY)).await;
            if matches!(written, Ok(Ok(()))) {
                linger(Stream::plain(stream)).await;
            }
            told.set(told.get() - 1);
        });
    }
}

/// Accepts until the shard has drained. The backlog is emptied first, so that nobody who got in is reset.
pub(crate) async fn accept(mut listener: TcpListener, serving: Rc<Serving>) {
    let mut closing = serving.closing.clone();
    let mut is_failing = false;
    loop {
        if let Some(table) = serving.table.filter(|_| serving.is_filled(FileTable::LEAVE_PERCENT)) {
            tracing::warn!("the shard's file table is almost full: it leaves the listeners");
            if group::leave(listener, &serving, &mut closing).await.is_break() {
                return;
            }
            listener = tokio::select! {
                listener = group::come_back(table, &serving) => listener,
                _ = closing.wait_for(|closing| *closing) => return,
            };
            tracing::info!("the shard listens again");
        }
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match accepted {
            Ok(connected) => {
                is_failing = false;
                if serving.take(connected, &mut closing).await.is_break() {
                    return;
                }
            }
            Err(error) if group::is_of_one_connection(&error) => {}
            Err(error) => {
                // Said once, not at every attempt: it lasts until somebody leaves.
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(%error, "cannot accept connections");
                }
                tokio::time::sleep(ACCEPT_REST).await;
            }
        }
    }
}

/// Everything before the first request.
async fn prepare(
    serving: &Serving,
    stream: TcpStream,
    arrival: (SocketAddr, Option<Place>),
) -> Option<(Stream, SocketAddr, Option<Place>)> {
    let (stream, client, place) = introduce(serving, stream, arrival).await?;
    let stream = secure(serving, stream, client).await?;
    Some((stream, client, place))
}

/// Who the client is: the peer, or whom its proxy names. None if it may not connect.
async fn introduce(
    serving: &Serving,
    mut stream: TcpStream,
    (peer, place): (SocketAddr, Option<Place>),
) -> Option<(TcpStream, SocketAddr, Option<Place>)> {
    if serving.limits.proxies.introduction == Introduction::None {
        return Some((stream, peer, place));
    }
    let mut closing = serving.closing.clone();
    let introduced = tokio::select! {
        introduced = tokio::time::timeout(serving.limits.header_timeout, proxies::introduced(&mut stream)) => introduced,
        _ = closing.wait_for(|closing| *closing) => return None,
    };
    let client = match introduced {
        Ok(Ok(Some(client))) => client,
        // The proxy itself, for which nobody else has to make room.
        Ok(Ok(None)) => return Some((stream, peer, None)),
        failed => {
            serving.refuse(Refusal::NoIntroduction);
            match failed {
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a connection was not introduced"),
                _ => tracing::debug!(%peer, "a connection was not introduced in time"),
            }
            return None;
        }
    };
    match serving.place(client) {
        Ok(place) => Some((stream, client, place)),
        Err(()) => {
            serving.tell_too_many(stream);
            None
        }
    }
}

/// Shakes hands, if TLS is spoken. None if nothing came of it: in time, and before the shard has drained.
async fn secure(serving: &Serving, stream: TcpStream, peer: SocketAddr) -> Option<Stream> {
    let Some(acceptor) = &serving.tls else { return Some(Stream::plain(stream)) };
    let mut closing = serving.closing.clone();
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(serving.limits.header_timeout, acceptor.accept(stream)) => accepted,
        _ = closing.wait_for(|closing| *closing) => return None,
    };
    // What anybody can cause costs no line that anybody has to read.
    match accepted {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake has failed"),
        Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
    }
    None
}

async fn serve(serving: &Serving, stream: Stream, peer: SocketAddr, seat: SeatRef) {
    let exit = Rc::new(Exit::default());
    let (edge, metrics) = (Rc::clone(&serving.edge), Arc::clone(&serving.metrics));
    let service = EdgeService { edge, peer, exit: Rc::clone(&exit), metrics };
    let io = Io { stream, exit: Rc::clone(&exit) };
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(serving.limits.header_timeout);
    builder.max_buf_size(serving.limits.header_bytes_max.max(8192));
    let mut connection = builder.serve_connection(io, service);
    let left = leave(&mut connection, &exit, (serving, &seat)).await;
    let was_wanted = seat.is_wanted();
    drop(seat);
    let parts = connection.into_parts();
    let mut stream = parts.io.stream;
    match left {
        Left::Session(Opened { address, head, place }) => {
            // Copied out: the buffer would pin 8 KiB for the life of the session.
            let mut received = parts.read_buf.to_vec();
            drop(parts.read_buf);
            match stream.into_session() {
                Some((socket, unread)) => {
                    received.extend_from_slice(&unread);
                    serving.local.attach(address, socket, (&head, &mut received), place);
                }
                None => serving.local.abandon(address),
            }
        }
        Left::Closed => linger(stream).await,
        // The last response is long gone, and no whole request came after it.
        Left::Evicted => {
            serving.count_evicted();
            drop(stream.finish_writing());
        }
        Left::SlowHead if parts.read_buf.is_empty() => {}
        Left::SlowHead => {
            serving.count_response(408);
            stream.try_write(SLOW_HEAD);
            linger(stream).await;
        }
        Left::Stalled => {
            if let Some(opened) = exit.session.take() {
                serving.local.abandon(opened.address);
            }
            if was_wanted || exit.is_recalled.get() {
                serving.count_evicted();
            } else {
                serving.refuse(Refusal::SlowReader);
            }
            stream.reset();
        }
    }
}

enum Left {
    Session(Opened),
    Closed,
    /// It waited for a request, and somebody else needed its place.
    Evicted,
    /// The head of a request did not come in time.
    SlowHead,
    /// The peer is too slow in taking a response, or somebody else needed its place or its bytes while it took none of it,
    /// or too little.
    Stalled,
}

/// Serves until the connection is over or a request became a session and all earlier responses are flushed.
async fn leave(
    connection: &mut Connection<Io, EdgeService>,
    exit: &Exit,
    (serving, seat): (&Serving, &SeatRef),
) -> Left {
    let mut closing = serving.closing.clone();
    let HttpLimits { write_timeout, write_bytes_per_second_min, .. } = serving.limits;
    let mut pace = Pace::new(write_timeout, write_bytes_per_second_min);
    let mut timer: Option<Pin<Box<Sleep>>> = None;
    let mut closing = Box::pin(async move { closing.wait_for(|closing| *closing).await.is_ok() });
    let mut is_closing = false;
    poll_fn(|context| {
        let is_evicted = !is_closing && seat.is_wanted();
        if is_evicted || !is_closing && closing.as_mut().poll(context).is_ready() {
            is_closing = true;
            Pin::new(&mut *connection).graceful_shutdown();
        }
        let polled = connection.poll_without_shutdown(context);
        let is_over = polled.is_ready();
        let session = if is_over || !exit.is_write_blocked.get() { exit.session.take() } else { None };
        match session {
            Some(opened) => return Poll::Ready(Left::Session(opened)),
            None if matches!(&polled, Poll::Ready(Err(error)) if error.is_timeout()) => {
                return Poll::Ready(Left::SlowHead);
            }
            // hyper has answered what is no request itself.
            None if matches!(&polled, Poll::Ready(Err(error)) if error.is_parse()) => {
                serving.count_response(400);
                return Poll::Ready(Left::Closed);
            }
            None if is_over && is_evicted => return Poll::Ready(Left::Evicted),
            None if is_over => return Poll::Ready(Left::Closed),
            None => {}
        }
        let is_idle = !exit.is_busy.get() && !exit.is_write_blocked.get();
        // Half a head holds no place that somebody else needs.
        if is_idle && seat.is_wanted() {
            return Poll::Ready(Left::Evicted);
        }
        let (written, now) = (exit.written_bytes.get(), clock::now());
        if !exit.is_write_blocked.get() {
            pace.flows(written, now);
            timer = None;
            exit.loans.borrow_mut().clear();
            // A request that was answered at once: it waits from now on.
            if exit.has_asked.replace(false) {
                seat.note(None, context.waker());
            }
            seat.note(is_idle.then_some(Waits::Request), context.waker());
            return Poll::Pending;
        }
        let (since, too_late) = pace.waits(written, now);
        seat.note(Some(Waits::Reader(since)), context.waker());
        let recalled = exit.poll_recalled(context);
        let is_wanted = recalled.is_some() || seat.is_wanted();
        let end = if is_wanted { too_late.min(loan::lost(since, recalled)) } else { too_late }.into();
        let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        if timer.deadline() != end {
            timer.as_mut().reset(end);
        }
        timer.as_mut().poll(context).map(|()| Left::Stalled)
    })
    .await
}

/// A connection that is closed with unread input is reset, and the peer may lose our last response with it.
pub(super) async fn linger(stream: Stream) {
    let mut stream = stream.finish_writing();
    let rest = async {
        let mut buffer = [0; 2048];
        let mut left = LINGER_BYTES;
        while let Ok(bytes @ 1..) = stream.read(&mut buffer).await {
            left = left.saturating_sub(bytes);
            if left == 0 {
                return;
            }
        }
    };
    // Either way the connection is dropped.
    let _ = tokio::time::timeout(LINGER_TIME, rest).await;
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Protocol, Type};

    use super::*;
    use crate::driver::connections::STALL_TIME;
    use crate::driver::group::listen;
    use crate::fanout::hub::Hub;
    use crate::fanout::session::SessionRef;
    use crate::fanout::shard::{Inbound, Reaction};
    use crate::proto::limits::{HubLimits, SessionLimits};

    fn bytes_of<A, B, C, D, F>(_: impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// What a connection costs before it is a session, hyper's buffers apart.
    #[test]
    fn a_connections_task_is_small() {
        let bytes = bytes_of(serve);
        assert!(bytes <= 4_608, "{bytes} bytes");
    }

    struct Silent;

    impl Inbound for Silent {
        fn text(&mut self, _: &SessionRef, _: &mut [u8]) -> Reaction {
            Reaction::Nothing
        }
    }

    /// Never answers; whether it was asked.
    #[derive(Default)]
    struct Mute(Cell<bool>);

    impl Edge for Mute {
        fn answer(self: Rc<Self>, _: Request<Incoming>, _: SocketAddr) -> AnswerFuture {
            self.0.set(true);
            Box::pin(std::future::pending())
        }
    }

    /// Answers with more than any connection holds.
    struct Large;

    impl Edge for Large {
        fn answer(self: Rc<Self>, _: Request<Incoming>, _: SocketAddr) -> AnswerFuture {
            static BODY: [u8; 32 << 20] = [0; 32 << 20];
            Box::pin(std::future::ready(Answer::Respond(Response::new(Full::new(Bytes::from_static(&BODY))))))
        }
    }

    fn local_runtime() -> tokio::runtime::LocalRuntime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build_local(tokio::runtime::LocalOptions::default()).unwrap()
    }

    fn serving(connections_max: usize, edge: Rc<dyn Edge>) -> (Rc<Serving>, watch::Sender<bool>) {
        let hub = Hub::new(1, &HubLimits::default(), &SessionLimits::default());
        let shard = Shard::new(Arc::clone(&hub), 0, SessionLimits::default(), 1 << 20, clock::now());
        let (local, _) = LocalShard::new(shard, Box::new(Silent)).unwrap();
        let (close, closing) = watch::channel(false);
        let serving = Serving {
            local,
            edge,
            tls: None,
            limits: HttpLimits::default(),
            connections: Rc::default(),
            by_address: None,
            metrics: Arc::clone(hub.metrics()),
            told: Rc::default(),
            is_limit_told: Cell::default(),
            closing,
            connections_max,
            table: None,
        };
        (Rc::new(serving), close)
    }

    #[test]
    fn whoever_waited_at_a_listener_that_is_left_is_taken_as_there_is_room() {
        local_runtime().block_on(async {
            let (serving, _close) = serving(2, Rc::new(Mute::default()));
            let listener = TcpListener::from_std(listen("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
            let address = listener.local_addr().unwrap();
            let clients: Vec<_> = (0..6).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
            let left = group::leave(listener, &serving, &mut serving.closing.clone()).await;
            assert_eq!(left, ControlFlow::Continue(()));
            // Each of the first has made room for one that came later, and nobody was left out.
            assert_eq!(serving.connections.open(), 2);
            assert_eq!(serving.metrics.engine.evicted_connections.value(), 4);
            drop(clients);
            serving.connections.wait_for_none().await;
        });
    }
    #[test]
    fn a_listener_is_left_at_once_however_long_those_wait_that_it_had() {
        local_runtime().block_on(async {
            let edge = Rc::new(Mute::default());
            let (serving, _close) = serving(1, Rc::clone(&edge) as Rc<dyn Edge>);
            let listener = TcpListener::from_std(listen("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
            let address = listener.local_addr().unwrap();
            let mut busy = std::net::TcpStream::connect(address).unwrap();
            std::io::Write::write_all(&mut busy, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            let (stream, peer) = listener.accept().await.unwrap();
            serving.spawn(stream, peer, None);
            while !edge.0.get() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let _waiting = [(); 2].map(|()| std::net::TcpStream::connect(address).unwrap());
            let mut closing = serving.closing.clone();
            let mut left = Box::pin(group::leave(listener, &serving, &mut closing));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(left.as_mut().poll(&mut context).is_pending(), "nobody makes room");
            // All that come from now on are dealt to those that are left.
            let other = listen(address).unwrap();
            let later = [(); 32].map(|()| std::net::TcpStream::connect(address).unwrap());
            for client in &later {
                assert_eq!(other.accept().unwrap().1, client.local_addr().unwrap());
            }
            drop(busy);
            let left = tokio::time::timeout(STALL_TIME * 10, left).await;
            assert_eq!(left, Ok(ControlFlow::Continue(())));
            assert_eq!(serving.connections.open(), 1);
        });
    }

    /// A connection that asks for something large and takes nothing of it.
    async fn stalled(serving: &Rc<Serving>, listener: &TcpListener) -> std::net::TcpStream {
        let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        socket.connect(&listener.local_addr().unwrap().into()).unwrap();
        let mut client = std::net::TcpStream::from(socket);
        std::io::Write::write_all(&mut client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        serving.spawn(stream, peer, None);
        client
    }

    #[test]
    fn whoever_takes_its_response_again_when_it_is_told_to_make_room_holds_up_nobody() {
        local_runtime().block_on(async {
            let (serving, _close) = serving(2, Rc::new(Large));
            let listener = TcpListener::from_std(listen("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
            let connections = &serving.connections;
            let mut client = stalled(&serving, &listener).await;
            // By that clock it has waited for long enough as soon as it waits: it is told, and has a second left.
            let mut room = Box::pin(connections.make_room(1, || clock::now() + STALL_TIME));
            while connections.leaving() == 0 {
                assert!(tokio::time::timeout(Duration::from_millis(1), room.as_mut()).await.is_err());
            }
            drop(room);
            let (stop, stopped) = std::sync::mpsc::sync_channel::<()>(0);
            let reader = std::thread::spawn(move || {
                let mut part = [0; 16 << 10];
                while stopped.recv_timeout(Duration::from_millis(20)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    if !matches!(std::io::Read::read(&mut client, &mut part), Ok(1..)) {
                        return false;
                    }
                }
                true
            });
            let _other = stalled(&serving, &listener).await;
            let room = tokio::time::timeout(STALL_TIME * 10, connections.make_room(2, clock::now)).await;
            assert!(room.is_ok(), "nobody else was told");
            drop(stop);
            assert!(reader.join().unwrap(), "whoever goes on stays");
            assert_eq!(serving.metrics.engine.evicted_connections.value(), 1);
        });
    }
}
