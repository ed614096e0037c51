//! What a request's head must be beyond what hyper makes sure of, so that whoever stands before us and we never differ on
//! where a request ends or whom it is for.
//!
//! hyper refuses with 400, and closes: lengths that are no number or differ from each other, a transfer coding whose last
//! is not `chunked`, either in HTTP/1.0, line folding, spaces before a colon, control characters. What it reads although it
//! need not, and what that means:
//!
//! - `Content-Length` beside `Transfer-Encoding`: the coding counts, and the connection is closed behind the response
//!   (RFC 9112 §6.3), so that what follows is nobody's request.
//! - LF alone at the end of a head's line (RFC 9112 §2.2), never of a chunk's. Whoever forwards one inside of a value has
//!   not read the value (RFC 9110 §5.5); what it hides is then a header of ours, as above at worst.
//! - The same `Content-Length` twice (RFC 9110 §8.6), spaces behind a chunk's size (§7.1.1), extensions of chunks up to
//!   16 KiB together, a fragment in the target, which is dropped.

use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode, Version};

/// A rule of RFC 9112 that a request's head breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeadFault {
    /// §6.1: a coding that is not `chunked`, or that twice.
    TransferCoding,
    /// §3.2: HTTP/1.1 without a `Host`, or more than one.
    HostCount,
    /// §3.2: a `Host` that is no host.
    Host,
    /// §3.2.2: a target that names another host than `Host` does, or is not of this protocol.
    Target,
}

impl HeadFault {
    const fn message(self) -> &'static str {
        match self {
            Self::TransferCoding => "the one transfer coding that is understood is chunked, once",
            Self::HostCount => "a request has one Host",
            Self::Host => "the Host is no host",
            Self::Target => "the target and the Host name different hosts",
        }
    }

    /// The answer, after which nothing else of the connection is read.
    pub(super) fn response<B: From<String>>(self) -> Response<B> {
        let body = format!(r#"{{"error":{{"code":"bad_request","message":"{}"}}}}"#, self.message());
        let mut response = Response::new(body.into());
        *response.status_mut() = StatusCode::BAD_REQUEST;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

/// The first rule that the head breaks.
pub(super) fn fault<B>(request: &Request<B>) -> Option<HeadFault> {
    let headers = request.headers();
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_understood = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if codings.next().is_some_and(|coding| !is_understood(coding)) || codings.next().is_some() {
        return Some(HeadFault::TransferCoding);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => match authority(host) {
            Some(host) => Some(host),
            None => return Some(HeadFault::Host),
        },
        (None, _) if request.version() < Version::HTTP_11 => None,
        _ => return Some(HeadFault::HostCount),
    };
    let uri = request.uri();
    // What a tunnel would be for is a path that there is not.
    if request.method() == Method::CONNECT {
        return None;
    }
    let is_ours = uri.authority().is_none_or(|target| {
        let is_http = uri.scheme_str().is_some_and(|scheme| matches!(scheme, "http" | "https"));
        is_http && host.as_ref().is_none_or(|host| host == target)
    });
    if is_ours { None } else { Some(HeadFault::Target) }
}

/// A host, and perhaps a port, without a user.
fn authority(host: &HeaderValue) -> Option<Authority> {
    let host = Authority::try_from(host.as_bytes()).ok()?;
    (!host.as_str().contains('@') && !host.host().is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_for_one_host_and_its_body_ends_in_one_place() {
        let check = |line: &str, headers: &[(&str, &str)], expected: Option<HeadFault>| {
            let (method, rest) = line.split_once(' ').unwrap();
            let (target, version) = rest.split_once(' ').unwrap();
            let version = if version == "HTTP/1.0" { Version::HTTP_10 } else { Version::HTTP_11 };
            let mut request = Request::builder().method(method).uri(target).version(version);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            assert_eq!(fault(&request.body(()).unwrap()), expected, "{line} {headers:?}");
        };
        let get = "GET / HTTP/1.1";
        for host in ["a", "a:80", "A.example", "127.0.0.1:9001", "[::1]:80", "my_service"] {
            check(get, &[("host", host)], None);
        }
        for host in ["", ":80", "a b", "a/b", "u@a", "a, b", "[::1", "a?b", "a#b"] {
            check(get, &[("host", host)], Some(HeadFault::Host));
        }
        check(get, &[], Some(HeadFault::HostCount));
        check("GET / HTTP/1.0", &[], None);
        check(get, &[("host", "a"), ("host", "a")], Some(HeadFault::HostCount));
        check("GET / HTTP/1.0", &[("host", "a"), ("host", "b")], Some(HeadFault::HostCount));
        check("GET http://a/x HTTP/1.1", &[("host", "A")], None);
        check("GET https://a:1/x HTTP/1.1", &[("host", "a:1")], None);
        check("GET http://a/x HTTP/1.0", &[], None);
        for target in ["http://b/x", "http://a:1/x", "ftp://a/x", "http://u@a/x", "a:80"] {
            check(&format!("GET {target} HTTP/1.1"), &[("host", "a")], Some(HeadFault::Target));
        }
        check("OPTIONS * HTTP/1.1", &[("host", "a")], None);
        check("CONNECT b:443 HTTP/1.1", &[("host", "b:443")], None);
        let te = |codings: &[&'static str], expected: Option<HeadFault>| {
            let codings = codings.iter().map(|coding| ("transfer-encoding", *coding));
            let headers: Vec<_> = codings.chain([("host", "a")]).collect();
            check("POST / HTTP/1.1", &headers, expected);
        };
        te(&["chunked"], None);
        te(&["Chunked"], None);
        for codings in
            [&["gzip, chunked"][..], &["chunked, chunked"], &[",chunked"], &["chunked", "chunked"], &["x", "chunked"]]
        {
            te(codings, Some(HeadFault::TransferCoding));
        }
    }

    #[test]
    fn the_answer_is_json_and_the_last() {
        let response: Response<String> = HeadFault::Host.response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()[CONNECTION]),
            (400, &HeaderValue::from_static("close"))
        );
        let body: serde_json::Value = serde_json::from_str(response.body()).unwrap();
        assert_eq!(body["error"]["code"], "bad_request");
    }
}
