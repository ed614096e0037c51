//! Signatures that take long to verify: on threads of their own, and so many at one time.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Verifications that are under way or wait for a thread, of all shards. At 0.1 ms each the last one waits for a few
/// hundredths of a second, and holds what a token does: 16 KiB.
const CHECKS_MAX: usize = 256;

/// Verifies what a shard's thread must not wait for.
#[derive(Debug)]
pub(crate) struct Checks {
    places: Arc<Semaphore>,
}

/// Why something was not verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotChecked {
    /// Anybody can cause it: the head of a token is enough to have its signature looked at.
    #[error("as many tokens are being verified as may be; try again later")]
    TooMany,
    /// The process ends.
    #[error("this node is shutting down; connect again")]
    Closing,
}

impl Checks {
    pub(crate) fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(CHECKS_MAX)) }
    }

    /// What `verify` says, on one of the calling shard's few threads for it.
    ///
    /// # Errors
    /// See [`NotChecked`]: `verify` was not called, or was not heard.
    ///
    /// # Cancel safety
    /// Dropped, a verification that has begun goes on, and keeps its place until it is over.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        verify: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NotChecked> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| NotChecked::TooMany)?;
        let verified = tokio::task::spawn_blocking(move || {
            let verified = verify();
            drop(place);
            verified
        });
        verified.await.map_err(|_| NotChecked::Closing)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn so_many_wait_and_the_next_is_refused_until_one_is_over() {
        let checks = Checks::new();
        let (release, released) = sync_channel::<()>(CHECKS_MAX);
        let released = Arc::new(std::sync::Mutex::new(released));
        let held = || {
            let released = Arc::clone(&released);
            checks.run(move || released.lock().unwrap().recv().is_ok())
        };
        let mut waiting = Box::pin(join_all((0..CHECKS_MAX).map(|_| held())));
        // All have their place.
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert_eq!(checks.run(|| true).await, Err(NotChecked::TooMany));
        // Whoever went away keeps it until its verification is over.
        drop(waiting);
        assert_eq!(checks.run(|| true).await, Err(NotChecked::TooMany));
        (0..CHECKS_MAX).for_each(|_| release.send(()).unwrap());
        while checks.places.available_permits() < CHECKS_MAX {
            tokio::task::yield_now().await;
        }
        assert_eq!(checks.run(|| true).await, Ok(true));
    }
}
