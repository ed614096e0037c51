//! What takes too long for a shard's thread, for as long as somebody waits for it.

use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// What is about more bytes than these leaves the shard's thread: below it takes a few dozen microseconds.
pub(crate) const APART_BYTES: usize = 64 << 10;

/// Runs `work` on the threads of `control`. None: it panicked, or the process ends.
///
/// # Cancel safety
/// Dropped, it ends `work` where that waits next.
pub(crate) async fn apart<T: Send + 'static>(
    control: &Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    let mut tasks = JoinSet::new();
    tasks.spawn_on(work, control);
    tasks.join_next().await?.ok()
}

/// Runs `work` [apart](apart()) if it is about more bytes than [`APART_BYTES`], and otherwise here.
///
/// # Cancel safety
/// As that of [`apart`].
pub(crate) async fn apart_if_large<T: Send + 'static>(
    control: &Handle,
    bytes: usize,
    work: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    if bytes > APART_BYTES { apart(control, work).await } else { Some(work.await) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn what_is_large_is_on_another_thread() {
        let control = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let shard = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (bytes, is_here) in [(0, true), (APART_BYTES, true), (APART_BYTES + 1, false)] {
            let work = apart_if_large(control.handle(), bytes, async { thread::current().id() });
            assert_eq!(shard.block_on(work) == Some(thread::current().id()), is_here, "{bytes}");
        }
    }

    #[tokio::test]
    async fn what_nobody_waits_for_ends() {
        let held = Arc::new(());
        let other = Arc::clone(&held);
        let control = Handle::current();
        let mut waiting = Box::pin(apart(&control, async move {
            std::future::pending::<()>().await;
            drop(other);
        }));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(waiting);
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
