//! A bell with the face of `AtomicWaker` that loom can look into. Its own is a lock: who registers while somebody rings is
//! woken at once, as by the original.

use std::task::Waker;

use loom::future::AtomicWaker;

pub(crate) struct Bell(AtomicWaker);

impl Bell {
    pub(crate) fn new() -> Self {
        Self(AtomicWaker::new())
    }

    pub(crate) fn register(&self, waker: &Waker) {
        self.0.register_by_ref(waker);
    }

    pub(crate) fn wake(&self) {
        self.0.wake();
    }
}
