//! Responses whose bytes others may come to need: whoever made one says so, and a client that takes nothing of it then
//! has to give them back.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// A loan: who may recall it, and what an [`Edge`](super::listener::Edge) puts among its response's extensions.
#[must_use]
pub fn lend() -> (Lender, Loan) {
    let (recall, recalled) = oneshot::channel();
    (Lender(recall), Loan(Arc::new(Mutex::new(State::Lent(recalled)))))
}

/// Whoever may recall the bytes of one response. Dropped, nobody does.
#[derive(Debug)]
pub struct Lender(oneshot::Sender<()>);

impl Lender {
    /// From now on the client's connection ends once it has taken nothing of the response for a second. Whoever goes on
    /// taking may keep it.
    pub fn recall(self) {
        // It may be over.
        let _ = self.0.send(());
    }

    /// Whether all of it was taken, or nobody takes it any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_closed()
    }
}

/// The other end of it, which the connection looks at while its client has the response to take.
#[derive(Debug, Clone)]
pub struct Loan(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    Lent(oneshot::Receiver<()>),
    Recalled,
    Kept,
}

impl Loan {
    /// Whether it was recalled. Wakes when it is.
    pub(super) fn poll_recalled(&self, context: &mut Context<'_>) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Lent(recalled) = &mut *state {
            match Pin::new(recalled).poll(context) {
                Poll::Ready(Ok(())) => *state = State::Recalled,
                Poll::Ready(Err(_)) => *state = State::Kept,
                Poll::Pending => {}
            }
        }
        matches!(*state, State::Recalled)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_loan_is_recalled_kept_or_over() {
        let mut context = Context::from_waker(Waker::noop());
        let (lender, loan) = lend();
        assert!(!loan.poll_recalled(&mut context));
        lender.recall();
        assert!(loan.poll_recalled(&mut context) && loan.poll_recalled(&mut context));
        let (lender, loan) = lend();
        drop(lender);
        assert!(!loan.poll_recalled(&mut context) && !loan.poll_recalled(&mut context));
        let (lender, loan) = lend();
        let other = loan.clone();
        drop(loan);
        assert!(!lender.is_over());
        drop(other);
        assert!(lender.is_over());
        lender.recall();
    }
}
