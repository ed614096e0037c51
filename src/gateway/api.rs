//! The adapter over HTTP, for workers in any language: `POST /api/…`.
//!
//! | route | body | answer |
//! |---|---|---|
//! | `/api/send` | `{channel_id, text, reply_to?}` | `{id, delivered, tabs, nodes}` |
//! | `/api/buttons` | `{channel_id, text, buttons \| view, reply_to?}` | the same |
//! | `/api/file` | `{channel_id, filename, mimetype?, data}`, `data` in base64; or the raw bytes with `?channel_id=&filename=`, their `Content-Type` and `X-Tabcast-Raw: 1` | the same and `url` |
//! | `/api/edit` | `{channel_id, message_id, text}` | the same, `id` being the edited message's |
//! | `/api/typing` | `{channel_id, active}` | `{delivered, tabs, nodes}` |
//! | `/api/end` | `{channel_id, reason?}`, `reason` one of stop (default), error, timeout, cancelled | the same |
//! | `/api/batch` | lines of `{"op":"send", …}`, `op` being one of the names above | one line for each, in order |
//!
//! Through a Redis Cluster, `nodes` of a room or a stream is a lower bound, and `at_least` is true beside it.
//!
//! What reached nobody has a `reason` beside the counts: `offline`, `no_such_stream`, `empty_room`, or
//! `waiting`: other nodes have not answered in time, and get it when they can be reached. An error is
//! `{"error":{"code","message"}}`; the codes are in [`ApiCode`]. `Idempotency-Key` makes a repeat answer as
//! the first did: see [`IdempotencyLimits`].
//!
//! The caller has authenticated the worker, and has read and bounded the body. `GET /api/users` is not here.

mod answer;
mod batch;
pub(crate) mod error;
mod idempotency;
pub(crate) mod op;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, Response, StatusCode};
use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

pub use crate::gateway::api::error::ApiCode;
use crate::gateway::api::error::ApiError;
pub use crate::gateway::api::idempotency::IdempotencyLimits;
use crate::gateway::api::idempotency::{Claim, Finished, Idempotency, KEY_BYTES_MAX, Stored};
use crate::gateway::api::op::{Op, OpKind};
use crate::platform::adapter::Outlet;
use crate::platform::webchat::WebChat;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// How much one request may ask for. The bytes of a body are bounded by whoever reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiLimits {
    /// Lines of one batch. Default 10,000; each costs about 120 bytes of the answer, which is held until it is sent.
    pub batch_lines_max: usize,
    /// Bytes of one line of a batch. Default 2 MiB: a file of 1 MiB in base64 fits.
    pub batch_line_bytes_max: usize,
    /// What is kept for repeats.
    pub idempotency: IdempotencyLimits,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self { batch_lines_max: 10_000, batch_line_bytes_max: 2 << 20, idempotency: IdempotencyLimits::default() }
    }
}

/// One request, its body read.
#[derive(Debug, Clone)]
pub struct ApiRequest<'a> {
    /// Its method.
    pub method: &'a Method,
    /// Its path, for example `/api/send`.
    pub path: &'a str,
    /// Its query, without the question mark.
    pub query: Option<&'a str>,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// Which worker asks (for example the name of its key): idempotency keys of two workers never meet.
    pub caller: &'a str,
    /// Its body, already bounded.
    pub body: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    One(OpKind),
    Batch,
}

impl Route {
    fn parse(path: &str) -> Option<Self> {
        let name = path.strip_prefix("/api/")?;
        if name == "batch" { Some(Self::Batch) } else { OpKind::parse(name).map(Self::One) }
    }
}

/// Answers `POST /api/…` by the adapter.
#[derive(Debug)]
pub struct Api<O: Outlet> {
    chat: Arc<WebChat<O>>,
    limits: ApiLimits,
    idempotency: Idempotency,
}

impl<O: Outlet> Api<O> {
    /// An API with nothing remembered.
    #[must_use]
    pub fn new(chat: Arc<WebChat<O>>, limits: ApiLimits) -> Self {
        Self { chat, limits, idempotency: Idempotency::new(limits.idempotency) }
    }

