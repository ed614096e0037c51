//! Spans of the process's tracer provider.

use std::num::{NonZeroU64, NonZeroU128};
use std::pin::Pin;
use std::sync::OnceLock;

use opentelemetry::context::{FutureExt, WithContext};
use opentelemetry::global::{self, BoxedTracer};
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue};

use crate::id::ChannelId;
use crate::proto::delivery::Delivery;
use crate::proto::frame::Frame;
use crate::proto::trace::TraceContext;

/// About what a span with its attributes holds.
const SPAN_BYTES: usize = 1 << 10;

/// Set once, and read by every publish.
static TRACER: OnceLock<BoxedTracer> = OnceLock::new();

/// From now on every publish of this process is a span of its tracer provider, [`opentelemetry::global`]: set that first.
/// A second call does nothing.
///
/// ```
/// use std::sync::mpsc::{SyncSender, sync_channel};
/// use opentelemetry::global;
/// use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
/// use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
/// use tabcast::engine::{Engine, EngineSettings};
/// use tabcast::id::ChannelId;
/// use tabcast::proto::event::Event;
///
/// #[derive(Debug)]
/// struct Names(SyncSender<String>);
///
/// impl SpanExporter for Names {
///     async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
///         let sent = batch.iter().try_for_each(|span| self.0.try_send(span.name.to_string()));
///         sent.map_err(|error| OTelSdkError::InternalFailure(error.to_string()))
///     }
/// }
///
/// let (sender, names) = sync_channel(8);
/// global::set_tracer_provider(SdkTracerProvider::builder().with_simple_exporter(Names(sender)).build());
/// tabcast::traces::begin();
///
/// let engine = Engine::new(EngineSettings::default());
/// engine.try_publish(&ChannelId::parse("ann")?, Event::Typing { active: true })?;
/// assert_eq!(names.recv()?, "tabcast publish");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn begin() {
    let _ = TRACER.get_or_init(|| global::tracer("tabcast"));
}

/// Whether anything is traced.
pub(crate) fn is_on() -> bool {
    TRACER.get().is_some()
}

/// Runs a future in the context of whoever asked for it; None: of nobody. In a box, so that what holds it stays small.
///
/// # Cancel safety
/// That of the future.
pub(crate) fn over<F: Future>(context: Option<&TraceContext>, future: F) -> WithContext<Pin<Box<F>>> {
    Box::pin(future).with_context(context.map_or_else(Context::new, remote))
}

/// Does something in the context of whoever asked for it; None: of nobody.
pub(crate) fn within<T>(context: Option<&TraceContext>, work: impl FnOnce() -> T) -> T {
    let _guard = context.map_or_else(Context::new, remote).attach();
    work()
}

/// The span that a frame was published in: what other nodes are told. One that is not sampled is told to nobody.
#[derive(Debug, Clone)]
pub(crate) struct Origin(Option<Box<TraceContext>>);

impl Origin {
    /// That of the publish which this thread is in.
    pub(crate) fn current() -> Self {
        let context =
            TRACER.get().and_then(|_| Context::map_current(|current| context_of(current.span().span_context())));
        Self(context.filter(TraceContext::is_sampled).map(Box::new))
    }

    pub(crate) fn context(&self) -> Option<&TraceContext> {
        self.0.as_deref()
    }

    /// Bytes that it holds beside its own place.
    pub(crate) fn bytes(&self) -> usize {
        self.context().map_or(0, TraceContext::bytes)
    }
}

/// The span of a publish. Dropped, it ends, and says what was told of it last. In a box, so that the futures that hold
/// one are small.
#[derive(Debug)]
pub(crate) struct PublishSpan(Option<Box<Publishing>>);

#[derive(Debug)]
struct Publishing {
    span: Span,
    /// An attribute is said only once.
    told: Option<(&'static str, Delivery)>,
}

impl PublishSpan {
    /// No span.
    pub(crate) const fn none() -> Self {
        Self(None)
    }

    /// A publish begins, in the context that this thread is in.
    pub(crate) fn begin(channel: &ChannelId, node: u64) -> Self {
        let attributes = || vec![channel_kind(channel), node_name(node)];
        let begin = || Span::start(SpanKind::Producer, "tabcast publish", None, attributes);
        Self(is_on().then(|| Box::new(Publishing { span: begin(), told: None })))
    }

    /// Does something in its context.
    pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        let context = self.0.as_ref().and_then(|publishing| publishing.span.0.as_deref().cloned());
        let _guard = context.map(Context::attach);
        work()
    }

    /// The frame is there.
    pub(crate) fn encoded(&self, frame: &Frame) {
        if let Some(publishing) = &self.0 {
            publishing.span.set(|| of_frame(frame));
            publishing.span.event("encoded");
        }
    }

