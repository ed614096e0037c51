//! No spans: everything is empty, and the compiler removes it.

use crate::id::ChannelId;
use crate::proto::delivery::Delivery;
use crate::proto::frame::Frame;
use crate::proto::trace::TraceContext;

/// What is held for a publish, a frame or a message holds nothing of this.
const _: () = assert!(size_of::<Origin>() + size_of::<PublishSpan>() + size_of::<Span>() == 0);

/// Whether anything is traced.
pub(crate) const fn is_on() -> bool {
    false
}

/// The future itself.
pub(crate) fn over<F: Future>(_context: Option<&TraceContext>, future: F) -> F {
    future
}

/// The work itself.
pub(crate) fn within<T>(_context: Option<&TraceContext>, work: impl FnOnce() -> T) -> T {
    work()
}

/// Nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin;

impl Origin {
    pub(crate) const fn current() -> Self {
        Self
    }

    pub(crate) const fn context(&self) -> Option<&TraceContext> {
        None
    }

    pub(crate) const fn bytes(&self) -> usize {
        0
    }
}

/// Nothing.
#[derive(Debug)]
pub(crate) struct PublishSpan;

impl PublishSpan {
    pub(crate) const fn none() -> Self {
        Self
    }

    pub(crate) const fn begin(_channel: &ChannelId, _node: u64) -> Self {
        Self
    }

    pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        work()
    }

    pub(crate) const fn encoded(&self, _frame: &Frame) {}

    pub(crate) const fn posted(&mut self, _outcome: &'static str, _delivery: Delivery) {}

    pub(crate) const fn settled(&mut self, _outcome: &'static str, _delivery: Delivery) {}

    pub(crate) const fn refused(&self, _outcome: &'static str) {}
}

/// Nothing.
#[derive(Debug)]
pub(crate) struct Span;

impl Span {
    pub(crate) fn receive(_context: Option<TraceContext>, _channel: &ChannelId, _frame: &Frame, _node: u64) -> Self {
        Self
    }

    pub(crate) const fn completion(_context: Option<&TraceContext>) -> Self {
        Self
    }

    pub(crate) const fn context(&self) -> Option<TraceContext> {
        None
    }

    pub(crate) const fn bytes(&self) -> usize {
        0
    }

    pub(crate) const fn done(&self, _outcome: &'static str) {}

    pub(crate) const fn refused(&self, _outcome: &'static str) {}
}
