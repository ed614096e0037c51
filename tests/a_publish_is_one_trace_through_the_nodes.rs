//! What a collector gets of a publish, and what others are told of its trace; and that a collector is nobody's trouble.
#![cfg(all(feature = "otel", feature = "cli"))]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span as Exported;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;
use serde_json::{Value, json};
use support::{Client, Gateway, PATIENCE, now, post, with_lines};

/// A request as a server of ours got it.
struct Request {
    head: String,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// An HTTP server that answers 200 to everything.
struct Receiving {
    address: SocketAddr,
    requests: Receiver<Request>,
}

impl Receiving {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = sync_channel(10_000);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let sender = sender.clone();
                std::thread::spawn(move || while read(&stream, &sender).is_some() {});
            }
        });
        Self { address, requests }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn next(&self) -> Request {
        self.requests.recv_timeout(PATIENCE).expect("a request")
    }
}

/// One request; None at the end.
fn read(stream: &TcpStream, sender: &SyncSender<Request>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let mut request = Request { head, body: Vec::new() };
    let length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).ok()?;
    sender.send(request).ok()?;
    (&*stream).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").ok()
}

/// A span, and the service that it is of.
#[derive(Debug)]
struct Span {
    service: String,
    exported: Exported,
}

impl Span {
    fn attribute(&self, name: &str) -> Value {
        let found = self.exported.attributes.iter().find(|attribute| attribute.key == name);
        match found.and_then(|attribute| attribute.value.clone()?.value) {
            Some(Any::StringValue(text)) => text.into(),
            Some(Any::IntValue(number)) => number.into(),
            other => json!(other.map(|other| format!("{other:?}"))),
        }
    }

    fn trace(&self) -> String {
        hexadecimal(&self.exported.trace_id)
    }

    fn id(&self) -> String {
        hexadecimal(&self.exported.span_id)
    }

    fn parent(&self) -> String {
        hexadecimal(&self.exported.parent_span_id)
    }

