//! The gateway as a process: made in the one order that file tables allow, run until a signal, drained.

#[cfg(feature = "otel")]
mod export;
#[cfg(not(feature = "otel"))]
#[path = "serve/no_export.rs"]
mod export;
#[cfg(not(feature = "redis"))]
#[path = "serve/alone.rs"]
mod redis;
#[cfg(feature = "redis")]
mod redis;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;

use crate::config::{FileTables, Recovery, Settings, Worker};
use crate::driver::listener::HttpLimits;
use crate::driver::start::{DrainPlan, EdgeFactory, ShardThreads, Start};
use crate::engine::EngineSettings;
use crate::engine::client::HandoverLimits;
use crate::engine::intake::{Intake, IntakeSettings};
use crate::fanout::hub::Drain;
use crate::gateway::api::{Api, ApiLimits, IdempotencyLimits};
use crate::gateway::auth::{KeyError, Keys};
use crate::gateway::body::BodyLimits;
use crate::gateway::certificate_files::{self, CertificateFiles, CertificateFilesError};
use crate::gateway::checks::Checks;
use crate::gateway::clients::{self, Clients};
use crate::gateway::edge::{Edges, Gateway};
use crate::gateway::files::remote::RemoteFiles;
use crate::gateway::metrics_text::MetricsText;
use crate::gateway::openai::{Answers, WholeBudget};
use crate::gateway::pages::Pages;
use crate::gateway::reload::{self, Reload, Reloaded};
use crate::gateway::serve::export::Export;
#[cfg(feature = "otel")]
pub use crate::gateway::serve::export::ExportError;
use crate::gateway::serve::redis::Node;
use crate::gateway::status;
use crate::gateway::worker;
use crate::gateway::worker::demo::Demo;
use crate::gateway::worker::webhook::{Webhook, WebhookError, WebhookSettings};
use crate::metrics::Metrics;
use crate::platform::adapter::{BotIdentity, MessageHandler, Outlet, PlatformAdapter, Unanswered};
use crate::platform::dispatch::{DispatchLimits, Inlet, dispatch};
use crate::platform::webchat::{History, WebChat};
use crate::proto::limits::{HubLimits, RecoveryLimits};

/// How long a drain waits for the worker to hear of the answers that it ended.
const TELL_TIME: Duration = Duration::from_secs(2);

/// Threads for what is not a shard's: workers, webhooks, large encodes' waiting.
const CONTROL_THREADS: usize = crate::config::CONTROL_THREADS;

