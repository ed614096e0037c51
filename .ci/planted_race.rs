//! Two threads and a cell: with `race` unordered, without it ordered. The sanitizer must tell them apart.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

struct Shared {
    value: UnsafeCell<u64>,
    ready: AtomicBool,
}

// SAFETY: not upheld with `race`, which is the point.
unsafe impl Sync for Shared {}

fn main() {
    let race = std::env::args().any(|argument| argument == "race");
    let (store, load) = if race { (Ordering::Relaxed, Ordering::Relaxed) } else { (Ordering::Release, Ordering::Acquire) };
    let shared = Arc::new(Shared { value: UnsafeCell::new(0), ready: AtomicBool::new(false) });
    let writer = Arc::clone(&shared);
    let thread = thread::spawn(move || {
        // SAFETY: the reader waits for `ready`.
        unsafe { *writer.value.get() = 7 };
        writer.ready.store(true, store);
    });
    while !shared.ready.load(load) {
        thread::yield_now();
    }
    // SAFETY: the writer is done once `ready` is set.
    assert_eq!(unsafe { *shared.value.get() }, 7);
    thread.join().unwrap();
}
