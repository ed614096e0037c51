//! What went wrong, as OpenAI's clients read it: a status, and `{"error":{message, type, param, code}}`.

use http::header::{ALLOW, CONNECTION, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};

use crate::driver::addresses::TooManyOfAddress;
use crate::fanout::shard::OpenError;
use crate::fanout::streams::{self, AttachError};
use crate::gateway::auth::AuthError;
use crate::gateway::body::BodyError;
use crate::gateway::openai::REQUEST_ID;
use crate::gateway::response::{self, Answered};
use crate::id::RequestId;
use crate::platform::dispatch::Refused;
use crate::platform::openai::{BadRequest, ErrorKind, error_body};
use crate::proto::completion::Failure;

/// SDKs send a request again after 408, 409, 429 and 5xx, unless this says `false`.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Failed {
    status: StatusCode,
    kind: ErrorKind,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    headers: HeaderMap,
}

impl Failed {
    fn new(status: StatusCode, kind: ErrorKind, code: &'static str, message: impl Into<String>) -> Self {
        let (message, headers) = (message.into(), HeaderMap::new());
        Self { status, kind, code: Some(code), param: None, message, headers }
    }

    fn with(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.insert(name, HeaderValue::from_static(value));
        self
    }

    fn of_request(mut self, id: &RequestId) -> Self {
        if let Ok(id) = HeaderValue::from_str(id.as_str()) {
            self.headers.insert(REQUEST_ID, id);
        }
        self
    }

    pub(super) fn not_found(message: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, ErrorKind::InvalidRequest, "not_found", message)
    }

    pub(super) fn method(allowed: &'static str) -> Self {
        let message = format!("only {allowed} is allowed here");
        let (status, kind) = (StatusCode::METHOD_NOT_ALLOWED, ErrorKind::InvalidRequest);
        Self::new(status, kind, "method_not_allowed", message).with(ALLOW, allowed)
    }

    pub(super) fn http_version() -> Self {
        let (status, kind) = (StatusCode::HTTP_VERSION_NOT_SUPPORTED, ErrorKind::InvalidRequest);
        Self::new(status, kind, "http_version", "a stream needs HTTP/1.1").with(SHOULD_RETRY, "false")
    }

    /// The connection ends with it, and says so: the request's body was not read, and the next one is for another node.
    pub(super) fn draining() -> Self {
        let message = "this node is shutting down; try again";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Server, "draining", message)
            .with(RETRY_AFTER, "1")
            .with(CONNECTION, "close")
    }

    pub(super) fn overloaded(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorKind::Server, "overloaded", message).with(RETRY_AFTER, "1")
    }

    pub(super) fn internal() -> Self {
        let message = "the request was not carried out";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Server, "internal_error", message)
    }

    /// The request with this key is under way, or its answer can still be found.
    pub(super) fn conflict(id: &RequestId) -> Self {
        let message = format!("a request with this Idempotency-Key is under way or was answered: {}", id.as_str());
        Self::new(StatusCode::CONFLICT, ErrorKind::InvalidRequest, "conflict", message)
            .with(SHOULD_RETRY, "false")
            .of_request(id)
    }

    /// The worker has the question: asking again would ask twice.
    pub(super) fn of_answer(failure: Failure, id: RequestId) -> Self {
        let status = match failure {
            Failure::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Failure::Cancelled | Failure::Draining => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let failed = Self::new(status, ErrorKind::Server, failure.code(), failure.message());
        failed.with(SHOULD_RETRY, "false").of_request(&id)
    }

    /// The worker has said more than one answer in one piece may hold.
    pub(super) fn answer_too_large(bytes_max: usize, id: &RequestId) -> Self {
        let message =
            format!("the answer is over the limit of {bytes_max} bytes for one in one piece; ask for a stream");
        let (status, kind) = (StatusCode::BAD_GATEWAY, ErrorKind::Server);
        Self::new(status, kind, "answer_too_large", message).with(SHOULD_RETRY, "false").of_request(id)
    }

    /// The worker has said more than there is room for beside the others. It has the question: no SDK asks it again.
    pub(super) fn no_room_for_answer(id: &RequestId) -> Self {
        let message = "the answers in one piece hold as many bytes as they may; ask for a stream, or again later";
        Self::overloaded(message).with(SHOULD_RETRY, "false").of_request(id)
    }

    pub(super) fn answer(self) -> Answered {
        let body = error_body(&self.message, self.kind, self.param.as_deref(), self.code);
        let mut response = response::typed(self.status, HeaderValue::from_static("application/json"), body);
        response.headers_mut().extend(self.headers);
        response
    }
}

