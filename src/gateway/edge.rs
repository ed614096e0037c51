//! The edge of one shard: which route a request takes, and who may take it.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::header::HeaderValue;
use http::{Method, Response, StatusCode};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde_json::json;

use crate::config::{KeyDigest, Settings};
use crate::driver::addresses::{Place, TooManyOfAddress};
use crate::driver::clock;
use crate::driver::handshake;
use crate::driver::listener::{Answer, AnswerFuture, Edge};
use crate::driver::shard_thread::LocalShard;
use crate::driver::start::EdgeFactory;
use crate::engine::Engine;
use crate::engine::client::ClientTexts;
use crate::fanout::shard::Inbound;
use crate::gateway::apart::APART_BYTES;
use crate::gateway::api::{Api, ApiRequest};
use crate::gateway::auth::{AuthError, Keys, Principal, RequestHead, RouteClass, bearer, shows_long_key};
use crate::gateway::body::BodyLimits;
use crate::gateway::checks::Checks;
use crate::gateway::clients::Clients;
use crate::gateway::files;
use crate::gateway::files::remote::RemoteFiles;
use crate::gateway::metrics_text::{self, Ceilings, MetricsText};
use crate::gateway::openai::{Answers, WholeBudget};
use crate::gateway::pages::Pages;
use crate::gateway::response::{Answered, draining, error, finish, json, method_not_allowed, refused, typed};
use crate::gateway::trace_headers;
use crate::id::UserId;
use crate::metrics::{Refusal, StatusClass};
use crate::proto::delivery::PublishError;
use crate::proto::disconnect::Disconnect;
use crate::traces;

/// What all shards' edges share.
pub(crate) struct Gateway {
    pub(crate) engine: Engine,
    /// As they are in effect: what a reload may change is looked up for each request.
    pub(crate) settings: ArcSwap<Settings>,
    pub(crate) keys: ArcSwap<Keys>,
    pub(crate) api: Api<Engine>,
    pub(crate) texts: ClientTexts,
    pub(crate) answers: Answers,
    pub(crate) whole_answers: WholeBudget,
    pub(crate) bodies: BodyLimits,
    pub(crate) clients: Clients,
    pub(crate) pages: Pages,
    pub(crate) metrics_text: MetricsText,
    pub(crate) remote_files: RemoteFiles,
    pub(crate) checks: Checks,
    pub(crate) is_draining: AtomicBool,
    /// Runs what takes too long for a shard's thread.
    pub(crate) control: tokio::runtime::Handle,
}

impl Gateway {
    /// # Ordering
    /// Relaxed: it says nothing about any other memory; who sees it late answers one more request.
    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }
}

/// Hands each shard's thread its parts of the gateway.
pub(crate) struct Edges(pub(crate) Arc<Gateway>);

impl EdgeFactory for Edges {
    fn inbound(&self, shard: u16) -> Box<dyn Inbound> {
        Box::new(self.0.texts.for_shard(shard))
    }

    fn edge(&self, local: Rc<LocalShard>) -> Rc<dyn Edge> {
        Rc::new(ShardEdge { gateway: Arc::clone(&self.0), local })
    }
}

/// The edge on one shard's thread.
pub(crate) struct ShardEdge {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) local: Rc<LocalShard>,
}

/// What a request asked for: its path with doubled slashes collapsed, its query, and whose it is.
pub(crate) struct Asked {
    pub(crate) path: String,
    query: Option<String>,
    /// The client's address, perhaps behind proxies.
    pub(crate) client: IpAddr,
}

impl Asked {
    fn new(request: &Request<Incoming>, client: IpAddr) -> Self {
        let mut path = String::with_capacity(request.uri().path().len());
        for character in request.uri().path().chars() {
            if character != '/' || !path.ends_with('/') {
                path.push(character);
            }
        }
        Self { path, query: request.uri().query().map(str::to_owned), client }
    }

    pub(crate) fn head<'a>(&'a self, request: &'a Request<Incoming>) -> RequestHead<'a> {
        let (method, headers) = (request.method(), request.headers());
        RequestHead { method, query: self.query.as_deref(), headers, peer: self.client }
    }

    /// Whether the query says `name=1`.
    pub(crate) fn has_flag(&self, name: &str) -> bool {
        self.parameter(name).is_some_and(|value| value == "1")
    }

    /// The first parameter of that name in the query.
    pub(crate) fn parameter(&self, name: &str) -> Option<Cow<'_, str>> {
        handshake::parameter(self.query.as_deref(), name)
    }

    /// All of them.
    pub(crate) fn parameters(&self, name: &str) -> impl Iterator<Item = Cow<'_, str>> {
        handshake::parameters(self.query.as_deref(), name)
    }
}

