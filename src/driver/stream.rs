//! A connection while HTTP is spoken on it: what hyper reads and writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::driver::socket::Socket;
#[cfg(feature = "tls")]
use crate::driver::socket::TlsSocket;
#[cfg(feature = "tls")]
use crate::driver::tls::Tls;

/// A connection that is no session (yet).
pub(crate) enum Stream {
    /// Plain TCP.
    Plain(TokioIo<TcpStream>),
    /// TLS over it, its handshake done.
    #[cfg(feature = "tls")]
    Tls(TcpStream, Box<Tls>),
}

impl Stream {
    /// Plain TCP.
    pub(crate) fn plain(stream: TcpStream) -> Self {
        Self::Plain(TokioIo::new(stream))
    }

    /// The connection as a session's, and what came over it and was not read. None if it cannot be one any more.
    pub(crate) fn into_session(self) -> Option<(Socket, Vec<u8>)> {
        match self {
            Self::Plain(stream) => Some((Socket::Plain(stream.into_inner().into_std().ok()?), Vec::new())),
            // Of the response before, a byte is not claimed: whoever wrote it has given up.
            #[cfg(feature = "tls")]
            Self::Tls(_, tls) if tls.holds_back() => None,
            #[cfg(feature = "tls")]
            Self::Tls(stream, mut tls) => {
                let unread = tls.take_unread();
                Some((Socket::Tls(TlsSocket { stream: stream.into_std().ok()?, tls }), unread))
            }
        }
    }

    /// Says that nothing more is sent; what is under it can still be read.
    pub(crate) fn finish_writing(self) -> TcpStream {
        match self {
            Self::Plain(stream) => {
                let stream = stream.into_inner();
                // The peer may be gone already: then there is nobody to tell.
                let _ = socket2::SockRef::from(&stream).shutdown(std::net::Shutdown::Write);
                stream
            }
            #[cfg(feature = "tls")]
            Self::Tls(stream, mut tls) => {
                tls.finish(&stream);
                stream
            }
        }
    }

    /// Ends the connection at once: the kernel forgets what the peer has not taken, which else it would hold for whoever
    /// never does.
    pub(crate) fn reset(self) {
        let stream = match &self {
            Self::Plain(stream) => stream.inner(),
            #[cfg(feature = "tls")]
            Self::Tls(stream, _) => stream,
        };
        // Where that cannot be, it ends like any other.
        let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }

    /// Writes a few bytes on an idle connection: whoever does not take them at once does not get them.
    pub(crate) fn try_write(&mut self, bytes: &[u8]) {
        let _ = match self {
            Self::Plain(stream) => stream.inner().try_write(bytes),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => tls.write(&*stream, &[IoSlice::new(bytes)]),
        };
    }
}

#[cfg(feature = "tls")]
fn poll_read_tls(
    stream: &TcpStream,
    tls: &mut Tls,
    context: &mut Context<'_>,
    mut buffer: ReadBufCursor<'_>,
) -> Poll<io::Result<()>> {
    loop {
        let unread = tls.unread();
        if !unread.is_empty() || tls.has_ended() {
            let bytes = unread.len().min(buffer.remaining());
            buffer.put_slice(&unread[..bytes]);
            tls.consume(bytes);
            return Poll::Ready(Ok(()));
        }
        std::task::ready!(stream.poll_read_ready(context))?;
        tls.fill(stream)?;
    }
}

#[cfg(feature = "tls")]
fn poll_write_tls(
    stream: &TcpStream,
    tls: &mut Tls,
    context: &mut Context<'_>,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    loop {
        match tls.write(stream, slices) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return Poll::Ready(result),
        }
        std::task::ready!(stream.poll_write_ready(context))?;
    }
}

#[cfg(feature = "tls")]
fn poll_flush_tls(stream: &TcpStream, tls: &mut Tls, context: &mut Context<'_>) -> Poll<io::Result<()>> {
    while !tls.flush(stream)? {
        std::task::ready!(stream.poll_write_ready(context))?;
    }
    Poll::Ready(Ok(()))
}

impl Read for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => poll_read_tls(stream, tls, context, buffer),
        }
    }
}

impl Write for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => poll_write_tls(stream, tls, context, &[IoSlice::new(bytes)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => poll_write_tls(stream, tls, context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => poll_flush_tls(stream, tls, context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            #[cfg(feature = "tls")]
            Self::Tls(stream, tls) => {
                std::task::ready!(poll_flush_tls(stream, tls, context))?;
                tls.finish(&*stream);
                Poll::Ready(Ok(()))
            }
        }
    }
}
