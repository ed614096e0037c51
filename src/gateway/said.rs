//! What users say without a WebSocket: `POST /events`, one frame a request; and the rooms that `GET /events` names.
//!
//! A proxy that lets no WebSocket through leaves a client an event stream, which has one direction. For the other one it
//! posts what it would have sent as a text message. The request needs no session: it is answered by whatever node it
//! comes to, and is held to the limits of one session for each user.

use std::rc::Rc;
use std::sync::Arc;

use http::header::{HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Incoming;
use serde_json::json;

use crate::driver::clock;
use crate::driver::listener::Answer;
use crate::engine::client::{ClientTexts, Said};
use crate::fanout::session::Address;
use crate::gateway::apart::APART_BYTES;
use crate::gateway::auth::allow_body;
use crate::gateway::edge::{Asked, ShardEdge};
use crate::gateway::response::{Answered, error, finish, refused, typed};
use crate::gateway::upgrade::identity;
use crate::platform::adapter::Outlet;
use crate::proto::event::ErrorCode;
use crate::proto::frame::Frame;

impl ShardEdge {
    /// `POST /events`: answered with the frame that a tab would get for it, 204 if a tab would get none.
    pub(super) async fn said(self: Rc<Self>, request: Request<Incoming>, asked: Asked) -> Answered {
        let claims = match self.identify(&request, &asked).await {
            Ok((claims, _)) => claims,
            Err(Answer::Respond(response)) => return response,
            Err(Answer::Session { .. }) => {
                return error(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request was not carried out");
            }
        };
        // No page of another origin can send such a body without being asked first.
        if let Err(refusal) = allow_body(request.headers()) {
            return refused(refusal);
        }
        let gateway = &self.gateway;
        let message_bytes_max = gateway.engine.session_limits().load().message_bytes_max;
        let bytes_max = message_bytes_max.min(gateway.settings.load().body_bytes_max);
        let body = match gateway.bodies.read(request, bytes_max).await {
            Ok(body) => body,
            Err(error) => return error.answer(),
        };
        let is_apart = body.bytes.len() > APART_BYTES;
        if !gateway.clients.may_say(&claims.user, body.bytes.len(), clock::now()) {
            // Who is told to be slower must not be able to make this thread read a large frame each time.
            let refused =
                if is_apart { ClientTexts::limited_unread() } else { gateway.texts.limited(&mut body.bytes.to_vec()) };
            return answered(&refused);
        }
        let identity = Arc::new(identity(claims, gateway.engine.now()));
        let texts = gateway.texts.clone();
        let say = async move {
            // The whole of it: its place in the budget goes when its bytes do.
            let body = body;
            texts.say(identity, &mut body.bytes.to_vec()).await
        };
        if !is_apart {
            return answered(&say.await);
        }
        match gateway.control.spawn(say).await {
            Ok(said) => answered(&said),
            Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request was not carried out"),
        }
    }

    /// Joins the rooms that the query names (`room=a&room=b`). The reader hears `ack` or `error` for each, with its place
    /// in the query as the `client_id`: `room-0`, `room-1`, ….
    pub(super) fn join_rooms(&self, address: Address, asked: &Asked) {
        for (place, room) in asked.parameters("room").enumerate() {
            let join = json!({ "type": "join", "room": room, "client_id": format!("room-{place}") });
            self.local.hear(address, &mut join.to_string().into_bytes());
        }
    }
}

/// The frame, and a status for whoever looks no further.
fn answered(said: &Said) -> Answered {
    let written = |status, frame: &Frame| {
        let body = frame.json().to_vec();
        typed(status, HeaderValue::from_static("application/json"), body)
    };
    match said {
        Said::Accepted(Some(frame)) => written(StatusCode::OK, frame),
        Said::Accepted(None) => {
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::NO_CONTENT;
            finish(response)
        }
        Said::Refused(code, frame) => {
            let mut response = written(status_of(*code), frame);
            if matches!(code, ErrorCode::RateLimited | ErrorCode::Overloaded | ErrorCode::Draining) {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            response
        }
    }
}

const fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadFrame | ErrorCode::BadField => StatusCode::BAD_REQUEST,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::LimitReached => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Overloaded | ErrorCode::Draining => StatusCode::SERVICE_UNAVAILABLE,
    }
}
