//! Files that another node has: fetched from it, within limits, for whoever asks here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use tokio::sync::Semaphore;

use crate::broker::Broker;
use crate::gateway::http_client::{HttpClient, http_client};
use crate::gateway::response::{Answered, error};

/// Files that are fetched from other nodes at one time. Each may hold as many bytes as a file may have.
const FETCHES_MAX: usize = 16;
/// How long all of one may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a connection to a node may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of headers and status that come with a file.
const HEAD_BYTES: usize = 16 << 10;
/// What marks a request of a node: it is answered from what that node has.
pub(super) const FROM_NODE: HeaderName = HeaderName::from_static("x-tabcast-node");

/// Fetches files.
#[derive(Debug, Clone)]
pub(crate) struct RemoteFiles {
    client: HttpClient,
    fetches: Arc<Semaphore>,
    bytes_max: usize,
}

impl RemoteFiles {
    /// `bytes_max`: of one file.
    ///
    /// # Errors
    /// The cryptography that TLS needs is not there.
    pub(crate) fn new(bytes_max: usize) -> io::Result<Self> {
        let client = http_client(CONNECT_TIMEOUT, FETCHES_MAX).map_err(io::Error::other)?;
        Ok(Self { client, fetches: Arc::new(Semaphore::new(FETCHES_MAX)), bytes_max })
    }

    /// What the node with that tag answers for `path`, which is below `/files/`. None: there is no such node.
    pub(super) async fn fetch(
        &self,
        broker: Arc<dyn Broker>,
        tag: u32,
        path: String,
        asked: (Method, HeaderMap),
    ) -> Option<Answered> {
        let address = broker.address_of(tag).await?;
        let Ok(_place) = self.fetches.try_acquire() else {
            let message = "as many files of other nodes are being fetched as may be; try again later";
            return Some(error(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message));
        };
        let (method, headers) = asked;
        let mut request =
            Request::builder().method(method).uri(format!("{}/files/{path}", address.trim_end_matches('/')));
        for name in [RANGE, IF_RANGE, IF_NONE_MATCH] {
            if let Some(value) = headers.get(&name) {
                request = request.header(name, value);
            }
        }
        let request = request.header(FROM_NODE, HeaderValue::from_static("1")).body(Full::default()).ok()?;
        let bytes_max = self.bytes_max + HEAD_BYTES;
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, async {
            let (parts, body) = self.client.request(request).await.ok()?.into_parts();
            let body: Bytes = Limited::new(body, bytes_max).collect().await.ok()?.to_bytes();
            let mut response = http::Response::from_parts(parts, Full::new(body));
            // These are said anew of the connection to whoever asked.
            for name in [http::header::CONNECTION, http::header::TRANSFER_ENCODING, http::header::DATE] {
                response.headers_mut().remove(name);
            }
            Some(response)
        });
        let unreachable = || {
            let message = "the node that has the file does not answer; try again later";
            error(StatusCode::BAD_GATEWAY, "node_unreachable", message)
        };
        Some(fetched.await.ok().flatten().unwrap_or_else(unreachable))
    }
}
