//! The chat page, the status page and their modules, and the clients for others, embedded in the binary.

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, ETAG, HeaderName, HeaderValue, IF_NONE_MATCH, REFERRER_POLICY,
};
use http::{HeaderMap, StatusCode};
use sha2::{Digest, Sha256};

use crate::gateway::response::{Answered, typed};

/// Nothing but what this server serves, no inline script or style, in nobody's frame; and no text can become markup or
/// code, not even by a mistake of the page's scripts.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
    connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

struct Page {
    path: &'static str,
    content_type: HeaderValue,
    body: Bytes,
    etag: HeaderValue,
}

/// Everything under `/` that is a file.
pub(crate) struct Pages {
    pages: Vec<Page>,
}

impl Pages {
    /// The pages; those of people are told in which mode the gateway runs.
    pub(crate) fn new(is_development: bool) -> Self {
        let mode = if is_development { "development" } else { "token" };
        let html = |text: &str| Bytes::from(text.replace("{{mode}}", mode));
        let (markup, script, style) =
            ("text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8");
        let (types, python) = ("application/typescript; charset=utf-8", "text/x-python; charset=utf-8");
        let pages = [
            ("/", markup, html(include_str!("pages/index.html"))),
            ("/status", markup, html(include_str!("pages/status.html"))),
            ("/status.js", script, Bytes::from_static(include_bytes!("pages/status.js"))),
            ("/feed.js", script, Bytes::from_static(include_bytes!("pages/feed.js"))),
            ("/chart.js", script, Bytes::from_static(include_bytes!("pages/chart.js"))),
            ("/status.css", style, Bytes::from_static(include_bytes!("pages/status.css"))),
            ("/app.js", script, Bytes::from_static(include_bytes!("pages/app.js"))),
            ("/dom.js", script, Bytes::from_static(include_bytes!("pages/dom.js"))),
            ("/identity.js", script, Bytes::from_static(include_bytes!("pages/identity.js"))),
            ("/tabcast.js", script, Bytes::from_static(include_bytes!("pages/tabcast.js"))),
            ("/tabcast.d.ts", types, Bytes::from_static(include_bytes!("pages/tabcast.d.ts"))),
            ("/tabcast.py", python, Bytes::from_static(include_bytes!("pages/tabcast.py"))),
            ("/style.css", style, Bytes::from_static(include_bytes!("pages/style.css"))),
            ("/favicon.svg", "image/svg+xml", Bytes::from_static(include_bytes!("pages/favicon.svg"))),
        ];
        let page = |(path, content_type, body): (_, &'static str, Bytes)| {
            let digest = Sha256::digest(&body);
            let tag: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            let etag = HeaderValue::from_str(&format!("\"{tag}\"")).unwrap_or(HeaderValue::from_static("\"\""));
            Page { path, content_type: HeaderValue::from_static(content_type), body, etag }
        };
        Self { pages: pages.into_iter().map(page).collect() }
    }

    /// The page at `path`, or 304 if the client has it.
    pub(crate) fn find(&self, path: &str, headers: &HeaderMap) -> Option<Answered> {
        let page = self.pages.iter().find(|page| page.path == path)?;
        let has_it = headers.get_all(IF_NONE_MATCH).iter().any(|tag| *tag == page.etag);
        let (status, body) =
            if has_it { (StatusCode::NOT_MODIFIED, Bytes::new()) } else { (StatusCode::OK, page.body.clone()) };
        let mut response = typed(status, page.content_type.clone(), body);
        let added: [(HeaderName, HeaderValue); 4] = [
            (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (ETAG, page.etag.clone()),
        ];
        for (name, value) in added {
            response.headers_mut().insert(name, value);
        }
        Some(response)
    }
}