    /// Whether a path is one of ours. Others under `/api` are somebody else's, or nobody's.
    #[must_use]
    pub fn has(path: &str) -> bool {
        Route::parse(path).is_some()
    }

    /// Answers one request. Errors are answers too.
    ///
    /// # Cancel safety
    /// A dropped request may or may not have taken effect, a dropped batch also in part, and it is not remembered
    /// under its `Idempotency-Key`. Whoever wants a repeat to be safe after the client went away lets this run to its end.
    pub async fn handle(&self, request: ApiRequest<'_>) -> Response<Bytes> {
        match self.route(&request).await {
            Ok(response) => response,
            Err(error) => error.into_response(),
        }
    }

    async fn route(&self, request: &ApiRequest<'_>) -> Result<Response<Bytes>, ApiError> {
        let Some(route) = Route::parse(request.path) else {
            return Err(ApiError::new(ApiCode::NotFound, "there is nothing at this path"));
        };
        if request.method != Method::POST {
            return Err(ApiError::new(ApiCode::MethodNotAllowed, "only POST is allowed here"));
        }
        let media = media(route, request.headers)?;
        let Some(key) = request.headers.get("idempotency-key") else {
            let stored = self.perform(route, media, request).await?;
            return Ok(stored.into_response());
        };
        let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= KEY_BYTES_MAX).ok_or_else(|| {
            let message = format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} visible ASCII characters");
            ApiError::new(ApiCode::BadRequest, message)
        })?;
        match self.idempotency.claim(request.caller, key, fingerprint(request), Instant::now()).await {
            Claim::Repeat(stored) => Ok(stored.into_repeat()),
            Claim::Mismatch => Err(ApiError::new(
                ApiCode::IdempotencyMismatch,
                "this Idempotency-Key came with another request before; use a new key for a new request",
            )),
            Claim::First(ticket) => match self.perform(route, media, request).await {
                Ok(stored) => Ok(match ticket.finish(stored.clone(), Instant::now()) {
                    Finished::Kept => stored.into_response(),
                    Finished::TooLarge => stored.into_promise_less(),
                }),
                // Nothing was done, so a repeat is a new try.
                Err(error) => Err(error),
            },
        }
    }

    async fn perform(&self, route: Route, media: Media, request: &ApiRequest<'_>) -> Result<Stored, ApiError> {
        let mut body = Vec::with_capacity(192);
        let content_type = match route {
            Route::Batch => {
                batch::run(&self.chat, &self.limits, &request.body, &mut body).await?;
                NDJSON
            }
            Route::One(kind) => {
                let op = match media {
                    Media::Json => Op::parse(Some(kind), &request.body)?,
                    Media::Raw(mimetype) => raw_file(request, mimetype)?,
                };
                answer::report(&self.chat, answer::make(&self.chat, op).await?, &mut body).await;
                JSON
            }
        };
        Ok(Stored { status: StatusCode::OK, content_type, body: Bytes::from(body) })
    }
}

/// What a body is.
#[derive(Debug)]
enum Media {
    Json,
    /// A file's bytes, and their media type.
    Raw(Option<String>),
}

/// A body is JSON and says so, or is marked as raw: neither can be sent by a foreign page without a preflight.
fn media(route: Route, headers: &HeaderMap) -> Result<Media, ApiError> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if route == Route::One(OpKind::File) && headers.get("x-tabcast-raw").is_some_and(|value| value == "1") {
        return Ok(Media::Raw((!content_type.is_empty()).then(|| content_type.to_owned())));
    }
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let allowed: &[&str] = match route {
        Route::One(_) => &["application/json"],
        Route::Batch => &["application/x-ndjson", "application/jsonl", "application/json"],
    };
    if allowed.iter().any(|name| essence.eq_ignore_ascii_case(name)) {
        return Ok(Media::Json);
    }
    let raw = if route == Route::One(OpKind::File) { ", or X-Tabcast-Raw: 1 with the file's own" } else { "" };
    let message = format!("Content-Type must be {}{raw}", allowed.join(" or "));
    Err(ApiError::new(ApiCode::UnsupportedMediaType, message))
}

