//! `/v1`: answers for OpenAI's clients.
//!
//! A request is a stream: what it asks goes to the worker like any other message, and what the worker sends to
//! `sse:{id}` reaches the client as chunks, written by a shard. Nothing here knows what a chunk looks like: that is
//! [`crate::proto::completion`].

mod failed;
mod kept;
mod whole;

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::header::{HOST, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode, Version};
use hyper::Request;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::driver::addresses::Place;
use crate::driver::listener;
use crate::fanout::shard::{Answer, OpenError};
use crate::fanout::streams::{self, StreamOptions};
use crate::gateway::auth::{Principal, RouteClass};
use crate::gateway::cors::Cors;
use crate::gateway::edge::{Asked, ShardEdge};
use crate::gateway::openai::failed::Failed;
pub(crate) use crate::gateway::openai::kept::Answers;
use crate::gateway::openai::kept::{Claim, Kept};
pub(crate) use crate::gateway::openai::whole::WholeBudget;
use crate::gateway::response::{self, Answered};
use crate::gateway::trace_headers;
use crate::id::{ChannelId, RequestId, UserId};
use crate::metrics::{HandshakeOutcome, Refusal};
use crate::platform::adapter::Outlet;
use crate::platform::message::IncomingMessage;
use crate::platform::openai::{BadRequest, ChatRequest};
use crate::proto::completion::{Completion, CompletionHead, estimated_tokens};
use crate::proto::event::Event;
use crate::proto::sse;
use crate::traces;
use crate::traces::Span;

/// The header that says which answer a response is.
const REQUEST_ID_NAME: &str = "x-request-id";
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_NAME);
/// What an answer's id begins with.
const ID_PREFIX: &str = "chatcmpl-";
/// Bodies over this are parsed on the control threads. The worst, empty arrays, take some 17 µs a KiB.
const PARSE_APART_BYTES: usize = 8 << 10;

#[derive(serde::Serialize)]
struct Models<'m> {
    object: &'static str,
    data: Vec<Model<'m>>,
}

#[derive(serde::Serialize)]
struct Model<'m> {
    id: &'m str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

/// A JSON body with its keys in the order of the type.
fn written(body: &impl serde::Serialize) -> Answered {
    // Every key is a string, so this cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    response::typed(StatusCode::OK, HeaderValue::from_static("application/json"), body)
}

/// A request for an answer, as it was understood.
struct Wanted {
    user: UserId,
    /// What the worker gets.
    question: IncomingMessage,
    is_stream: bool,
    kept: Kept,
    options: StreamOptions,
}

impl ShardEdge {
    /// Everything below `/v1`.
    pub(super) async fn v1(self: Rc<Self>, request: Request<Incoming>, asked: Asked) -> listener::Answer {
        let cors = Cors::of(&self.gateway.keys.load(), request.headers());
        if request.method() == Method::OPTIONS {
            return listener::Answer::Respond(cors.preflight("GET, POST, DELETE", request.headers()));
        }
        match self.v1_route(request, &asked, &cors).await {
            Ok(listener::Answer::Respond(response)) => listener::Answer::Respond(cors.allow(response)),
            Ok(session) => session,
            Err(failed) => listener::Answer::Respond(cors.allow(failed.answer())),
        }
    }

    async fn v1_route(
        self: Rc<Self>,
        request: Request<Incoming>,
        asked: &Asked,
        cors: &Cors,
    ) -> Result<listener::Answer, Failed> {
        let principal = self.authorize(RouteClass::OpenAi, &request, asked);
        let Principal::OpenAi(user) = principal.map_err(Failed::from)? else {
            return Err(Failed::not_found("there is nothing at this path"));
        };
        let path = asked.path.strip_prefix("/v1").unwrap_or_default();
        // Base URLs are joined to paths by hand.
        let path = path.strip_suffix('/').unwrap_or(path);
        let method = request.method().clone();
        let respond = |response: Answered| Ok(listener::Answer::Respond(response));
        if let Some(answer) = path.strip_prefix("/chat/completions/") {
            return match (&method, answer.strip_suffix("/events")) {
                (&Method::GET, Some(id)) => self.attach(&request, (&user, asked.client), id, cors),
                (&Method::DELETE, None) => respond(self.cancel(&user, answer)?),
                (_, Some(_)) => Err(Failed::method("GET, OPTIONS")),
                (_, None) => Err(Failed::method("DELETE, OPTIONS")),
            };
        }
        let is_get = [Method::GET, Method::HEAD].contains(&method);
        match path {
            "/chat/completions" if method == Method::POST => {
                let span = Span::completion(trace_headers::context_of(request.headers()).as_ref());
                let answer = self.complete(&span, request, user, asked.client, cors).await;
                if answer.is_ok() {
                    span.done("answered");
                } else {
                    span.refused("refused");
                }
                answer
            }
            "/chat/completions" => Err(Failed::method("POST, OPTIONS")),
            "/models" if is_get => respond(self.models()),
            _ if let Some(model) = path.strip_prefix("/models/") => {
                if is_get {
                    respond(self.model(model)?)
                } else {
                    Err(Failed::method("GET, HEAD, OPTIONS"))
                }
            }
            "/models" => Err(Failed::method("GET, HEAD, OPTIONS")),
            _ => Err(Failed::not_found("there is nothing at this path")),
        }
    }