    /// What every span of a frame has.
    fn check(&self, channel: &str, outcome: &str) {
        assert_eq!(
            (self.attribute("tabcast.channel.kind"), self.attribute("tabcast.outcome")),
            (json!(channel), json!(outcome))
        );
        assert_eq!(self.attribute("tabcast.frame.kind"), "message");
        assert!(self.attribute("tabcast.frame.bytes").as_i64().unwrap() > 50);
        assert_eq!(self.exported.trace_state, "vendor=1");
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What was exported.
struct Collector {
    server: Receiving,
    spans: Vec<Span>,
}

impl Collector {
    fn start() -> Self {
        Self { server: Receiving::start(), spans: Vec::new() }
    }

    fn read_one(&mut self) {
        let request = self.server.next();
        assert!(request.head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{}", request.head);
        assert_eq!(request.header("content-type"), Some("application/x-protobuf"));
        for group in ExportTraceServiceRequest::decode(&request.body[..]).unwrap().resource_spans {
            let resource = group.resource.unwrap();
            let service = Span {
                service: String::new(),
                exported: Exported { attributes: resource.attributes, ..Exported::default() },
            };
            let service = service.attribute("service.name").as_str().unwrap().to_owned();
            for exported in group.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.spans.push(Span { service: service.clone(), exported });
            }
        }
    }

    /// Waits for a span, by its service, name and trace.
    fn span(&mut self, service: &str, name: &str, trace: &str) -> &Span {
        let is_it = |span: &Span| (&*span.service, &*span.exported.name, &*span.trace()) == (service, name, trace);
        while !self.spans.iter().any(is_it) {
            self.read_one();
        }
        self.spans.iter().find(|span| is_it(span)).unwrap()
    }
}

/// A Redis of this test's own.
struct Redis {
    directory: tempfile::TempDir,
    child: Child,
}

impl Redis {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("redis-server");
        command
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(directory.path().join("s"));
        let child = command.arg("--dir").arg(directory.path()).stdout(Stdio::null()).spawn().unwrap();
        let redis = Self { directory, child };
        let deadline = now() + PATIENCE;
        while redis.client().is_err() {
            assert!(now() < deadline, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        redis
    }

    fn url(&self) -> String {
        format!("redis+unix://{}", self.directory.path().join("s").display())
    }

    fn client(&self) -> redis::RedisResult<redis::Connection> {
        redis::Client::open(self.url())?.get_connection()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// The caller's header, of a trace of its own.
fn parent(trace: &str, flags: &str) -> String {
    format!("00-{trace}-{CALLER}-{flags}")
}

/// Exports soon, and begins no trace by itself.
fn traced<'s>(collector: &'s str, service: &'s str) -> Vec<(&'s str, &'s str)> {
    vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
        ("OTEL_SERVICE_NAME", service),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0"),
        ("shards", "1"),
    ]
}

/// Asks, and gives where the answer comes.
fn ask(gateway: &Gateway, path: &str, body: &Value, lines: &str) -> Client {
    let mut client = gateway.connect();
    client.write(&with_lines(&post(path, "application/json", body.to_string().as_bytes()), lines));
    client
}

fn answer(mut client: Client) -> Value {
    let response = client.response();
    assert_eq!(response.status, 200, "{}", response.text());
    serde_json::from_slice(&response.body).unwrap()
}

fn call(gateway: &Gateway, path: &str, body: &Value, lines: &str) -> Value {
    answer(ask(gateway, path, body, lines))
}

fn send(gateway: &Gateway, channel: &str, lines: &str) -> Value {
    call(gateway, "/api/send", &json!({"channel_id": channel, "text": "a secret"}), lines)
}

fn in_trace(parent: &str) -> String {
    format!("traceparent: {parent}\r\n")
}

#[test]
fn a_publish_and_its_arrival_on_another_node_are_one_trace() {
    let (mut collector, redis) = (Collector::start(), Redis::start());
    let (collector_url, redis_url) = (collector.server.url(), redis.url());
    let node = |name: &str| Gateway::start(&[&traced(&collector_url, name)[..], &[("redis", &redis_url)]].concat());
    let (a, b) = (node("a"), node("b"));
    let mut tab = b.tab("user=ann");
    tab.send(&json!({"type": "join", "room": "den", "client_id": "1"}));
    assert_eq!(tab.json()["client_id"], "1");
    // What is not to be traced goes first: once what follows it is there, it would be too.
    let unsampled = parent(&"a".repeat(32), "00");
    for header in [&*unsampled, "00-zz", &format!("00-{}-01", "0".repeat(49)), "", &CALLER.repeat(1_000)] {
        assert_eq!(send(&a, "ann", &in_trace(header))["nodes"], 1);
    }
    send(&a, "ann", &in_trace(&parent(&"b".repeat(32), "01")).repeat(2));
    for (channel, kind, digit) in [("ann", "user", "c"), ("room:den", "room", "d")] {
        let trace = digit.repeat(32);
        let lines = format!("{}tracestate: vendor=1\r\n", in_trace(&parent(&trace, "01")));
        assert_eq!(send(&a, channel, &lines)["nodes"], 1);
        let publish = collector.span("a", "tabcast publish", &trace);
        assert_eq!((publish.parent().as_str(), publish.exported.kind), (CALLER, SpanKind::Producer as i32));
        publish.check(kind, "delivered");
        assert_eq!((publish.attribute("tabcast.tabs"), publish.attribute("tabcast.nodes")), (json!(0), json!(1)));
        let events: Vec<_> = publish.exported.events.iter().map(|event| &*event.name).collect();
        assert_eq!(events, ["encoded", "posted"]);
        let (id, node) = (publish.id(), publish.attribute("tabcast.node"));
        let receive = collector.span("b", "tabcast receive", &trace);
        assert_eq!((receive.parent(), receive.exported.kind), (id, SpanKind::Consumer as i32));
        receive.check(kind, "taken");
        assert_ne!(receive.attribute("tabcast.node"), node);
    }
    // Two publishes, one arrival of each, and nothing of the others.
    assert_eq!(collector.spans.len(), 4, "{:#?}", collector.spans);
    let all = format!("{:?}", collector.spans);
    assert!(!["secret", "\"ann\"", "\"den\""].iter().any(|word| all.contains(word)), "{all}");
}

#[test]
fn an_answer_is_in_the_trace_of_its_question() {
    let (mut collector, redis, webhook) = (Collector::start(), Redis::start(), Receiving::start());
    let (collector_url, redis_url, webhook_url) = (collector.server.url(), redis.url(), webhook.url());
    let worker = [("redis", &*redis_url), ("worker", "webhook"), ("webhook_url", &*webhook_url)];
    let node = |name: &str| Gateway::start(&[&traced(&collector_url, name)[..], &worker].concat());
    let (a, b) = (node("a"), node("b"));
    let lines = format!("{}tracestate: vendor=1\r\n", in_trace(&parent(TRACE, "01")));
    let handed_back = answered(&a, &b, &webhook, &lines).unwrap();
    let question = collector.span("b", "tabcast completion", TRACE);
    assert_eq!((question.parent().as_str(), question.exported.kind), (CALLER, SpanKind::Server as i32));
    assert_eq!(question.attribute("tabcast.outcome"), "answered");
    let id = question.id();
    assert_eq!(handed_back, format!("00-{TRACE}-{id}-01"));
    let publish = collector.span("a", "tabcast publish", TRACE);
    publish.check("stream", "delivered");
    assert_eq!(publish.parent(), id);
    let id = publish.id();
    let receive = collector.span("b", "tabcast receive", TRACE);
    receive.check("stream", "taken");
    assert_eq!(receive.parent(), id);
    // Whoever is not to be traced is told so, and nothing comes of it.
    let unsampled = answered(&a, &b, &webhook, &in_trace(&parent(&"a".repeat(32), "00"))).unwrap();
    assert!(unsampled.starts_with(&format!("00-{}-", "a".repeat(32))) && unsampled.ends_with("-00"), "{unsampled}");
    answered(&a, &b, &webhook, &in_trace(&parent(&"b".repeat(32), "01"))).unwrap();
    collector.span("b", "tabcast receive", &"b".repeat(32));
    assert!(collector.spans.iter().all(|span| !span.trace().contains("aa")), "{:#?}", collector.spans);
}

/// Asks `b` for an answer, which is sent through `a` in the trace that the webhook was told, and ended in none. Gives
/// that.
fn answered(a: &Gateway, b: &Gateway, webhook: &Receiving, lines: &str) -> Option<String> {
    let body = json!({"messages": [{"role": "user", "content": "a secret"}]});
    let asked = ask(b, "/v1/chat/completions", &body, lines);
    let request = webhook.next();
    let message: Value = serde_json::from_slice(&request.body).unwrap();
    let parent = request.header("traceparent");
    assert_eq!(message.get("traceparent").and_then(Value::as_str), parent);
    let state = if parent.is_some() && lines.contains("tracestate") { Some("vendor=1") } else { None };
    assert_eq!((request.header("tracestate"), message.get("tracestate").and_then(Value::as_str)), (state, state));
    let channel = message["channel_id"].as_str().unwrap();
    let state = state.map(|state| format!("tracestate: {state}\r\n"));
    send(a, channel, &(parent.map_or_else(String::new, in_trace) + &state.unwrap_or_default()));
    call(a, "/api/end", &json!({"channel_id": channel}), "");
    assert_eq!(answer(asked)["choices"][0]["message"]["content"], "a secret");
    parent.map(str::to_owned)
}

#[test]
fn an_entry_of_a_worker_goes_on_in_the_trace_that_it_was_given() {
    let (mut collector, redis) = (Collector::start(), Redis::start());
    let (collector_url, redis_url) = (collector.server.url(), redis.url());
    let worker = [("redis", &*redis_url), ("worker", "redis")];
    let gateway = Gateway::start(&[&traced(&collector_url, "a")[..], &worker].concat());
    let mut tab = gateway.tab("user=ann");
    let mut client = redis.client().unwrap();
    let mut write = |entry: Value| {
        let mut command = redis::cmd("XADD");
        command.arg("sg:stream:outbound:webchat").arg("*").arg("e").arg(entry.to_string());
        command.exec(&mut client).unwrap();
        assert_eq!(tab.json()["text"], "a secret");
    };
    let entry = json!({"channel_id": "ann", "type": "message", "text": "a secret"});
    for odd in [json!(1), json!(null), json!("00-zz"), json!(parent(&"a".repeat(32), "00"))] {
        let mut entry = entry.clone();
        entry["traceparent"] = odd;
        write(entry);
    }
    let mut entry = entry;
    entry["traceparent"] = parent(TRACE, "01").into();
    entry["tracestate"] = "vendor=1".into();
    write(entry);
    let publish = collector.span("a", "tabcast publish", TRACE);
    publish.check("user", "delivered");
    assert_eq!((publish.parent().as_str(), publish.attribute("tabcast.tabs")), (CALLER, json!(1)));
    assert_eq!(collector.spans.len(), 1, "{:#?}", collector.spans);
}

#[test]
fn a_publish_that_is_refused_is_an_error_and_one_for_nobody_is_none() {
    let mut collector = Collector::start();
    let collector_url = collector.server.url();
    let gateway = Gateway::start(&[&traced(&collector_url, "a")[..], &[("file_bytes_max", "1000")]].concat());
    let file = |bytes: usize, trace: &str| {
        let path = "/api/file?channel_id=ann&filename=secret.txt";
        let lines = format!("X-Tabcast-Raw: 1\r\n{}", in_trace(&parent(trace, "01")));
        let mut client = gateway.connect();
        client.write(&with_lines(&post(path, "text/plain", &vec![b'x'; bytes]), &lines));
        client.response().status
    };
    let [large, fitting] = ["a", "b"].map(|digit| digit.repeat(32));
    assert_eq!((file(1_001, &large), file(1_000, &fitting)), (413, 200));
    let refused = collector.span("a", "tabcast publish", &large);
    assert_eq!(refused.attribute("tabcast.outcome"), "too_large");
    assert_eq!(refused.exported.status.as_ref().unwrap().code, StatusCode::Error as i32);
    assert!(refused.exported.events.is_empty());
    let published = collector.span("a", "tabcast publish", &fitting);
    assert_eq!(
        (published.attribute("tabcast.outcome"), published.attribute("tabcast.tabs")),
        (json!("nobody"), json!(0))
    );
    assert_eq!(published.exported.status.as_ref().unwrap().code, StatusCode::Unset as i32);
    assert_eq!(published.attribute("tabcast.frame.kind"), "file");
    for span in &collector.spans {
        let names: std::collections::HashSet<_> =
            span.exported.attributes.iter().map(|attribute| &attribute.key).collect();
        assert_eq!(names.len(), span.exported.attributes.len(), "none is there twice: {span:?}");
        assert!(!format!("{span:?}").contains("secret"));
    }
}

#[test]
fn a_handler_in_the_process_is_in_the_trace_and_what_waits_is_exported_before_the_end() {
    let mut collector = Collector::start();
    let collector_url = collector.server.url();
    let settings = [&traced(&collector_url, "a")[..], &[("worker", "demo"), ("OTEL_BSP_SCHEDULE_DELAY", "3600000")]];
    let mut gateway = Gateway::start(&settings.concat());
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    call(&gateway, "/v1/chat/completions", &body, &in_trace(&parent(TRACE, "01")));
    assert!(collector.server.requests.try_recv().is_err(), "it is not due for an hour");
    gateway.terminate();
    assert!(gateway.wait().success());
    let id = collector.span("a", "tabcast completion", TRACE).id();
    assert_eq!(collector.span("a", "tabcast publish", TRACE).parent(), id);
}

#[test]
fn a_collector_that_cannot_be_reached_is_one_line_in_the_log() {
    let [taken, silent] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [refusing, unanswering] =
        [&taken, &silent].map(|listener| format!("http://{}", listener.local_addr().unwrap()));
    drop(taken);
    for (collector, line) in [(refusing, "refused"), (unanswering, "no answer in time")] {
        let more = [
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "100"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
            ("drain_deadline", "4s"),
            ("drain_spread", "1s"),
            ("close_timeout", "1s"),
        ];
        let mut gateway = Gateway::start(&[&traced(&collector, "a")[..], &more].concat());
        let publish = |count: usize| {
            for _ in 0..count {
                send(&gateway, "ann", &in_trace(&parent(TRACE, "01")));
            }
        };
        publish(20);
        let said = gateway.wait_for_log("spans do not reach the collector");
        assert!(said.contains(line), "{said}");
        publish(200);
        let begun = now();
        gateway.terminate();
        assert!(gateway.wait().success());
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(!gateway.log().contains("spans do not reach the collector"));
    }
}

#[test]
fn without_a_collector_nobody_is_told_of_any_trace() {
    let webhook = Receiving::start();
    let url = webhook.url();
    let settings = [("worker", "webhook"), ("webhook_url", &*url), ("OTEL_TRACES_SAMPLER", "always_on")];
    let gateway = Gateway::start(&settings);
    assert_eq!(answered(&gateway, &gateway, &webhook, &in_trace(&parent(TRACE, "01"))), None);
}

#[test]
fn variables_that_cannot_be_followed_are_refused() {
    for (name, value) in [
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "not a URL"),
    ] {
        let settings = [&traced("http://127.0.0.1:4318", "a")[..], &[(name, value)]].concat();
        let refused = Gateway::try_start(&settings, None).err().unwrap();
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.log.contains("ERROR"), "{refused:?}");
    }
}
