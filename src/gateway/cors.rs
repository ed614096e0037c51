//! What pages of listed origins may read and ask (Fetch §3.2): for `/events` and `/v1`.

use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue, VARY,
};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::Full;

use crate::gateway::auth::Keys;
use crate::gateway::response::{Answered, error, finish};

/// Headers that a page may send if it did not ask for others.
const ALLOWED_HEADERS: &str =
    "authorization, content-type, last-event-id, cache-control, idempotency-key, x-tabcast-detach";
/// Headers of ours that a page may read.
const EXPOSED_HEADERS: &str = "x-request-id, retry-after, x-should-retry";
/// The longest list of headers that is sent back as it was asked for.
const REQUESTED_BYTES_MAX: usize = 1024;

/// The origin of a request, if `allowed_origins` names it.
#[derive(Debug, Clone)]
pub(crate) struct Cors(Option<HeaderValue>);

impl Cors {
    pub(crate) fn of(keys: &Keys, headers: &HeaderMap) -> Self {
        Self(keys.origins().cors(headers).cloned())
    }

    /// The answer to a browser that asks whether it may ask.
    pub(crate) fn preflight(&self, methods: &'static str, headers: &HeaderMap) -> Answered {
        if self.0.is_none() {
            return error(StatusCode::FORBIDDEN, "origin", "this origin may not ask");
        }
        let requested = headers.get(ACCESS_CONTROL_REQUEST_HEADERS).filter(|list| is_list_of_names(list.as_bytes()));
        let allowed = requested.cloned().unwrap_or(HeaderValue::from_static(ALLOWED_HEADERS));
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::NO_CONTENT;
        response.headers_mut().extend([
            (ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(methods)),
            (ACCESS_CONTROL_ALLOW_HEADERS, allowed),
            (ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600")),
        ]);
        self.allow(finish(response))
    }

    /// Lets the page read a response.
    pub(crate) fn allow(&self, mut response: Answered) -> Answered {
        let headers = response.headers_mut();
        headers.append(VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = &self.0 {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
        }
        response
    }

    /// The same for a head that is written by hand. An origin that was listed is visible ASCII.
    pub(crate) fn headers(&self) -> Vec<(&str, &str)> {
        let mut headers = vec![("vary", "origin")];
        if let Some(origin) = self.0.as_ref().and_then(|origin| origin.to_str().ok()) {
            headers.push(("access-control-allow-origin", origin));
            headers.push(("access-control-expose-headers", EXPOSED_HEADERS));
        }
        headers
    }
}

/// Names of headers (RFC 9110 §5.6.2) with commas and spaces between.
fn is_list_of_names(list: &[u8]) -> bool {
    let is_legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~, ".contains(byte);
    (1..=REQUESTED_BYTES_MAX).contains(&list.len()) && list.iter().all(is_legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_names_is_nothing_else() {
        for (list, expected) in [
            ("authorization, x-stainless-os", true),
            ("", false),
            ("a\r\nb", false),
            ("a: b", false),
            (&"a".repeat(1025), false),
        ] {
            assert_eq!(is_list_of_names(list.as_bytes()), expected, "{list:?}");
        }
    }
}
