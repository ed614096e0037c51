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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use mio::{Events, Poll, Token};
    use rustls::pki_types::PrivateKeyDer;
    use rustls::{ServerConfig, ServerConnection, StreamOwned};

    use super::*;
    use crate::bench::client::{Client, Ending, Sink, State};
    use crate::bench::socket::{Dial, Transport};
    use crate::bench::websocket::Fault;

    fn file(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/keys").join(name)
    }

    /// Accepts one WebSocket, sends `count` texts, reads a pong, and closes.
    fn serve(listener: &TcpListener, count: usize) {
        let certificates = CertificateDer::pem_file_iter(file("localhost.cert.pem")).unwrap();
        let certificates = certificates.collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(file("localhost.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
        let session = ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = StreamOwned::new(session, listener.accept().unwrap().0);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            // A client that does not trust us is gone.
            if stream.read_exact(&mut byte).is_err() {
                return;
            }
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 101 Switching\r\n\r\n").unwrap();
        for _ in 0..count {
            stream.write_all(&[[0x81, 100].as_slice(), &[b'x'; 100]].concat()).unwrap();
        }
        stream.write_all(b"\x89\x01p").unwrap();
        let mut pong = [0; 7];
        stream.read_exact(&mut pong).unwrap();
        assert_eq!(&pong, b"\x8a\x81\0\0\0\0p");
        stream.write_all(b"\x88\x02\x03\xe8").unwrap();
    }

    #[derive(Default)]
    struct Counted {
        messages: usize,
        pings: usize,
    }

    impl Sink for Counted {
        fn opened(&mut self) {}

        fn message(&mut self, payload: &[u8]) {
            assert_eq!(payload, [b'x'; 100]);
            self.messages += 1;
        }

        fn deflated(&mut self, _: &[u8]) -> Result<(), Fault> {
            Err(Fault::Reserved)
        }

        fn ping(&mut self) {
            self.pings += 1;
        }
    }

    /// Runs a client of one connection to its end.
    fn run(name: &str, count: usize) -> io::Result<(Counted, Option<Ending>)> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || serve(&listener, count));
        let trust = Trust::new(&file("localhost.cert.pem"), name).unwrap();
        let socket = Dial { address, source: None, receive_buffer: None }.connect()?;
        let (mut poll, mut events) = (Poll::new()?, Events::with_capacity(8));
        let mut client = Client::new(false);
        client.transport = Transport::Tls(Box::new(Tls::new(socket, &trust)?));
        client.transport.register(poll.registry(), Token(0))?;
        client.state = State::Connecting;
        client.write(b"GET / HTTP/1.1\r\n\r\n")?;
        client.state = State::Shaking;
        let (mut counted, mut buffer) = (Counted::default(), vec![0; 4096]);
        let ending = 'all: loop {
            poll.poll(&mut events, Some(Duration::from_secs(10)))?;
            assert!(!events.is_empty(), "nothing comes");
            client.flush();
            loop {
                let carried = client.carried(&mut buffer);
                match client.transport.read(&mut buffer[carried..]) {
                    Ok(0) => break 'all None,
                    Ok(read) => {
                        if let Err(ending) = client.take(&mut buffer[..carried + read], carried, &mut counted) {
                            break 'all Some(ending);
                        }
                    }
                    Err(error) if crate::bench::socket::is_not_now(&error) => break,
                    Err(error) => return Err(error),
                }
            }
        };
        server.join().unwrap();
        Ok((counted, ending))
    }

    #[test]
    fn a_client_over_tls_gets_everything_and_answers() {
        let (counted, ending) = run("localhost", 500).unwrap();
        assert_eq!((counted.messages, counted.pings, ending), (500, 1, Some(Ending::Closed(1000))));
        assert!(run("127.0.0.1", 1).is_ok(), "by its address");
    }

    #[test]
    fn a_server_that_is_not_trusted_gets_nothing() {
        assert!(run("elsewhere.example", 1).is_err());
        let not_a_certificate = Trust::new(&file("localhost.pem"), "localhost");
        assert!(not_a_certificate.err().unwrap().contains("no certificate"));
        assert!(Trust::new(&file("absent.pem"), "localhost").is_err());
    }
}
