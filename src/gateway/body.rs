//! Request bodies: read within a limit, a time, and a budget for all of them together.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::{CONTENT_LENGTH, RETRY_AFTER};
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::gateway::response::{Answered, error, error_with};

/// A body's bytes, and its place in the budget for as long as they are held.
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _places: Option<OwnedSemaphorePermit>,
}

/// How much may be read.
#[derive(Debug, Clone)]
pub(crate) struct BodyLimits {
    pub(crate) bytes_max: usize,
    pub(crate) timeout: Duration,
    pub(crate) budget: Arc<Semaphore>,
}

impl BodyLimits {
    /// Reads the whole body.
    ///
    /// # Errors
    /// The answer to give: 400 (broken), 408 (too slow), 413 (too large) or 503 (too many at once).
    pub(crate) async fn read(&self, request: Request<Incoming>) -> Result<Held, Answered> {
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|bytes: u64| bytes > self.bytes_max as u64) {
            return Err(self.too_large());
        }
        let read = self.collect(request.into_body());
        let timed_out = |_| error(StatusCode::REQUEST_TIMEOUT, "timeout", "the body did not come in time");
        tokio::time::timeout(self.timeout, read).await.map_err(timed_out)?
    }

    async fn collect(&self, mut body: Incoming) -> Result<Held, Answered> {
        let mut first = Bytes::new();
        let mut whole = BytesMut::new();
        let mut places: Option<OwnedSemaphorePermit> = None;
        while let Some(frame) = body.frame().await {
            let broken = |_| error(StatusCode::BAD_REQUEST, "bad_request", "the body ended before its end");
            let Ok(chunk) = frame.map_err(broken)?.into_data() else { continue };
            let place = self.place(chunk.len()).ok_or_else(too_many)?;
            match &mut places {
                Some(places) => places.merge(place),
                None => places = Some(place),
            }
            if first.len() + whole.len() + chunk.len() > self.bytes_max {
                return Err(self.too_large());
            }
            if first.is_empty() && whole.is_empty() {
                first = chunk;
                continue;
            }
            if !first.is_empty() {
                let rest = usize::try_from(body.size_hint().lower()).unwrap_or(0).min(self.bytes_max);
                whole.reserve(first.len() + chunk.len() + rest);
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&chunk);
        }
        let bytes = if whole.is_empty() { first } else { whole.freeze() };
        Ok(Held { bytes, _places: places })
    }

    fn place(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Arc::clone(&self.budget).try_acquire_many_owned(bytes).ok()
    }

    fn too_large(&self) -> Answered {
        let message = format!("the body is over the limit of {} bytes", self.bytes_max);
        error(StatusCode::PAYLOAD_TOO_LARGE, "too_large", &message)
    }
}

fn too_many() -> Answered {
    let message = "too many bodies are being read; try again later";
    error_with(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message, (RETRY_AFTER, "1"))
}
