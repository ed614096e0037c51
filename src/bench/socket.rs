//! Connections: from many source addresses, plain or encrypted, and never waited for.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};

use mio::event::Source;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, Socket, Type};

use super::tls::Tls;

/// How a connection is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dial {
    pub(super) address: SocketAddr,
    /// Which loopback address it comes from; none for the kernel's choice.
    pub(super) source: Option<Ipv4Addr>,
    /// Room for what is not read, in bytes; none for the kernel's choice.
    pub(super) receive_buffer: Option<usize>,
}

/// The source address of a client, of so many.
pub(super) fn source(index: usize, sources: usize) -> Option<Ipv4Addr> {
    let first = u32::from(Ipv4Addr::new(127, 0, 1, 1));
    (sources > 1).then(|| Ipv4Addr::from(first + u32::try_from(index % sources).unwrap_or(0)))
}

impl Dial {
    /// Begins to connect. That it is connected, or is not, is told by readiness.
    pub(super) fn connect(self) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(self.address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        if let Some(bytes) = self.receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(source) = self.source {
            bind_without_port(&socket)?;
            socket.bind(&SocketAddr::from((source, 0)).into())?;
        }
        match socket.connect(&self.address.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(TcpStream::from_std(socket.into())),
        }
    }
}

/// The port is chosen when it is connected: only then one port can serve connections to several servers, and a port
/// whose last connection is in TIME_WAIT can be used again.
#[expect(unsafe_code, reason = "neither socket2 nor rustix names this option")]
fn bind_without_port(socket: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the pointer and length are those of `on`, which lives until the call is over; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            std::ptr::from_ref(&on).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What is under a client: 16 bytes.
#[derive(Debug)]
pub(super) enum Transport {
    /// Not connected, or no more.
    None,
    Plain(TcpStream),
    Tls(Box<Tls>),
}

impl Transport {
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        // Both at once: readiness is told at its edges, so that the second costs nothing until something changes.
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.socket()?.register(registry, token, interest)
    }

    /// No more news of what comes in.
    pub(super) fn deafen(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.socket()?.reregister(registry, token, Interest::WRITABLE)
    }

    /// News of what comes in, again.
    pub(super) fn listen(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.socket()?.reregister(registry, token, Interest::READABLE | Interest::WRITABLE)
    }

    fn socket(&mut self) -> io::Result<&mut TcpStream> {
        match self {
            Self::None => Err(io::ErrorKind::NotConnected.into()),
            Self::Plain(socket) => Ok(socket),
            Self::Tls(tls) => Ok(&mut tls.socket),
        }
    }

    /// Reads what there is. 0 is the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None => Ok(0),
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
        }
    }

    /// Writes what fits, and says how much that was.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None => Err(io::ErrorKind::NotConnected.into()),
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    /// True if a read of fewer bytes than there was room for has left nothing: not so where bytes wait in between.
    pub(super) fn is_drained_by_short_read(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    /// Goes on with what an encrypted connection has still to write.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(tls) => tls.flush(),
            _ => Ok(()),
        }
    }
}

/// An error that says: not now.
pub(super) fn is_not_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_spread_over_loopback() {
        assert_eq!(source(5, 1), None);
        assert_eq!(source(0, 2), Some(Ipv4Addr::new(127, 0, 1, 1)));
        assert_eq!(source(5, 2), Some(Ipv4Addr::new(127, 0, 1, 2)));
        assert_eq!(source(299, 300), Some(Ipv4Addr::new(127, 0, 2, 44)));
    }

    #[test]
    fn a_connection_comes_from_its_source() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let source = Ipv4Addr::new(127, 0, 1, 9);
        let dial = Dial { address: listener.local_addr().unwrap(), source: Some(source), receive_buffer: Some(4096) };
        let _client = dial.connect().unwrap();
        assert_eq!(listener.accept().unwrap().1.ip(), source);
    }

    #[test]
    fn a_transport_is_small() {
        // mio keeps 8 more bytes of each socket where debug assertions are on.
        assert!(size_of::<Transport>() <= if cfg!(debug_assertions) { 24 } else { 16 });
    }
}
