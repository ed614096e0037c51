//! From a request to a session: the WebSocket handshake (RFC 6455 §4.2), its extension, and event streams.

use std::rc::Rc;
use std::time::SystemTime;

use http::header::{HeaderName, RETRY_AFTER, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderMap, Method, StatusCode, Version};
use hyper::Request;
use hyper::body::Incoming;

use crate::config::Deflate;
use crate::driver::addresses::Place;
use crate::driver::clock;
use crate::driver::handshake;
use crate::driver::listener::Answer;
use crate::fanout::session::{Address, Identity};
use crate::fanout::shard::{OpenError, Opening, Resume, Wire};
use crate::gateway::auth::{AuthError, Claims, Credential};
use crate::gateway::checks::NotChecked;
use crate::gateway::clients::TooFast;
use crate::gateway::cors::Cors;
use crate::gateway::edge::{Asked, ShardEdge};
use crate::gateway::response::{Answered, draining, error, error_with, method_not_allowed, refused};
use crate::id::ChannelId;
use crate::metrics::{HandshakeOutcome, Refusal};
use crate::platform::adapter::Outlet;
use crate::proto::deflate::Accepted;
use crate::proto::event::Timestamp;
use crate::proto::sse;

impl ShardEdge {
    /// `GET /ws`.
    pub(super) async fn websocket(self: Rc<Self>, mut request: Request<Incoming>, asked: Asked) -> Answer {
        // Who asks comes first: a page that may not know why its handshake failed asks again without one.
        let (claims, credential) = match self.identify(&request, &asked).await {
            Ok(identified) => identified,
            Err(answer) => return answer,
        };
        if let Some(response) = handshake::fault(&request) {
            return self.refuse(HandshakeOutcome::BadRequest, response);
        }
        // It writes the answer's headers; the connection is taken from hyper in our own way.
        let Ok((response, _never)) = fastwebsockets::upgrade::upgrade(&mut request) else {
            let response = error(StatusCode::BAD_REQUEST, "bad_handshake", "the handshake is incomplete");
            return self.refuse(HandshakeOutcome::BadRequest, response);
        };
        let extensions = self.extensions(request.headers());
        let wire = Wire::websocket(extensions.map(|accepted| accepted.window));
        let resume = Resume::from_position(asked.parameter("after").as_deref());
        let (address, place) = match self.open(claims, (wire, resume), &asked).await {
            Ok(opened) => opened,
            Err(answer) => return *answer,
        };
        self.count(HandshakeOutcome::WebSocket);
        let extensions = extensions.map(|accepted| accepted.header);
        let head = switching_protocols(response.headers(), credential.protocol(), extensions);
        Answer::Session { address, head, status: 101, place }
    }

    /// What is answered to the extensions that a client offers.
    fn extensions(&self, headers: &HeaderMap) -> Option<Accepted> {
        match self.gateway.settings.load().deflate {
            Deflate::On => handshake::extensions(headers),
            Deflate::Off => None,
        }
    }

    /// `GET /events`, and `POST` for what its reader says.
    pub(super) async fn events(self: Rc<Self>, request: Request<Incoming>, asked: Asked) -> Answer {
        let cors = Cors::of(&self.gateway.keys.load(), request.headers());
        if request.method() == Method::OPTIONS {
            return Answer::Respond(cors.preflight("GET, POST", request.headers()));
        }
        if request.method() == Method::POST {
            return Answer::Respond(cors.allow(Box::pin(self.said(request, asked)).await));
        }
        match self.event_stream(request, asked, &cors).await {
            // A page must be able to read why it was refused.
            Answer::Respond(response) => Answer::Respond(cors.allow(response)),
            session => session,
        }
    }

    async fn event_stream(self: Rc<Self>, request: Request<Incoming>, asked: Asked, cors: &Cors) -> Answer {
        if request.method() != Method::GET {
            return self.refuse(HandshakeOutcome::BadRequest, method_not_allowed("GET, POST, OPTIONS"));
        }
        if request.version() != Version::HTTP_11 {
            let message = "an event stream needs HTTP/1.1";
            let response = error(StatusCode::HTTP_VERSION_NOT_SUPPORTED, "http_version", message);
            return self.refuse(HandshakeOutcome::BadRequest, response);
        }
        if let Some(watched) = asked.parameter("watch") {
            return self.watch(&request, &asked, &watched, cors);
        }
        let claims = match self.identify(&request, &asked).await {
            Ok((claims, _)) => claims,
            Err(answer) => return answer,
        };
        let resume = handshake::resume_of_reader(request.headers(), asked.parameter("after"));
        let (address, place) = match self.open(claims, (Wire::EventStream, resume), &asked).await {
            Ok(opened) => opened,
            Err(answer) => return *answer,
        };
        self.count(HandshakeOutcome::Events);
        self.join_rooms(address, &asked);
        Answer::Session { address, head: sse::response_head(&cors.headers()), status: 200, place }
    }

    pub(super) fn count(&self, outcome: HandshakeOutcome) {
        self.gateway.engine.metrics().engine.handshakes.of(outcome).increment();
    }

    pub(super) fn refuse(&self, outcome: HandshakeOutcome, response: Answered) -> Answer {
        self.count(outcome);
        Answer::Respond(response)
    }

    /// Who asks may not.
    pub(super) fn deny(&self, refusal: AuthError) -> Answer {
        let outcome = match refusal.status() {
            StatusCode::UNAUTHORIZED => HandshakeOutcome::Unauthorized,
            StatusCode::FORBIDDEN => HandshakeOutcome::Forbidden,
            StatusCode::TOO_MANY_REQUESTS => HandshakeOutcome::LimitReached,
            _ => HandshakeOutcome::BadRequest,
        };
        self.refuse(outcome, refused(refusal))
    }

