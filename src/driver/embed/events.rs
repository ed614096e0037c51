//! Event streams as response bodies: a tab's frames as records, between them what keeps the stream alive.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame as BodyFrame, SizeHint};

use crate::engine::mailboxes::{Piece, TabMailbox};
use crate::proto::frame::Frame;
use crate::proto::sse;

/// Records up to this many bytes are copied: that costs less than to share them, and a server joins them in its buffers
/// anyway. What is larger is the frame's own memory, whoever reads it, and counts there.
const COPIED_BYTES_MAX: usize = 2 << 10;

/// The body of an answer to a reader of events: the tab's records until it ends, and whether it should come back; or why
/// there is no tab. Dropping it ends the tab.
#[derive(Debug)]
pub struct EventsBody(Content);

#[derive(Debug)]
enum Content {
    Tab(Box<Records>),
    /// A refusal, or what is said at the end.
    Whole(Full<Bytes>),
}

#[derive(Debug)]
struct Records {
    tab: TabMailbox,
    /// The rest of a record that has begun.
    rest: Option<Bytes>,
}

impl EventsBody {
    pub(super) fn of(tab: TabMailbox) -> Self {
        Self(Content::Tab(Box::new(Records { tab, rest: None })))
    }

    pub(super) fn refusal(body: Full<Bytes>) -> Self {
        Self(Content::Whole(body))
    }
}

impl Records {
    /// The next part of a record; None once there are no more of them. None is empty: a server might take that for the
    /// end.
    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(rest) = self.rest.take() {
                return Poll::Ready(Some(rest));
            }
            let Some(piece) = ready!(self.tab.poll_piece(context)) else { return Poll::Ready(None) };
            let (part, rest) = record(&piece);
            self.rest = rest;
            if !part.is_empty() {
                return Poll::Ready(Some(part));
            }
        }
    }

    /// What is said once there are no more of them.
    fn last_record(&self) -> String {
        self.tab.ending().map(sse::last_record).unwrap_or_default()
    }
}

/// A piece as it stands in an event stream, without the chunk around it, which is the server's to make: nothing if it has
/// no form there.
fn record(piece: &Piece) -> (Bytes, Option<Bytes>) {
    match piece {
        Piece::Chunk(chunk) => (Bytes::copy_from_slice(sse::unchunked(chunk)), None),
        Piece::Frame(frame) => match frame.event_stream().map(|form| form.record()) {
            None => (Bytes::new(), None),
            Some([start, rest]) if start.len() + rest.len() <= COPIED_BYTES_MAX => {
                ([start, rest].concat().into(), None)
            }
            Some([start, _]) => (Bytes::copy_from_slice(start), Some(Bytes::from_owner(Shared(frame.clone())))),
        },
    }
}

/// A frame as the owner of what its record goes on with.
struct Shared(Frame);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.event_stream().map_or(&[], |form| form.record()[1])
    }
}

impl Body for EventsBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Infallible>>> {
        let content = &mut self.get_mut().0;
        loop {
            match content {
                Content::Whole(body) => return Pin::new(body).poll_frame(context),
                Content::Tab(records) => match ready!(records.poll_part(context)) {
                    Some(part) => return Poll::Ready(Some(Ok(BodyFrame::data(part)))),
                    None => *content = Content::Whole(records.last_record().into()),
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Content::Whole(body) => body.is_end_stream(),
            Content::Tab(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Content::Whole(body) => body.size_hint(),
            Content::Tab(_) => SizeHint::default(),
        }
    }
}
