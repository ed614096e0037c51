//! From which pages, and in development mode from which machine, a request may come.

use std::net::IpAddr;

use http::HeaderMap;
use http::HeaderValue;
use http::header;

use super::AuthError;
use super::NotLocal;
use super::RequestHead;

/// Headers that say that a proxy passed the request on, beside all `x-forwarded-*`.
const FORWARDING: [&str; 27] = [
    "forwarded",
    "forwarded-for",
    "via",
    "x-forward-for",
    "x-real-ip",
    "x-client-ip",
    "client-ip",
    "x-cluster-client-ip",
    "x-proxyuser-ip",
    "x-remote-addr",
    "x-host",
    "x-original-host",
    "x-original-url",
    "x-original-forwarded-for",
    "x-rewrite-url",
    "x-envoy-external-address",
    "x-azure-clientip",
    "x-appengine-user-ip",
    "true-client-ip",
    "cdn-loop",
    "cf-connecting-ip",
    "cf-connecting-ipv6",
    "cf-pseudo-ipv4",
    "cf-ray",
    "fly-client-ip",
    "fastly-client-ip",
    "fastly-client",
];

/// Where a request's page comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginCheck {
    /// The request does not say: most likely not a browser.
    Missing,
    /// Our own page.
    Own,
    /// A page that the setting names.
    Listed,
    /// Any other page, or one that hides its origin.
    Foreign,
}

/// The origins that may connect.
#[derive(Debug, Clone)]
pub struct Origins {
    listed: Box<[String]>,
    any: bool,
    /// Scheme and authority of `public_url`.
    public: Option<(String, String)>,
    /// No page of ours comes without TLS.
    is_https_only: bool,
}

fn split_origin(origin: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = origin.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    matches!(scheme, "http" | "https").then_some((scheme, authority))
}

/// Whether two authorities are one, the scheme's default port being written or not.
fn is_same_authority(scheme: &str, origin: &str, host: &str) -> bool {
    let default = if scheme == "https" { ":443" } else { ":80" };
    let bare = |authority: &str| authority.strip_suffix(default).unwrap_or(authority).to_ascii_lowercase();
    !origin.is_empty() && bare(origin) == bare(host)
}

