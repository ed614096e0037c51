//! The shards' threads of an embedded engine: without listeners, as sockets come to them.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::rt::{Read, Write};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use crate::driver::clock;
use crate::driver::connections::Connections;
use crate::driver::embed::TabsSettings;
use crate::driver::embed::carry::carry;
use crate::driver::listener::NOTSENT_BYTES_MAX;
use crate::driver::shard_thread::{LocalShard, ShardDriver};
use crate::driver::socket::Socket;
use crate::driver::start::AbortOnPanic;
use crate::engine::Engine;
use crate::engine::client::ClientTexts;
use crate::fanout::hub::{Drain, Hub};
use crate::fanout::session::Identity;
use crate::fanout::shard::{OpenError, Opening, Resume, Shard, Wire};
use crate::id::ChannelId;
use crate::platform::adapter::Outlet;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// A connection on its way to a shard, and what it becomes there.
pub(super) struct Arrival {
    pub(super) upgrading: OnUpgrade,
    pub(super) engine: Engine,
    pub(super) identity: Identity,
    pub(super) wire: Wire,
    pub(super) resume: Resume,
    pub(super) wants_hello: bool,
    /// Its place among those that are on their way.
    pub(super) _room: OwnedSemaphorePermit,
}

/// The shards' threads. They end when the hub has drained.
#[derive(Debug)]
pub(super) struct Threads {
    arrivals: Box<[mpsc::Sender<Arrival>]>,
    running: watch::Receiver<usize>,
}

impl Threads {
    /// Starts a thread for each shard, and returns when all of them are ready.
    pub(super) fn start(engine: &Engine, texts: &ClientTexts, settings: &TabsSettings) -> io::Result<Self> {
        let hub = engine.hub();
        let count = hub.shard_count();
        let (running_count, running) = watch::channel(count);
        let (ready, is_ready) = std::sync::mpsc::sync_channel(count);
        let mut arrivals = Vec::with_capacity(count);
        let mut started = Ok(());
        for index in 0..u16::try_from(count).unwrap_or(u16::MAX) {
            let (arrival, coming) = mpsc::channel(settings.arrivals_max());
            let thread = Thread {
                index,
                hub: Arc::clone(hub),
                engine_settings: engine.settings().clone(),
                texts: texts.clone(),
                coming,
                timeout: settings.arrival_timeout,
            };
            let (ready, running) = (ready.clone(), running_count.clone());
            let run = move || {
                let _alarm = AbortOnPanic;
                thread.run(&ready);
                drop(ready);
                running.send_modify(|running| *running -= 1);
            };
            match std::thread::Builder::new().name(format!("shard-{index}")).spawn(run) {
                Ok(_detached) => arrivals.push(arrival),
                Err(error) => {
                    started = Err(error);
                    break;
                }
            }
        }
        drop(ready);
        for _ in 0..arrivals.len() {
            let ended = |_| Err(io::Error::other("a shard's thread ended before it was ready"));
            started = started.and(is_ready.recv().unwrap_or_else(ended));
        }
        if let Err(error) = started {
            hub.drain(Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest: Duration::ZERO });
            return Err(error);
        }
        Ok(Self { arrivals: arrivals.into(), running })
    }

    /// Gives an arrival to one of the shards, whose number wraps around. Whoever has a place among the arrivals finds
    /// room.
    pub(super) fn hand_over(&self, shard: usize, arrival: Arrival) -> Result<(), Gone> {
        self.arrivals[shard % self.arrivals.len()].try_send(arrival).map_err(|_| Gone)
    }

    /// Threads that have not ended.
    pub(super) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Waits until all threads have ended.
    pub(super) async fn ended(&self) {
        // The sender is gone only with its threads.
        let _ = self.running.clone().wait_for(|running| *running == 0).await;
    }
}

/// The shard's thread has ended.
pub(super) struct Gone;

struct Thread {
    index: u16,
    hub: Arc<Hub>,
    engine_settings: crate::engine::EngineSettings,
    texts: ClientTexts,
    coming: mpsc::Receiver<Arrival>,
    timeout: Duration,
}

impl Thread {
    fn run(self, ready: &std::sync::mpsc::SyncSender<io::Result<()>>) {
        match self.make() {
            // Nobody waits any more if another shard failed.
            Err(error) => drop(ready.send(Err(error))),
            Ok((runtime, local, driver)) => {
                drop(ready.send(Ok(())));
                if let Err(error) = runtime.block_on(self.serve(local, driver)) {
                    tracing::error!(%error, "a shard cannot go on");
                    std::process::abort();
                }
            }
        }
    }

    fn make(&self) -> io::Result<(LocalRuntime, Rc<LocalShard>, ShardDriver)> {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let (sessions, budget) = (self.engine_settings.sessions.clone(), self.engine_settings.hub.bytes_budget);
        let shard = Shard::new(Arc::clone(&self.hub), self.index, sessions, budget, clock::now());
        let (local, driver) = LocalShard::new(shard, Box::new(self.texts.for_shard(self.index)))?;
        Ok((runtime, local, driver))
    }

    async fn serve(self, local: Rc<LocalShard>, driver: ShardDriver) -> io::Result<()> {
        let Self { coming, timeout, texts, .. } = self;
        // The shard has its own; what is left of them must not keep the intake alive.
        drop(texts);
        let connections = Rc::new(Connections::default());
        let arriving = Rc::clone(&connections);
        let (running, ended) = oneshot::channel();
        let receiving = tokio::task::spawn_local(receive(coming, ended, move |arrival| {
            let (local, counted) = (Rc::clone(&local), arriving.enter());
            tokio::task::spawn_local(async move {
                adopt(local, arrival, timeout).await;
                drop(counted);
            });
        }));
        driver.run().await?;
        // Who came last is told, and what is carried reaches its client.
        drop(running);
        receiving.await.map_err(io::Error::other)?;
        connections.wait_for_none().await;
        Ok(())
    }
}

