//! A session's socket, whatever is spoken on it.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};

#[cfg(feature = "tls")]
use crate::driver::tls::Tls;

/// A non-blocking connection.
#[derive(Debug)]
pub enum Socket {
    /// Plain TCP, non-blocking.
    Plain(TcpStream),
    /// TLS over it, its handshake done.
    #[cfg(feature = "tls")]
    Tls(TlsSocket),
}

/// A connection and what TLS knows of it.
#[cfg(feature = "tls")]
#[derive(Debug)]
pub struct TlsSocket {
    pub(crate) stream: TcpStream,
    pub(crate) tls: Box<Tls>,
}

/// What one read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Bytes that were read: perhaps none, although more may follow.
    pub bytes: usize,
    /// What is behind them.
    pub rest: Rest,
}

/// What is behind what was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Nothing now: readiness says when there is more.
    Drained,
    /// Perhaps more: no readiness need say so.
    More,
    /// The end.
    Ended,
}

impl Socket {
    /// Reads what is there, at most what `buffer` holds.
    ///
    /// # Errors
    /// As `recv`, but that nothing is an empty share; `InvalidData` if the peer's TLS is broken.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Share> {
        match self {
            Self::Plain(stream) => read_plain(stream, buffer),
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { stream, tls }) => tls.read(stream, buffer),
        }
    }

    /// Writes what the kernel takes; returns the bytes that the caller need not keep. Fewer than all means that it takes
    /// no more until it says so, and that [`Self::flush`] comes first then.
    ///
    /// # Errors
    /// As `send`; `WouldBlock` if it takes nothing.
    pub fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match (self, slices) {
            (Self::Plain(stream), [slice]) => stream.write(slice),
            (Self::Plain(stream), _) => stream.write_vectored(slices),
            #[cfg(feature = "tls")]
            (Self::Tls(TlsSocket { stream, tls }), slices) => tls.write(stream, slices),
        }
    }

    /// The kernel takes bytes again: hands it what the socket itself kept. True if nothing is left of that.
    ///
    /// # Errors
    /// As `send`, but for `WouldBlock`.
    pub fn flush(&mut self) -> io::Result<bool> {
        match self {
            Self::Plain(_) => Ok(true),
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { stream, tls }) => tls.flush(stream),
        }
    }

    /// Says that nothing more is sent; the peer's last words can still be read.
    pub fn finish_writing(&mut self) {
        match self {
            // The peer may be gone already: then there is nobody to tell.
            Self::Plain(stream) => drop(stream.shutdown(Shutdown::Write)),
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { stream, tls }) => tls.finish(stream),
        }
    }

    /// The connection is dropped. Where an end must be told from a loss, the peer is told that it is one.
    pub fn close(self) {
        match self {
            Self::Plain(stream) => drop(stream),
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { stream, mut tls }) => tls.finish(&stream),
        }
    }

    /// Bytes in user space of a record that is not whole yet.
    #[must_use]
    pub fn incomplete_bytes(&self) -> usize {
        match self {
            Self::Plain(_) => 0,
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { tls, .. }) => tls.incomplete_bytes(),
        }
    }

    /// Nothing is kept of what comes any more: it is read, and thrown away.
    pub fn turn_deaf(&mut self) {
        match self {
            Self::Plain(_) => {}
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { tls, .. }) => tls.turn_deaf(),
        }
    }

    /// Whether there is something to read that no readiness will tell of.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { tls, .. }) => tls.has_ended(),
        }
    }
}

/// A short read has drained the socket.
fn read_plain(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Share> {
    loop {
        let (bytes, rest) = match stream.read(buffer) {
            Ok(0) => (0, Rest::Ended),
            Ok(bytes) if bytes == buffer.len() => (bytes, Rest::More),
            Ok(bytes) => (bytes, Rest::Drained),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (0, Rest::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        return Ok(Share { bytes, rest });
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Plain(stream) => stream.as_raw_fd(),
            #[cfg(feature = "tls")]
            Self::Tls(TlsSocket { stream, .. }) => stream.as_raw_fd(),
        }
    }
}
