//! The opening handshakes of tabs: what a request lacks to become one, and what it asks for (RFC 6455 §4.2, RFC 7692 §5).

use std::borrow::Cow;

use base64_simd::STANDARD as BASE64;
use http::header::{CONNECTION, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderMap, Method, Request, StatusCode, Version};
use hyper::body::Body;
use percent_encoding::percent_decode_str;

use crate::driver::response::{Answered, error, error_with, has_token, method_not_allowed};
use crate::fanout::shard::Resume;
use crate::proto::deflate;
use crate::proto::deflate::Accepted;

/// What a client's opening handshake lacks (RFC 6455 §4.2.1).
pub(crate) fn fault<B: Body>(request: &Request<B>) -> Option<Answered> {
    let headers = request.headers();
    if request.method() != Method::GET {
        return Some(method_not_allowed("GET"));
    }
    let is_upgrade = has_token(headers, UPGRADE, "websocket") && has_token(headers, CONNECTION, "upgrade");
    if !is_upgrade || request.version() != Version::HTTP_11 {
        let message = "this is a WebSocket endpoint: ask for an upgrade to websocket over HTTP/1.1";
        return Some(error_with(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message, (UPGRADE, "websocket")));
    }
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let message = "only version 13 of the WebSocket protocol is spoken here";
        let version = (SEC_WEBSOCKET_VERSION, "13");
        return Some(error_with(StatusCode::UPGRADE_REQUIRED, "websocket_version", message, version));
    }
    let is_key = |key: &[u8]| BASE64.decode_to_vec(key).is_ok_and(|key| key.len() == 16);
    if !request.body().is_end_stream() {
        return Some(error(StatusCode::BAD_REQUEST, "bad_handshake", "the handshake has a body"));
    }
    let mut keys = headers.get_all(SEC_WEBSOCKET_KEY).iter();
    match (keys.next(), keys.next()) {
        (Some(key), None) if is_key(key.as_bytes()) => None,
        _ => {
            Some(error(StatusCode::BAD_REQUEST, "bad_handshake", "Sec-WebSocket-Key must be 16 bytes in base64, once"))
        }
    }
}

/// What is answered to the extensions that a client offers. What is not text is no offer.
pub(crate) fn extensions(headers: &HeaderMap) -> Option<Accepted> {
    let offers = headers.get_all(SEC_WEBSOCKET_EXTENSIONS).iter();
    deflate::accept(offers.filter_map(|offers| offers.to_str().ok()))
}

/// Where the reader of an event stream goes on: behind its `Last-Event-ID`, or behind `after` if it sent none.
pub(crate) fn resume_of_reader(headers: &HeaderMap, after: Option<Cow<'_, str>>) -> Resume {
    let position = match headers.get("last-event-id") {
        // What is not text is no position of ours; an empty one is how a reader says that it has none.
        Some(position) => Some(Cow::Borrowed(position.to_str().unwrap_or("?"))).filter(|text| !text.is_empty()),
        None => after,
    };
    Resume::from_position(position.as_deref())
}

/// The first parameter of that name in a query, decoded; what is not UTF-8 then is as it came.
pub(crate) fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    parameters(query, name).next()
}

/// All of that name, in their order.
pub(crate) fn parameters<'a>(query: Option<&'a str>, name: &str) -> impl Iterator<Item = Cow<'a, str>> {
    let pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let values = pairs.filter(move |(key, _)| *key == name);
    values.map(|(_, value)| decoded(value))
}

/// A value, as forms and `URLSearchParams` write it: a space is `+`.
fn decoded(value: &str) -> Cow<'_, str> {
    if !value.contains('+') {
        return percent_decode_str(value).decode_utf8().unwrap_or(Cow::Borrowed(value));
    }
    let spaced = value.replace('+', " ");
    Cow::Owned(percent_decode_str(&spaced).decode_utf8().map(Cow::into_owned).unwrap_or(spaced))
}
