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
use hyper::body::Body;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::broker::Broker;
use crate::gateway::apart::apart;
use crate::gateway::files::{POLICY, RESOURCE_POLICY};
use crate::gateway::http_client::{HttpClient, http_client};
use crate::gateway::lent::LentRoom;
use crate::gateway::response::{Answered, error, finish};

/// Files that are fetched from other nodes at one time, their addresses looked up too. As many of the largest are held at
/// one time, fetched or still to be taken by whoever asked, or more that are smaller.
const FETCHES_MAX: usize = 16;
/// How long all of one may take, its address looked up too.
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
    /// For the bytes of all that are held.
    room: LentRoom,
    bytes_max: usize,
}

impl RemoteFiles {
    /// `bytes_max`: of one file.
    ///
    /// # Errors
    /// The cryptography that TLS needs is not there.
    pub(crate) fn new(bytes_max: usize) -> io::Result<Self> {
        let client = http_client(CONNECT_TIMEOUT, FETCHES_MAX).map_err(io::Error::other)?;
        let room = LentRoom::new(bytes_max.saturating_mul(FETCHES_MAX));
        Ok(Self { client, fetches: Arc::new(Semaphore::new(FETCHES_MAX)), room, bytes_max })
    }

    /// What the node with that tag answers for a path, which is below `/files/`: fetched on the threads of `control`. None:
    /// there is no such node.
    ///
    /// # Cancel safety
    /// Dropped, as when the client goes away, the fetch ends, and gives back its place and its room.
    pub(super) async fn fetch_apart(
        &self,
        control: &Handle,
        node: (Arc<dyn Broker>, u32),
        asked: (String, Method, HeaderMap),
    ) -> Option<Answered> {
        let files = self.clone();
        apart(control, async move { files.fetch(node, asked).await }).await?
    }

    async fn fetch(&self, node: (Arc<dyn Broker>, u32), asked: (String, Method, HeaderMap)) -> Option<Answered> {
        // Before anything is asked: whoever knows a link could have Redis asked without end.
        let Ok(_fetch) = self.fetches.try_acquire() else { return Some(overloaded()) };
        // With the time that it takes to learn where the node is.
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, self.found(node, asked)).await;
        let fetched = fetched.unwrap_or(Some(Err(NotFetched::Unreachable)))?;
        Some(fetched.unwrap_or_else(NotFetched::answer))
    }

    async fn found(
        &self,
        (broker, tag): (Arc<dyn Broker>, u32),
        (path, method, headers): (String, Method, HeaderMap),
    ) -> Option<Result<Answered, NotFetched>> {
        let uri = file_uri(&broker.address_of(tag).await?, &path)?;
        let mut request = Request::builder().method(method).uri(uri);
        for name in [RANGE, IF_RANGE, IF_NONE_MATCH] {
            if let Some(value) = headers.get(&name) {
                request = request.header(name, value);
            }
        }
        let request = request.header(FROM_NODE, HeaderValue::from_static("1")).body(Full::default()).ok()?;
        Some(self.ask(request).await)
    }

    async fn ask(&self, request: Request<Full<Bytes>>) -> Result<Answered, NotFetched> {
        let unreachable = || NotFetched::Unreachable;
        let (parts, body) = self.client.request(request).await.map_err(|_| unreachable())?.into_parts();
        // Of an unknown length it may be as long as any.
        let announced = body.size_hint().exact().map_or(Some(self.bytes_max), |bytes| bytes.try_into().ok());
        let announced = announced.filter(|bytes| *bytes <= self.bytes_max).and_then(|bytes| u32::try_from(bytes).ok());
        let mut place = self.room.take(announced.ok_or_else(unreachable)?).await.ok_or(NotFetched::Overloaded)?;
        let bytes = Limited::new(body, self.bytes_max).collect().await.map_err(|_| unreachable())?.to_bytes();
        drop(place.split(place.num_permits().saturating_sub(bytes.len())));
        let count = bytes.len();
        let mut answered =
            passed_on(&parts, Bytes::from_owner(Held { bytes, _place: place })).ok_or_else(unreachable)?;
        if count > 0 {
            answered.extensions_mut().insert(self.room.lend(count));
        }
        Ok(answered)
    }
}

/// Why there is nothing of a file.
enum NotFetched {
    Unreachable,
    Overloaded,
}

impl NotFetched {
    fn answer(self) -> Answered {
        match self {
            Self::Overloaded => overloaded(),
            Self::Unreachable => {
                let message = "the node that has the file does not answer; try again later";
                error(StatusCode::BAD_GATEWAY, "node_unreachable", message)
            }
        }
    }
}

