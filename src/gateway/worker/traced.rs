//! A handler whose publishes are in the trace of the message that they are for.

use std::sync::Arc;

use crate::platform::adapter::{BoxFuture, MessageHandler, PlatformAdapter};
use crate::platform::message::IncomingMessage;
use crate::traces;

/// Runs a handler in the context of each message.
pub(crate) struct Traced(pub(crate) Arc<dyn MessageHandler>);

impl MessageHandler for Traced {
    fn handle(&self, message: IncomingMessage, adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        let trace = message.trace.clone();
        Box::pin(traces::over(trace.as_deref(), self.0.handle(message, adapter)))
    }
}
