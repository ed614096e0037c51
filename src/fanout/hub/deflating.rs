//! Which frames get a compressed form: large enough ones for whoever may have a tab here that reads it.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fanout::hub::Hub;
use crate::id::ChannelId;
use crate::proto::deflate::{JSON_BYTES_MAX, Window};
use crate::proto::frame::{Frame, Kind};

/// How many sessions of this node read compressed frames, and what is worth compressing for them.
///
/// On lines of its own: every publisher reads it, and sessions that come and go are all that writes it.
///
/// # Ordering
/// Relaxed: a hint, publishes nothing. Who reads it a moment late makes a form that nobody needs, or none, and the plain
/// one is written.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Deflating {
    sessions: AtomicUsize,
    bytes_min: usize,
}

impl Deflating {
    pub(crate) const fn new(bytes_min: usize) -> Self {
        Self { sessions: AtomicUsize::new(0), bytes_min }
    }

    /// A session that reads compressed frames has begun.
    pub(crate) fn joined(&self) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
    }

    /// One that did is over.
    pub(crate) fn left(&self) {
        self.sessions.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many there are.
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }
}

impl Hub {
    pub(crate) fn deflating(&self) -> &Deflating {
        &self.deflating
    }

    /// Whether `frame` is to be given to [`deflate`](Self::deflate) before it is posted to `channel`: a session of this
    /// node negotiated permessage-deflate, the frame's JSON has
    /// [`deflate_bytes_min`](crate::proto::limits::HubLimits::deflate_bytes_min) bytes or more but not over
    /// [`JSON_BYTES_MAX`], and the channel has sessions here. Without such a session it costs one relaxed load.
    ///
    /// Never for a file: its base64 shrinks by a quarter at 25 ms of CPU for each MiB, which is what it takes to write
    /// that quarter to some two hundred tabs. Nor for a stream: whoever reads an answer gets it as it is.
    #[must_use]
    #[inline]
    pub fn wants_deflated(&self, channel: &ChannelId, frame: &Frame) -> bool {
        self.deflating.sessions() > 0 && self.is_worth_deflating(channel, frame)
    }

    #[inline(never)]
    fn is_worth_deflating(&self, channel: &ChannelId, frame: &Frame) -> bool {
        if frame.kind() == Kind::File || !(self.deflating.bytes_min..=JSON_BYTES_MAX).contains(&frame.json().len()) {
            return false;
        }
        match channel {
            ChannelId::User(user) => self.registry.is_online(user),
            ChannelId::Room(name) => self.rooms.find(name).is_some(),
            ChannelId::Stream(_) => false,
        }
    }

    /// Makes the frame's compressed form: see [`Frame::deflate`]. Once for all tabs, and only while nobody else holds it.
    pub fn deflate(&self, frame: &mut Frame) {
        if frame.deflated().is_none() && frame.deflate() {
            self.count_form(frame);
        }
    }

    /// The same for one tab alone, with its window: see [`Frame::deflate_for`].
    pub(crate) fn deflate_for(&self, window: Window, frame: &mut Frame) {
        if frame.deflated().is_none() && frame.deflate_for(window) {
            self.count_form(frame);
        }
    }

    fn count_form(&self, frame: &Frame) {
        let counts = &self.metrics.engine.deflates;
        counts.frames.increment();
        counts.json_bytes.add(frame.payload().len() as u64);
        counts.form_bytes.add(frame.deflated().map_or(0, <[u8]>::len) as u64);
    }
}
