//! HTTP until a request becomes a session: accepting, hyper, and the way out of it.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1::{Builder, Connection};
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::TokioTimer;
use socket2::{Domain, Protocol, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::Sleep;

use crate::driver::shard_thread::LocalShard;
use crate::driver::stream::Stream;
use crate::driver::tls::ThreadAcceptor;
use crate::fanout::session::Address;
use crate::fanout::shard::Shard;

/// After the last response: how long, and how many bytes, a client may still send before the connection is dropped.
const LINGER_TIME: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 256 << 10;
/// How long accepting rests after an error that will not go away by itself (no descriptors left).
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// How often a shard that left the listeners looks whether it may come back.
const COME_BACK_REST: Duration = Duration::from_millis(100);
/// Connections that the kernel may hold for one listener until they are accepted.
const BACKLOG: i32 = 4096;
/// Unsent bytes that the kernel may hold for one socket before it says "full": lag then stays in our bounded queue.
const NOTSENT_BYTES_MAX: u32 = 64 << 10;
/// What a client gets that began a request's head and did not end it in time.
const SLOW_HEAD: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 85\r\n\
    connection: close\r\ncache-control: no-store\r\n\r\n\
    {\"error\":{\"code\":\"timeout\",\"message\":\"the head of the request did not come in time\"}}";

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
    },
}

/// The future of an answer. It runs on the shard's thread.
pub type AnswerFuture = Pin<Box<dyn Future<Output = Answer>>>;

/// Answers HTTP requests on a shard's thread.
pub trait Edge {
    /// Answers one request. Bodies are bounded by whoever reads them.
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
    /// `header_bytes_max` and 16 KiB. Past it nothing is accepted until one of them is over.
    pub connections_max: usize,
    /// How long a client may take none of a response's bytes before its connection is dropped. Default 60 s.
    pub write_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            header_bytes_max: 16 << 10,
            connections_max: 1_024,
            write_timeout: Duration::from_secs(60),
        }
    }
}

/// Connections of this thread that hyper holds.
#[derive(Default)]
pub(crate) struct Connections {
    open: Cell<usize>,
    closed: Notify,
}

struct Counted(Rc<Connections>);

impl Counted {
    fn new(connections: &Rc<Connections>) -> Self {
        connections.open.set(connections.open.get() + 1);
        Self(Rc::clone(connections))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.closed.notify_waiters();
    }
}

impl Connections {
    /// Waits until hyper holds at most `count`.
    pub(crate) async fn wait_for(&self, count: usize) {
        while self.open.get() > count {
            self.closed.notified().await;
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
    /// True once the shard has drained: accepting stops, and connections end after the request that they are in.
    pub(crate) closing: watch::Receiver<bool>,
    /// This shard's part of [`HttpLimits::connections_max`].
    pub(crate) connections_max: usize,
    /// The thread's own file table, if it has one.
    pub(crate) table: Option<FileTable>,
}

/// A file table of a thread's own: the kernel deals connections to all listeners alike, so one whose table is almost
/// full leaves them to the others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileTable {
    /// Where the shard listens.
    pub(crate) address: SocketAddr,
    /// Descriptors that are no connections.
    pub(crate) base: usize,
    /// Descriptors that the table may have.
    pub(crate) limit: usize,
}

impl FileTable {
    const LEAVE_PERCENT: usize = 95;
    const COME_BACK_PERCENT: usize = 90;

    fn is_filled(self, connections: usize, percent: usize) -> bool {
        self.base + connections >= self.limit / 100 * percent + self.limit % 100 * percent / 100
    }
}

impl Serving {
    /// Whether the thread's own file table is filled to so many percent.
    fn is_filled(&self, percent: usize) -> bool {
        let connections = || self.connections.open.get() + self.local.with_shard(Shard::session_count);
        self.table.is_some_and(|table| table.is_filled(connections(), percent))
    }

    fn spawn(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        let serving = Rc::clone(self);
        let counted = Counted::new(&serving.connections);
        tokio::task::spawn_local(async move {
            if let Some(stream) = secure(&serving, stream, peer).await {
                serve(&serving, stream, peer).await;
            }
            drop(counted);
        });
    }
}

/// A listener that shares its port with those of the other shards.
pub(crate) fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // What is accepted inherits both: two system calls less for each connection.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(NOTSENT_BYTES_MAX)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Closes a listener that others share the port of; whoever waits in its backlog is taken, not reset.
fn leave_group(listener: TcpListener, serving: &Rc<Serving>) {
    let Ok(listener) = listener.into_std() else { return };
    while let Ok((stream, peer)) = listener.accept() {
        if stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            serving.spawn(stream, peer);
        }
    }
}

/// Waits until there is room in the table again, and listens.
async fn come_back(table: FileTable, serving: &Serving) -> TcpListener {
    loop {
        tokio::time::sleep(COME_BACK_REST).await;
        if serving.is_filled(FileTable::COME_BACK_PERCENT) {
            continue;
        }
        match listen(table.address).and_then(TcpListener::from_std) {
            Ok(listener) => return listener,
            Err(error) => tracing::warn!(%error, "a shard cannot listen again"),
        }
    }
}

