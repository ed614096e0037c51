//! The limits of sessions as they are in effect, and what tabs are told of them.

use std::sync::{Arc, PoisonError};

use arc_swap::ArcSwap;

use crate::engine::Engine;
use crate::fanout::session::Address;
use crate::platform::adapter::Outlet;
use crate::proto::event::Notice;
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

impl Engine {
    /// The limits of sessions that are in effect.
    pub(crate) fn session_limits(&self) -> &Arc<ArcSwap<SessionLimits>> {
        &self.inner.sessions
    }

    /// From now on these are the limits of all sessions, also of those that are open. A message that is being received,
    /// and is already longer than it may be now, ends its session. The limits of streams stay what they were.
    pub fn limit_sessions(&self, limits: SessionLimits) {
        let limits = Arc::new(limits);
        // Of two that come at once, the same one is the last everywhere. It covers nothing that could be half done.
        let _turn = self.inner.limiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.sessions.store(Arc::clone(&limits));
        self.inner.hub.limit_sessions(&limits);
    }

    /// What a tab is told first that asks for it: which session it is, the time here, and its limits.
    #[must_use]
    pub fn hello(&self, session: Address) -> Frame {
        let limits = self.session_limits().load();
        Frame::notice(&Notice::Hello {
            session: session.as_u64(),
            server_time: self.now(),
            message_bytes_max: limits.message_bytes_max,
            attachment_bytes_max: limits.attachment_bytes_max,
        })
    }
}
