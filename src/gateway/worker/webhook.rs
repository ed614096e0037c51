//! A worker behind a URL: every message is POSTed as JSON, and tried again until it is taken or given up.
//!
//! Order within a channel is the lane's: the next message goes out when this one is settled. A message may arrive
//! more than once (its answer was lost); `Idempotency-Key` is the message id, so that the receiver can tell.
//! A cancel comes after the question that it cancels, or neither comes.

mod retry;
mod under_way;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, USER_AGENT};
use http::uri::Scheme;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use sha2::Sha256;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};

use crate::gateway::http_client::{HttpClient, http_client};
use crate::gateway::trace_headers;
use crate::gateway::worker::webhook::retry::{backoff, retry_after};
use crate::gateway::worker::webhook::under_way::{Delivery, Heard, UnderWay};
use crate::metrics::{Metrics, WorkerOutcome};
use crate::platform::adapter::{BoxFuture, MessageHandler, PlatformAdapter};
use crate::platform::message::IncomingMessage;
use crate::proto::trace::TraceContext;

/// The most of a response that is read, so that its connection can be used again. The rest costs the connection.
const RESPONSE_BYTES_MAX: usize = 64 << 10;

/// Where messages go, and how hard it is tried.
#[derive(Clone)]
pub struct WebhookSettings {
    /// `http` or `https`, with a host and without a password. Redirects are not followed.
    pub url: Uri,
    /// What `X-Tabcast-Signature` is made with. Without it there is no signature.
    pub secret: Option<Vec<u8>>,
    /// How long one attempt may take, connecting and all. Default 10 s.
    pub request_timeout: Duration,
    /// Attempts for one message. Default 8.
    pub attempts_max: u32,
    /// How long one message may be tried. Default 2 minutes; its channel waits as long.
    pub message_timeout: Duration,
    /// The mean of the first pause is half of this; each next pause is twice as long, a random part of it. Default 500 ms.
    pub backoff_base: Duration,
    /// The longest pause. Default 30 s.
    pub backoff_max: Duration,
    /// Requests on their way at once. Default 64; each costs a connection.
    pub requests_max: usize,
}

impl WebhookSettings {
    /// The defaults for a URL.
    #[must_use]
    pub fn new(url: Uri) -> Self {
        Self {
            url,
            secret: None,
            request_timeout: Duration::from_secs(10),
            attempts_max: 8,
            message_timeout: Duration::from_secs(120),
            backoff_base: Duration::from_millis(500),
            backoff_max: Duration::from_secs(30),
            requests_max: 64,
        }
    }
}

impl std::fmt::Debug for WebhookSettings {
    /// Without the secret, and without the URL's query, which may hold another.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let url = format_args!("{:?}{}", self.url.authority(), self.url.path());
        f.debug_struct("WebhookSettings")
            .field("url", &url)
            .field("signed", &self.secret.is_some())
            .finish_non_exhaustive()
    }
}

/// Why a webhook could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebhookError {
    /// Not a URL that messages can be POSTed to.
    #[error("the webhook's URL must be http:// or https://, with a host and without a password")]
    BadUrl,
    /// The TLS library refused its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// What became of the messages so far. A question that was cancelled before it was settled was neither delivered nor
/// given up, and so was its cancel if that was not POSTed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WebhookCounts {
    /// Taken with a 2xx.
    pub delivered: u64,
    /// Attempts after the first of a message.
    pub retries: u64,
    /// Given up after the last attempt, or for lack of time.
    pub gave_up: u64,
    /// Refused for good by the receiver.
    pub rejected: u64,
}

/// # Ordering
/// Relaxed: statistics, they publish nothing.
#[derive(Default)]
struct Counters {
    delivered: AtomicU64,
    retries: AtomicU64,
    gave_up: AtomicU64,
    rejected: AtomicU64,
}

