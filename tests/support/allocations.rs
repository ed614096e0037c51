//! The system's allocator, counted: how often each thread allocates, and how many bytes the process holds.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static OWN_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Relaxed: a statistic, publishes nothing.
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Passes on to the system's allocator.
struct Counting;

#[expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts and passes on")]
// SAFETY: every call is passed on to `System` unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        hold(layout.size(), 0);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(layout.size(), bytes);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

fn count(before: usize, after: usize) {
    // A thread that is ending counts no more.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
    hold(before, after);
}

fn hold(before: usize, after: usize) {
    let more = after.wrapping_sub(before);
    let _ = OWN_BYTES.try_with(|bytes| bytes.set(bytes.get().wrapping_add(more)));
    LIVE_BYTES.fetch_add(more, Ordering::Relaxed);
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often this thread allocates in `run`.
pub(crate) fn allocations<T>(run: impl FnOnce() -> T) -> (usize, T) {
    let before = ALLOCATIONS.with(Cell::get);
    let result = run();
    (ALLOCATIONS.with(Cell::get) - before, result)
}

/// How many bytes more this thread holds after `run`, as they were asked for.
pub(crate) fn held_bytes<T>(run: impl FnOnce() -> T) -> (usize, T) {
    let before = OWN_BYTES.with(Cell::get);
    let result = run();
    let held = OWN_BYTES.with(Cell::get).wrapping_sub(before);
    assert!(held < usize::MAX / 2, "it gave more back than it took");
    (held, result)
}

/// Bytes that the process holds, as they were asked for.
pub(crate) fn live_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}