impl Edge for ShardEdge {
    fn answer(self: Rc<Self>, request: Request<Incoming>, peer: SocketAddr) -> AnswerFuture {
        let client = self.gateway.clients.address_of(request.headers(), peer.ip());
        let asked = Asked::new(&request, client);
        Box::pin(self.answered(request, asked))
    }
}

impl ShardEdge {
    async fn answered(self: Rc<Self>, request: Request<Incoming>, asked: Asked) -> Answer {
        let metrics = Arc::clone(self.gateway.engine.metrics());
        let answer = match asked.path.as_str() {
            "/ws" => self.websocket(request, asked).await,
            "/events" => self.events(request, asked).await,
            path if path == "/v1" || path.starts_with("/v1/") => self.v1(request, asked).await,
            _ => Answer::Respond(self.respond(request, asked).await),
        };
        let status = match &answer {
            Answer::Respond(response) => response.status().as_u16(),
            Answer::Session { status, .. } => *status,
        };
        metrics.engine.http_responses.of(StatusClass::of(status)).increment();
        answer
    }

    /// Counts what was refused.
    pub(crate) fn count_refusal(&self, refusal: Refusal) {
        self.gateway.engine.metrics().engine.refusals.of(refusal).increment();
    }

    /// A place among the sessions of a client's address.
    pub(crate) fn place(&self, client: IpAddr) -> Result<Option<Place>, TooManyOfAddress> {
        self.gateway.clients.place(client).inspect_err(|_| self.count_refusal(Refusal::TabsOfAddress))
    }

    /// Lets a request through to routes of `class`, or says why not. From an address that has just shown too many keys that
    /// are not known here none is looked at that could be found by guessing: otherwise the answer would tell the right one.
    /// A longer one that is known is let through, or whoever shares an address with a guesser would be shut out by him.
    pub(crate) fn authorize(
        &self,
        class: RouteClass,
        request: &Request<Incoming>,
        asked: &Asked,
    ) -> Result<Principal, AuthError> {
        let (clients, now) = (&self.gateway.clients, clock::now());
        let is_braked = class != RouteClass::Public && !clients.may_show_key(asked.client, now);
        let too_many = || {
            self.count_refusal(Refusal::BadKeysOfAddress);
            Err(AuthError::TooManyKeys)
        };
        if is_braked && !shows_long_key(request.headers()) {
            return too_many();
        }
        match self.gateway.keys.load().authorize(class, &asked.head(request), SystemTime::now()) {
            Err(AuthError::UnknownKey) if is_braked => too_many(),
            Err(AuthError::UnknownKey) => {
                clients.count_bad_key(asked.client, now);
                Err(AuthError::UnknownKey)
            }
            authorized => authorized,
        }
    }

