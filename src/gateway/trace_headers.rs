//! `traceparent` and `tracestate` of requests, ours and others'.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use crate::proto::trace::TraceContext;
use crate::traces;

const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// Whose a request is. None: it does not say so as it must (W3C Trace Context, 3.2 and 3.3), or nothing is traced here.
pub(crate) fn context_of(headers: &HeaderMap) -> Option<TraceContext> {
    if !traces::is_on() {
        return None;
    }
    let mut parents = headers.get_all(PARENT).iter();
    let (Some(parent), None) = (parents.next(), parents.next()) else { return None };
    // Many headers are one list (RFC 9110, 5.3); a state that is not text is none.
    let states: Result<Vec<_>, _> = headers.get_all(STATE).iter().map(HeaderValue::to_str).collect();
    TraceContext::parse(parent.to_str().ok()?, &states.unwrap_or_default().join(","))
}

/// Says whose a request of ours is.
pub(crate) fn put(headers: &mut HeaderMap, context: &TraceContext) {
    // Both are visible ASCII.
    if let Ok(parent) = HeaderValue::try_from(context.to_string()) {
        headers.insert(PARENT, parent);
    }
    if let Ok(state) = HeaderValue::from_str(context.state())
        && !context.state().is_empty()
    {
        headers.insert(STATE, state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_was_put_is_what_is_read_where_something_is_traced() {
        let mut headers = HeaderMap::new();
        put(&mut headers, &TraceContext::parse(FIRST, "a=1,b=2").unwrap());
        assert_eq!(
            (headers["traceparent"].as_bytes(), headers["tracestate"].as_bytes()),
            (FIRST.as_bytes(), &b"a=1,b=2"[..])
        );
        #[cfg(not(feature = "otel"))]
        assert_eq!(context_of(&headers), None);
        #[cfg(feature = "otel")]
        {
            traces::begin();
            assert_eq!(context_of(&headers).unwrap().state(), "a=1,b=2");
            headers.append(STATE, HeaderValue::from_static("c=3"));
            assert_eq!(context_of(&headers).unwrap().state(), "a=1,b=2,c=3");
            headers.append(STATE, HeaderValue::from_bytes(b"d=\xff").unwrap());
            assert_eq!(context_of(&headers).unwrap().state(), "");
            headers.append(PARENT, HeaderValue::from_static(FIRST));
            assert_eq!(context_of(&headers), None, "two are none");
        }
    }
}
