//! Responses: plain ones, errors in the one shape, and what every response carries.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::Full;

/// A whole response.
pub(crate) type Answered = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A response of a known type. Nothing of ours may be guessed to be another type, or kept by a cache unless it says so.
pub(crate) fn typed(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Answered {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    finish(response)
}

/// Adds what every response carries.
pub(crate) fn finish(mut response: Answered) -> Answered {
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A JSON body.
pub(crate) fn json(status: StatusCode, body: &serde_json::Value) -> Answered {
    typed(status, JSON, body.to_string())
}

/// `{"error":{"code","message"}}`. What is refused for now (429 and 503) may be asked again in a second.
pub(crate) fn error(status: StatusCode, code: &str, message: &str) -> Answered {
    let mut response = json(status, &serde_json::json!({ "error": { "code": code, "message": message } }));
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// An error and one header that belongs to it (`Allow`, another `Retry-After`, …).
pub(crate) fn error_with(
    status: StatusCode,
    code: &str,
    message: &str,
    (name, value): (HeaderName, &'static str),
) -> Answered {
    let mut response = error(status, code, message);
    response.headers_mut().insert(name, HeaderValue::from_static(value));
    response
}

/// 405 with what is allowed.
pub(crate) fn method_not_allowed(allowed: &'static str) -> Answered {
    let message = format!("only {allowed} is allowed here");
    error_with(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", &message, (http::header::ALLOW, allowed))
}

/// 503 while the node shuts down.
pub(crate) fn draining() -> Answered {
    let message = "this node is shutting down; connect again";
    error(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
}

/// Whether a comma-separated header has `token` among its values, in any case.
pub(crate) fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_refused_for_now_is_told_when_to_come_back() {
        for status in (400..600).map(|status| StatusCode::from_u16(status).unwrap()) {
            let after = |response: Answered| response.headers().get(RETRY_AFTER).cloned();
            let is_temporary = [429, 503].contains(&status.as_u16());
            assert_eq!(
                after(error(status, "code", "why")),
                is_temporary.then(|| HeaderValue::from_static("1")),
                "{status}"
            );
            let later = error_with(status, "code", "why", (RETRY_AFTER, "5"));
            assert_eq!(after(later).unwrap(), "5");
        }
        assert!(draining().headers().contains_key(RETRY_AFTER));
    }
}
