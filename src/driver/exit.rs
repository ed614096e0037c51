//! The way of a connection out of hyper.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::service::Service;
use hyper::{Request, Response};

use crate::driver::addresses::Place;
use crate::driver::head;
use crate::driver::listener::{Answer, Edge};
use crate::driver::loan::Loan;
use crate::driver::stream::Stream;
use crate::fanout::session::Address;
use crate::metrics::{Metrics, StatusClass};

/// What the service decided, and whether hyper still has something to write.
#[derive(Default)]
pub(super) struct Exit {
    pub(super) session: RefCell<Option<Opened>>,
    /// A request came, and was not answered yet.
    pub(super) is_busy: Cell<bool>,
    /// A request came since that was looked at.
    pub(super) has_asked: Cell<bool>,
    pub(super) is_write_blocked: Cell<bool>,
    pub(super) written_bytes: Cell<u64>,
    /// Of responses that the client has still to take. hyper begins no more than the next one behind one that waits.
    pub(super) loans: RefCell<Vec<Loan>>,
    /// One of them was wanted back.
    pub(super) is_recalled: Cell<bool>,
}

impl Exit {
    /// Since when a response that the client has still to take is wanted back, if one is. Wakes when it is.
    pub(super) fn poll_recalled(&self, context: &mut Context<'_>) -> Option<Instant> {
        // Each has to be asked, to wake.
        let recalled = self.loans.borrow().iter().filter_map(|loan| loan.poll_recalled(context)).min();
        self.is_recalled.set(recalled.is_some());
        recalled
    }
}

/// A session that waits for its connection.
pub(super) struct Opened {
    pub(super) address: Address,
    pub(super) head: Vec<u8>,
    pub(super) place: Option<Place>,
}

pub(super) struct EdgeService {
    pub(super) edge: Rc<dyn Edge>,
    pub(super) peer: SocketAddr,
    pub(super) exit: Rc<Exit>,
    pub(super) metrics: Arc<Metrics>,
}

impl Service<Request<Incoming>> for EdgeService {
    type Response = Response<Full<Bytes>>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        if let Some(fault) = head::fault(&request) {
            let response = fault.response();
            self.metrics.engine.http_responses.of(StatusClass::of(response.status().as_u16())).increment();
            return Box::pin(std::future::ready(Ok(response)));
        }
        let answer = Rc::clone(&self.edge).answer(request, self.peer);
        let exit = Rc::clone(&self.exit);
        exit.is_busy.set(true);
        exit.has_asked.set(true);
        Box::pin(async move {
            match answer.await {
                Answer::Respond(mut response) => {
                    exit.is_busy.set(false);
                    exit.loans.borrow_mut().extend(response.extensions_mut().remove::<Loan>());
                    Ok(response)
                }
                Answer::Session { address, head, place, .. } => {
                    *exit.session.borrow_mut() = Some(Opened { address, head, place });
                    // The connection is taken from under hyper: there is no response for it to write.
                    std::future::pending().await
                }
            }
        })
    }
}

/// The connection as hyper sees it, with a note of whether a write is stuck.
pub(super) struct Io {
    pub(super) stream: Stream,
    pub(super) exit: Rc<Exit>,
}

impl Io {
    fn note(&self, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.exit.is_write_blocked.set(poll.is_pending());
        if let Poll::Ready(Ok(bytes)) = &poll {
            self.exit.written_bytes.set(self.exit.written_bytes.get() + *bytes as u64);
        }
        poll
    }
}

impl Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl Write for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