    async fn respond(self: Rc<Self>, request: Request<Incoming>, asked: Asked) -> Answered {
        let path = asked.path.as_str();
        let class = class_of(path, request.method());
        if let Err(refusal) = self.authorize(class, &request, &asked) {
            return refused(refusal);
        }
        let is_get = [Method::GET, Method::HEAD].contains(request.method());
        if let Some(page) = self.gateway.pages.find(path, request.headers()) {
            return if is_get { page } else { method_not_allowed("GET, HEAD") };
        }
        match path {
            "/healthz" | "/readyz" | "/metrics" | "/api/users" if !is_get => method_not_allowed("GET, HEAD"),
            "/healthz" => json(StatusCode::OK, &json!({ "status": "ok" })),
            "/readyz" if self.gateway.is_draining() => draining(),
            "/readyz" => match self.gateway.engine.broker().health() {
                Ok(()) => json(StatusCode::OK, &json!({ "status": "ready" })),
                Err(unhealthy) => error(StatusCode::SERVICE_UNAVAILABLE, "not_ready", &unhealthy.to_string()),
            },
            "/metrics" => self.metrics(),
            "/api/users" => self.users().await,
            _ if let Some(user) = path.strip_prefix("/api/users/") => self.user(user, request.method()).await,
            _ if let Some(file) = path.strip_prefix("/files/") => {
                files::answer(&self.gateway, file, request.method(), request.headers()).await
            }
            _ if Api::<Engine>::has(path) => self.api(request, asked).await,
            _ => error(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path"),
        }
    }

    fn metrics(&self) -> Answered {
        let content_type = HeaderValue::from_static(metrics_text::CONTENT_TYPE);
        let is_ready = !self.gateway.is_draining() && self.gateway.engine.broker().health().is_ok();
        let ceilings = Ceilings::of(&self.gateway.settings.load());
        typed(StatusCode::OK, content_type, self.gateway.metrics_text.render(is_ready, Some(ceilings)))
    }

    async fn user(&self, encoded: &str, method: &Method) -> Answered {
        let text = percent_decode_str(encoded).decode_utf8().unwrap_or(Cow::Borrowed(""));
        let user = match UserId::parse(&text) {
            Ok(user) => user,
            Err(refusal) => return error(StatusCode::BAD_REQUEST, "bad_field", &refusal.to_string()),
        };
        match *method {
            Method::GET | Method::HEAD => {
                let sessions = self.gateway.engine.hub().registry().get_sessions(&user);
                let sessions: Vec<_> = sessions
                    .iter()
                    .flat_map(|sessions| sessions.iter())
                    .map(|session| {
                        let identity = session.identity();
                        json!({
                            "session": session.address().as_u64().to_string(), "user_name": &*identity.name,
                            "avatar": &*identity.avatar, "connected_at": identity.connected_at.as_seconds(),
                        })
                    })
                    .collect();
                let online = self.gateway.engine.is_online(&user).await;
                let body =
                    json!({ "user_id": user.as_str(), "online": online, "tabs": sessions.len(), "sessions": sessions });
                json(StatusCode::OK, &body)
            }
            Method::DELETE => match self.gateway.engine.end_sessions(&user, Disconnect::Kicked).await {
                Ok(closed) => {
                    let answers = self.gateway.engine.hub().cancel_streams(&user);
                    let nodes = self.gateway.engine.end_sessions_elsewhere(&user, Disconnect::Kicked).await;
                    let body =
                        json!({ "user_id": user.as_str(), "closed": closed, "answers": answers, "nodes": nodes });
                    json(StatusCode::OK, &body)
                }
                Err(PublishError::Closed) => draining(),
                Err(refusal) => error(StatusCode::SERVICE_UNAVAILABLE, "overloaded", &refusal.to_string()),
            },
            _ => method_not_allowed("GET, HEAD, DELETE"),
        }
    }

    async fn api(&self, request: Request<Incoming>, asked: Asked) -> Answered {
        if request.method() != Method::POST {
            return method_not_allowed("POST");
        }
        let (method, headers) = (request.method().clone(), request.headers().clone());
        let bytes_max = self.gateway.settings.load().body_bytes_max;
        let body = match self.gateway.bodies.read(request, bytes_max).await {
            Ok(body) => body,
            Err(error) => return error.answer(),
        };
        let is_keyed = headers.contains_key("idempotency-key");
        let is_apart = is_keyed || body.bytes.len() > APART_BYTES;
        let gateway = Arc::clone(&self.gateway);
        let handle = traces::over(trace_headers::context_of(&headers).as_ref(), async move {
            // The whole of it: its place in the budget goes when its bytes do.
            let body = body;
            let caller = if is_keyed { caller(&headers) } else { String::new() };
            let Asked { path, query, .. } = &asked;
            let (path, query) = (path.as_str(), query.as_deref());
            let request = ApiRequest {
                method: &method,
                path,
                query,
                headers: &headers,
                caller: &caller,
                body: body.bytes.clone(),
            };
            gateway.api.handle(request).await
        });
        // A large body takes long to read, and a shard's thread must not. A keyed request runs to its end even if the
        // client goes away, so that its repeat finds the answer.
        let answered: Response<_> = if is_apart {
            match self.gateway.control.spawn(handle).await {
                Ok(answered) => answered,
                Err(_) => {
                    return error(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request was not carried out");
                }
            }
        } else {
            handle.await
        };
        finish(answered.map(Full::new))
    }
}

/// Which keys open a path. What is nobody's path is public, and not found.
fn class_of(path: &str, method: &Method) -> RouteClass {
    match path {
        "/metrics" => RouteClass::Operator,
        _ if path.starts_with("/api/users/") && method == Method::DELETE => RouteClass::Operator,
        _ if path.starts_with("/api/") => RouteClass::Api,
        _ => RouteClass::Public,
    }
}

/// A name for whoever holds the key of a request, without the key.
fn caller(headers: &http::HeaderMap) -> String {
    let key = bearer(headers).unwrap_or_default();
    KeyDigest::of(key.as_bytes()).as_bytes().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use http::header::AUTHORIZATION;

    use super::*;

    /// What a request costs while it is answered, its head and body apart: one for each connection.
    #[test]
    fn an_answers_future_is_small() {
        fn bytes_of<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = bytes_of(ShardEdge::answered);
        assert!(bytes <= 4_608, "{bytes} bytes");
    }

    #[test]
    fn a_caller_is_who_has_the_key_however_its_header_is_written() {
        let of = |text: &'static str| caller(&HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static(text))]));
        assert_eq!(of("Bearer a"), of("bearer  a "));
        assert_ne!(of("Bearer a"), of("Bearer A"));
        assert_ne!(of("Bearer a"), caller(&HeaderMap::new()));
    }
}