/// The one value of a header; none if it is missing, doubled, or not ASCII.
fn only(headers: &HeaderMap, name: impl header::AsHeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

impl Origins {
    /// `listed` are origins or `*`; `public_url` is where browsers find this gateway; `is_https_only` if it speaks TLS.
    #[must_use]
    pub fn new(listed: &[String], public_url: Option<&str>, is_https_only: bool) -> Self {
        let split = |url: &str| split_origin(url).map(|(scheme, at)| (scheme.to_owned(), at.to_owned()));
        Self {
            listed: listed.iter().filter(|origin| *origin != "*").map(|origin| origin.to_ascii_lowercase()).collect(),
            any: listed.iter().any(|origin| origin == "*"),
            public: public_url.and_then(split),
            is_https_only,
        }
    }

    /// Compares `Origin` with our own and with the list.
    ///
    /// Our own is that of `public_url`, and that of the request's `Host` with either scheme: a proxy that ends TLS
    /// hides which it was. Where the host is that of `public_url`, its scheme counts; where the gateway itself speaks TLS,
    /// a page that came without is not ours.
    #[must_use]
    pub fn check(&self, headers: &HeaderMap) -> OriginCheck {
        if !headers.contains_key(header::ORIGIN) {
            return OriginCheck::Missing;
        }
        let Some(origin) = only(headers, header::ORIGIN) else { return OriginCheck::Foreign };
        if self.is_own(origin, only(headers, header::HOST)) {
            OriginCheck::Own
        } else if self.any || self.is_listed(origin) {
            OriginCheck::Listed
        } else {
            OriginCheck::Foreign
        }
    }

    /// Whether the list names it, `*` not counted. Browsers leave the scheme's default port out; the list may have it.
    fn is_listed(&self, origin: &str) -> bool {
        let Some((scheme, authority)) = split_origin(origin) else { return false };
        let mut listed = self.listed.iter().filter_map(|listed| split_origin(listed));
        listed.any(|(other, listed)| other == scheme && is_same_authority(scheme, authority, listed))
    }

    fn is_own(&self, origin: &str, host: Option<&str>) -> bool {
        let Some((scheme, authority)) = split_origin(origin) else { return false };
        match &self.public {
            Some((public_scheme, public)) if is_same_authority(scheme, authority, public) => scheme == public_scheme,
            _ if self.is_https_only && scheme != "https" => false,
            _ => host.is_some_and(|host| is_same_authority(scheme, authority, host)),
        }
    }

    /// The value of `Access-Control-Allow-Origin` for a page that the setting names.
    #[must_use]
    pub fn cors<'h>(&self, headers: &'h HeaderMap) -> Option<&'h HeaderValue> {
        (self.check(headers) == OriginCheck::Listed).then(|| headers.get(header::ORIGIN)).flatten()
    }

    /// With a token in a header no page can act for somebody else, so a missing origin is fine.
    pub(super) fn allow_header_token(&self, headers: &HeaderMap) -> Result<(), AuthError> {
        if self.check(headers) == OriginCheck::Foreign { Err(AuthError::ForeignOrigin) } else { Ok(()) }
    }

    /// A cookie comes along with what any page asks: the request must say that the page is one of ours. Browsers
    /// leave `Origin` out of an own page's GET, and say so in `Sec-Fetch-Site` (which no page can forge).
    pub(super) fn allow_cookie(&self, headers: &HeaderMap) -> Result<(), AuthError> {
        match self.check(headers) {
            OriginCheck::Own => Ok(()),
            // `*` is for those who bring their own token; a cookie comes along with whatever any page asks.
            OriginCheck::Listed if !self.any => Ok(()),
            OriginCheck::Missing if only(headers, "sec-fetch-site") == Some("same-origin") => Ok(()),
            _ => Err(AuthError::ForeignOrigin),
        }
    }

    /// Development mode: only this machine, no proxy between, no foreign page. `*` in the list does not count here.
    pub(super) fn allow_local(&self, request: &RequestHead<'_>) -> Result<(), NotLocal> {
        let headers = request.headers;
        if !request.peer.to_canonical().is_loopback() {
            return Err(NotLocal::Peer);
        }
        if !only(headers, header::HOST).is_some_and(is_local_host) {
            return Err(NotLocal::Host);
        }
        if headers.keys().any(|name| is_forwarding(name.as_str())) {
            return Err(NotLocal::Forwarded);
        }
        match self.check(headers) {
            OriginCheck::Listed if self.is_listed(only(headers, header::ORIGIN).unwrap_or_default()) => return Ok(()),
            OriginCheck::Listed | OriginCheck::Foreign => return Err(NotLocal::Origin),
            OriginCheck::Own | OriginCheck::Missing => {}
        }
        match only(headers, "sec-fetch-site") {
            Some("same-origin" | "none") => Ok(()),
            None if !headers.contains_key("sec-fetch-site") => Ok(()),
            _ => Err(NotLocal::FetchSite),
        }
    }
}

fn is_forwarding(name: &str) -> bool {
    name.starts_with("x-forwarded-") || name == "x-forwarded" || FORWARDING.contains(&name)
}

/// `localhost`, 127.0.0.0/8 or `[::1]`, with or without a port.
fn is_local_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    if let Some(address) = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return address.parse::<std::net::Ipv6Addr>().is_ok_and(|address| address.is_loopback());
    }
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4() && address.is_loopback())
}