fn overloaded() -> Answered {
    let message = "as many files of other nodes are being fetched as may be; try again later";
    error(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
}

/// A file's bytes, and their room among those that are held: free once whoever asked has taken them.
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
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::broker::{BrokerFuture, Forwarded, NodeId, OnlineUser, Peer, SpoolFull};
    use crate::id::{ChannelId, UserId};
    use crate::proto::disconnect::Disconnect;
    use crate::proto::frame::{Frame, Kind};

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

    /// Knows one other node, and how often it was asked for its address. Where that is empty, it does not answer.
    struct Neighbour {
        address: String,
        asked: AtomicUsize,
    }

    impl Broker for Neighbour {
        fn attach(&self, _: &Arc<dyn Peer>) -> NodeId {
            NodeId::new(0)
        }

        fn wants(&self, _: NodeId, _: &ChannelId, _: Kind) -> bool {
            false
        }

        fn forward(&self, _: NodeId, _: &ChannelId, _: &Frame) -> Result<Forwarded, SpoolFull> {
            Err(SpoolFull)
        }

        fn is_online_elsewhere<'a>(&'a self, _: NodeId, _: &'a UserId) -> BrokerFuture<'a, bool> {
            Box::pin(std::future::ready(false))
        }

        fn end_elsewhere<'a>(&'a self, _: NodeId, _: &'a UserId, _: Disconnect) -> BrokerFuture<'a, usize> {
            Box::pin(std::future::ready(0))
        }

        fn users_elsewhere(&self, _: NodeId, _: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
            Box::pin(std::future::ready(None))
        }

        fn address_of(&self, _: u32) -> BrokerFuture<'_, Option<String>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let address = self.address.clone();
            if address.is_empty() {
                Box::pin(std::future::pending())
            } else {
                Box::pin(std::future::ready(Some(address)))
            }
        }
    }

    /// A node that answers a request with a file of as many bytes as its path says, or else not at all.
    fn node() -> Arc<Neighbour> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let answer = |mut stream: TcpStream| {
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            match head.strip_prefix("GET /files/").and_then(|rest| rest.split(' ').next()?.parse().ok()) {
                Some(bytes) => {
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\nconnection: close\r\n\r\n");
                    // Whoever asked may have gone away.
                    stream.write_all((head + &"x".repeat(bytes)).as_bytes())
                }
                None => stream.read(&mut byte).map(drop),
            }
        };
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || answer(stream));
            }
        });
        Arc::new(Neighbour { address, asked: AtomicUsize::new(0) })
    }

    async fn fetch(files: &RemoteFiles, node: &Arc<Neighbour>, path: &str) -> Answered {
        let broker = Arc::clone(node) as Arc<dyn Broker>;
        files.fetch((broker, 7), (path.to_owned(), Method::GET, HeaderMap::new())).await.unwrap()
    }

    fn expect_overloaded(answered: &Answered) {
        assert_eq!(answered.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answered.headers()["retry-after"], "1");
    }

    #[tokio::test]
    async fn so_many_bytes_are_held_as_so_many_of_the_largest_files_have() {
        let (files, node) = (RemoteFiles::new(1_000).unwrap(), node());
        let mut held = Vec::new();
        // Readers of small files leave room for others, however many they are and whatever they take.
        for _ in 0..FETCHES_MAX * 2 {
            held.push(fetch(&files, &node, "100").await);
        }
        assert!(held.iter().all(|answered| answered.status() == StatusCode::OK));
        for _ in 0..FETCHES_MAX - 4 {
            held.push(fetch(&files, &node, "1000").await);
        }
        expect_overloaded(&fetch(&files, &node, "1000").await);
        assert_eq!(fetch(&files, &node, "800").await.status(), StatusCode::OK);
        let body = held.pop().unwrap().into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "x".repeat(1_000));
        drop(body);
        assert_eq!(fetch(&files, &node, "1000").await.status(), StatusCode::OK);
        assert_eq!(fetch(&files, &node, "1001").await.status(), StatusCode::BAD_GATEWAY);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_where_a_node_is_has_no_longer_than_the_node() {
        let files = RemoteFiles::new(1_000).unwrap();
        let silent = Arc::new(Neighbour { address: String::new(), asked: AtomicUsize::new(0) });
        let answered = tokio::time::timeout(FETCH_TIMEOUT * 2, fetch(&files, &silent, "1")).await.unwrap();
        assert_eq!(answered.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(files.fetches.available_permits(), FETCHES_MAX);
    }

    #[tokio::test]
    async fn whoever_goes_away_leaves_the_place_of_a_fetch_to_others() {
        let (files, node) = (RemoteFiles::new(1_000).unwrap(), node());
        let asked = || {
            let broker = Arc::clone(&node) as Arc<dyn Broker>;
            (files.clone(), (broker, 7), ("never".to_owned(), Method::GET, HeaderMap::new()))
        };
        let control = Handle::current();
        let mut under_way: Vec<_> = (0..FETCHES_MAX)
            .map(|_| {
                let ((files, node, asked), control) = (asked(), &control);
                Box::pin(async move { files.fetch_apart(control, node, asked).await })
            })
            .collect();
        for fetch in &mut under_way {
            assert!(futures_util::poll!(fetch).is_pending());
        }
        while files.fetches.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        expect_overloaded(&fetch(&files, &node, "1").await);
        drop(under_way);
        // Far sooner than the node would have been given up.
        tokio::time::timeout(FETCH_TIMEOUT / 2, async {
            while files.fetches.available_permits() < FETCHES_MAX {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert_eq!(fetch(&files, &node, "1").await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn past_so_many_fetches_nobody_is_asked_for_anything() {
        let (files, node) = (RemoteFiles::new(1_000).unwrap(), node());
        let mut under_way: Vec<_> = (0..FETCHES_MAX).map(|_| Box::pin(fetch(&files, &node, "never"))).collect();
        for fetch in &mut under_way {
            assert!(futures_util::poll!(fetch).is_pending());
        }
        expect_overloaded(&fetch(&files, &node, "1").await);
        assert_eq!(node.asked.load(Ordering::Relaxed), FETCHES_MAX);
        under_way.pop();
        assert_eq!(fetch(&files, &node, "1").await.status(), StatusCode::OK);
    }
}
