//! Where frames are compressed: small ones by their publisher, large ones on a thread apart. Never by a shard.

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::engine::Engine;
use crate::fanout::hub::Hub;
use crate::id::ChannelId;
use crate::proto::deflate::{LARGE_BYTES_MIN, LARGE_DEFLATES_MAX};
use crate::proto::delivery::PublishError;
use crate::proto::frame::Frame;

/// Large frames that are compressed now, in the whole process: each has a compressor of its own.
static LARGE_DEFLATES: Semaphore = Semaphore::const_new(LARGE_DEFLATES_MAX);

/// Gives a frame its compressed form if a tab here may want it, and if that takes no longer than a thread may take that
/// others wait for.
pub(super) fn deflate_small(hub: &Hub, channel: &ChannelId, frame: &mut Frame) {
    if hub.wants_deflated(channel, frame) && frame.json().len() < LARGE_BYTES_MIN {
        hub.deflate(frame);
    }
}

impl Engine {
    /// Gives a frame its compressed form if a tab here may want it. A large one leaves the thread for that; outside of a
    /// runtime, and while [`LARGE_DEFLATES_MAX`] are under way, it goes without.
    ///
    /// # Errors
    /// [`PublishError::Closed`]: the runtime is shutting down.
    pub(super) async fn deflated(&self, channel: &ChannelId, mut frame: Frame) -> Result<Frame, PublishError> {
        let hub = self.hub();
        if !hub.wants_deflated(channel, &frame) {
            return Ok(frame);
        }
        if frame.json().len() < LARGE_BYTES_MIN {
            hub.deflate(&mut frame);
            return Ok(frame);
        }
        let (Ok(runtime), Ok(turn)) = (Handle::try_current(), LARGE_DEFLATES.try_acquire()) else { return Ok(frame) };
        let hub = hub.clone();
        let deflate = move || {
            hub.deflate(&mut frame);
            drop(turn);
            frame
        };
        runtime.spawn_blocking(deflate).await.map_err(|_| PublishError::Closed)
    }
}
