//! TLS for the shards' listeners: what a handshake offers, and what becomes of it.

pub mod certificates;
mod record;

use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use tokio::net::TcpStream;

use crate::driver::listener::linger;
use crate::driver::stream::Stream;
use crate::driver::tls::record::Scratch;
use crate::metrics::{ShardMetrics, TlsHandshake};

pub(crate) use crate::driver::tls::record::Tls;

/// What a client gets that speaks HTTP where TLS is spoken.
const PLAIN_HTTP: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 77\r\n\
    connection: close\r\ncache-control: no-store\r\n\r\n\
    {\"error\":{\"code\":\"tls_required\",\"message\":\"this port speaks TLS: use https\"}}";

/// Accepts TLS with one set of settings. Cloned for each shard, cheaply.
#[derive(Clone)]
pub struct Acceptor(Arc<ServerConfig>);

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Acceptor").finish_non_exhaustive()
    }
}

impl Acceptor {
    /// TLS 1.3 and 1.2 by *ring*, ALPN `http/1.1`, stateless session tickets (one a handshake), no early data, no
    /// certificates of clients. Which certificate a handshake gets is asked of `certificates` each time.
    ///
    /// # Errors
    /// If the system gives no random bytes for the keys of the tickets.
    pub fn new(certificates: Arc<dyn ResolvesServerCert>) -> Result<Self, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?.with_no_client_auth();
        let mut config = builder.with_cert_resolver(certificates);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A ticket is state that the client keeps: the server keeps none.
        config.ticketer = ring::Ticketer::new()?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 1;
        Ok(Self(Arc::new(config)))
    }

    /// For the connections of one thread, which counts in `metrics`.
    pub(crate) fn for_thread(&self, metrics: Arc<ShardMetrics>) -> ThreadAcceptor {
        let scratch = Rc::new(Scratch::new(Arc::clone(&metrics)));
        ThreadAcceptor { config: Arc::clone(&self.0), scratch, metrics }
    }
}

/// An [`Acceptor`] with the memory that a thread's connections share.
pub(crate) struct ThreadAcceptor {
    config: Arc<ServerConfig>,
    scratch: Rc<Scratch>,
    metrics: Arc<ShardMetrics>,
}

impl ThreadAcceptor {
    /// Shakes hands. What came behind the handshake is kept to be read.
    ///
    /// # Errors
    /// If the peer goes away, or speaks no TLS that is spoken here: it was told so. Counted as a failed handshake.
    ///
    /// # Cancel safety
    /// Dropped, the connection is, and the handshake counts as failed.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<Stream> {
        let mut outcome = Outcome { metrics: &self.metrics, is: TlsHandshake::Failed };
        let mut first = [0];
        stream.peek(&mut first).await?;
        // A record of the handshake begins with 22, a method of HTTP with a letter.
        if first[0].is_ascii_alphabetic() {
            // A few bytes on an idle socket: whoever does not take them at once does not get them.
            let _ = stream.try_write(PLAIN_HTTP);
            linger(Stream::plain(stream)).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no TLS, but plain HTTP"));
        }
        let tls = Tls::new(Arc::clone(&self.config), Rc::clone(&self.scratch)).map_err(io::Error::other)?;
        let mut tls = Box::new(tls);
        loop {
            if !tls.flush(&stream)? {
                stream.writable().await?;
            } else if !tls.is_handshaking() {
                break;
            } else if tls.has_ended() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            } else {
                stream.readable().await?;
                tls.fill(&stream)?;
            }
        }
        outcome.is = if tls.is_resumed() { TlsHandshake::Resumed } else { TlsHandshake::Full };
        Ok(Stream::Tls(stream, tls))
    }
}

/// Counts a handshake when it is over, also if nobody waits for it any more.
struct Outcome<'m> {
    metrics: &'m ShardMetrics,
    is: TlsHandshake,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        self.metrics.tls_handshakes.of(self.is).increment();
    }
}
