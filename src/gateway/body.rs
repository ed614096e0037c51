//! Request bodies: read within a limit, a time, and a budget for all of them together.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::CONTENT_LENGTH;
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::gateway::response::{Answered, error};
use crate::metrics::{Metrics, Refusal};

/// A body's bytes, and its place in the budget for as long as they are held.
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _places: Option<OwnedSemaphorePermit>,
}

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body ended before its end")]
    Broken,
    #[error("the body did not come in time")]
    Timeout,
    #[error("the body is over the limit of {bytes_max} bytes")]
    TooLarge { bytes_max: usize },
    #[error("too many bodies are being read; try again later")]
    TooMany,
}

impl BodyError {
    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::Broken => StatusCode::BAD_REQUEST,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooMany => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub(crate) const fn code(self) -> &'static str {
        match self {
            Self::Broken => "bad_request",
            Self::Timeout => "timeout",
            Self::TooLarge { .. } => "too_large",
            Self::TooMany => "overloaded",
        }
    }

    /// The answer of the routes that are not OpenAI's.
    pub(crate) fn answer(self) -> Answered {
        error(self.status(), self.code(), &self.to_string())
    }
}

/// The bytes of an answer, together with its places in whatever bounds them: these go when the last byte is written.
pub(crate) fn kept_with(bytes: Vec<u8>, places: impl Send + 'static) -> Bytes {
    struct Kept<T> {
        bytes: Vec<u8>,
        _places: T,
    }
    impl<T> AsRef<[u8]> for Kept<T> {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    Bytes::from_owner(Kept { bytes, _places: places })
}

/// How much may be read.
#[derive(Debug, Clone)]
pub(crate) struct BodyLimits {
    pub(crate) timeout: Duration,
    pub(crate) budget: Arc<Semaphore>,
    /// Where bodies are counted for which there was no room.
    pub(crate) metrics: Arc<Metrics>,
}

impl BodyLimits {
    /// Reads the whole body, of `bytes_max` bytes at the most.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub(crate) async fn read(&self, request: Request<Incoming>, bytes_max: usize) -> Result<Held, BodyError> {
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if announced.is_some_and(|bytes: u64| bytes > bytes_max as u64) {
            return Err(BodyError::TooLarge { bytes_max });
        }
        let read = self.collect(request.into_body(), bytes_max);
        tokio::time::timeout(self.timeout, read).await.map_err(|_| BodyError::Timeout)?
    }

    async fn collect(&self, mut body: Incoming, bytes_max: usize) -> Result<Held, BodyError> {
        let mut first = Bytes::new();
        let mut whole = BytesMut::new();
        let mut places: Option<OwnedSemaphorePermit> = None;
        while let Some(frame) = body.frame().await {
            let Ok(chunk) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
            let place = self.place(chunk.len()).ok_or(BodyError::TooMany)?;
            match &mut places {
                Some(places) => places.merge(place),
                None => places = Some(place),
            }
            if first.len() + whole.len() + chunk.len() > bytes_max {
                return Err(BodyError::TooLarge { bytes_max });
            }
            if first.is_empty() && whole.is_empty() {
                first = chunk;
                continue;
            }
            if !first.is_empty() {
                let rest = usize::try_from(body.size_hint().lower()).unwrap_or(0).min(bytes_max);
                whole.reserve(first.len() + chunk.len() + rest);
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&chunk);
        }
        let bytes = if whole.is_empty() { first } else { whole.freeze() };
        Ok(Held { bytes, _places: places })
    }

    /// Takes `bytes` of the budget, for as long as what it returns is held. `None` if there are not so many: that is counted.
    pub(crate) fn place(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let place = Arc::clone(&self.budget).try_acquire_many_owned(bytes).ok();
        if place.is_none() {
            self.metrics.engine.refusals.of(Refusal::Bodies).increment();
        }
        place
    }
}