/// `/api` in development mode, and what users say by requests: a body that a foreign page could send without being asked first (a form, plain text) is
/// refused.
pub(in crate::gateway) fn allow_body(headers: &HeaderMap) -> Result<(), AuthError> {
    if only(headers, "x-tabcast-raw") == Some("1") {
        return Ok(());
    }
    let kind = only(headers, header::CONTENT_TYPE).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json = ["application/json", "application/x-ndjson", "application/ndjson", "application/jsonl"];
    if is_json.contains(&essence.as_str()) { Ok(()) } else { Err(AuthError::NotJson) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn origins(listed: &[&str], public_url: Option<&str>) -> Origins {
        Origins::new(&listed.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>(), public_url, false)
    }

    #[test]
    fn an_origin_is_our_own_listed_or_foreign() {
        let check = |origins: &Origins, host: &str, origin: &str, expected: OriginCheck| {
            assert_eq!(origins.check(&headers(&[("host", host), ("origin", origin)])), expected, "{host} {origin}");
        };
        let plain = origins(&[], None);
        check(&plain, "chat.example", "http://chat.example", OriginCheck::Own);
        check(&plain, "chat.example", "https://chat.example", OriginCheck::Own);
        check(&plain, "chat.example:443", "https://chat.example", OriginCheck::Own);
        check(&plain, "Chat.Example", "https://chat.example", OriginCheck::Own);
        check(&plain, "chat.example:8080", "http://chat.example:8080", OriginCheck::Own);
        check(&plain, "chat.example:8080", "http://chat.example", OriginCheck::Foreign);
        check(&plain, "chat.example", "http://chat.example:8080", OriginCheck::Foreign);
        check(&plain, "chat.example", "https://chat.example.evil", OriginCheck::Foreign);
        check(&plain, "chat.example", "https://evil", OriginCheck::Foreign);
        check(&plain, "chat.example", "null", OriginCheck::Foreign);
        check(&plain, "chat.example", "", OriginCheck::Foreign);
        check(&plain, "", "https://", OriginCheck::Foreign);
        check(&plain, "chat.example", "ftp://chat.example", OriginCheck::Foreign);

        let secure = Origins::new(&["http://old.example".to_owned()], None, true);
        check(&secure, "chat.example", "https://chat.example", OriginCheck::Own);
        check(&secure, "chat.example:8443", "https://chat.example:8443", OriginCheck::Own);
        check(&secure, "chat.example", "http://chat.example", OriginCheck::Foreign);
        check(&secure, "chat.example:8443", "http://chat.example:8443", OriginCheck::Foreign);
        check(&secure, "chat.example", "http://old.example", OriginCheck::Listed);

        let public = origins(&["https://other.example"], Some("https://chat.example/path"));
        check(&public, "10.0.0.1:8080", "https://chat.example", OriginCheck::Own);
        check(&public, "chat.example", "http://chat.example", OriginCheck::Foreign);
        check(&public, "10.0.0.1:8080", "http://10.0.0.1:8080", OriginCheck::Own);
        check(&public, "10.0.0.1:8080", "https://other.example", OriginCheck::Listed);
        check(&public, "10.0.0.1:8080", "http://other.example", OriginCheck::Foreign);
        check(&origins(&["*"], None), "a", "https://b", OriginCheck::Listed);
        let ports = origins(&["https://a.example:443", "HTTP://b.example:80", "https://c.example:8443"], None);
        check(&ports, "h", "https://a.example", OriginCheck::Listed);
        check(&ports, "h", "http://b.example", OriginCheck::Listed);
        check(&ports, "h", "https://c.example:8443", OriginCheck::Listed);
        for foreign in ["http://a.example", "http://a.example:443", "https://c.example", "null", ""] {
            check(&ports, "h", foreign, OriginCheck::Foreign);
        }

        assert_eq!(plain.check(&headers(&[("host", "a")])), OriginCheck::Missing);
        let twice = headers(&[("host", "a"), ("origin", "http://a"), ("origin", "http://a")]);
        assert_eq!(plain.check(&twice), OriginCheck::Foreign);
    }

    #[test]
    fn a_cookie_needs_an_origin_and_a_header_token_does_not() {
        let plain = origins(&[], None);
        let allowed = |list: &[(&'static str, &str)]| {
            let headers = headers(list);
            (plain.allow_header_token(&headers).is_ok(), plain.allow_cookie(&headers).is_ok())
        };
        assert_eq!(allowed(&[("host", "a")]), (true, false));
        assert_eq!(allowed(&[("host", "a"), ("origin", "https://a")]), (true, true));
        assert_eq!(allowed(&[("host", "a"), ("origin", "https://b")]), (false, false));
        assert_eq!(allowed(&[("host", "a"), ("sec-fetch-site", "same-origin")]), (true, true));
        assert_eq!(allowed(&[("host", "a"), ("sec-fetch-site", "same-site")]), (true, false));
        assert_eq!(allowed(&[("host", "a"), ("sec-fetch-site", "none")]), (true, false));
        assert_eq!(allowed(&[("host", "a"), ("origin", "null"), ("sec-fetch-site", "same-origin")]), (false, false));
    }

    #[test]
    fn cors_answers_listed_origins_only() {
        let listed = origins(&["https://other.example"], None);
        let cors = |origin: &str| listed.cors(&headers(&[("host", "a"), ("origin", origin)])).is_some();
        assert!(cors("https://other.example"));
        assert!(!cors("https://a"));
        assert!(!cors("https://evil"));
    }

    fn local(list: &[(&'static str, &str)], listed: &[&str]) -> Result<(), NotLocal> {
        let headers = headers(list);
        let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let method = http::Method::GET;
        origins(listed, None).allow_local(&RequestHead { method: &method, query: None, headers: &headers, peer })
    }

    #[test]
    fn development_mode_takes_local_hosts_only() {
        for host in ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8080"] {
            assert_eq!(local(&[("host", host)], &[]), Ok(()), "{host}");
        }
        for host in [
            "example.org",
            "localhost.evil",
            "evil.localhost",
            "localhost.",
            "127.0.0.1.evil",
            "10.0.0.1",
            "0.0.0.0",
            "[::]",
            "[::ffff:127.0.0.1]",
            "::1",
            "",
            ":80",
            "127.0.0.1:",
            "localhost:80:80",
            "user@localhost",
            "127.1",
        ] {
            assert_eq!(local(&[("host", host)], &[]), Err(NotLocal::Host), "{host}");
        }
        assert_eq!(local(&[], &[]), Err(NotLocal::Host));
        assert_eq!(local(&[("host", "localhost"), ("host", "localhost")], &[]), Err(NotLocal::Host));
    }

    #[test]
    fn development_mode_takes_nothing_from_a_proxy() {
        for name in [
            "forwarded",
            "via",
            "x-real-ip",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-whatever",
            "x-forwarded",
            "true-client-ip",
            "forwarded-for",
            "x-forward-for",
            "client-ip",
            "x-proxyuser-ip",
            "x-remote-addr",
            "cf-connecting-ipv6",
            "cf-ray",
            "cdn-loop",
            "fly-client-ip",
            "fastly-client-ip",
            "x-azure-clientip",
            "x-original-url",
            "x-host",
            "x-rewrite-url",
        ] {
            assert_eq!(local(&[("host", "localhost"), (name, "x")], &[]), Err(NotLocal::Forwarded), "{name}");
        }
        let peer = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        let headers = headers(&[("host", "localhost")]);
        let request = RequestHead { method: &http::Method::GET, query: None, headers: &headers, peer };
        assert_eq!(origins(&[], None).allow_local(&request), Err(NotLocal::Peer));
    }

    #[test]
    fn development_mode_takes_nothing_from_a_foreign_page() {
        let check = |origin: &str, site: &str, listed: &[&str], expected: Result<(), NotLocal>| {
            let mut list = vec![("host", "localhost:8080")];
            list.extend((!origin.is_empty()).then_some(("origin", origin)));
            list.extend((!site.is_empty()).then_some(("sec-fetch-site", site)));
            assert_eq!(local(&list, listed), expected, "{origin} {site} {listed:?}");
        };
        check("http://localhost:8080", "same-origin", &[], Ok(()));
        check("", "same-origin", &[], Ok(()));
        check("", "none", &[], Ok(()));
        check("http://localhost:8080", "", &[], Ok(()));
        check("http://localhost:3000", "same-site", &[], Err(NotLocal::Origin));
        check("https://evil.example", "cross-site", &[], Err(NotLocal::Origin));
        check("https://evil.example", "", &[], Err(NotLocal::Origin));
        check("https://evil.example", "cross-site", &["*"], Err(NotLocal::Origin));
        check("null", "", &[], Err(NotLocal::Origin));
        check("", "cross-site", &[], Err(NotLocal::FetchSite));
        check("", "same-site", &[], Err(NotLocal::FetchSite));
        check("", "bogus", &[], Err(NotLocal::FetchSite));
        check("http://localhost:3000", "same-site", &["http://localhost:3000"], Ok(()));
    }

    #[test]
    fn development_mode_takes_no_body_that_a_form_could_send() {
        let check = |list: &[(&'static str, &str)], expected: bool| {
            assert_eq!(allow_body(&headers(list)).is_ok(), expected, "{list:?}");
        };
        check(&[("content-type", "application/json")], true);
        check(&[("content-type", "Application/JSON; charset=utf-8")], true);
        check(&[("content-type", "application/x-ndjson")], true);
        check(&[("content-type", "text/plain"), ("x-tabcast-raw", "1")], true);
        check(&[("x-tabcast-raw", "0")], false);
        check(&[("content-type", "text/plain")], false);
        check(&[("content-type", "text/plain; application/json")], false);
        check(&[("content-type", "application/x-www-form-urlencoded")], false);
        check(&[("content-type", "application/json"), ("content-type", "text/plain")], false);
        check(&[], false);
    }
}
