//! Sessions come and go: registered together with what they have missed, and told of to whoever wants to know.

use std::sync::Arc;

use crate::fanout::hub::{Hub, Post, shard_number};
use crate::fanout::registry::TooManyTabs;
use crate::fanout::returning::Missed;
use crate::fanout::session::SessionRef;
use crate::fanout::shard::Resume;
use crate::id::{ChannelId, MessageId, UserId};
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

/// Whoever wants to know that a user's sessions have changed: a hint to look at what is true.
pub(crate) trait Edges: Send + Sync {
    /// Called without a lock, and must not wait.
    fn changed(&self, user: &UserId);
}

impl Hub {
    /// From now on these are the limits of all sessions: shards take them in their own time, in order.
    pub(crate) fn limit_sessions(&self, limits: &Arc<SessionLimits>) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            inbox.room.take(1, 0);
            self.push(&[shard_number(shard)], || Post::Limits(Arc::clone(limits)));
        }
    }

    /// Registers a session and finds what it has missed, as one step: what is posted from here on reaches it live. The
    /// inner None says that it is not known.
    ///
    /// # Errors
    /// The user has as many sessions as one user may have.
    pub(crate) fn connect(&self, session: SessionRef, resume: &Resume) -> Result<Option<Vec<Frame>>, TooManyTabs> {
        let user = session.user().clone();
        let missed = self.register(session, &user, resume)?;
        self.tell_edge(&user);
        Ok(missed)
    }

    fn register(&self, session: SessionRef, user: &UserId, resume: &Resume) -> Result<Option<Vec<Frame>>, TooManyTabs> {
        let channel = || ChannelId::User(user.clone());
        match resume {
            Resume::Fresh => self.registry.connect(session).map(|()| Some(Vec::new())),
            Resume::Unknown => self.registry.connect(session).map(|()| None),
            Resume::After(positions) => {
                let stripe = self.stripes.hold(&channel());
                let missed = self.stripes.since(&stripe, user, positions);
                self.registry.connect(session)?;
                drop(stripe);
                Ok(missed)
            }
            Resume::Missed(missed) => {
                let stripe = self.stripes.hold(&channel());
                let address = session.address();
                self.registry.connect(session)?;
                let frames = self.returning.finish(missed, address, self.stripes.now());
                drop(stripe);
                Ok(frames)
            }
        }
    }

    fn tell_edge(&self, user: &UserId) {
        if let Some(edges) = self.edges.get() {
            edges.changed(user);
        }
    }

    /// Who is told when a user's sessions change. Once.
    pub(crate) fn set_edges(&self, edges: Box<dyn Edges>) {
        // A hub has one engine.
        let _ = self.edges.set(edges);
    }

    /// Begins to collect what is posted to a user, for a tab that has these messages and whose past is kept elsewhere.
    pub(crate) fn begin_return(&self, user: &UserId, messages: &[MessageId]) -> Missed {
        self.returning.begin(user, messages)
    }

    /// Lets go what recovery holds of a user: not all of it comes here any more.
    pub(crate) fn forget_backlog(&self, user: &UserId) {
        self.stripes.forget(user, || ());
    }

    /// Takes a session out of the registry.
    pub(crate) fn disconnect(&self, session: &SessionRef) {
        self.registry.disconnect(session);
        self.tell_edge(session.user());
    }

    /// Takes a session out of the registry between two posts that are kept: who counted it has pushed to its shard by now.
    pub(crate) fn unlist(&self, session: &SessionRef) {
        let stripe = self.stripes.hold(&ChannelId::User(session.user().clone()));
        self.registry.disconnect(session);
        drop(stripe);
        self.tell_edge(session.user());
    }
}
