//! What went wrong, as a status and a JSON body.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};

use crate::platform::adapter::SendError;
use crate::proto::delivery::PublishError;

/// Why a request was refused: the codes of `{"error":{"code","message"}}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ApiCode {
    /// 400 `bad_request`: a header that cannot be.
    BadRequest,
    /// 400 `bad_json`: the body is not a JSON object, or has a key twice.
    BadJson,
    /// 400 `bad_field`: a field is missing, has the wrong type or a value that is not allowed.
    BadField,
    /// 404 `not_found`.
    NotFound,
    /// 405 `method_not_allowed`, with `Allow`.
    MethodNotAllowed,
    /// 413 `too_large`: more than may be published, or more lines than a batch may have.
    TooLarge,
    /// 415 `unsupported_media_type`.
    UnsupportedMediaType,
    /// 422 `idempotency_mismatch`: one key for two requests.
    IdempotencyMismatch,
    /// 503 `overloaded`, with `Retry-After`: nothing was posted.
    Overloaded,
    /// There is nobody here, and as much waits for the other nodes as may wait; try again.
    SpoolFull,
    /// 503 `draining`, with `Retry-After`: nothing was posted, this node is going away.
    Draining,
}

impl ApiCode {
    /// Its name in the body.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::BadJson => "bad_json",
            Self::BadField => "bad_field",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::TooLarge => "too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::IdempotencyMismatch => "idempotency_mismatch",
            Self::Overloaded => "overloaded",
            Self::SpoolFull => "spool_full",
            Self::Draining => "draining",
        }
    }

    /// Its HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest | Self::BadJson | Self::BadField => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::IdempotencyMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Overloaded | Self::SpoolFull | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// A refusal: its code, and a sentence that says what is wrong and how much is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(super) code: ApiCode,
    message: Cow<'static, str>,
}

impl ApiError {
    pub(super) fn new(code: ApiCode, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into() }
    }

    pub(super) fn field(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ApiCode::BadField, message)
    }

    pub(super) fn write(&self, body: &mut Vec<u8>) {
        let error = serde_json::json!({ "error": { "code": self.code.as_str(), "message": self.message } });
        body.extend_from_slice(error.to_string().as_bytes());
    }

    pub(super) fn into_response(self) -> Response<Bytes> {
        let mut body = Vec::new();
        self.write(&mut body);
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = self.code.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.code.status() {
            StatusCode::METHOD_NOT_ALLOWED => headers.insert(ALLOW, HeaderValue::from_static("POST")),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"))
            }
            _ => None,
        };
        response
    }
}

/// The sentence alone.
impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<SendError> for ApiError {
    fn from(error: SendError) -> Self {
        let code = match &error {
            SendError::Publish(PublishError::Overloaded) => ApiCode::Overloaded,
            SendError::Publish(PublishError::SpoolFull) => ApiCode::SpoolFull,
            SendError::Publish(PublishError::Closed) => ApiCode::Draining,
            SendError::Publish(PublishError::TooLarge { .. }) => ApiCode::TooLarge,
            _ => ApiCode::BadField,
        };
        Self::new(code, error.to_string())
    }
}