fn raw_file<'a>(request: &ApiRequest<'a>, mimetype: Option<String>) -> Result<Op<'a>, ApiError> {
    let channel = query_value(request.query, "channel_id")?;
    let filename = query_value(request.query, "filename")?;
    op::file(&channel, filename.into(), mimetype.map(Into::into), request.body.clone())
}

/// One value of a query as forms write it: `+` and `%20` are spaces. A second value of that name is refused.
fn query_value(query: Option<&str>, name: &str) -> Result<String, ApiError> {
    let bad = |what: &str| ApiError::new(ApiCode::BadField, format!("`{name}` {what}"));
    let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|pair| pair.0 == name).map(|pair| pair.1);
    let value = values.next().ok_or_else(|| bad("is missing in the query"))?;
    if values.next().is_some() {
        return Err(bad("is there twice"));
    }
    let value = value.replace('+', " ");
    percent_decode_str(&value).decode_utf8().map(Into::into).map_err(|_| bad("is not UTF-8"))
}

/// What makes two requests the same one.
fn fingerprint(request: &ApiRequest<'_>) -> [u8; 32] {
    let content_type = request.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let is_raw = request.headers.contains_key("x-tabcast-raw");
    let head = [request.path.as_bytes(), request.query.unwrap_or_default().as_bytes(), content_type];
    let mut hash = Sha256::new();
    for part in head {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        hash.update(part);
    }
    hash.update([u8::from(is_raw)]);
    hash.update(&request.body);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http::header::{ALLOW, RETRY_AFTER};

    use super::*;
    use crate::platform::adapter::BotIdentity;
    use crate::platform::recording::{Recorder, published_id};
    use crate::proto::delivery::{Delivery, Nobody, PublishError};

    const ID: &str = "00000000-0000-4000-8000-000000000001";

    fn api() -> (Arc<Recorder>, Api<Recorder>) {
        let outlet = Arc::new(Recorder::default());
        let chat = Arc::new(WebChat::new(Arc::clone(&outlet), BotIdentity::default()));
        let limits = ApiLimits { batch_lines_max: 5, batch_line_bytes_max: 200, ..ApiLimits::default() };
        (outlet, Api::new(chat, limits))
    }

    /// A request in one line: method, target, headers as `name: value` pairs.
    async fn ask(api: &Api<Recorder>, line: &str, headers: &[(&'static str, &str)], body: &str) -> Response<Bytes> {
        let (method, target) = line.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let method: Method = method.parse().unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let body = Bytes::copy_from_slice(body.replace("$ID", ID).as_bytes());
        api.handle(ApiRequest { method: &method, path, query, headers: &map, caller: "w", body }).await
    }

    const AS_JSON: &[(&str, &str)] = &[("content-type", "application/json; charset=utf-8")];

    fn body_of(response: &Response<Bytes>) -> String {
        String::from_utf8(response.body().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn each_route_calls_the_adapter_and_reports_who_was_addressed() {
        let (outlet, api) = api();
        let check = async |path: &str, body: &str, published: &str, answer: &str| {
            let response = ask(&api, &format!("POST /api/{path}"), AS_JSON, body).await;
            let line = outlet.take().join("\n");
            let id = line.split(' ').nth(2).unwrap_or_default().to_owned();
            assert_eq!(line, published.replace("$NEW", &id).replace("$ID", ID), "{path} {body}");
            assert_eq!(body_of(&response), answer.replace("$NEW", &id).replace("$ID", ID), "{path} {body}");
            assert_eq!((response.status(), &response.headers()["content-type"]), (StatusCode::OK, &JSON));
        };
        let done = r#"{"id":"$NEW","delivered":true,"tabs":1,"nodes":0}"#;
        check(
            "send",
            r#"{"channel_id":"u","text":" a\n"}"#,
            "webchat:u message $NEW sender=star text=' a\n' at=7.5",
            done,
        )
        .await;
        check(
            "send",
            r#"{"text":"","channel_id":"sse:r","reply_to":"$ID","unknown":[{}]}"#,
            "sse:r message $NEW sender=star reply_to=$ID text='' at=7.5",
            done,
        )
        .await;
        check(
            "buttons",
            r#"{"channel_id":"u","text":"?","buttons":[{"label":"A","custom_id":"a"}],"reply_to":null}"#,
            "webchat:u buttons $NEW sender=star text='?' [A=a] at=7.5",
            done,
        )
        .await;
        check(
            "buttons",
            r#"{"channel_id":"room:r","text":"?","view":{"children":[{"children":[{"label":"A"}]}]}}"#,
            "room:r buttons $NEW sender=star text='?' [A=] at=7.5",
            done,
        )
        .await;
        let with_url = r#"{"id":"$NEW","delivered":true,"tabs":1,"nodes":0,"url":"webchat://file/$NEW/a%20%22b"}"#;
        check(
            "file",
            r#"{"channel_id":"u","filename":"a \"b","data":"YWI"}"#,
            "webchat:u file $NEW name='a \"b' application/octet-stream data=[97, 98] at=7.5",
            with_url,
        )
        .await;
        let edited = r#"{"id":"$ID","delivered":true,"tabs":1,"nodes":0}"#;
        check(
            "edit",
            r#"{"channel_id":"u","message_id":"$ID","text":"b"}"#,
            "webchat:u edit $ID text='b' at=7.5",
            edited,
        )
        .await;
        let plain = r#"{"delivered":true,"tabs":1,"nodes":0}"#;
        check("typing", r#"{"channel_id":"u","active":true}"#, "webchat:u typing true", plain).await;
        check("end", r#"{"channel_id":"sse:r"}"#, "sse:r end stop", plain).await;
        check("end", r#"{"channel_id":"sse:r","reason":"cancelled"}"#, "sse:r end cancelled", plain).await;
        let nobody = r#"{"delivered":false,"tabs":0,"nodes":0,"reason":"no_such_stream"}"#;
        check("end", r#"{"channel_id":"u"}"#, "", nobody).await;
        for (reason, name) in
            [(Nobody::Offline, "offline"), (Nobody::EmptyRoom, "empty_room"), (Nobody::Waiting, "waiting")]
        {
            outlet.set_delivery(Delivery::to_nobody(reason));
            let answer = format!(r#"{{"delivered":false,"tabs":0,"nodes":0,"reason":"{name}"}}"#);
            check("typing", r#"{"channel_id":"u","active":false}"#, "webchat:u typing false", &answer).await;
        }
    }

    #[tokio::test]
    async fn a_file_may_be_its_raw_bytes() {
        let (outlet, api) = api();
        let raw = &[("x-tabcast-raw", "1"), ("content-type", "text/plain")];
        let target = "POST /api/file?filename=a+%2B%E6%97%A5.txt&channel_id=room%3Ar";
        let response = ask(&api, target, raw, "ab").await;
        let line = outlet.take().remove(0);
        let id = published_id(&line);
        assert_eq!(line, format!("room:r file {id} name='a +日.txt' text/plain data=[97, 98] at=7.5"));
        assert!(body_of(&response).ends_with(&format!("\"url\":\"webchat://file/{id}/a%20%2B%E6%97%A5.txt\"}}")));
        let response = ask(&api, target, &[("x-tabcast-raw", "1")], "").await;
        assert_eq!(response.status(), StatusCode::OK);
        assert!(outlet.take()[0].contains("application/octet-stream data=[]"));
        let bad = [
            ("POST /api/file", "`channel_id` is missing in the query"),
            ("POST /api/file?channel_id=u", "`filename` is missing in the query"),
            ("POST /api/file?channel_id=u&filename=", "`filename` is empty"),
            ("POST /api/file?channel_id=u&filename=a&filename=b", "`filename` is there twice"),
            ("POST /api/file?channel_id=u&filename=%ff", "`filename` is not UTF-8"),
            ("POST /api/file?channel_id=u&filename=%00", "control character"),
            ("POST /api/file?channel_id=sse:&filename=a", "`channel_id`: the id is empty"),
        ];
        for (target, part) in bad {
            let response = ask(&api, target, raw, "ab").await;
            assert_eq!(
                (response.status(), body_of(&response).contains(part)),
                (StatusCode::BAD_REQUEST, true),
                "{target}"
            );
        }
        assert!(outlet.take().is_empty());
    }

    #[tokio::test]
    async fn a_bad_request_gets_the_standard_status_and_says_what_is_wrong() {
        let (outlet, api) = api();
        let check = async |line: &str, headers: &[(&'static str, &str)], body: &str, expected: (u16, &str, &str)| {
            let response = ask(&api, line, headers, body).await;
            let json: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
            let message = json["error"]["message"].as_str().unwrap().to_owned();
            let got = (response.status().as_u16(), json["error"]["code"].as_str().unwrap());
            assert_eq!(got, (expected.0, expected.1), "{line} {body}: {message}");
            assert!(message.contains(expected.2), "{line} {body}: {message}");
            assert_eq!(response.headers()["content-type"], "application/json");
            response
        };
        for path in ["/api/nope", "/api/", "/api/send/", "/api/send/x", "/v1/send"] {
            check(&format!("POST {path}"), AS_JSON, "{}", (404, "not_found", "nothing")).await;
        }
        for method in ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"] {
            let response =
                check(&format!("{method} /api/send"), AS_JSON, "{}", (405, "method_not_allowed", "POST")).await;
            assert_eq!(response.headers()[ALLOW], "POST");
        }
        for kind in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "application/x-ndjson"]
        {
            let expected = (415, "unsupported_media_type", "application/json");
            check("POST /api/send", &[("content-type", kind)], "{}", expected).await;
        }
        check("POST /api/send", &[], "{}", (415, "unsupported_media_type", "application/json")).await;
        check("POST /api/send", &[("x-tabcast-raw", "1")], "{}", (415, "unsupported_media_type", "json")).await;
        check("POST /api/file", &[], "{}", (415, "unsupported_media_type", "X-Tabcast-Raw")).await;
        for body in ["", "nope", "[", "[]", "1", "{} {}", "{\"text\":\"a\",\"text\":\"b\"}", "{\"text\":\"\u{1}\"}"] {
            check("POST /api/send", AS_JSON, body, (400, "bad_json", "JSON")).await;
        }
        let long = "a".repeat(257);
        let cases = [
            ("send", "{}", "`channel_id` is missing"),
            ("send", r#"{"channel_id":1,"text":"a"}"#, "`channel_id` must be a string"),
            ("send", r#"{"channel_id":{"a":[1]},"text":"a"}"#, "`channel_id` must be a string"),
            ("send", r#"{"channel_id":[true,{}],"text":"a"}"#, "`channel_id` must be a string"),
            ("send", r#"{"channel_id":"u"}"#, "`text` is missing"),
            ("send", r#"{"channel_id":"u","text":null}"#, "`text` is missing"),
            ("send", r#"{"channel_id":"u","text":1.5}"#, "`text` must be a string"),
            ("send", r#"{"channel_id":"","text":"a"}"#, "`channel_id`: the id is empty"),
            ("send", r#"{"channel_id":"room:","text":"a"}"#, "`channel_id`: the id is empty"),
            ("send", r#"{"channel_id":"a\u0000","text":"a"}"#, "control"),
            ("send", &format!(r#"{{"channel_id":"{long}","text":"a"}}"#), "257 bytes; at most 256"),
            ("send", r#"{"channel_id":"u","text":"a","reply_to":"x"}"#, "`reply_to`: a message id is a UUID"),
            ("buttons", r#"{"channel_id":"u","text":"a"}"#, "`buttons` or `view` is missing"),
            ("buttons", r#"{"channel_id":"u","text":"a","buttons":[],"view":[]}"#, "only one"),
            ("buttons", r#"{"channel_id":"u","text":"a","buttons":[{"style":"blue"}]}"#, "style of button 0"),
            ("buttons", &format!(r#"{{"channel_id":"u","text":"a","buttons":[{{"label":"{long}"}}]}}"#), "at most 80"),
            ("file", r#"{"channel_id":"u","filename":"a"}"#, "`data` is missing"),
            ("file", r#"{"channel_id":"u","data":""}"#, "`filename` is missing"),
            ("file", r#"{"channel_id":"u","filename":"a","data":"a b"}"#, "not standard base64"),
            ("file", r#"{"channel_id":"u","filename":"","data":""}"#, "`filename` is empty"),
            ("file", &format!(r#"{{"channel_id":"u","filename":"{long}","data":""}}"#), "257 bytes; at most 255"),
            ("edit", r#"{"channel_id":"u","text":"a"}"#, "`message_id` is missing"),
            ("edit", r#"{"channel_id":"u","text":"a","message_id":"1"}"#, "UUID"),
            ("typing", r#"{"channel_id":"u"}"#, "`active` must be true or false"),
            ("typing", r#"{"channel_id":"u","active":1}"#, "`active` must be true or false"),
            ("end", r#"{"channel_id":"sse:r","reason":"because"}"#, "stop, error, timeout, cancelled"),
        ];
        for (path, body, part) in cases {
            check(&format!("POST /api/{path}"), AS_JSON, body, (400, "bad_field", part)).await;
        }
        assert!(outlet.take().is_empty());
    }

    #[tokio::test]
    async fn what_the_engine_refuses_has_its_status() {
        let (outlet, api) = api();
        let cases = [
            (PublishError::Overloaded, 503, "overloaded", true),
            (PublishError::SpoolFull, 503, "spool_full", true),
            (PublishError::Closed, 503, "draining", true),
            (PublishError::TooLarge { bytes: 9, bytes_max: 8 }, 413, "too_large", false),
        ];
        for (error, status, code, retry) in cases {
            outlet.refuse(error);
            let response = ask(&api, "POST /api/send", AS_JSON, r#"{"channel_id":"u","text":"a"}"#).await;
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().contains_key(RETRY_AFTER), retry);
            assert!(body_of(&response).contains(code) && body_of(&response).contains(&error.to_string()));
        }
    }

    #[tokio::test]
    async fn a_batch_is_answered_line_by_line_in_order() {
        let (outlet, api) = api();
        let kind = &[("content-type", "application/x-ndjson")];
        let body = concat!(
            "{\"op\":\"send\",\"channel_id\":\"a\",\"text\":\"1\"}\r\n\n",
            "{\"op\":\"nope\",\"channel_id\":\"a\"}\n",
            "not json\n",
            "{\"op\":\"edit\",\"channel_id\":\"a\",\"message_id\":\"$ID\",\"text\":\"2\"}\n  \n",
            "{\"channel_id\":\"b\",\"op\":\"typing\",\"active\":true}",
        );
        let response = ask(&api, "POST /api/batch", kind, body).await;
        assert_eq!((response.status(), &response.headers()["content-type"]), (StatusCode::OK, &NDJSON));
        let lines = outlet.take();
        let id = published_id(&lines[0]);
        let expected = [
            format!("webchat:a message {id} sender=star text='1' at=7.5"),
            format!("webchat:a edit {ID} text='2' at=7.5"),
            "webchat:b typing true".to_owned(),
        ];
        assert_eq!(lines, expected);
        let text = body_of(&response);
        let answers: Vec<_> = text.lines().collect();
        assert_eq!(answers.len(), 5);
        assert_eq!(answers[0], format!(r#"{{"id":"{id}","delivered":true,"tabs":1,"nodes":0}}"#));
        assert!(answers[1].starts_with(r#"{"error":{"code":"bad_field","message":"`op` must be one of"#));
        assert!(answers[2].starts_with(r#"{"error":{"code":"bad_json""#));
        assert_eq!(answers[3], format!(r#"{{"id":"{ID}","delivered":true,"tabs":1,"nodes":0}}"#));
        assert_eq!(answers[4], r#"{"delivered":true,"tabs":1,"nodes":0}"#);
        assert!(text.ends_with('\n'));
    }

    #[tokio::test]
    async fn a_batch_is_bounded_and_stops_at_an_overload() {
        let (outlet, api) = api();
        let kind = &[("content-type", "application/x-ndjson")];
        let line = "{\"op\":\"typing\",\"channel_id\":\"a\",\"active\":true}\n";
        let response = ask(&api, "POST /api/batch", kind, &line.repeat(6)).await;
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert!(body_of(&response).contains("6 lines; at most 5") && outlet.take().is_empty());
        let response = ask(&api, "POST /api/batch", kind, " \n").await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let wide = format!("{}{line}", "{\"op\":\"send\"}".replace('}', &format!("{}}}", " ".repeat(200))) + "\n");
        let response = ask(&api, "POST /api/batch", kind, &wide).await;
        assert!(body_of(&response).lines().next().unwrap().contains("bytes; at most 200"));
        assert_eq!(outlet.take().len(), 1, "the rest goes on");
        outlet.refuse(PublishError::Overloaded);
        let response = ask(&api, "POST /api/batch", kind, &line.repeat(3)).await;
        assert_eq!(body_of(&response).matches("\"overloaded\"").count(), 3);
    }

    #[tokio::test]
    async fn an_idempotency_key_makes_a_repeat_answer_as_the_first_did() {
        let (outlet, api) = api();
        let keyed = |key: &'static str| vec![AS_JSON[0], ("idempotency-key", key)];
        let body = r#"{"channel_id":"u","text":"a"}"#;
        let first = ask(&api, "POST /api/send", &keyed("k"), body).await;
        let again = ask(&api, "POST /api/send", &keyed("k"), body).await;
        assert_eq!((outlet.take().len(), first.body()), (1, again.body()));
        assert_eq!(again.headers()["idempotency-replayed"], "true");
        assert!(!first.headers().contains_key("idempotency-replayed"));
        let other = ask(&api, "POST /api/send", &keyed("k"), r#"{"channel_id":"u","text":"b"}"#).await;
        assert_eq!(other.status(), StatusCode::UNPROCESSABLE_ENTITY);
        let other = ask(&api, "POST /api/typing", &keyed("k"), body).await;
        assert_eq!(other.status(), StatusCode::UNPROCESSABLE_ENTITY);
        let unkeyed = ask(&api, "POST /api/send", AS_JSON, body).await;
        assert_ne!(unkeyed.body(), first.body());
        assert_eq!(outlet.take().len(), 1);
        assert!(!unkeyed.headers().contains_key("idempotency-kept"));
        let long = "k".repeat(256);
        for key in ["", long.as_str(), "k\u{e9}"] {
            let headers = [AS_JSON[0], ("idempotency-key", key)];
            let response = ask(&api, "POST /api/send", &headers, body).await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{key:?}");
        }
    }

    #[test]
    fn after_an_error_a_repeat_is_a_new_try() {
        let (outlet, api) = api();
        let headers = [AS_JSON[0], ("idempotency-key", "k")];
        let body = r#"{"channel_id":"u","text":"a"}"#;
        outlet.refuse(PublishError::Overloaded);
        let response = ask(&api, "POST /api/send", &headers, body).now_or_never().unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        outlet.set_delivery(Delivery::here(1));
        let response = ask(&api, "POST /api/send", &headers, body).now_or_never().unwrap();
        assert_eq!((response.status(), outlet.take().len()), (StatusCode::OK, 1));
    }

    #[test]
    fn only_its_own_paths_are_claimed() {
        for name in ["send", "file", "buttons", "edit", "typing", "end", "batch"] {
            assert!(Api::<Recorder>::has(&format!("/api/{name}")), "{name}");
        }
        for path in ["/api/users", "/api", "/", "/api/send/", "/xapi/send"] {
            assert!(!Api::<Recorder>::has(path), "{path}");
        }
    }
}