/// Hands on what comes, until `ended` is ready, and then what has come by then: nothing is taken any more.
async fn receive<T>(mut coming: mpsc::Receiver<T>, ended: oneshot::Receiver<Infallible>, mut each: impl FnMut(T)) {
    tokio::pin!(ended);
    loop {
        tokio::select! {
            arrival = coming.recv() => match arrival {
                Some(arrival) => each(arrival),
                None => return,
            },
            _ = &mut ended, if !coming.is_closed() => coming.close(),
        }
    }
}

/// Waits for a connection, and makes it a session of this thread's shard.
async fn adopt(local: Rc<LocalShard>, arrival: Arrival, patience: Duration) {
    let Arrival { upgrading, engine, identity, wire, resume, wants_hello, _room } = arrival;
    let upgraded = match tokio::time::timeout(patience, upgrading).await {
        Ok(Ok(upgraded)) => upgraded,
        // What anybody can cause costs no line that anybody has to read.
        Ok(Err(error)) => return tracing::debug!(%error, "a connection was not handed over"),
        Err(_) => return tracing::debug!("a connection was not handed over in time"),
    };
    let connection = match handed(upgraded) {
        Ok(handed) => handed.map(|(socket, received)| (socket, received, None)),
        Err(upgraded) => pair().map(|(socket, end)| (socket, Vec::new(), Some((upgraded, end)))),
    };
    let (mut socket, mut received, carried) = match connection {
        Ok(connection) => connection,
        Err(error) => return tracing::warn!(%error, "a connection cannot be handed over"),
    };
    // What other nodes publish has to reach this one before the tab hears anything.
    engine.expect(&ChannelId::User(identity.user.clone())).await;
    let resume = engine.resume(&identity.user, resume).await;
    let opening = Opening { resume, ..Opening::at(engine.now(), identity, wire) };
    match local.open(opening, |address| wants_hello.then(|| engine.hello(address))) {
        Ok(address) => local.attach(address, socket, (&[], &mut received), None),
        Err(error) => refuse(&mut socket, error),
    }
    let limits = Arc::clone(engine.session_limits());
    // From here on it holds no engine, whose last user may be gone before the peer is.
    drop((engine, _room, local));
    if let Some((upgraded, end)) = carried {
        carry(TokioIo::new(upgraded), end, limits).await;
    }
}

/// Tells a client why its tab was not opened, if the kernel takes it at once.
fn refuse(socket: &mut Socket, error: OpenError) {
    let ending = match error {
        OpenError::Draining => Disconnect::ServiceRestart,
        _ => Disconnect::OverBudget,
    };
    let _ = socket.write(&[io::IoSlice::new(Frame::close(ending).websocket())]);
    socket.finish_writing();
}

/// A server's connection as a socket of ours, and what was read of it already. The inner error is one that cannot be
/// handed on.
fn handed(upgraded: Upgraded) -> Result<io::Result<(Socket, Vec<u8>)>, Upgraded> {
    // Copied out: the buffer would pin 8 KiB for the life of the session.
    match taken::<TcpStream>(upgraded) {
        Ok((stream, received)) => Ok(stream.into_std().map(|stream| {
            let kernel = socket2::SockRef::from(&stream);
            // As the gateway's own sockets are; without either it still works.
            let _ = kernel.set_tcp_nodelay(true);
            let _ = kernel.set_tcp_notsent_lowat(NOTSENT_BYTES_MAX);
            (Socket::Plain(stream), received.to_vec())
        })),
        Err(upgraded) => {
            let (stream, received) = taken::<UnixStream>(upgraded)?;
            Ok(stream.into_std().map(|stream| (unix(stream), received.to_vec())))
        }
    }
}

/// The stream under hyper's own server, or under hyper-util's, and what was read of it already.
fn taken<S>(upgraded: Upgraded) -> Result<(S, Bytes), Upgraded>
where
    TokioIo<S>: Read + Write + Unpin + Send + 'static,
{
    match upgraded.downcast::<TokioIo<S>>() {
        Ok(parts) => Ok((parts.io.into_inner(), parts.read_buf)),
        Err(upgraded) => {
            auto::upgrade::downcast::<TokioIo<S>>(upgraded).map(|parts| (parts.io.into_inner(), parts.read_buf))
        }
    }
}

/// Sent to, received from and shut down in the same words as TCP.
fn unix(stream: std::os::unix::net::UnixStream) -> Socket {
    Socket::Plain(std::net::TcpStream::from(OwnedFd::from(stream)))
}

/// A socket for a shard, and its other end.
fn pair() -> io::Result<(Socket, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((unix(ours), UnixStream::from_std(theirs)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arrivals_task_is_small() {
        fn bytes_of<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = bytes_of(adopt);
        assert!(bytes <= 4_096, "{bytes} bytes");
    }

    /// More than a task receives in one go.
    #[tokio::test]
    async fn who_has_come_when_a_shard_ends_is_received_and_who_comes_later_is_not() {
        let (arrival, coming) = mpsc::channel(1_000);
        let (running, ended) = oneshot::channel();
        (0..900).for_each(|n| arrival.try_send(n).unwrap());
        drop(running);
        let mut received = Vec::new();
        receive(coming, ended, |n| received.push(n)).await;
        assert!(received.into_iter().eq(0..900));
        assert!(arrival.try_send(900).is_err());
    }
}