    fn models(&self) -> Answered {
        let settings = self.gateway.settings.load();
        let data = settings.models.iter().map(|model| self.described(model)).collect();
        written(&Models { object: "list", data })
    }

    fn model(&self, encoded: &str) -> Result<Answered, Failed> {
        let name = percent_encoding::percent_decode_str(encoded).decode_utf8_lossy();
        let settings = self.gateway.settings.load();
        let model = settings.models.iter().find(|model| **model == *name);
        let model = model.ok_or_else(|| Failed::not_found("there is no such model"))?;
        Ok(written(&self.described(model)))
    }

    fn described<'m>(&self, model: &'m str) -> Model<'m> {
        Model { id: model, object: "model", created: self.gateway.answers.started(), owned_by: "tabcast" }
    }

    fn cancel(&self, user: &UserId, id: &str) -> Result<Answered, Failed> {
        let unknown = || Failed::not_found("there is no such answer");
        let request = RequestId::parse(id).map_err(|_| unknown())?;
        let cancelled = self.gateway.engine.hub().cancel_stream(&request, user).map_err(|_| unknown())?;
        let body = json!({ "id": id, "object": "chat.completion", "cancelled": cancelled });
        Ok(response::json(StatusCode::OK, &body))
    }

    /// `POST /v1/chat/completions`.
    async fn complete(
        &self,
        span: &Span,
        request: Request<Incoming>,
        user: UserId,
        client: IpAddr,
        cors: &Cors,
    ) -> Result<listener::Answer, Failed> {
        if self.gateway.is_draining() {
            return Err(Failed::draining());
        }
        let (headers, version) = (request.headers().clone(), request.version());
        let chat = self.read_chat(request).await?;
        if chat.is_stream && version != Version::HTTP_11 {
            return Err(Failed::http_version());
        }
        let mut wanted = self.want(user, chat, &headers);
        wanted.question.trace = span.context().map(Box::new);
        let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok());
        let claim = self.gateway.answers.claim(self.gateway.engine.hub(), &wanted.user, key, &wanted.kept)?;
        let place = self.place(client).map_err(Failed::from)?;
        if wanted.is_stream {
            self.stream(wanted, claim, place, cors).await
        } else {
            Box::pin(self.whole(wanted, claim, place)).await.map(listener::Answer::Respond)
        }
    }

    async fn read_chat(&self, request: Request<Incoming>) -> Result<ChatRequest, Failed> {
        let gateway = &self.gateway;
        let bytes_max = {
            let settings = gateway.settings.load();
            settings.completion_bytes_max.min(settings.body_bytes_max)
        };
        let body = gateway.bodies.read(request, bytes_max).await.map_err(Failed::from)?;
        let bytes = body.bytes.len();
        let parse = move || ChatRequest::parse(&body.bytes);
        let parsed: Result<ChatRequest, BadRequest> = if bytes > PARSE_APART_BYTES {
            // There are two of these threads, and so at most two requests that are being built.
            gateway.control.spawn(async move { parse() }).await.map_err(|_| Failed::internal())?
        } else {
            parse()
        };
        parsed.map_err(Failed::from)
    }

    fn want(&self, user: UserId, mut chat: ChatRequest, headers: &HeaderMap) -> Wanted {
        let settings = self.gateway.settings.load();
        let default = settings.models.first().map_or("tabcast", String::as_str);
        let head = CompletionHead {
            id: RequestId::random_with_prefix(ID_PREFIX),
            created: self.gateway.engine.now().as_micros() / 1_000_000,
            model: chat.model_or(default).into(),
            files_url: self.files_url(headers),
            wants_usage: chat.wants_usage,
            prompt_tokens: estimated_tokens(chat.prompt_chars),
        };
        let is_detachable = headers.get("x-tabcast-detach").is_some_and(|value| value == "true");
        let options = StreamOptions {
            owner: Some(user.clone()),
            is_detachable,
            is_mirrored: settings.mirror_to_tabs,
            idle_timeout: Some(settings.answer_timeout),
        };
        let (is_stream, question) = (chat.is_stream, self.question(&user, &head.id, chat));
        Wanted { user, question, is_stream, kept: Kept { head, is_detachable }, options }
    }

    /// Where the links of files lead: to `public_url`, or to where the client found us.
    fn files_url(&self, headers: &HeaderMap) -> Arc<str> {
        let settings = self.gateway.settings.load();
        if let Some(url) = &settings.public_url {
            return url.trim_end_matches('/').into();
        }
        let listen = settings.listen.to_string();
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).filter(|host| is_authority(host));
        format!("{}://{}", settings.scheme(), host.unwrap_or(&listen)).into()
    }

    /// An answer as a stream: from here on its shard writes it.
    async fn stream(
        &self,
        wanted: Wanted,
        claim: Claim<'_>,
        of_address: Option<Place>,
        cors: &Cors,
    ) -> Result<listener::Answer, Failed> {
        let Wanted { question, kept, options, .. } = wanted;
        let place = self.gateway.answers.inlet().reserve(&question).map_err(Failed::from)?;
        // Whoever answers may be on any node: its first word has to find the way.
        self.gateway.engine.expect(&ChannelId::Stream(kept.head.id.clone())).await;
        let (request, head) = self.stream_head(&kept.head, cors);
        let (completion, first) = begin(kept.head);
        let opened = self.local.open_answer(Answer { request, completion }, options);
        let address = opened.map_err(|error| self.not_opened(error))?;
        claim.opened();
        self.count(HandshakeOutcome::Answer);
        self.mirror(&question);
        place.hand_on(question);
        Ok(listener::Answer::Session { address, head: [head, first].concat(), status: 200, place: of_address })
    }

    /// `GET /v1/chat/completions/{id}/events`.
    fn attach(
        &self,
        request: &Request<Incoming>,
        (user, client): (&UserId, IpAddr),
        id: &str,
        cors: &Cors,
    ) -> Result<listener::Answer, Failed> {
        if self.gateway.is_draining() {
            return Err(Failed::draining());
        }
        if request.version() != Version::HTTP_11 {
            return Err(Failed::http_version());
        }
        let unknown = || Failed::not_found("there is no such answer");
        let id = RequestId::parse(id).map_err(|_| unknown())?;
        let mut head = self.gateway.answers.head(&id).ok_or_else(unknown)?;
        head.files_url = self.files_url(request.headers());
        let (request, response_head) = self.stream_head(&head, cors);
        let (completion, first) = begin(head);
        let place = self.place(client).map_err(Failed::from)?;
        let opened = self.local.reopen_answer(user, Answer { request, completion });
        let address = opened.map_err(|error| self.not_opened(error))?;
        self.count(HandshakeOutcome::Answer);
        Ok(listener::Answer::Session { address, head: [response_head, first].concat(), status: 200, place })
    }

    /// Why an answer was not opened; what there was too much of is counted.
    fn not_opened(&self, error: OpenError) -> Failed {
        match error {
            OpenError::Stream(streams::OpenError::TooManyOfOwner { .. }) => self.count_refusal(Refusal::AnswersOfUser),
            OpenError::Stream(streams::OpenError::TooMany { .. }) | OpenError::NoSlot => {
                self.count_refusal(Refusal::Answers)
            }
            _ => {}
        }
        error.into()
    }

    fn stream_head(&self, head: &CompletionHead, cors: &Cors) -> (RequestId, Vec<u8>) {
        let mut headers = cors.headers();
        // Its last chunk is the connection's last word.
        headers.extend([("connection", "close"), (REQUEST_ID_NAME, head.id.as_str())]);
        (head.id.clone(), sse::response_head(&headers))
    }

    /// What the worker gets.
    fn question(&self, user: &UserId, request: &RequestId, chat: ChatRequest) -> IncomingMessage {
        let extra = [
            ("request_id".to_owned(), Value::from(request.as_str())),
            ("openai".to_owned(), Value::Object(chat.extra)),
        ];
        let channel_id = ChannelId::Stream(request.clone()).to_string();
        let asked = IncomingMessage::new(channel_id, user.as_str(), chat.text, self.gateway.engine.now());
        IncomingMessage { extra: serde_json::Map::from_iter(extra), ..asked }
    }

    /// Shows the question to its user's tabs, where that is wanted: before the worker can answer.
    fn mirror(&self, message: &IncomingMessage) {
        if !self.gateway.settings.load().mirror_to_tabs {
            return;
        }
        let Ok(user) = UserId::parse(&message.user_id) else { return };
        let (id, timestamp) = (message.message_id, message.timestamp);
        let event = Event::Message { id, text: &message.text, sender: &message.user_id, reply_to: None, timestamp };
        let publish = || self.gateway.engine.try_publish(&ChannelId::User(user), event);
        if let Err(error) = traces::within(message.trace.as_deref(), publish) {
            tracing::warn!(%error, "a question was not shown to its user's tabs");
        }
    }
}

/// The machine that makes an answer's records, and its first record as a chunk.
fn begin(head: CompletionHead) -> (Completion, Vec<u8>) {
    let mut completion = Completion::new(head);
    let mut first = Vec::with_capacity(256);
    completion.start(&mut first);
    (completion, sse::chunk(&first))
}

/// A host and perhaps a port, as it may stand in a link.
fn is_authority(host: &str) -> bool {
    !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_and_a_port_may_stand_in_a_link() {
        for good in ["chat.example", "chat.example:8443", "127.0.0.1:80", "[::1]:8080", "under_score"] {
            assert!(is_authority(good), "{good}");
        }
        for bad in [
            "",
            "evil.example/x",
            "user@evil.example",
            "a b",
            "a)",
            "a](javascript:1",
            "a?b",
            "a#b",
            "a\\b",
            "ü",
            "a\"b",
            "<b>",
            "a%0d",
        ] {
            assert!(!is_authority(bad), "{bad}");
        }
    }
}
