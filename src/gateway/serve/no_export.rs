//! Nothing is traced, and nothing exported.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::gateway::serve::ServeError;
use crate::platform::adapter::MessageHandler;

/// Nothing.
#[derive(Debug)]
pub(super) struct Export;

impl Export {
    #[expect(clippy::unnecessary_wraps, reason = "what it stands for may fail")]
    pub(super) fn begin(_control: &Runtime) -> Result<Self, ServeError> {
        Ok(Self)
    }

    pub(super) fn of_messages(&self, handler: Arc<dyn MessageHandler>) -> Arc<dyn MessageHandler> {
        handler
    }

    pub(super) async fn finish(self, _patience: Duration) {}
}