/// A [`MessageHandler`] that POSTs. Clones share connections and counts.
///
/// A request has `Content-Type: application/json`, `Idempotency-Key: <message id>`, `X-Tabcast-Timestamp: <Unix
/// seconds>` and, with a secret, `X-Tabcast-Signature: sha256=<hex HMAC-SHA-256 of "timestamp.body">`, both new for
/// each attempt, and `traceparent` and `tracestate` if the message has a trace. The body is [`IncomingMessage::to_json`]. What is tried again: no connection, no answer in time, 408,
/// 429 (not before its `Retry-After`) and 5xx; any other answer but a 2xx is final.
///
/// A message with `extra.cancel` ends the attempts for its channel's question, the message with `extra.openai`. It waits
/// for an attempt that is on its way, `request_timeout` at most, and is POSTed after it; if there was no attempt, neither
/// is POSTed.
#[derive(Clone)]
pub struct Webhook {
    inner: Arc<Inner>,
}

struct Inner {
    settings: WebhookSettings,
    client: HttpClient,
    requests: Semaphore,
    under_way: Arc<UnderWay>,
    counters: Counters,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook").field("settings", &self.inner.settings).field("counts", &self.counts()).finish()
    }
}

impl MessageHandler for Webhook {
    fn handle(&self, message: IncomingMessage, _adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        let inner = Arc::clone(&self.inner);
        // Before the future is polled: a cancel that comes from here on finds its question.
        let delivery = inner.under_way.begin(&message);
        Box::pin(async move {
            let is_cancel = message.extra.contains_key("cancel");
            if is_cancel && inner.under_way.cancel(&message.channel_id).await == Heard::Nothing {
                return;
            }
            inner.deliver(message, &delivery).await;
        })
    }
}

/// What one attempt came to.
enum Attempt {
    Delivered,
    /// Worth another try, not before the given pause.
    Again(String, Duration),
    Rejected(StatusCode),
}

impl Webhook {
    /// Checks the settings; nothing is connected yet. TLS trusts the usual public roots (webpki). What becomes of
    /// messages is also counted in `metrics`.
    ///
    /// # Errors
    /// The URL is not http(s) with a host, or has a password in it; or TLS cannot be set up.
    pub fn new(settings: WebhookSettings, metrics: Arc<Metrics>) -> Result<Self, WebhookError> {
        let scheme = settings.url.scheme();
        let is_http = scheme == Some(&Scheme::HTTP) || scheme == Some(&Scheme::HTTPS);
        let authority = settings.url.authority().map_or("", http::uri::Authority::as_str);
        if !is_http || authority.is_empty() || authority.contains('@') {
            return Err(WebhookError::BadUrl);
        }
        let client = http_client(settings.request_timeout, settings.requests_max)?;
        let requests = Semaphore::new(settings.requests_max.clamp(1, Semaphore::MAX_PERMITS));
        let (under_way, counters) = (Arc::default(), Counters::default());
        Ok(Self { inner: Arc::new(Inner { settings, client, requests, under_way, counters, metrics }) })
    }

    /// What became of the messages so far.
    #[must_use]
    pub fn counts(&self) -> WebhookCounts {
        let counters = &self.inner.counters;
        WebhookCounts {
            delivered: counters.delivered.load(Ordering::Relaxed),
            retries: counters.retries.load(Ordering::Relaxed),
            gave_up: counters.gave_up.load(Ordering::Relaxed),
            rejected: counters.rejected.load(Ordering::Relaxed),
        }
    }
}

impl Inner {
    async fn deliver(&self, message: IncomingMessage, delivery: &Delivery) {
        let id = message.message_id.to_string();
        let body = Bytes::from(message.to_json(&id.replace('-', ""), message.timestamp));
        let trace = message.trace.clone();
        drop(message);
        let deadline = Instant::now() + self.settings.message_timeout;
        let mut attempts = 0;
        while let Some(permit) = self.permit(delivery).await {
            if attempts > 0 {
                self.count(&self.counters.retries, WorkerOutcome::Retried);
            }
            let attempt = self.attempt(&id, trace.as_deref(), body.clone(), permit).await;
            attempts += 1;
            let (reason, floor) = match attempt {
                Attempt::Delivered => {
                    self.count(&self.counters.delivered, WorkerOutcome::Delivered);
                    return;
                }
                Attempt::Rejected(status) => {
                    self.count(&self.counters.rejected, WorkerOutcome::Failed);
                    tracing::warn!(message_id = %id, %status, "the webhook refused a message; it is dropped");
                    return;
                }
                Attempt::Again(..) if delivery.is_cancelled() => break,
                Attempt::Again(reason, floor) => (reason, floor),
            };
            let pause = floor.max(backoff(&self.settings, attempts));
            if attempts >= self.settings.attempts_max || Instant::now() + pause >= deadline {
                self.count(&self.counters.gave_up, WorkerOutcome::Failed);
                tracing::warn!(message_id = %id, attempts, reason, "the webhook did not take a message; it is dropped");
                return;
            }
            tracing::debug!(message_id = %id, attempts, reason, ?pause, "the webhook is tried again");
            tokio::select! {
                () = sleep(pause) => {}
                () = delivery.cancelled() => break,
            }
        }
        tracing::debug!(message_id = %id, attempts, "a question was cancelled; it is not tried again");
    }