    fn refuse_hasty(&self, too_fast: TooFast) -> Answer {
        let (status, refusal) = match too_fast {
            TooFast::Address => (StatusCode::TOO_MANY_REQUESTS, Refusal::HandshakesOfAddress),
            TooFast::Everybody => (StatusCode::SERVICE_UNAVAILABLE, Refusal::Handshakes),
        };
        self.count_refusal(refusal);
        let response = error_with(status, "rate_limited", &too_fast.to_string(), (RETRY_AFTER, "1"));
        self.refuse(HandshakeOutcome::LimitReached, response)
    }

    fn refuse_unchecked(&self, refusal: NotChecked) -> Answer {
        if refusal == NotChecked::Closing {
            return self.refuse(HandshakeOutcome::Draining, draining());
        }
        self.count_refusal(Refusal::Checks);
        let response = error(StatusCode::SERVICE_UNAVAILABLE, "overloaded", &refusal.to_string());
        self.refuse(HandshakeOutcome::LimitReached, response)
    }

    /// Who asks. A signature that takes long to verify is verified on another thread.
    pub(super) async fn identify(
        &self,
        request: &Request<Incoming>,
        asked: &Asked,
    ) -> Result<(Claims, Credential), Answer> {
        if self.gateway.is_draining() {
            return Err(self.refuse(HandshakeOutcome::Draining, draining()));
        }
        // Before anything is verified: a flood must not cost a signature each.
        if let Err(too_fast) = self.gateway.clients.admit(asked.client, clock::now()) {
            return Err(self.refuse_hasty(too_fast));
        }
        let keys = self.gateway.keys.load_full();
        let deny = |refusal| self.deny(refusal);
        let credential = keys.session_credential(&asked.head(request)).map_err(deny)?;
        let claims = if keys.is_costly(&credential) {
            let offered = credential.clone();
            let verify = move || keys.verify(&offered, SystemTime::now());
            self.gateway.checks.run(verify).await.map_err(|refusal| self.refuse_unchecked(refusal))?.map_err(deny)?
        } else {
            keys.verify(&credential, SystemTime::now()).map_err(deny)?
        };
        Ok((claims, credential))
    }

    async fn open(
        &self,
        claims: Claims,
        (wire, resume): (Wire, Resume),
        asked: &Asked,
    ) -> Result<(Address, Option<Place>), Box<Answer>> {
        let full = |status, message: &str| {
            let response = error_with(status, "limit_reached", message, (RETRY_AFTER, "5"));
            Box::new(self.refuse(HandshakeOutcome::LimitReached, response))
        };
        let is_full =
            || self.gateway.engine.hub().registry().total_connections() >= self.gateway.settings.load().tabs_max;
        let all = || {
            self.count_refusal(Refusal::Tabs);
            full(StatusCode::SERVICE_UNAVAILABLE, "this node has as many tabs as it may have")
        };
        if is_full() {
            return Err(all());
        }
        let place = self.place(asked.client).map_err(|many| full(StatusCode::TOO_MANY_REQUESTS, &many.to_string()))?;
        // What other nodes publish has to reach this one before the tab hears anything.
        let engine = &self.gateway.engine;
        engine.expect(&ChannelId::User(claims.user.clone())).await;
        let resume = engine.resume(&claims.user, resume).await;
        // Others may have come meanwhile.
        if is_full() {
            return Err(all());
        }
        let now = engine.now();
        let opening = Opening { resume, ..Opening::at(now, identity(claims, now), wire) };
        let greet = |address| asked.has_flag("hello").then(|| engine.hello(address));
        let opened = self.local.open(opening, greet);
        opened.map(|address| (address, place)).map_err(|error| match error {
            OpenError::Draining => Box::new(self.refuse(HandshakeOutcome::Draining, draining())),
            OpenError::TooManyTabs(limit) => {
                self.count_refusal(Refusal::TabsOfUser);
                full(StatusCode::TOO_MANY_REQUESTS, &limit.to_string())
            }
            error => {
                self.count_refusal(Refusal::Tabs);
                full(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
            }
        })
    }
}

pub(super) fn identity(claims: Claims, now: Timestamp) -> Identity {
    let Claims { user, name, avatar, rooms, expires_at } = claims;
    let name = if name == user.as_str() { user.shared() } else { name.into() };
    Identity { user, name, avatar: avatar.into(), connected_at: now, expires_at, rooms }
}

fn switching_protocols(headers: &HeaderMap, protocol: Option<&str>, extensions: Option<&str>) -> Vec<u8> {
    let mut head = Vec::with_capacity(256);
    head.extend_from_slice(b"HTTP/1.1 101 Switching Protocols\r\n");
    let mut line = |name: &HeaderName, value: &[u8]| {
        for part in [name.as_str().as_bytes(), b": ", value, b"\r\n"] {
            head.extend_from_slice(part);
        }
    };
    for (name, value) in headers {
        line(name, value.as_bytes());
    }
    if let Some(protocol) = protocol {
        line(&SEC_WEBSOCKET_PROTOCOL, protocol.as_bytes());
    }
    if let Some(extensions) = extensions {
        line(&SEC_WEBSOCKET_EXTENSIONS, extensions.as_bytes());
    }
    head.extend_from_slice(b"\r\n");
    head
}
