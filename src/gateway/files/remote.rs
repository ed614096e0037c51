//! Files that another node has: fetched from it, within limits, for whoever asks here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::broker::Broker;
use crate::gateway::files::{POLICY, RESOURCE_POLICY};
use crate::gateway::http_client::{HttpClient, http_client};
use crate::gateway::response::{Answered, error, finish};

/// Files that are fetched from other nodes, or wait to be taken by whoever asked, at one time. Each may hold as many bytes
/// as a file may have.
const FETCHES_MAX: usize = 16;
/// How long all of one may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a connection to a node may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
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
        let uri = file_uri(&broker.address_of(tag).await?, &path)?;
        let Ok(place) = Arc::clone(&self.fetches).try_acquire_owned() else {
            let message = "as many files of other nodes are being fetched as may be; try again later";
            return Some(error(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message));
        };
        let (method, headers) = asked;
        let mut request = Request::builder().method(method).uri(uri);
        for name in [RANGE, IF_RANGE, IF_NONE_MATCH] {
            if let Some(value) = headers.get(&name) {
                request = request.header(name, value);
            }
        }
        let request = request.header(FROM_NODE, HeaderValue::from_static("1")).body(Full::default()).ok()?;
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, async {
            let (parts, body) = self.client.request(request).await.ok()?.into_parts();
            let bytes = Limited::new(body, self.bytes_max).collect().await.ok()?.to_bytes();
            passed_on(&parts, Bytes::from_owner(Held { bytes, _place: place }))
        });
        let unreachable = || {
            let message = "the node that has the file does not answer; try again later";
            error(StatusCode::BAD_GATEWAY, "node_unreachable", message)
        };
        Some(fetched.await.ok().flatten().unwrap_or_else(unreachable))
    }
}

/// A file's bytes, and its place among those that are fetched: free once whoever asked has taken them.
struct Held {
    bytes: Bytes,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Where a node has a file. None: what it said of itself is no address of a node.
fn file_uri(address: &str, path: &str) -> Option<Uri> {
    let base: Uri = address.parse().ok()?;
    let authority = base.authority()?;
    let is_node = matches!(base.scheme_str(), Some("http" | "https"))
        && !authority.as_str().contains('@')
        && base.query().is_none();
    let path = format!("{}/files/{path}", base.path().trim_end_matches('/'));
    let uri = Uri::builder().scheme(base.scheme_str()?).authority(authority.as_str()).path_and_query(path);
    uri.build().ok().filter(|_| is_node)
}

/// What a node said of a file, and nothing else of what it said. None: that is no answer to it.
fn passed_on(parts: &http::response::Parts, body: Bytes) -> Option<Answered> {
    let known = [
        StatusCode::OK,
        StatusCode::PARTIAL_CONTENT,
        StatusCode::NOT_MODIFIED,
        StatusCode::NOT_FOUND,
        StatusCode::RANGE_NOT_SATISFIABLE,
    ];
    if !known.contains(&parts.status) {
        return None;
    }
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = parts.status;
    let headers = response.headers_mut();
    for name in [ETAG, CACHE_CONTROL, ACCEPT_RANGES, CONTENT_RANGE, CONTENT_TYPE, CONTENT_DISPOSITION] {
        if let Some(value) = parts.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    headers.extend([(CONTENT_SECURITY_POLICY, POLICY), RESOURCE_POLICY]);
    Some(finish(response))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_nodes_address_leads_to_a_file() {
        let check = |address: &str, expected: Option<&str>| {
            let uri = file_uri(address, "id/a%20b.txt").map(|uri| uri.to_string());
            assert_eq!(uri.as_deref(), expected, "{address}");
        };
        check("http://10.0.0.7:8080", Some("http://10.0.0.7:8080/files/id/a%20b.txt"));
        check("https://node/base/", Some("https://node/base/files/id/a%20b.txt"));
        for bad in ["", "node", "ftp://node", "http://u:p@node", "http://node/?x=", "/files"] {
            check(bad, None);
        }
    }

    #[test]
    fn of_what_a_node_answers_only_what_a_file_has_is_passed_on() {
        let answer = |status: u16| {
            let response = Response::builder().status(status).header("set-cookie", "a=b").header("location", "x");
            let (parts, ()) = response.header("content-type", "text/html").body(()).unwrap().into_parts();
            passed_on(&parts, Bytes::from_static(b"x"))
        };
        let response = answer(200).unwrap();
        let names: Vec<_> = response.headers().keys().map(HeaderName::as_str).collect();
        assert!(!names.contains(&"set-cookie") && !names.contains(&"location"), "{names:?}");
        assert_eq!(response.headers()["content-security-policy"], POLICY);
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        assert!(answer(302).is_none() && answer(500).is_none());
    }
}
