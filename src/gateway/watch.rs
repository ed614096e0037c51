//! `GET /events?watch=…`: for operators, an event stream of what goes by on a channel, or of how this node is.

use http::StatusCode;
use http::header::RETRY_AFTER;
use hyper::Request;
use hyper::body::Incoming;

use crate::driver::listener::Answer;
use crate::fanout::hub::Watched;
use crate::fanout::shard::OpenError;
use crate::gateway::auth::RouteClass;
use crate::gateway::cors::Cors;
use crate::gateway::edge::{Asked, ShardEdge};
use crate::gateway::response::{draining, error, error_with};
use crate::id::{ChannelId, IdError};
use crate::metrics::HandshakeOutcome;
use crate::proto::sse;

/// What `?watch=` names: `status`, or a channel id. A user of that name is `webchat:status`.
fn watched(text: &str) -> Result<Watched, IdError> {
    match text {
        "status" => Ok(Watched::Status),
        channel => ChannelId::parse(channel).map(Watched::Channel),
    }
}

impl ShardEdge {
    /// Lets an operator watch. The limits of tabs and of handshakes are not asked: who wants to know why nobody gets in
    /// has to get in, and so few may watch that a bound of their own does.
    pub(super) fn watch(&self, request: &Request<Incoming>, asked: &Asked, text: &str, cors: &Cors) -> Answer {
        if self.gateway.is_draining() {
            return self.refuse(HandshakeOutcome::Draining, draining());
        }
        if let Err(refusal) = self.authorize(RouteClass::Operator, request, asked) {
            return self.deny(refusal);
        }
        let watched = match watched(text) {
            Ok(watched) => watched,
            Err(refusal) => {
                let response = error(StatusCode::BAD_REQUEST, "bad_field", &format!("?watch=: {refusal}"));
                return self.refuse(HandshakeOutcome::BadRequest, response);
            }
        };
        match self.local.open_watcher(&watched) {
            Ok(address) => {
                self.count(HandshakeOutcome::Events);
                Answer::Session { address, head: sse::response_head(&cors.headers()), status: 200, place: None }
            }
            Err(OpenError::Draining) => self.refuse(HandshakeOutcome::Draining, draining()),
            Err(refusal) => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let response = error_with(status, "limit_reached", &refusal.to_string(), (RETRY_AFTER, "5"));
                self.refuse(HandshakeOutcome::LimitReached, response)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_watched_is_the_node_or_a_channel() {
        let user = |text: &str| ChannelId::parse(text).map(Watched::Channel);
        assert_eq!(watched("status"), Ok(Watched::Status));
        assert_eq!(watched("webchat:status"), user("webchat:status"));
        assert_eq!(watched("ann"), user("webchat:ann"));
        assert_eq!(watched("room:a b"), user("room:a b"));
        assert_eq!(watched(""), Err(IdError::Empty));
        assert_eq!(watched("sse:\n"), Err(IdError::Control));
    }
}
