//! TLS for tests: an authority of their own, and clients that trust nobody else.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};
use serde_json::Value;
use tempfile::TempDir;

use super::{Client, Gateway, PATIENCE, post};

pub(crate) type Stream = StreamOwned<ClientConnection, TcpStream>;

/// An authority, and the files of a server that it vouches for.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    own: CertificateDer<'static>,
    folder: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let own = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), own, folder: tempfile::tempdir().unwrap() }
    }

    /// A certificate for `localhost` and its key, both in PEM.
    pub(crate) fn issue(&self, shape: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        shape(&mut params);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts them where [`Self::gateway`] looks for them; each file is there as a whole or not at all.
    pub(crate) fn write(&self, (certificate, key): &(String, String)) {
        for (name, text) in [("cert.pem", certificate), ("key.pem", key)] {
            std::fs::write(self.path("new"), text).unwrap();
            std::fs::rename(self.path("new"), self.path(name)).unwrap();
        }
    }

    /// A gateway with a fresh certificate.
    pub(crate) fn gateway(&self, settings: &[(&str, &str)]) -> Gateway {
        self.write(&self.issue(|_| ()));
        let path = |name| self.path(name);
        let (certificate, key) = (path("cert.pem"), path("key.pem"));
        let of = |path: &Path| path.to_str().unwrap().to_owned();
        let (certificate, key) = (of(&certificate), of(&key));
        let tls = [("tls_cert", certificate.as_str()), ("tls_key", key.as_str())];
        Gateway::start(&[settings, &tls].concat())
    }

    /// A client that trusts this authority, and speaks these versions.
    pub(crate) fn client_of(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.own.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.client_of(rustls::ALL_VERSIONS)
    }

    pub(crate) fn connect(&self, gateway: &Gateway) -> Client<Stream> {
        over(&self.client(), Client::connect(gateway.address))
    }

    pub(crate) fn tab(&self, gateway: &Gateway, query: &str) -> Client<Stream> {
        self.connect(gateway).upgraded(query)
    }

    /// One POST of JSON on a connection of its own; its answer must be 200.
    pub(crate) fn post(&self, gateway: &Gateway, path: &str, body: &Value) -> Value {
        let mut client = self.connect(gateway);
        client.write(&post(path, "application/json", body.to_string().as_bytes()));
        let response = client.response();
        assert_eq!(response.status, 200, "{path} {body}: {}", response.text());
        serde_json::from_slice(&response.body).unwrap()
    }

    /// What a metric counts now; all its labels together if `name` has none.
    pub(crate) fn metric(&self, gateway: &Gateway, name: &str) -> u64 {
        let mut client = self.connect(gateway);
        client.write(&super::get("/metrics"));
        super::metric_in(&client.response().text(), name)
    }

    /// Waits until a metric is `expected`.
    pub(crate) fn wait_for_metric(&self, gateway: &Gateway, name: &str, expected: u64) {
        let deadline = super::now() + PATIENCE;
        while self.metric(gateway, name) != expected {
            assert!(super::now() < deadline, "{name} is {}", self.metric(gateway, name));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// TLS over a connection; the handshake is done with the first byte that is read or written.
pub(crate) fn over(config: &Arc<ClientConfig>, client: Client) -> Client<Stream> {
    let connection = ClientConnection::new(Arc::clone(config), "localhost".try_into().unwrap()).unwrap();
    Client::over(StreamOwned::new(connection, client.stream))
}

/// Says goodbye; what comes can still be read.
pub(crate) fn finish(client: &mut Client<Stream>) {
    client.stream.conn.send_close_notify();
    client.stream.flush().unwrap();
}
