//! The gateway as one node of many.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::broker::Broker;
use crate::broker::redis::{RedisBroker, RedisServer, RedisSettings};
use crate::config::{Recovery, Settings, Worker, base64_bytes};
use crate::engine::Engine;
use crate::engine::intake::{Durable, NotKept};
use crate::gateway::serve::{ServeError, engine_settings, kept_limits};
use crate::gateway::worker::redis::inbound::{AppendError, Appender, RedisWorker};
use crate::gateway::worker::redis::{Shutdown, StreamSettings, start};
use crate::platform::adapter::{BoxFuture, MessageHandler};
use crate::platform::message::IncomingMessage;
use crate::platform::webchat::WebChat;

/// How long the start waits for the other nodes.
const JOIN_TIME: Duration = Duration::from_secs(3);
/// What an envelope has beside a file.
const ENVELOPE_BYTES: usize = 1 << 20;
/// How long a tab waits for its message to be on the stream before it is told that it is not.
const KEEP_TIMEOUT: Duration = Duration::from_secs(3);

/// What the gateway has of Redis, if it is one node of many.
#[derive(Debug, Default)]
pub(super) struct Node {
    broker: Option<Arc<RedisBroker>>,
    /// What ends the two ways of workers' streams.
    stop: Option<Stop>,
}

#[derive(Debug)]
struct Stop {
    consuming: watch::Sender<bool>,
    appending: watch::Sender<bool>,
}

/// Whoever answers over streams: the handler of all messages, and where those of tabs are kept before they are acked.
pub(super) struct StreamWorker {
    pub(super) handler: Arc<dyn MessageHandler>,
    pub(super) durable: Arc<dyn Durable>,
}

impl Node {
    /// The engine: on its own, or one node of those that share a Redis.
    pub(super) fn join(control: &Runtime, settings: &Settings) -> Result<(Engine, Self), ServeError> {
        if settings.redis.is_empty() {
            return Ok((Engine::new(engine_settings(settings)), Self::default()));
        }
        let ca = settings.redis_ca_file.as_ref().map(std::fs::read).transpose()?;
        let server = RedisServer {
            urls: settings.redis.iter().map(|url| url.to_string()).collect(),
            is_cluster: settings.redis_cluster,
            ca,
            timeout: settings.redis_timeout,
        };
        let broker = RedisSettings {
            server,
            prefix: settings.redis_prefix.clone(),
            recovery: (settings.recovery == Recovery::Redis).then(|| kept_limits(settings)),
            spool_bytes_max: settings.redis_spool_bytes_max,
            canary_deadline: settings.redis_canary_deadline,
            address: settings.node_address(),
        };
        let broker = RedisBroker::new(broker, control.handle().clone())?;
        let engine = Engine::with_broker(engine_settings(settings), Arc::clone(&broker) as Arc<dyn Broker>);
        // Tabs that come before the other nodes know of this one could miss what those publish.
        if control.block_on(broker.joined(JOIN_TIME)) {
            tracing::info!(node = %broker.node(), "joined the other nodes through Redis");
        } else {
            tracing::warn!(node = %broker.node(), "Redis does not answer: this node is alone until it does");
        }
        Ok((engine, Self { broker: Some(broker), stop: None }))
    }

    /// Starts both ways of workers' streams, with `worker = "redis"`.
    pub(super) fn start_streams(
        &mut self,
        control: &Runtime,
        settings: &Settings,
        engine: &Engine,
        chat: &Arc<WebChat<Engine>>,
    ) -> Option<StreamWorker> {
        let broker = self.broker.as_ref().filter(|_| settings.worker == Worker::Redis)?;
        let prefixed = |name: &Option<String>, default: &str| {
            name.clone().unwrap_or_else(|| format!("{}{default}", settings.redis_prefix))
        };
        let streams = StreamSettings {
            inbound_stream: prefixed(&settings.redis_inbound_stream, "stream:inbound"),
            inbound_group: prefixed(&settings.redis_inbound_group, "workers"),
            outbound_stream: prefixed(&settings.redis_outbound_stream, "stream:outbound:webchat"),
            outbound_group: prefixed(&settings.redis_outbound_group, "gateway:webchat"),
            entries_max: settings.redis_stream_entries_max,
            form: settings.redis_envelope,
            entry_bytes_max: base64_bytes(settings.file_bytes_max).saturating_add(ENVELOPE_BYTES),
            node: broker.node().to_string(),
        };
        let (consuming, stop_consuming) = watch::channel(false);
        let (appending, stop_appending) = watch::channel(false);
        let shutdown = Shutdown { consuming: stop_consuming, appending: stop_appending };
        let started = start(broker.endpoint(), streams, Arc::clone(chat) as _, engine.metrics(), shutdown);
        control.spawn(started.appending);
        control.spawn(started.consuming);
        self.stop = Some(Stop { consuming, appending });
        let handler = Arc::new(RedisWorker::new(Arc::clone(&started.appender)));
        Some(StreamWorker { handler, durable: Arc::new(Stream(started.appender)) })
    }

    /// This node listens there: others find its files.
    pub(super) fn listens_at(&self, settings: &Settings, address: SocketAddr) {
        if let (Some(broker), None, Some(address)) = (&self.broker, &settings.node_url, settings.address_at(address)) {
            broker.set_address(address);
        }
    }

    /// Another node reads what workers answer from now on.
    pub(super) fn stop_consuming(&self) {
        if let Some(stop) = &self.stop {
            stop.consuming.send_replace(true);
        }
    }

    /// Nothing is taken for workers any more.
    pub(super) fn stop_appending(&self) {
        if let Some(stop) = &self.stop {
            stop.appending.send_replace(true);
        }
    }
}

/// The stream that workers read, as the intake sees it.
struct Stream(Arc<Appender>);

impl Durable for Stream {
    fn keep<'a>(&'a self, message: &'a IncomingMessage) -> BoxFuture<'a, Result<(), NotKept>> {
        Box::pin(async move {
            self.0.append_within(message, KEEP_TIMEOUT).await.map_err(|error| match error {
                AppendError::Unavailable => NotKept::Unknown(error.to_string()),
                AppendError::Full | AppendError::Refused(_) => NotKept::Refused(error.to_string()),
            })
        })
    }
}