    /// Waits until a request may be made. None if the message was cancelled.
    async fn permit(&self, delivery: &Delivery) -> Option<SemaphorePermit<'_>> {
        let permit = tokio::select! {
            // The semaphore is never closed.
            permit = self.requests.acquire() => permit.ok()?,
            () = delivery.cancelled() => return None,
        };
        delivery.goes_out().then_some(permit)
    }

    fn count(&self, counter: &AtomicU64, outcome: WorkerOutcome) {
        counter.fetch_add(1, Ordering::Relaxed);
        self.metrics.engine.worker_messages.of(outcome).increment();
    }

    /// One request. A pause between two holds no permit, so that a channel in trouble does not stop others.
    async fn attempt(
        &self,
        id: &str,
        trace: Option<&TraceContext>,
        body: Bytes,
        _permit: SemaphorePermit<'_>,
    ) -> Attempt {
        let request = match self.request(id, trace, body) {
            Ok(request) => request,
            Err(error) => return Attempt::Again(error.to_string(), Duration::ZERO),
        };
        let exchange = async {
            let response = self.client.request(request).await?;
            let (parts, body) = response.into_parts();
            Ok::<_, hyper_util::client::legacy::Error>((parts, discard(body).await))
        };
        let parts = match timeout(self.settings.request_timeout, exchange).await {
            Ok(Ok((parts, ()))) => parts,
            Ok(Err(error)) => return Attempt::Again(chain(&error), Duration::ZERO),
            Err(_) => return Attempt::Again("no answer in time".to_owned(), Duration::ZERO),
        };
        match parts.status {
            status if status.is_success() => Attempt::Delivered,
            status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => {
                Attempt::Again(status.to_string(), retry_after(parts.headers.get(RETRY_AFTER), SystemTime::now()))
            }
            status if status.is_server_error() => {
                Attempt::Again(status.to_string(), retry_after(parts.headers.get(RETRY_AFTER), SystemTime::now()))
            }
            status => Attempt::Rejected(status),
        }
    }

    fn request(
        &self,
        id: &str,
        trace: Option<&TraceContext>,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, http::Error> {
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut request = Request::post(self.settings.url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("tabcast/", env!("CARGO_PKG_VERSION")))
            .header("idempotency-key", id)
            .header("x-tabcast-timestamp", timestamp);
        if let Some(secret) = &self.settings.secret {
            request =
                request.header("x-tabcast-signature", HeaderValue::try_from(signature(secret, timestamp, &body))?);
        }
        let mut request = request.body(Full::new(body))?;
        if let Some(trace) = trace {
            trace_headers::put(request.headers_mut(), trace);
        }
        Ok(request)
    }
}

