//! Where frames are written: a small buffer of each thread, and a bounded pool of large ones.
//!
//! Fresh memory for a large frame costs several times what the encoding does (page faults), so the buffers of
//! dropped large frames are kept for the next ones.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::proto::json::Buffer;

/// Bytes of unused buffers that the process keeps, all sizes together: its worst case beside live frames.
pub const POOLED_BYTES_MAX: usize = 64 << 20;

/// A buffer larger than this is not kept: one would push out all others.
const POOLED_BUFFER_BYTES_MAX: usize = POOLED_BYTES_MAX / 2;

/// How many unused buffers are kept: what bounds the search for one.
const POOLED_BUFFERS_MAX: usize = 64;

/// A thread keeps its buffer for small frames up to this size.
const SCRATCH_BYTES_MAX: usize = 128 << 10;

const SCRATCH_BYTES: usize = 4 << 10;

thread_local! {
    static SCRATCH: Cell<Buffer> = const { Cell::new(Buffer::new()) };
}

/// Runs `write` on this thread's buffer, which is empty.
pub(super) fn with_scratch<T>(write: impl FnOnce(&mut Buffer) -> T) -> T {
    // A thread that is ending has no buffer any more; neither has a `write` inside a `write`. Both get a fresh one.
    let mut buffer = SCRATCH.try_with(Cell::take).unwrap_or_default();
    if buffer.room_bytes() == 0 {
        buffer = Buffer::with_room(SCRATCH_BYTES);
    }
    let result = write(&mut buffer);
    if buffer.room_bytes() <= SCRATCH_BYTES_MAX {
        buffer.clear();
        // What is displaced, if anything, is an empty buffer.
        let _ = SCRATCH.try_with(|scratch| scratch.set(buffer));
    }
    result
}

/// Unused buffers, the one that was returned last at the back.
#[derive(Debug)]
struct Pool {
    buffers: VecDeque<Buffer>,
    bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { buffers: VecDeque::new(), bytes: 0 });

fn lock() -> MutexGuard<'static, Pool> {
    // The pool is whole between any two statements that could panic.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of unused buffers that the process keeps now, at most [`POOLED_BYTES_MAX`].
#[must_use]
pub fn pooled_bytes() -> usize {
    lock().bytes
}

/// Rounds up to a quarter of a power of two, so that frames of about one size find each other's buffers.
const fn size_class(bytes: usize) -> usize {
    bytes.next_multiple_of(bytes.next_power_of_two() / 8)
}

/// A buffer that goes back to the pool when it is dropped.
#[derive(Debug)]
pub(super) struct Pooled(Buffer);

impl Pooled {
    /// An empty buffer with room for `bytes` (more than 8) and at most twice its size class.
    pub(super) fn take(bytes: usize) -> Self {
        let class = size_class(bytes);
        let found = {
            let mut pool = lock();
            let fits = |buffer: &Buffer| (class..=2 * class).contains(&buffer.room_bytes());
            let place = pool.buffers.iter().rposition(fits);
            let buffer = place.and_then(|place| pool.buffers.remove(place));
            pool.bytes -= buffer.as_ref().map_or(0, Buffer::room_bytes);
            buffer
        };
        Self(found.unwrap_or_else(|| Buffer::with_room(class)))
    }

    pub(super) const fn buffer(&self) -> &Buffer {
        &self.0
    }

    pub(super) const fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.0
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.0);
        let bytes = buffer.room_bytes();
        if bytes > POOLED_BUFFER_BYTES_MAX {
            return;
        }
        buffer.clear();
        // The oldest make room. They are dropped after the lock.
        let mut displaced = Vec::new();
        let mut pool = lock();
        while pool.bytes + bytes > POOLED_BYTES_MAX || pool.buffers.len() >= POOLED_BUFFERS_MAX {
            let Some(oldest) = pool.buffers.pop_front() else { break };
            pool.bytes -= oldest.room_bytes();
            displaced.push(oldest);
        }
        pool.bytes += bytes;
        pool.buffers.push_back(buffer);
        drop(pool);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_class_wastes_at_most_a_quarter() {
        let check = |bytes: usize, expected: usize| assert_eq!(size_class(bytes), expected, "{bytes}");
        check(64 << 10, 64 << 10);
        check((64 << 10) + 1, 80 << 10);
        check((1 << 20) + 1, 5 << 18);
        check(1_398_500, 6 << 18);
        for bytes in (9_usize..1 << 22).step_by(997) {
            assert!((bytes..bytes + bytes.div_ceil(4) + 1).contains(&size_class(bytes)), "{bytes}");
        }
    }

    /// One test for all of the pool: it is the process's.
    #[test]
    fn the_pool_hands_buffers_out_again_and_stays_within_its_bound() {
        let class = size_class(9 << 20);
        let mut first = Pooled::take(9 << 20);
        first.buffer_mut().put(b"used");
        let place = first.buffer().written().as_ptr();
        drop(first);
        let second = Pooled::take(9 << 20);
        assert_eq!(second.buffer().written(), b"");
        assert_eq!(second.buffer().written().as_ptr(), place);
        assert_eq!(second.buffer().room_bytes(), class);

        let many: Vec<Pooled> = (0..40).map(|_| Pooled::take(9 << 20)).collect();
        drop(many);
        assert!(pooled_bytes() <= POOLED_BYTES_MAX);
        let small: Vec<Pooled> = (0..200).map(|_| Pooled::take(64 << 10)).collect();
        drop(small);
        assert!(pooled_bytes() <= POOLED_BYTES_MAX);
        assert!(lock().buffers.len() <= POOLED_BUFFERS_MAX);
        drop(Pooled::take(POOLED_BYTES_MAX));
        assert!(pooled_bytes() <= POOLED_BYTES_MAX);
    }

    #[test]
    fn a_thread_reuses_its_small_buffer_but_not_one_that_grew() {
        let place = with_scratch(|buffer| {
            buffer.put(&[1; 100]);
            buffer.written().as_ptr()
        });
        assert_eq!(with_scratch(|buffer| (buffer.len(), buffer.written().as_ptr())), (0, place));
        with_scratch(|buffer| buffer.put(&vec![1; SCRATCH_BYTES_MAX + 1]));
        with_scratch(|buffer| assert_eq!(buffer.room_bytes(), SCRATCH_BYTES));
        // One inside the other.
        with_scratch(|outer| {
            outer.put(b"outer");
            with_scratch(|inner| assert!(inner.is_empty()));
            assert_eq!(outer.written(), b"outer");
        });
    }
}