impl From<AuthError> for Failed {
    fn from(refusal: AuthError) -> Self {
        let (kind, code) = match refusal.status() {
            StatusCode::UNAUTHORIZED => (ErrorKind::Authentication, "invalid_api_key"),
            StatusCode::FORBIDDEN => (ErrorKind::Permission, refusal.code()),
            StatusCode::TOO_MANY_REQUESTS => (ErrorKind::RateLimit, refusal.code()),
            _ => (ErrorKind::InvalidRequest, refusal.code()),
        };
        let failed = Self::new(refusal.status(), kind, code, refusal.to_string());
        match (refusal.www_authenticate(), refusal.retry_after()) {
            (Some(challenge), _) => failed.with(WWW_AUTHENTICATE, challenge),
            (None, Some(seconds)) => failed.with(RETRY_AFTER, seconds),
            (None, None) => failed,
        }
    }
}

impl From<BodyError> for Failed {
    fn from(error: BodyError) -> Self {
        let kind = match error {
            BodyError::Broken | BodyError::TooLarge { .. } => ErrorKind::InvalidRequest,
            BodyError::Timeout => ErrorKind::Timeout,
            BodyError::TooMany => return Self::overloaded(error.to_string()),
        };
        Self::new(error.status(), kind, error.code(), error.to_string())
    }
}

impl From<BadRequest> for Failed {
    fn from(error: BadRequest) -> Self {
        let (status, kind) = (StatusCode::BAD_REQUEST, ErrorKind::InvalidRequest);
        let BadRequest { message, param, code } = error;
        Self { status, kind, code, param, message, headers: HeaderMap::new() }
    }
}

impl From<Refused> for Failed {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Closed => Self::draining(),
            Refused::Full | Refused::ChannelFull => Self::overloaded(refused.to_string()),
        }
    }
}

impl From<streams::OpenError> for Failed {
    fn from(error: streams::OpenError) -> Self {
        match error {
            streams::OpenError::TooManyOfOwner { .. } => {
                let (status, message) = (StatusCode::TOO_MANY_REQUESTS, error.to_string());
                Self::new(status, ErrorKind::RateLimit, "too_many_answers", message).with(RETRY_AFTER, "1")
            }
            _ => Self::overloaded(error.to_string()),
        }
    }
}

impl From<TooManyOfAddress> for Failed {
    fn from(many: TooManyOfAddress) -> Self {
        let (status, kind) = (StatusCode::TOO_MANY_REQUESTS, ErrorKind::RateLimit);
        Self::new(status, kind, "limit_reached", many.to_string()).with(RETRY_AFTER, "5")
    }
}

impl From<OpenError> for Failed {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Draining => Self::draining(),
            OpenError::Stream(error) => error.into(),
            OpenError::Attach(AttachError::NoSuchStream) => Self::not_found("there is no such answer"),
            OpenError::Attach(AttachError::Lost) => {
                let (status, kind) = (StatusCode::GONE, ErrorKind::InvalidRequest);
                Self::new(status, kind, "replay_lost", error.to_string())
            }
            OpenError::TooManyTabs(_) | OpenError::TooManyWatchers(_) | OpenError::NoSlot => {
                Self::overloaded(error.to_string())
            }
        }
    }
}