/// Accepts until the shard has drained. The backlog is emptied first, so that nobody who got in is reset.
pub(crate) async fn accept(mut listener: TcpListener, serving: Rc<Serving>) {
    let mut closing = serving.closing.clone();
    let mut is_failing = false;
    loop {
        if let Some(table) = serving.table.filter(|_| serving.is_filled(FileTable::LEAVE_PERCENT)) {
            tracing::warn!("the shard's file table is almost full: it leaves the listeners");
            leave_group(listener, &serving);
            listener = tokio::select! {
                listener = come_back(table, &serving) => listener,
                _ = closing.wait_for(|closing| *closing) => return,
            };
            tracing::info!("the shard listens again");
        }
        let accept = async {
            serving.connections.wait_for(serving.connections_max - 1).await;
            listener.accept().await
        };
        let accepted = tokio::select! {
            biased;
            accepted = accept => accepted,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                is_failing = false;
                serving.spawn(stream, peer);
            }
            // The connection was gone before it was taken: the next one is not.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
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

async fn serve(serving: &Serving, stream: Stream, peer: SocketAddr) {
    let exit = Rc::new(Exit::default());
    let service = EdgeService { edge: Rc::clone(&serving.edge), peer, exit: Rc::clone(&exit) };
    let io = Io { stream, exit: Rc::clone(&exit) };
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(serving.limits.header_timeout);
    builder.max_buf_size(serving.limits.header_bytes_max.max(8192));
    let mut connection = builder.serve_connection(io, service);
    let left = leave(&mut connection, &exit, serving).await;
    let parts = connection.into_parts();
    let mut stream = parts.io.stream;
    match left {
        Left::Session { address, head } => {
            // Copied out: the buffer would pin 8 KiB for the life of the session.
            let mut received = parts.read_buf.to_vec();
            drop(parts.read_buf);
            match stream.into_session() {
                Some((socket, unread)) => {
                    received.extend_from_slice(&unread);
                    serving.local.attach(address, socket, &head, &mut received);
                }
                None => serving.local.abandon(address),
            }
        }
        Left::Closed => linger(stream).await,
        Left::SlowHead if parts.read_buf.is_empty() => {}
        Left::SlowHead => {
            stream.try_write(SLOW_HEAD);
            linger(stream).await;
        }
        Left::Stalled => {
            if let Some((address, _)) = exit.session.take() {
                serving.local.abandon(address);
            }
        }
    }
}

enum Left {
    Session {
        address: Address,
        head: Vec<u8>,
    },
    Closed,
    /// The head of a request did not come in time.
    SlowHead,
    /// The peer takes none of a response.
    Stalled,
}

/// Serves until the connection is over or a request became a session and all earlier responses are flushed.
async fn leave(connection: &mut Connection<Io, EdgeService>, exit: &Exit, serving: &Serving) -> Left {
    let mut closing = serving.closing.clone();
    let mut stall: Option<(u64, Pin<Box<Sleep>>)> = None;
    let mut closing = Box::pin(async move { closing.wait_for(|closing| *closing).await.is_ok() });
    let mut is_closing = false;
    poll_fn(|context| {
        if !is_closing && closing.as_mut().poll(context).is_ready() {
            is_closing = true;
            Pin::new(&mut *connection).graceful_shutdown();
        }
        let polled = connection.poll_without_shutdown(context);
        let is_over = polled.is_ready();
        let session = if is_over || !exit.is_write_blocked.get() { exit.session.take() } else { None };
        match session {
            Some((address, head)) => return Poll::Ready(Left::Session { address, head }),
            None if matches!(&polled, Poll::Ready(Err(error)) if error.is_timeout()) => {
                return Poll::Ready(Left::SlowHead);
            }
            None if is_over => return Poll::Ready(Left::Closed),
            None => {}
        }
        if !exit.is_write_blocked.get() {
            stall = None;
            return Poll::Pending;
        }
        let written = exit.written_bytes.get();
        let timer = || (written, Box::pin(tokio::time::sleep(serving.limits.write_timeout)));
        if stall.as_ref().is_some_and(|(before, _)| *before != written) {
            stall = None;
        }
        let (_, timer) = stall.get_or_insert_with(timer);
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

/// The way out of hyper: what the service decided, and whether hyper still has something to write.
#[derive(Default)]
struct Exit {
    session: RefCell<Option<(Address, Vec<u8>)>>,
    is_write_blocked: Cell<bool>,
    written_bytes: Cell<u64>,
}

struct EdgeService {
    edge: Rc<dyn Edge>,
    peer: SocketAddr,
    exit: Rc<Exit>,
}

impl Service<Request<Incoming>> for EdgeService {
    type Response = Response<Full<Bytes>>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let answer = Rc::clone(&self.edge).answer(request, self.peer);
        let exit = Rc::clone(&self.exit);
        Box::pin(async move {
            match answer.await {
                Answer::Respond(response) => Ok(response),
                Answer::Session { address, head, .. } => {
                    *exit.session.borrow_mut() = Some((address, head));
                    // The connection is taken from under hyper: there is no response for it to write.
                    std::future::pending().await
                }
            }
        })
    }
}

/// The connection as hyper sees it, with a note of whether a write is stuck.
struct Io {
    stream: Stream,
    exit: Rc<Exit>,
}

impl Io {
    fn note(&self, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.exit.is_write_blocked.set(poll.is_pending());
        if let Poll::Ready(Ok(bytes)) = &poll {
            self.exit.written_bytes.set(self.exit.written_bytes.get() + *bytes as u64);
        }
        poll
    }
}

impl Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl Write for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    /// What a connection costs before it is a session, hyper's buffers apart.
    #[test]
    fn a_connections_task_is_small() {
        let bytes = bytes_of(serve);
        assert!(bytes <= 4_608, "{bytes} bytes");
    }
}
