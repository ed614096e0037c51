//! Event streams as response bodies: a tab's frames as records, between them what keeps the stream alive.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame as BodyFrame, SizeHint};

use crate::engine::mailboxes::{Piece, TabMailbox};
use crate::proto::sse;

/// The body of an answer to a reader of events: the tab's records until it ends, or why there is no tab. Dropping it ends
/// the tab.
#[derive(Debug)]
pub struct EventsBody(Content);

#[derive(Debug)]
enum Content {
    Tab(Box<TabMailbox>),
    Refusal(Full<Bytes>),
}

impl EventsBody {
    pub(super) fn of(tab: TabMailbox) -> Self {
        Self(Content::Tab(Box::new(tab)))
    }

    pub(super) fn refusal(body: Full<Bytes>) -> Self {
        Self(Content::Refusal(body))
    }
}

/// A piece as it stands in an event stream, without the chunk around it, which is the server's to make.
fn record(piece: &Piece) -> Option<Bytes> {
    match piece {
        Piece::Frame(frame) => frame.event_stream().map(|form| Bytes::from(form.record().concat())),
        Piece::Chunk(chunk) => Some(Bytes::copy_from_slice(sse::unchunked(chunk))),
    }
}

impl Body for EventsBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Infallible>>> {
        match &mut self.get_mut().0 {
            Content::Refusal(body) => Pin::new(body).poll_frame(context),
            Content::Tab(tab) => loop {
                let Some(piece) = ready!(tab.poll_piece(context)) else { return Poll::Ready(None) };
                // What has no form there, and an empty record, which a server might take for the end.
                if let Some(record) = record(&piece).filter(|record| !record.is_empty()) {
                    return Poll::Ready(Some(Ok(BodyFrame::data(record))));
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Content::Refusal(body) => body.is_end_stream(),
            Content::Tab(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Content::Refusal(body) => body.size_hint(),
            Content::Tab(_) => SizeHint::default(),
        }
    }
}