/// `sha256=` and the hexadecimal HMAC-SHA-256 of `timestamp.body`.
#[must_use]
pub fn signature(secret: &[u8], timestamp: u64, body: &[u8]) -> String {
    // HMAC takes a key of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else { return String::new() };
    mac.update(timestamp.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    let mut text = String::from("sha256=");
    for byte in mac.finalize().into_bytes() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    text
}

/// Reads what little there is; more than [`RESPONSE_BYTES_MAX`] or a broken body only costs the connection.
async fn discard(mut body: Incoming) {
    let mut bytes = 0;
    while let Some(Ok(frame)) = body.frame().await {
        bytes += frame.data_ref().map_or(0, Bytes::len);
        if bytes > RESPONSE_BYTES_MAX {
            return;
        }
    }
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};
    use std::sync::Mutex;

    use serde_json::{Map, Value, json};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinSet;

    use super::*;
    use crate::gateway::worker;
    use crate::id::{RequestId, UserId};
    use crate::platform::adapter::BotIdentity;
    use crate::platform::dispatch::{DispatchLimits, Inlet, Refused, dispatch};
    use crate::platform::recording::Recorder;
    use crate::platform::webchat::WebChat;
    use crate::proto::event::Timestamp;

    fn message(channel: &str, text: &str) -> IncomingMessage {
        IncomingMessage::new(channel.to_owned(), "u", text.to_owned(), Timestamp::from_micros(1_000_000))
    }

    const CHANNEL: &str = "sse:r";

    fn question() -> IncomingMessage {
        let extra = Map::from_iter([("openai".to_owned(), json!({}))]);
        IncomingMessage { extra, ..message(CHANNEL, "question") }
    }

    fn cancel() -> IncomingMessage {
        let (request, user) = (RequestId::parse("r").unwrap(), UserId::parse("u").unwrap());
        IncomingMessage::cancel(&request, &user, Timestamp::from_micros(1_000_000))
    }

    /// One request as the receiver saw it.
    struct Seen {
        at: Instant,
        line: String,
        headers: HashMap<String, String>,
        body: Vec<u8>,
    }

    impl Seen {
        fn text(&self) -> String {
            let body = serde_json::from_slice::<Value>(&self.body).unwrap();
            if body["extra"]["cancel"].is_object() { "cancel" } else { body["content"].as_str().unwrap() }.to_owned()
        }
    }

    /// What the receiver answers next: a status line and headers, `hang up`, or `hang` for ever.
    type Script = Arc<Mutex<VecDeque<&'static str>>>;

    /// A receiver that follows a script, and answers 204 when that is over.
    struct Receiver {
        url: Uri,
        seen: Arc<Mutex<Vec<Seen>>>,
        _task: JoinSet<()>,
    }

    impl Receiver {
        async fn start(script: &[&'static str]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/hook?x=1", listener.local_addr().unwrap()).parse().unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let script: Script = Arc::new(Mutex::new(script.iter().copied().collect()));
            let (log, mut task) = (Arc::clone(&seen), JoinSet::new());
            task.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    connections.spawn(serve(socket, Arc::clone(&script), Arc::clone(&log)));
                }
            });
            Self { url, seen, _task: task }
        }

        fn texts(&self) -> String {
            self.seen.lock().unwrap().iter().map(Seen::text).collect::<Vec<_>>().join(" ")
        }
    }

    async fn serve(socket: TcpStream, script: Script, log: Arc<Mutex<Vec<Seen>>>) {
        let mut socket = BufReader::new(socket);
        loop {
            let (mut line, mut headers) = (String::new(), HashMap::new());
            if socket.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            loop {
                let mut header = String::new();
                socket.read_line(&mut header).await.unwrap();
                let Some((name, value)) = header.trim_end().split_once(": ") else { break };
                headers.insert(name.to_lowercase(), value.to_owned());
            }
            let mut body = vec![0; headers["content-length"].parse().unwrap()];
            socket.read_exact(&mut body).await.unwrap();
            log.lock().unwrap().push(Seen { at: Instant::now(), line: line.trim_end().to_owned(), headers, body });
            let answer = script.lock().unwrap().pop_front().unwrap_or("204 No Content");
            match answer {
                "hang up" => return,
                "hang" => std::future::pending().await,
                status => {
                    let response = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                    socket.write_all(response.as_bytes()).await.unwrap();
                }
            }
        }
    }

    fn quick(url: &Uri) -> WebhookSettings {
        WebhookSettings {
            request_timeout: Duration::from_millis(200),
            backoff_base: Duration::from_millis(4),
            backoff_max: Duration::from_millis(10),
            attempts_max: 4,
            ..WebhookSettings::new(url.clone())
        }
    }

    fn start(settings: WebhookSettings, limits: DispatchLimits) -> (Webhook, Inlet, JoinSet<()>) {
        let webhook = Webhook::new(settings, Arc::new(Metrics::new(1))).unwrap();
        let chat = Arc::new(WebChat::new(Arc::new(Recorder::default()), BotIdentity::default()));
        let (inlet, runner) = dispatch(Arc::new(webhook.clone()), chat, limits);
        let mut tasks = JoinSet::new();
        tasks.spawn(worker::run(runner));
        (webhook, inlet, tasks)
    }

    async fn finish(inlet: &Inlet, mut tasks: JoinSet<()>) {
        inlet.end();
        timeout(Duration::from_secs(20), async {
            inlet.drained().await;
            while tasks.join_next().await.is_some() {}
        })
        .await
        .unwrap();
    }

    async fn until(is_so: impl Fn() -> bool) {
        let looking = async {
            while !is_so() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), looking).await.unwrap();
    }

    #[tokio::test]
    async fn a_message_is_posted_with_its_headers_and_signature() {
        let receiver = Receiver::start(&[]).await;
        let settings = WebhookSettings { secret: Some(b"s3cret".to_vec()), ..quick(&receiver.url) };
        let (webhook, inlet, tasks) = start(settings, DispatchLimits::default());
        let sent = message("webchat:u", "hi");
        inlet.try_accept(sent.clone()).unwrap();
        finish(&inlet, tasks).await;
        let seen = &receiver.seen.lock().unwrap()[0];
        assert_eq!(seen.line, "POST /hook?x=1 HTTP/1.1");
        assert_eq!(seen.headers["content-type"], "application/json");
        assert_eq!(seen.headers["idempotency-key"], sent.message_id.to_string());
        let timestamp: u64 = seen.headers["x-tabcast-timestamp"].parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(timestamp) < 60);
        assert_eq!(seen.headers["x-tabcast-signature"], signature(b"s3cret", timestamp, &seen.body));
        let trace = sent.message_id.to_string().replace('-', "");
        assert_eq!(seen.body, sent.to_json(&trace, sent.timestamp));
        assert_eq!(webhook.counts(), WebhookCounts { delivered: 1, ..WebhookCounts::default() });
        assert_eq!(webhook.inner.metrics.engine.worker_messages.of(WorkerOutcome::Delivered).value(), 1);
    }

    #[test]
    fn the_signature_is_the_known_one() {
        // printf '1700000000.{}' | openssl dgst -sha256 -hmac key
        let expected = "sha256=9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae";
        assert_eq!(signature(b"key", 1_700_000_000, b"{}"), expected);
    }

    #[tokio::test]
    async fn order_is_kept_within_a_channel_across_retries() {
        let script = ["503 Busy", "hang up", "429 Slow", "408 Late", "204 OK", "500 Oops", "hang"];
        let receiver = Receiver::start(&script).await;
        let settings = WebhookSettings { attempts_max: 9, ..quick(&receiver.url) };
        let (webhook, inlet, tasks) = start(settings, DispatchLimits::default());
        for text in ["1", "2", "3"] {
            inlet.try_accept(message("webchat:u", text)).unwrap();
        }
        finish(&inlet, tasks).await;
        assert_eq!(receiver.texts(), "1 1 1 1 1 2 2 2 3");
        assert_eq!(webhook.counts(), WebhookCounts { delivered: 3, retries: 6, ..WebhookCounts::default() });
        let seen = receiver.seen.lock().unwrap();
        assert!(seen[..5].iter().all(|one| one.headers["idempotency-key"] == seen[0].headers["idempotency-key"]));
    }

    #[tokio::test]
    async fn a_channel_in_trouble_does_not_stop_the_others() {
        let receiver = Receiver::start(&["503 Busy\r\nRetry-After: 1"]).await;
        let settings = WebhookSettings { requests_max: 1, ..quick(&receiver.url) };
        let (webhook, inlet, tasks) = start(settings, DispatchLimits::default());
        inlet.try_accept(message("webchat:a", "a1")).unwrap();
        until(|| receiver.texts() == "a1").await;
        for text in ["b1", "b2"] {
            inlet.try_accept(message("webchat:b", text)).unwrap();
        }
        let begun = Instant::now();
        finish(&inlet, tasks).await;
        assert_eq!(receiver.texts(), "a1 b1 b2 a1");
        assert!(begun.elapsed() > Duration::from_millis(900), "Retry-After was not honoured");
        assert_eq!(webhook.counts().delivered, 3);
    }

    #[tokio::test]
    async fn a_final_answer_is_not_tried_again() {
        for status in ["400 Bad", "404 Gone", "301 Moved\r\nLocation: http://127.0.0.1:1/", "422 No"] {
            let receiver = Receiver::start(&[status]).await;
            let (webhook, inlet, tasks) = start(quick(&receiver.url), DispatchLimits::default());
            inlet.try_accept(message("webchat:u", "1")).unwrap();
            inlet.try_accept(message("webchat:u", "2")).unwrap();
            finish(&inlet, tasks).await;
            assert_eq!(receiver.texts(), "1 2", "{status}");
            let expected = WebhookCounts { delivered: 1, rejected: 1, ..WebhookCounts::default() };
            assert_eq!(webhook.counts(), expected, "{status}");
        }
    }

    #[tokio::test]
    async fn attempts_and_time_are_bounded() {
        let script = ["500 a", "500 b", "500 c", "500 d", "204 OK", "429 Later\r\nRetry-After: 600"];
        let receiver = Receiver::start(&script).await;
        let (webhook, inlet, tasks) = start(quick(&receiver.url), DispatchLimits::default());
        for text in ["1", "2", "3"] {
            inlet.try_accept(message("webchat:u", text)).unwrap();
        }
        finish(&inlet, tasks).await;
        assert_eq!(receiver.texts(), "1 1 1 1 2 3", "four attempts, and a pause that is too long is not waited for");
        let expected = WebhookCounts { delivered: 1, retries: 3, gave_up: 2, rejected: 0 };
        assert_eq!(webhook.counts(), expected);
    }

    #[tokio::test]
    async fn a_receiver_that_is_not_there_is_tried_and_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        drop(listener);
        let (webhook, inlet, tasks) = start(quick(&url), DispatchLimits::default());
        inlet.try_accept(message("webchat:u", "1")).unwrap();
        finish(&inlet, tasks).await;
        assert_eq!(webhook.counts(), WebhookCounts { retries: 3, gave_up: 1, ..WebhookCounts::default() });
        let counted = |outcome| webhook.inner.metrics.engine.worker_messages.of(outcome).value();
        assert_eq!((counted(WorkerOutcome::Retried), counted(WorkerOutcome::Failed)), (3, 1));
    }

    #[tokio::test]
    async fn what_waits_for_the_receiver_is_bounded() {
        let receiver = Receiver::start(&["hang", "hang"]).await;
        let limits = DispatchLimits { messages_max: 2, ..DispatchLimits::default() };
        let (webhook, inlet, tasks) = start(quick(&receiver.url), limits);
        assert_eq!(inlet.try_accept(message("webchat:a", "1")), Ok(()));
        assert_eq!(inlet.try_accept(message("webchat:b", "2")), Ok(()));
        assert_eq!(inlet.try_accept(message("webchat:c", "3")), Err(Refused::Full));
        finish(&inlet, tasks).await;
        assert_eq!(webhook.counts().delivered, 2);
    }

    /// Attempts that go on for longer than it takes to send a cancel.
    fn patient(url: &Uri) -> WebhookSettings {
        WebhookSettings { request_timeout: Duration::from_secs(1), ..quick(url) }
    }

    /// Sends a question, its cancel once `is_ready`, and gives what the receiver saw.
    async fn cancelled_when(
        settings: WebhookSettings,
        receiver: &Receiver,
        is_ready: impl Fn(&Inner) -> bool,
    ) -> WebhookCounts {
        let (webhook, inlet, tasks) = start(settings, DispatchLimits::default());
        inlet.try_accept(question()).unwrap();
        until(|| !receiver.texts().is_empty() && is_ready(&webhook.inner)).await;
        inlet.cancel(cancel());
        finish(&inlet, tasks).await;
        assert_eq!(webhook.inner.under_way.questions(), 0);
        webhook.counts()
    }

    #[tokio::test]
    async fn a_cancel_between_two_attempts_is_the_last_that_goes_out() {
        // A pause that is longer than this test waits.
        let receiver = Receiver::start(&["503 Busy\r\nRetry-After: 60"]).await;
        let is_paused = |inner: &Inner| inner.requests.available_permits() == inner.settings.requests_max;
        let counts = cancelled_when(quick(&receiver.url), &receiver, is_paused).await;
        assert_eq!(receiver.texts(), "question cancel");
        assert_eq!(counts, WebhookCounts { delivered: 1, ..WebhookCounts::default() }, "the cancel, and no failure");
    }

    #[tokio::test]
    async fn a_cancel_waits_for_the_attempt_that_is_on_its_way() {
        let receiver = Receiver::start(&["hang"]).await;
        let (begun, settings) = (Instant::now(), patient(&receiver.url));
        let counts = cancelled_when(settings.clone(), &receiver, |_| true).await;
        assert_eq!(receiver.texts(), "question cancel");
        assert!(receiver.seen.lock().unwrap()[1].at - begun >= settings.request_timeout);
        assert_eq!(counts, WebhookCounts { delivered: 1, ..WebhookCounts::default() });
    }

    #[tokio::test]
    async fn a_cancel_during_the_last_attempt_is_no_failure_of_it() {
        let receiver = Receiver::start(&["hang"]).await;
        let settings = WebhookSettings { attempts_max: 1, ..patient(&receiver.url) };
        let counts = cancelled_when(settings, &receiver, |_| true).await;
        assert_eq!(receiver.texts(), "question cancel");
        assert_eq!(counts, WebhookCounts { delivered: 1, ..WebhookCounts::default() });
    }

    #[tokio::test]
    async fn a_cancel_of_what_was_delivered_goes_out() {
        let receiver = Receiver::start(&[]).await;
        let counts = cancelled_when(quick(&receiver.url), &receiver, |inner| inner.under_way.questions() == 0).await;
        assert_eq!(receiver.texts(), "question cancel");
        assert_eq!(counts, WebhookCounts { delivered: 2, ..WebhookCounts::default() });
    }

    #[tokio::test]
    async fn of_a_question_that_waits_for_its_turn_the_receiver_never_hears() {
        let receiver = Receiver::start(&["hang"]).await;
        let settings = WebhookSettings { requests_max: 1, ..patient(&receiver.url) };
        let (webhook, inlet, tasks) = start(settings, DispatchLimits::default());
        inlet.try_accept(message("webchat:a", "a")).unwrap();
        until(|| receiver.texts() == "a").await;
        inlet.try_accept(question()).unwrap();
        until(|| webhook.inner.under_way.questions() == 1).await;
        inlet.cancel(cancel());
        until(|| inlet.counts().pending == 1).await;
        assert_eq!(webhook.counts(), WebhookCounts::default(), "a is still on its way");
        finish(&inlet, tasks).await;
        assert_eq!(receiver.texts(), "a a");
        assert_eq!(webhook.counts(), WebhookCounts { delivered: 1, retries: 1, ..WebhookCounts::default() });
    }

    #[test]
    fn a_url_that_cannot_be_posted_to_is_refused() {
        for url in ["/hook", "ftp://x/", "http://user:secret@x/", "https://user@x/"] {
            let settings = WebhookSettings::new(url.parse().unwrap());
            assert!(matches!(Webhook::new(settings, Arc::new(Metrics::new(1))), Err(WebhookError::BadUrl)), "{url}");
        }
        let settings = WebhookSettings::new(Uri::from_static("https://example.com/hook"));
        assert!(Webhook::new(settings, Arc::new(Metrics::new(1))).is_ok());
        let settings = WebhookSettings {
            secret: Some(b"s3cret".to_vec()),
            ..WebhookSettings::new(Uri::from_static("https://example.com/hook?token=t0ken"))
        };
        let text = format!("{settings:?}");
        assert!(!text.contains("s3cret") && !text.contains("t0ken") && !text.contains("115"), "{text}");
    }
}
