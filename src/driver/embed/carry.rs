//! Connections that cannot be handed to a shard: what comes over them is copied to a socket that can, and back.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, split};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::time::Instant;

use crate::driver::clock;
use crate::proto::limits::SessionLimits;

/// Bytes that are copied at once: a client says little.
const FROM_CLIENT_BYTES: usize = 4 << 10;
const TO_CLIENT_BYTES: usize = 16 << 10;
/// How long a client may take none of what is copied before it is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked whether a shard that has said its last has closed its end.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The same while a client stalls, of which there may be many, and for long.
const LOOK_AGAIN_STALLED: Duration = Duration::from_millis(500);

/// Copies both ways until both have ended, or the client is gone. Once the shard has closed its end, the client has a
/// [`SessionLimits::close_timeout`] to take what was said to it.
pub(super) async fn carry(client: impl AsyncRead + AsyncWrite, shard: UnixStream, limits: Arc<ArcSwap<SessionLimits>>) {
    let (mut from_client, mut to_client) = split(client);
    let (mut from_shard, mut to_shard) = shard.into_split();
    let inward = async {
        let mut buffer = vec![0; FROM_CLIENT_BYTES].into_boxed_slice();
        while let Ok(bytes @ 1..) = from_client.read(&mut buffer).await {
            if in_time(to_shard.write_all(&buffer[..bytes])).await.is_err() {
                break;
            }
        }
        // The shard closes its end for that, if it has not.
        let _ = to_shard.shutdown().await;
    };
    let outward = async move {
        let mut patience = Patience { limits, deadline: None };
        if copy_out(&mut from_shard, &mut to_client, &mut patience).await.is_ok() {
            let _ = patience.bound(&from_shard, to_client.shutdown()).await;
        }
        from_shard
    };
    tokio::pin!(inward, outward);
    tokio::select! {
        () = &mut inward => drop(outward.await),
        from_shard = &mut outward => {
            // Its answer to our close, for which the shard waits no longer than it does for any.
            tokio::select! {
                () = inward => {}
                () = closed(&from_shard, LOOK_AGAIN) => {}
            }
        }
    }
}

/// Waits until the shard has closed its end, and not only said its last.
async fn closed(shard: &OwnedReadHalf, look_again: Duration) {
    // Once writable is always writable: no readiness tells of the change.
    while shard.ready(Interest::WRITABLE).await.is_ok_and(|ready| !ready.is_write_closed()) {
        tokio::time::sleep(look_again).await;
    }
}

/// Copies what the shard says until its end.
async fn copy_out(
    from: &mut OwnedReadHalf,
    to: &mut (impl AsyncWrite + Unpin),
    patience: &mut Patience,
) -> io::Result<()> {
    let mut buffer = vec![0; TO_CLIENT_BYTES].into_boxed_slice();
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(());
        }
        let write = async {
            to.write_all(&buffer[..bytes]).await?;
            to.flush().await
        };
        patience.bound(from, write).await?;
    }
}

/// How long a client is waited for.
struct Patience {
    limits: Arc<ArcSwap<SessionLimits>>,
    /// Once the shard has closed its end: for all that is left.
    deadline: Option<Instant>,
}

impl Patience {
    /// Waits for a write as long as a client may take for one; but when the shard has closed its end, no longer than until
    /// the deadline.
    async fn bound(&mut self, shard: &OwnedReadHalf, write: impl Future<Output = io::Result<()>>) -> io::Result<()> {
        let last = async {
            closed(shard, LOOK_AGAIN_STALLED).await;
            let close_timeout = self.limits.load().close_timeout.min(clock::TIME_MAX);
            tokio::time::sleep_until(*self.deadline.get_or_insert_with(|| Instant::now() + close_timeout)).await;
        };
        tokio::select! {
            biased;
            written = in_time(write) => written,
            () = last => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn in_time(write: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(WRITE_TIMEOUT, write).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_little_has_one_close_timeout_for_all_that_is_left() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (client, mut stalled) = tokio::io::duplex(64);
        let limits = SessionLimits { close_timeout: Duration::from_secs(5), ..SessionLimits::default() };
        let mut shard = ours;
        shard.write_all(&[7; 64 << 10]).await.unwrap();
        drop(shard);
        let start = Instant::now();
        let reads = async {
            // A buffer's worth every 50 seconds would be in time for each of its writes.
            let mut little = [0; TO_CLIENT_BYTES];
            while stalled.read_exact(&mut little).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(50)).await;
            }
        };
        tokio::select! {
            () = carry(client, theirs, Arc::new(ArcSwap::from_pointee(limits))) => {}
            () = reads => {}
        }
        let taken = start.elapsed();
        assert!(taken >= Duration::from_secs(5) && taken < Duration::from_secs(7), "{taken:?}");
    }
}
