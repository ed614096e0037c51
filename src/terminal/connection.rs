//! The stream from the node, opened again whenever it is lost.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::mpsc;

use super::lines::Events;
use super::text::clean;
use super::{Failure, Node};

/// How long a connection may take until the node answers.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before a lost connection is opened again; it doubles with each that fails.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Bytes of an answer that refuses.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
/// Updates that may wait to be shown.
pub(super) const UPDATES_MAX: usize = 64;

/// What happens to the stream.
#[derive(Debug)]
pub(super) enum Update {
    /// The node has answered.
    Open,
    /// The data of an event.
    Event(String),
    /// The connection is lost, and opened again after a pause.
    Lost {
        /// Why.
        reason: String,
        /// How long that is.
        pause: Duration,
    },
    /// The node does not want us, and will not.
    Refused(Refusal),
}

/// An answer that is no stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    pub(super) fn is_about_the_key(&self) -> bool {
        [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&self.status)
    }

    /// Whether it may be another answer next time.
    fn is_passing(&self) -> bool {
        let waits = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        self.status.is_server_error() || waits.contains(&self.status)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status.as_u16(), self.message)
    }
}

/// One stream of a node.
pub(super) struct Stream {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    uri: Uri,
    key: Option<HeaderValue>,
    /// A node that says nothing for so long is lost.
    silence_max: Duration,
}

/// Why an attempt ended.
enum End {
    Lost(String),
    Refused(Refusal),
}

impl Stream {
    /// The stream of what `watched` names.
    ///
    /// # Errors
    /// An argument is not usable. No message repeats the key.
    pub(super) fn new(node: &Node, watched: &str, silence_max: Duration) -> Result<Self, Failure> {
        let argument = |reason: String| Failure::Argument(reason);
        let uri = format!(
            "{}/events?watch={}",
            node.url.trim_end_matches('/'),
            utf8_percent_encode(watched, NON_ALPHANUMERIC)
        );
        let uri: Uri = uri.parse().map_err(|error| argument(format!("--url {}: {error}", clean(&node.url))))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(argument(format!(
                "--url {}: expected http://host:port or https://host:port",
                clean(&node.url)
            )));
        }
        let key = node.key.as_deref().filter(|key| !key.is_empty()).map(bearer).transpose().map_err(argument)?;
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(OPEN_TIMEOUT));
        let tls = tls(node.ca.as_deref()).map_err(argument)?;
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { client, uri, key, silence_max })
    }

    /// Follows the stream until the node refuses it or nobody takes its updates any more.
    ///
    /// # Cancel safety
    /// Dropped, the connection is closed; an update that was not taken yet is lost.
    pub(super) async fn follow(&self, updates: mpsc::Sender<Update>) {
        let mut pause = PAUSE_MIN;
        loop {
            let (end, has_heard) = self.attempt(&updates).await;
            if has_heard {
                pause = PAUSE_MIN;
            }
            let update = match end {
                End::Refused(refusal) if !refusal.is_passing() => Update::Refused(refusal),
                End::Refused(refusal) => Update::Lost { reason: refusal.to_string(), pause },
                End::Lost(reason) => Update::Lost { reason, pause },
            };
            let is_over = matches!(update, Update::Refused(_));
            if updates.send(update).await.is_err() || is_over {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// One connection to its end, and whether an event came on it.
    async fn attempt(&self, updates: &mpsc::Sender<Update>) -> (End, bool) {
        let mut body = match self.open().await {
            Ok(body) => body,
            Err(end) => return (end, false),
        };
        if updates.send(Update::Open).await.is_err() {
            return (End::Lost(String::new()), false);
        }
        let (mut events, mut whole, mut has_heard) = (Events::default(), Vec::new(), false);
        loop {
            let frame = match tokio::time::timeout(self.silence_max, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return (End::Lost(chain(&error)), has_heard),
                Ok(None) => return (End::Lost("the node has ended the stream".to_owned()), has_heard),
                Err(_) => {
                    let reason = format!("the node says nothing for {} s", self.silence_max.as_secs());
                    return (End::Lost(reason), has_heard);
                }
            };
            let Ok(bytes) = frame.into_data() else { continue };
            if let Err(error) = events.read(&bytes, &mut whole) {
                return (End::Lost(error.to_string()), has_heard);
            }
            for event in whole.drain(..) {
                has_heard = true;
                if updates.send(Update::Event(event)).await.is_err() {
                    return (End::Lost(String::new()), has_heard);
                }
            }
        }
    }

    async fn open(&self) -> Result<Incoming, End> {
        let lost = |error: &dyn std::error::Error| End::Lost(chain(error));
        let mut request = Request::get(self.uri.clone()).header(ACCEPT, "text/event-stream");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key.clone());
        }
        let request = request.body(Empty::new()).map_err(|error| lost(&error))?;
        let answered = tokio::time::timeout(OPEN_TIMEOUT, self.client.request(request)).await;
        let no_answer = || End::Lost(format!("no answer within {} s", OPEN_TIMEOUT.as_secs()));
        let response = answered.map_err(|_| no_answer())?.map_err(|error| lost(&error))?;
        let status = response.status();
        let content_type = response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        if status == StatusCode::OK && content_type.is_some_and(|kind| kind.starts_with(b"text/event-stream")) {
            return Ok(response.into_body());
        }
        let body = Limited::new(response.into_body(), REFUSAL_BYTES_MAX).collect();
        let body = tokio::time::timeout(OPEN_TIMEOUT, body).await.ok().and_then(Result::ok);
        let message = body.map(|body| message_of(&body.to_bytes())).unwrap_or_default();
        let is_other = status == StatusCode::OK;
        let message = if is_other { "the answer is no event stream: is this tabcast?".to_owned() } else { message };
        Err(End::Refused(Refusal { status, message }))
    }
}

/// What the body of a refusal says in our one shape, else what it begins with.
fn message_of(body: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let message = value.as_ref().and_then(|value| value["error"]["message"].as_str());
    let text =
        message.map_or_else(|| String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(), str::to_owned);
    clean(text.trim())
}

/// An error with what caused it: hyper's own says only that something failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    clean(&text)
}

fn bearer(key: &str) -> Result<HeaderValue, String> {
    let key = match key.strip_prefix("file:") {
        None => key.to_owned(),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| format!("--key: cannot read {path}: {error}"))?;
            let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            lines.next().ok_or_else(|| format!("--key: {path} holds no key"))?.to_owned()
        }
    };
    let value = HeaderValue::try_from(format!("Bearer {key}"));
    let mut value = value.map_err(|_| "--key: a key has printable characters of ASCII only".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Trusts the certificates of the web, and those of a file.
fn tls(ca: Option<&Path>) -> Result<ClientConfig, String> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let Some(path) = ca else { return Ok(builder.with_webpki_roots().with_no_client_auth()) };
    let bad = |error: &dyn fmt::Display| format!("--ca {}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
        roots.add(certificate.map_err(|error| bad(&error))?).map_err(|error| bad(&error))?;
    }
    if roots.is_empty() {
        return Err(bad(&"no certificate in it"));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
