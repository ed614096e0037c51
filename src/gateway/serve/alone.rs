//! The gateway without Redis: one node.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::runtime::Runtime;

use crate::config::Settings;
use crate::engine::Engine;
use crate::engine::intake::Durable;
use crate::gateway::serve::{ServeError, engine_settings};
use crate::platform::adapter::MessageHandler;
use crate::platform::webchat::WebChat;

/// Nothing.
#[derive(Debug)]
pub(super) struct Node;

/// Nobody answers over streams.
pub(super) struct StreamWorker {
    pub(super) handler: Arc<dyn MessageHandler>,
    pub(super) durable: Arc<dyn Durable>,
}

impl Node {
    pub(super) fn join(_control: &Runtime, settings: &Settings) -> Result<(Engine, Self), ServeError> {
        if settings.redis.is_empty() {
            Ok((Engine::new(engine_settings(settings)), Self))
        } else {
            Err(ServeError::NoRedis)
        }
    }

    pub(super) fn start_streams(
        &mut self,
        _control: &Runtime,
        _settings: &Settings,
        _engine: &Engine,
        _chat: &Arc<WebChat<Engine>>,
    ) -> Option<StreamWorker> {
        None
    }

    pub(super) fn listens_at(&self, _settings: &Settings, _address: SocketAddr) {}

    pub(super) fn stop_consuming(&self) {}

    pub(super) fn stop_appending(&self) {}
}