    /// The frame is in the inboxes of this node's shards.
    pub(crate) fn posted(&mut self, outcome: &'static str, delivery: Delivery) {
        if let Some(publishing) = &self.0 {
            publishing.span.event("posted");
        }
        self.settled(outcome, delivery);
    }

    /// As much as anybody waits for is known.
    pub(crate) fn settled(&mut self, outcome: &'static str, delivery: Delivery) {
        if let Some(publishing) = &mut self.0 {
            publishing.told = Some((outcome, delivery));
        }
    }

    /// Nothing was published.
    pub(crate) fn refused(&self, outcome: &'static str) {
        if let Some(publishing) = &self.0 {
            publishing.span.refused(outcome);
        }
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        if let Some((outcome, delivery)) = self.told {
            let count = |name, value| KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX));
            self.span.done(outcome);
            self.span.set(|| [count("tabcast.tabs", delivery.tabs), count("tabcast.nodes", delivery.nodes)]);
        }
    }
}

/// One span. Dropped, it ends. In a box, as above.
#[derive(Debug)]
pub(crate) struct Span(Option<Box<Context>>);

impl Span {
    /// A frame that another node's publish has sent here; None: it is not traced.
    pub(crate) fn receive(context: Option<TraceContext>, channel: &ChannelId, frame: &Frame, node: u64) -> Self {
        let Some(context) = context else { return Self(None) };
        Self::start(SpanKind::Consumer, "tabcast receive", Some(&remote(&context)), || {
            let [kind, bytes] = of_frame(frame);
            vec![channel_kind(channel), node_name(node), kind, bytes]
        })
    }

    /// A question for an answer, and who asks it.
    pub(crate) fn completion(context: Option<&TraceContext>) -> Self {
        let parent = context.map_or_else(Context::new, remote);
        Self::start(SpanKind::Server, "tabcast completion", Some(&parent), Vec::new)
    }

    /// As a child of `parent`, or of the context that this thread is in.
    fn start(
        kind: SpanKind,
        name: &'static str,
        parent: Option<&Context>,
        attributes: impl FnOnce() -> Vec<KeyValue>,
    ) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let builder = tracer.span_builder(name).with_kind(kind);
        let span = match parent {
            Some(parent) => tracer.build_with_context(builder, parent),
            None => tracer.build(builder),
        };
        let span = Self(Some(Box::new(Context::new().with_span(span))));
        span.set(attributes);
        span
    }

    /// What is to be told to whoever goes on with it, sampled or not.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        context_of(self.0.as_ref()?.span().span_context())
    }

    /// About what it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |_| SPAN_BYTES)
    }

    /// What became of it, once.
    pub(crate) fn done(&self, outcome: &'static str) {
        self.set(|| [KeyValue::new("tabcast.outcome", outcome)]);
    }

    /// It came to nothing: instead of [`done`](Self::done).
    pub(crate) fn refused(&self, outcome: &'static str) {
        self.done(outcome);
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(outcome));
        }
    }

    fn set<A: IntoIterator<Item = KeyValue>>(&self, attributes: impl FnOnce() -> A) {
        if let Some(context) = &self.0
            && context.span().is_recording()
        {
            context.span().set_attributes(attributes());
        }
    }

    fn event(&self, name: &'static str) {
        if let Some(context) = &self.0 {
            context.span().add_event(name, Vec::new());
        }
    }
}

fn channel_kind(channel: &ChannelId) -> KeyValue {
    let kind = match channel {
        ChannelId::User(_) => "user",
        ChannelId::Room(_) => "room",
        ChannelId::Stream(_) => "stream",
    };
    KeyValue::new("tabcast.channel.kind", kind)
}

fn of_frame(frame: &Frame) -> [KeyValue; 2] {
    let bytes = i64::try_from(frame.json().len()).unwrap_or(i64::MAX);
    [KeyValue::new("tabcast.frame.kind", frame.kind().as_str()), KeyValue::new("tabcast.frame.bytes", bytes)]
}

fn node_name(node: u64) -> KeyValue {
    KeyValue::new("tabcast.node", format!("{node:016x}"))
}

/// A context in which spans are children of one elsewhere.
fn remote(context: &TraceContext) -> Context {
    let flags = if context.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
    // A state that is not understood is not handed on, and the parent counts (W3C Trace Context, 3.3.1).
    let state = context.state().parse::<TraceState>().unwrap_or_default();
    let (trace, span) = (TraceId::from(context.trace().get()), SpanId::from(context.span().get()));
    Context::new().with_remote_span_context(SpanContext::new(trace, span, flags, true, state))
}

fn context_of(span: &SpanContext) -> Option<TraceContext> {
    let trace = NonZeroU128::new(u128::from_be_bytes(span.trace_id().to_bytes()))?;
    let id = NonZeroU64::new(u64::from_be_bytes(span.span_id().to_bytes()))?;
    Some(TraceContext::new(trace, id, span.is_sampled(), &span.trace_state().header()))
}
