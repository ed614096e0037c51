//! Starts shards on threads, in the one order in which each of them can have a file table of its own.
//!
//! A descriptor is a number in a table. Once a thread has its own table, the number of a descriptor that was opened
//! later means another file, or none, in any other thread: a wake-up written to it lands in a stranger's socket.
//! So: every thread makes its runtime, its readiness queue and with them its wake-up descriptor while all share one
//! table; barrier; each thread unshares; barrier; only then anything else is opened, by the thread that uses and
//! drops it. tokio's signal pipe exists by then as well, and has the same number everywhere.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::{Arc, Barrier, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::watch;

use crate::driver::addresses::AddressCounts;
use crate::driver::clock;
use crate::driver::connections::Connections;
use crate::driver::group::{FileTable, listen};
use crate::driver::listener::{self, Edge, HttpLimits, Serving};
use crate::driver::shard_thread::{LocalShard, ShardDriver};
use crate::driver::tls::Acceptor;
use crate::fanout::hub::{Drain, Hub};
use crate::fanout::shard::{Inbound, Shard};
use crate::proto::limits::SessionLimits;

/// Threads of one shard for what takes long: signatures of tokens, and large frames.
const BLOCKING_THREADS_MAX: usize = 2;
/// How often a drain looks whether all answers have ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the shards' threads are started with.
#[derive(Debug, Clone)]
pub struct Start {
    /// Where to listen. Port 0 means a free one; all shards share it.
    pub listen: SocketAddr,
    /// A file table for each shard's thread: for more sessions than one table may have descriptors. Linux only.
    /// For a process that is ours alone: an embedded engine shares the table of its process.
    pub own_file_tables: bool,
    /// Speaks TLS on every connection, and nothing else. None: plain TCP.
    pub tls: Option<Acceptor>,
    /// Limits of sessions.
    pub sessions: SessionLimits,
    /// Limits of HTTP.
    pub http: HttpLimits,
    /// The process's byte budget.
    pub bytes_budget: usize,
}

/// Makes what each shard's thread needs of the layers above. Called on the shard's own thread.
pub trait EdgeFactory: Send + Sync + 'static {
    /// Whoever understands the text of clients.
    fn inbound(&self, shard: u16) -> Box<dyn Inbound>;
    /// Whoever answers requests.
    fn edge(&self, local: Rc<LocalShard>) -> Rc<dyn Edge>;
}

/// Waits until all answers have ended by themselves, so long at the most; then ends those that are left.
pub(super) async fn end_answers(hub: &Hub, patience: Duration) {
    let ended = async {
        while hub.stream_count() > 0 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let _ = tokio::time::timeout(patience, ended).await;
    hub.end_streams();
}

/// How the shards' threads end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainPlan {
    /// How fast sessions are told to come back later.
    pub sessions: Drain,
    /// Answers that have not ended by then are ended.
    pub answers: Duration,
    /// When it is over, whatever is left.
    pub deadline: Duration,
}

impl DrainPlan {
    /// A plan that is over within `deadline`: sessions are told over a quarter of it, 2,000 a second at most if that is
    /// enough for all of them, and have the last quarter to close.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tabcast::driver::start::DrainPlan;
    ///
    /// let plan = DrainPlan::within(Duration::from_secs(20));
    /// assert_eq!((plan.sessions.spread, plan.sessions.latest), (Duration::from_secs(5), Duration::from_secs(15)));
    /// assert_eq!((plan.answers, plan.deadline), (Duration::from_secs(15), Duration::from_secs(20)));
    /// ```
    #[must_use]
    pub fn within(deadline: Duration) -> Self {
        let latest = deadline / 4 * 3;
        let sessions = Drain { spread: deadline / 4, closes_per_second_max: 2_000, latest };
        Self { sessions, answers: latest, deadline }
    }
}

/// The shards' threads. Dropping it does not end them: [`ShardThreads::drain`] does.
pub struct ShardThreads {
    address: SocketAddr,
    hub: Arc<Hub>,
    running: watch::Receiver<usize>,
    /// Shards that have not drained.
    occupied: watch::Receiver<usize>,
    /// True once requests need not be answered any more.
    release: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    by_address: Option<Arc<AddressCounts>>,
}