/// Why the gateway did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {listen}: {error}")]
    Listen {
        /// The address.
        listen: std::net::SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// The kernel refused something else.
    #[error("cannot serve: {0}")]
    Io(#[from] io::Error),
    /// A key cannot verify.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A certificate cannot be used.
    #[error(transparent)]
    Certificate(#[from] CertificateFilesError),
    /// Redis cannot be set up: a URL that is none, or certificates that cannot be read.
    #[cfg(feature = "redis")]
    #[error("redis: {0}")]
    Redis(#[from] ::redis::RedisError),
    /// The settings ask for Redis.
    #[cfg(not(feature = "redis"))]
    #[error("redis is set, and this binary was built without the feature `redis`")]
    NoRedis,
    /// Spans cannot be exported as OpenTelemetry's variables say.
    #[cfg(feature = "otel")]
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The webhook cannot be set up.
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    /// The webhook's URL is not one.
    #[error("webhook_url is not a URL: {0}")]
    WebhookUrl(#[from] http::uri::InvalidUri),
}

/// Runs a gateway until SIGTERM or SIGINT, and drains it. A second signal leaves at once.
///
/// It makes its own threads and runtimes, in the order that a file table per shard needs: call it from a thread that
/// is in no runtime, before anything else opens descriptors that must reach the shards.
///
/// # Errors
/// [`ServeError`]: nothing runs.
pub fn run(settings: Settings) -> Result<(), ServeError> {
    run_with(settings, None)
}

/// The same with an embedder's own worker in the place of the setting's.
///
/// # Errors
/// As [`run`].
pub fn run_with(settings: Settings, handler: Option<Arc<dyn MessageHandler>>) -> Result<(), ServeError> {
    run_reloading(settings, handler, None)
}

/// The same with settings that are read again on SIGHUP. The signal is caught from the first moment on.
///
/// # Errors
/// As [`run`].
pub fn run_reloading(
    settings: Settings,
    handler: Option<Arc<dyn MessageHandler>>,
    reload: Option<Reload>,
) -> Result<(), ServeError> {
    raise_open_files();
    let control =
        Builder::new_multi_thread().worker_threads(CONTROL_THREADS).thread_name("control").enable_all().build()?;
    let (signals, running) = {
        let _entered = control.enter();
        (Signals::new()?, Running::start(&control, settings, handler)?)
    };
    let (scheme, address) = (running.gateway.settings.load().scheme(), running.threads.address());
    tracing::info!(%address, "ready: {scheme}://{address}/");
    control.block_on(running.until(signals, reload));
    control.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}

struct Signals {
    leave: Leave,
    /// The certificate is to be read again.
    certificates: Signal,
    /// The settings are to be read again.
    settings: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (certificates, settings) = (signal(SignalKind::hangup())?, signal(SignalKind::hangup())?);
        Ok(Self { leave: Leave { terminate, interrupt }, certificates, settings })
    }
}

struct Leave {
    terminate: Signal,
    interrupt: Signal,
}

impl Leave {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

struct Running {
    gateway: Arc<Gateway>,
    threads: ShardThreads,
    inlet: Inlet,
    node: Node,
    export: Export,
    certificates: Option<CertificateFiles>,
}

impl Running {
    fn start(
        control: &Runtime,
        settings: Settings,
        handler: Option<Arc<dyn MessageHandler>>,
    ) -> Result<Self, ServeError> {
        let certificates = CertificateFiles::open(&settings)?;
        let export = Export::begin(control)?;
        let (engine, mut node) = Node::join(control, &settings)?;
        let bot = bot(&settings);
        let history = if settings.history_from_recovery { History::Recovery } else { History::Empty };
        let chat = Arc::new(WebChat::new(Arc::new(engine.clone()), bot.clone()).with_history(history));
        let streams = if handler.is_none() { node.start_streams(control, &settings, &engine, &chat) } else { None };
        let (handler, durable) = match (handler, streams) {
            (Some(handler), _) => (handler, None),
            (None, Some(streams)) => (streams.handler, Some(streams.durable)),
            (None, None) => (worker_of(&settings, engine.metrics())?, None),
        };
        let adapter: Arc<dyn PlatformAdapter> = Arc::clone(&chat) as Arc<dyn PlatformAdapter>;
        let limits = DispatchLimits {
            messages_max: settings.worker_queue_max,
            bytes_max: settings.worker_queue_bytes_max,
            ..DispatchLimits::default()
        };
        let (inlet, runner) = dispatch(export.of_messages(handler), adapter, limits);
        let handover = HandoverLimits { bytes_max: settings.inbound_bytes_max, ..HandoverLimits::default() };
        let (echo_to_tabs, client_ids_max) = (settings.echo_to_tabs, settings.client_ids_max);
        let intake = IntakeSettings { bot, echo_to_tabs, handover, client_ids_max, durable };
        let (intake, texts) = Intake::new(engine.clone(), inlet.clone(), intake);
        control.spawn(worker::run(runner));
        control.spawn(intake.run());
        control.spawn(worker::look_after(engine.clone(), inlet.clone()));
        let answers = Answers::new(inlet.clone(), engine.now().as_micros() / 1_000_000);
        let metrics_text = MetricsText::new(Arc::clone(engine.metrics()), engine.broker().metrics().cloned());
        let gateway = Arc::new(Gateway {
            keys: ArcSwap::from_pointee(Keys::new(&settings)?),
            api: Api::new(chat, api_limits(&settings)),
            texts,
            answers,
            whole_answers: WholeBudget::new(settings.whole_answers_bytes_max),
            bodies: BodyLimits {
                timeout: settings.body_timeout,
                budget: Arc::new(Semaphore::new(settings.bodies_bytes_max.min(Semaphore::MAX_PERMITS))),
                metrics: Arc::clone(engine.metrics()),
            },
            clients: Clients::new(&settings),
            pages: Pages::new(settings.is_development()),
            metrics_text,
            remote_files: RemoteFiles::new(settings.file_bytes_max)?,
            checks: Checks::new(),
            is_draining: AtomicBool::new(false),
            control: control.handle().clone(),
            engine,
            settings: ArcSwap::from_pointee(settings),
        });
        let settings = &*gateway.settings.load_full();
        let start = Start {
            listen: settings.listen,
            own_file_tables: settings.file_tables == FileTables::PerShard,
            tls: certificates.as_ref().map(CertificateFiles::acceptor).transpose()?,
            sessions: settings.session_limits(),
            http: http_limits(settings),
            bytes_budget: settings.bytes_budget,
        };
        let edges: Arc<dyn EdgeFactory> = Arc::new(Edges(Arc::clone(&gateway)));
        let listen = settings.listen;
        let threads = ShardThreads::start(gateway.engine.hub(), &start, &edges)
            .map_err(|error| ServeError::Listen { listen, error })?;
        node.listens_at(settings, threads.address());
        control.spawn(status::run(Arc::clone(&gateway), threads.address()));
        Ok(Self { gateway, threads, inlet, node, export, certificates })
    }

    async fn until(mut self, signals: Signals, reload: Option<Reload>) {
        let Signals { mut leave, mut certificates, settings } = signals;
        let connections = self.threads.connections_by_address().cloned();
        let reloaded = Reloaded { gateway: Arc::clone(&self.gateway), connections };
        tokio::select! {
            () = leave.next() => {}
            never = certificate_files::keep(self.certificates.take(), &mut certificates) => match never {},
            never = reload::keep(reload, reloaded, settings) => match never {},
        }
        tokio::select! {
            () = self.drain() => {}
            () = leave.next() => tracing::warn!("a second signal: leaving at once"),
        }
    }

    /// Readiness flips first. Then, for as long as the deadline allows, the worker finishes what it was given, and its
    /// answers still find those who are there; then tabs are told and closed. The workers' routes answer to the end.
    async fn drain(self) {
        self.gateway.is_draining.store(true, Ordering::Relaxed);
        let settings = self.gateway.settings.load_full();
        let (deadline, closing) = (settings.drain_deadline, settings.close_timeout);
        let sessions = Drain {
            spread: settings.drain_spread,
            closes_per_second_max: settings.drain_closes_per_second_max,
            latest: deadline.saturating_sub(closing),
        };
        let tabs = self.gateway.engine.hub().registry().total_connections();
        let time = sessions.time_for(tabs);
        tracing::info!(tabs, ?time, ?deadline, "draining");
        self.inlet.close();
        self.node.stop_consuming();
        let end = tokio::time::Instant::now() + deadline;
        let patience = deadline.saturating_sub(time).saturating_sub(closing);
        let begun = tokio::time::timeout(patience, self.inlet.drained()).await;
        if begun.is_err() {
            tracing::info!(messages = self.inlet.counts().pending, "closing tabs while the worker is still busy");
        }
        let rest = end.saturating_duration_since(tokio::time::Instant::now());
        let latest = rest.saturating_sub(closing);
        let plan = DrainPlan { sessions: Drain { latest, ..sessions }, answers: latest, deadline: rest };
        let busy = self.threads.drain(plan, self.inlet.drained()).await;
        // Whoever answers elsewhere is told that nobody waits for it any more.
        let hub = self.gateway.engine.hub();
        let told = async {
            while hub.waiting_cancels() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            self.inlet.drained().await;
        };
        let _ = tokio::time::timeout_at(end.min(tokio::time::Instant::now() + TELL_TIME), told).await;
        self.node.stop_appending();
        // What waits for the other nodes is for their tabs, and this one is none of theirs any more.
        let left = self.gateway.engine.leave();
        let _ = tokio::time::timeout_at(end.min(tokio::time::Instant::now() + TELL_TIME), left).await;
        if busy > 0 {
            tracing::warn!(shards = busy, "the deadline has passed with connections left");
        }
        let pending = self.inlet.counts().pending;
        if pending > 0 {
            tracing::warn!(messages = pending, "the deadline has passed with messages left");
        }
        self.export.finish(end.saturating_duration_since(tokio::time::Instant::now()).min(TELL_TIME)).await;
        tracing::info!("drained");
    }
}

/// As many descriptors as the hard limit allows: they are what tabs are made of.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files stays at {:?}", limit.current);
    }
}

fn engine_settings(settings: &Settings) -> EngineSettings {
    let hub = HubLimits {
        inbox_posts_max: settings.inbox_posts_max,
        inbox_bytes_max: settings.inbox_bytes_max,
        tabs_per_user_max: settings.tabs_per_user_max,
        watchers_max: settings.watchers_max,
        bytes_budget: settings.bytes_budget,
        file_bytes_max: settings.file_bytes_max,
        inbound_bytes_max: settings.inbound_bytes_max,
        deflate_bytes_min: settings.deflate_bytes_min,
        streams_max: settings.answers_max,
        streams_per_owner_max: settings.answers_per_user_max,
        stream_bytes_max: settings.answer_bytes_max,
        streams_bytes_max: settings.answers_bytes_max,
        recovery: recovery_limits(settings),
    };
    let (sessions, files) = (settings.session_limits(), settings.file_limits());
    let (shards, publish_deadline) = (settings.shards, settings.publish_deadline);
    EngineSettings { shards, sessions, hub, files, publish_deadline, has_mailboxes: false }
}

/// Without a limit they are counted all the same, but in development mode: one that comes later holds for all of them.
pub(super) fn connections_per_address(settings: &Settings) -> usize {
    let max = settings.connections_per_address_max;
    settings.outside_development(if max == 0 { usize::MAX } else { max })
}

/// What is kept of users' frames, wherever that is.
fn kept_limits(settings: &Settings) -> RecoveryLimits {
    RecoveryLimits {
        frames_max: settings.recovery_frames_max,
        bytes_max: settings.recovery_bytes_max,
        lifetime: settings.recovery_time,
        total_bytes_max: settings.recovery_total_bytes_max,
    }
}

fn recovery_limits(settings: &Settings) -> RecoveryLimits {
    let kept = kept_limits(settings);
    match settings.recovery {
        Recovery::Off | Recovery::Redis => RecoveryLimits { frames_max: 0, ..kept },
        Recovery::Memory => kept,
    }
}

fn bot(settings: &Settings) -> BotIdentity {
    BotIdentity {
        user_id: settings.bot_user_id.as_str().to_owned(),
        display_name: settings.bot_display_name.clone(),
        mention: settings.bot_mention.clone(),
        ..BotIdentity::default()
    }
}

fn http_limits(settings: &Settings) -> HttpLimits {
    HttpLimits {
        header_timeout: settings.header_timeout,
        header_bytes_max: settings.header_bytes_max,
        connections_max: settings.http_connections_max,
        connections_per_address_max: connections_per_address(settings),
        proxies: clients::proxies(settings),
        write_timeout: settings.body_timeout,
        write_bytes_per_second_min: settings.response_bytes_per_second_min,
    }
}

fn api_limits(settings: &Settings) -> ApiLimits {
    let answers_max = settings.idempotency_keys_max;
    let bytes_max = answers_max.saturating_mul(crate::config::IDEMPOTENCY_BYTES);
    let (batch_lines_max, batch_line_bytes_max) = (settings.batch_lines_max, settings.batch_line_bytes_max);
    let idempotency = IdempotencyLimits { answers_max, bytes_max, ..IdempotencyLimits::default() };
    ApiLimits { batch_lines_max, batch_line_bytes_max, idempotency }
}

fn worker_of(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Arc<dyn MessageHandler>, ServeError> {
    Ok(match (settings.worker, &settings.webhook_url) {
        (Worker::Demo, _) => Arc::new(Demo),
        (Worker::Webhook, Some(url)) => {
            let webhook = WebhookSettings {
                secret: settings.webhook_secret.as_ref().map(|secret| secret.expose().to_vec()),
                request_timeout: settings.webhook_timeout,
                attempts_max: settings.webhook_attempts_max,
                message_timeout: settings.webhook_message_timeout(),
                backoff_base: settings.webhook_backoff_min,
                backoff_max: settings.webhook_backoff_max,
                requests_max: settings.webhook_in_flight_max,
                ..WebhookSettings::new(url.parse()?)
            };
            Arc::new(Webhook::new(webhook, Arc::clone(metrics))?)
        }
        (Worker::Webhook | Worker::Redis | Worker::None, _) => Arc::new(Unanswered),
    })
}
