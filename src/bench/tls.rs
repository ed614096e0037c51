//! TLS 1.3 beside a socket: rustls's connection is sans-io, so that a client of a thread's poll stays what it is.

use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use mio::net::TcpStream;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// Which certificates are trusted, and for which name.
#[derive(Debug, Clone)]
pub struct Trust {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Trust {
    /// Trusts the certificates of a PEM file, for a server of that name.
    ///
    /// # Errors
    /// If the file has none, or the name is no name.
    pub fn new(file: &Path, name: &str) -> Result<Self, String> {
        let bad = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(file).map_err(|error| bad(&error))? {
            roots.add(certificate.map_err(|error| bad(&error))?).map_err(|error| bad(&error))?;
        }
        if roots.is_empty() {
            return Err(bad(&"no certificate in it"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| bad(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every handshake is a whole one: resumed ones would flatter the server.
        config.resumption = rustls::client::Resumption::disabled();
        let name = match name.parse::<IpAddr>() {
            Ok(address) => ServerName::IpAddress(address.into()),
            Err(_) => ServerName::try_from(name.to_owned()).map_err(|error| format!("{name}: {error}"))?,
        };
        Ok(Self { config: Arc::new(config), name })
    }
}

/// One encrypted connection.
#[derive(Debug)]
pub(super) struct Tls {
    pub(super) socket: TcpStream,
    session: ClientConnection,
    /// The peer has closed the connection under it.
    is_over: bool,
}

impl Tls {
    pub(super) fn new(socket: TcpStream, trust: &Trust) -> io::Result<Self> {
        let session = ClientConnection::new(Arc::clone(&trust.config), trust.name.clone()).map_err(io::Error::other)?;
        Ok(Self { socket, session, is_over: false })
    }

    /// Reads what there is, decrypted. 0 is the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.is_over => {}
                // An end without `close_notify` is how most programs end; what was lost with it is counted anyway.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof || self.is_over => {
                    let _ = error;
                    return Ok(0);
                }
                Err(error) => return Err(error),
            }
            self.is_over = self.session.read_tls(&mut self.socket)? == 0;
            self.session.process_new_packets().map_err(io::Error::other)?;
            self.flush()?;
        }
    }

    /// Takes what fits, and writes what the socket takes of it.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let count = self.session.writer().write(bytes)?;
        self.flush()?;
        if count == 0 && !bytes.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    /// Writes what the session has for the socket, as far as it goes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(error) if super::socket::is_not_now(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