impl ShardThreads {
    /// Starts all shards of `hub` and returns when every one of them listens.
    ///
    /// # Errors
    /// If the address is taken or cannot be listened on, or the kernel has no threads or descriptors left; or if the
    /// hub's shards were started before, even without success: then it takes a new engine.
    pub fn start(hub: &Arc<Hub>, start: &Start, factory: &Arc<dyn EdgeFactory>) -> io::Result<Self> {
        let count = hub.shard_count();
        if hub.is_claimed() {
            let message = "the engine's shards were started before, and are not started twice";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        let (running_count, running) = watch::channel(count);
        let (occupied_count, occupied) = watch::channel(count);
        let (release, released) = watch::channel(false);
        let together = Arc::new(Together {
            barrier: Barrier::new(count + 1),
            address: OnceLock::new(),
            by_address: AddressCounts::new(start.http.connections_per_address_max),
        });
        let (ready, is_ready) = std::sync::mpsc::sync_channel(count);
        let mut threads = Vec::with_capacity(count);
        for index in 0..u16::try_from(count).unwrap_or(u16::MAX) {
            let thread = ShardThread {
                index,
                hub: Arc::clone(hub),
                start: start.clone(),
                factory: Arc::clone(factory),
                together: Arc::clone(&together),
                ready: ready.clone(),
                occupied: occupied_count.clone(),
                released: released.clone(),
            };
            let running = running_count.clone();
            let run = move || {
                let _alarm = AbortOnPanic;
                thread.run();
                running.send_modify(|running| *running -= 1);
            };
            threads.push(std::thread::Builder::new().name(format!("shard-{index}")).spawn(run)?);
        }
        drop(ready);
        together.barrier.wait();
        together.barrier.wait();
        let mut listening = Ok(());
        for _ in 0..count {
            let ended = |_| Err(io::Error::other("a shard's thread ended before it listened"));
            listening = listening.and(is_ready.recv().unwrap_or_else(ended));
        }
        if let Err(error) = listening {
            release.send_replace(true);
            hub.drain(Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest: Duration::ZERO });
            return Err(error);
        }
        let address = together.address.get().and_then(|bound| bound.as_ref().ok()).copied();
        let address = address.ok_or_else(|| io::Error::other("no shard listens"))?;
        let by_address = together.by_address.clone();
        Ok(Self { address, hub: Arc::clone(hub), running, occupied, release, threads, by_address })
    }

    /// How many connections that are not sessions each address has, and their limit, which may be replaced. None if they
    /// were started without one.
    #[must_use]
    pub fn connections_by_address(&self) -> Option<&Arc<AddressCounts>> {
        self.by_address.as_ref()
    }

    /// Where the shards listen.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens no session any more, tells the open ones to come back later, and writes what they have queued. Requests
    /// are answered until all sessions are gone and `work` is done, so that a worker can still answer; then accepting
    /// stops and the last connections are closed. Returns how many shards were still busy at the deadline.
    ///
    /// # Cancel safety
    /// Dropped, the drain goes on and nobody waits for it.
    pub async fn drain(mut self, plan: DrainPlan, work: impl Future<Output = ()>) -> usize {
        self.hub.drain(plan.sessions);
        let (hub, release) = (Arc::clone(&self.hub), self.release.clone());
        let answers = end_answers(&hub, plan.answers);
        let mut occupied = self.occupied.clone();
        // A shard that has drained before the others goes on answering requests.
        let drained = async {
            let _ = occupied.wait_for(|occupied| *occupied == 0).await;
        };
        let work = async {
            tokio::join!(answers, work, drained);
            release.send_replace(true);
        };
        let ended = async {
            tokio::join!(work, async {
                // The senders are gone only with their threads.
                let _ = self.running.wait_for(|running| *running == 0).await;
            });
        };
        if tokio::time::timeout(plan.deadline, ended).await.is_err() {
            return *self.running.borrow();
        }
        for thread in self.threads {
            // A thread that panicked has ended the process already.
            let _ = thread.join();
        }
        0
    }
}

/// What the threads agree on.
struct Together {
    barrier: Barrier,
    address: OnceLock<Result<SocketAddr, io::ErrorKind>>,
    by_address: Option<Arc<AddressCounts>>,
}

/// A shard whose thread is gone would leave its tabs silent for ever: better no process than that one.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

struct ShardThread {
    index: u16,
    hub: Arc<Hub>,
    start: Start,
    factory: Arc<dyn EdgeFactory>,
    together: Arc<Together>,
    ready: std::sync::mpsc::SyncSender<io::Result<()>>,
    occupied: watch::Sender<usize>,
    released: watch::Receiver<bool>,
}

