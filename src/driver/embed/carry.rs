//! Connections that cannot be handed to a shard: what comes over them is copied to a socket that can, and back.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, split};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// Bytes that are copied at once: a client says little.
const FROM_CLIENT_BYTES: usize = 4 << 10;
const TO_CLIENT_BYTES: usize = 16 << 10;
/// How long a client may take none of what is copied before it is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is looked whether a shard that has said its last has closed its end.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Copies both ways until both have ended, or the client is gone.
pub(super) async fn carry(client: impl AsyncRead + AsyncWrite, shard: UnixStream) {
    let (mut from_client, mut to_client) = split(client);
    let (mut from_shard, mut to_shard) = shard.into_split();
    let inward = async {
        let _ = copy(&mut from_client, &mut to_shard, FROM_CLIENT_BYTES).await;
        // The shard closes its end for that, if it has not.
        let _ = to_shard.shutdown().await;
    };
    let outward = async move {
        if copy(&mut from_shard, &mut to_client, TO_CLIENT_BYTES).await.is_ok() {
            let _ = in_time(to_client.shutdown()).await;
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
                () = closed(&from_shard) => {}
            }
        }
    }
}

/// Waits until the shard has closed its end, and not only said its last.
async fn closed(shard: &OwnedReadHalf) {
    // Once writable is always writable: no readiness tells of the change.
    while shard.ready(Interest::WRITABLE).await.is_ok_and(|ready| !ready.is_write_closed()) {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Copies until the end of `from`.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    bytes_max: usize,
) -> io::Result<()> {
    let mut buffer = vec![0; bytes_max].into_boxed_slice();
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(());
        }
        in_time(async {
            to.write_all(&buffer[..bytes]).await?;
            to.flush().await
        })
        .await?;
    }
}

async fn in_time(write: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(WRITE_TIMEOUT, write).await?
}
