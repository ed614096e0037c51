//! A listener among those of the other shards, all on one port: how a shard leaves them, and comes back.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use socket2::{Domain, Protocol, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::driver::listener::{NOTSENT_BYTES_MAX, Serving};

/// How often a shard that left the listeners looks whether it may come back.
const COME_BACK_REST: Duration = Duration::from_millis(100);
/// Connections that the kernel may hold for one listener until they are accepted.
const BACKLOG: i32 = 4096;

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
    pub(super) const LEAVE_PERCENT: usize = 95;
    pub(super) const COME_BACK_PERCENT: usize = 90;

    pub(super) fn is_filled(self, connections: usize, percent: usize) -> bool {
        self.base + connections >= self.limit / 100 * percent + self.limit % 100 * percent / 100
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

/// Closes a listener that others share the port of, at once: the kernel deals connections to it for as long as it is open,
/// however little room there is. Whoever waited in its backlog is taken then, one after the other as there is room, and not
/// reset. Breaks if the shard has drained before.
pub(super) async fn leave(
    listener: TcpListener,
    serving: &Rc<Serving>,
    closing: &mut watch::Receiver<bool>,
) -> ControlFlow<()> {
    let Ok(listener) = listener.into_std() else { return ControlFlow::Continue(()) };
    let mut waiting = VecDeque::new();
    // Not more than can have waited when it began: others may come as fast as they are accepted.
    let mut left = BACKLOG;
    while left > 0 {
        match listener.accept() {
            Ok(connected) => waiting.push_back(connected),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if is_of_one_connection(&error) => {}
            // No descriptor is left: there may be one once the first of them is where it can be told to make room.
            Err(_) => {
                let Some(first) = waiting.pop_front() else { break };
                take_accepted(first, serving, closing).await?;
                continue;
            }
        }
        left -= 1;
    }
    drop(listener);
    for connected in waiting {
        take_accepted(connected, serving, closing).await?;
    }
    ControlFlow::Continue(())
}

/// As [`Serving::take`], of one that the runtime does not know yet.
async fn take_accepted(
    (stream, peer): (std::net::TcpStream, SocketAddr),
    serving: &Rc<Serving>,
    closing: &mut watch::Receiver<bool>,
) -> ControlFlow<()> {
    match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
        Ok(stream) => serving.take((stream, peer), closing).await,
        Err(_) => ControlFlow::Continue(()),
    }
}

/// Whether a connection was gone before it was taken: the next one is not.
pub(super) fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

/// Waits until there is room in the table again, and listens.
pub(super) async fn come_back(table: FileTable, serving: &Serving) -> TcpListener {
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