impl ShardThread {
    fn run(self) {
        let made = self.make();
        self.together.barrier.wait();
        let unshared = if self.start.own_file_tables { unshare_files() } else { Ok(()) };
        self.together.barrier.wait();
        let ready = self.ready.clone();
        let result = made.and_then(|made| unshared.map(|()| made)).and_then(|made| {
            let listener = self.listen()?;
            Ok((made, listener))
        });
        match result {
            // Nobody waits any more if another shard failed.
            Err(error) => drop(ready.send(Err(error))),
            Ok(((runtime, local, driver), listener)) => {
                let main = self.serve(local, driver, listener);
                if let Err(error) = runtime.block_on(main) {
                    tracing::error!(%error, "a shard cannot go on");
                    std::process::abort();
                }
            }
        }
    }

    fn make(&self) -> io::Result<(LocalRuntime, Rc<LocalShard>, ShardDriver)> {
        let mut builder = Builder::new_current_thread();
        let runtime =
            builder.enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build_local(LocalOptions::default())?;
        let Start { sessions, bytes_budget, .. } = &self.start;
        let shard = Shard::new(Arc::clone(&self.hub), self.index, sessions.clone(), *bytes_budget, clock::now());
        let (local, driver) = LocalShard::new(shard, self.factory.inbound(self.index))?;
        Ok((runtime, local, driver))
    }

    /// The first shard finds the port out, the others share it.
    fn listen(&self) -> io::Result<std::net::TcpListener> {
        let mut own = None;
        let address = self.together.address.get_or_init(|| {
            let bound = probe(self.start.listen).and_then(|()| listen(self.start.listen)).and_then(|listener| {
                let address = listener.local_addr()?;
                own = Some(listener);
                Ok(address)
            });
            bound.map_err(|error| error.kind())
        });
        match (own, *address) {
            (Some(listener), _) => Ok(listener),
            (None, Ok(address)) => listen(address),
            (None, Err(kind)) => Err(kind.into()),
        }
    }

    async fn serve(
        self,
        local: Rc<LocalShard>,
        driver: ShardDriver,
        listener: std::net::TcpListener,
    ) -> io::Result<()> {
        let table = if self.start.own_file_tables { Some(own_table(&listener)?) } else { None };
        let listener = TcpListener::from_std(listener)?;
        let metrics = self.hub.metrics().shard(usize::from(self.index));
        let connections = Rc::new(Connections::counted_in(Arc::clone(&metrics)));
        let (close, closing) = watch::channel(false);
        let serving = Rc::new(Serving {
            edge: self.factory.edge(Rc::clone(&local)),
            local,
            tls: self.start.tls.as_ref().map(|acceptor| acceptor.for_thread(metrics)),
            limits: self.start.http.clone(),
            connections: Rc::clone(&connections),
            by_address: self.together.by_address.clone(),
            metrics: Arc::clone(self.hub.metrics()),
            told: Rc::default(),
            is_limit_told: std::cell::Cell::default(),
            closing,
            connections_max: (self.start.http.connections_max / self.hub.shard_count()).max(1),
            table,
        });
        tokio::task::spawn_local(listener::accept(listener, serving));
        drop(self.ready.send(Ok(())));
        drop(self.ready);
        driver.run().await?;
        self.occupied.send_modify(|occupied| *occupied -= 1);
        let mut released = self.released;
        // An error is a gateway that is gone: nobody waits for its last requests.
        let _ = released.wait_for(|released| *released).await;
        close.send_replace(true);
        connections.wait_for_none().await;
        Ok(())
    }
}

/// The thread's file table. The kernel gives the lowest free number, so that the listener's, the last descriptor that
/// was opened before the first connection, says how many there are.
fn own_table(listener: &std::net::TcpListener) -> io::Result<FileTable> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let base = usize::try_from(listener.as_raw_fd()).unwrap_or(0) + 1;
    Ok(FileTable { address: listener.local_addr()?, base, limit })
}

/// Fails if somebody listens there already: with `SO_REUSEPORT` a second process would silently share the port.
fn probe(address: SocketAddr) -> io::Result<()> {
    std::net::TcpListener::bind(address).map(drop)
}

/// Gives the calling thread a file table of its own, a copy of the one that it had: for who keeps to the order that the
/// module's first paragraphs explain.
#[expect(unsafe_code, reason = "the only way to a file table of one's own")]
pub(crate) fn unshare_files() -> io::Result<()> {
    // SAFETY: no descriptor that was opened before is closed or replaced after this point, and none that is opened
    // after it crosses threads: the module's first paragraphs say how that is kept.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }.map_err(io::Error::from)
}
