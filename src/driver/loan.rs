//! Responses whose bytes others may come to need: whoever made one says so, and a client that takes nothing of it then, or
//! too little, has to give them back.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::driver::clock;
use crate::driver::connections::STALL_TIME;

/// How long a client may have a response once that was recalled, however much it takes: 20 s. Otherwise a byte now and then
/// would keep what others wait for.
const RECALLED_TIME: Duration = Duration::from_secs(20);

/// A loan: who may recall it, and what an [`Edge`](super::listener::Edge) puts among its response's extensions.
#[must_use]
pub fn lend() -> (Lender, Loan) {
    let (recall, recalled) = oneshot::channel();
    (Lender(recall), Loan(Arc::new(Mutex::new(State::Lent(recalled)))))
}

/// Whoever may recall the bytes of one response. Dropped, nobody does.
#[derive(Debug)]
pub struct Lender(oneshot::Sender<Instant>);

impl Lender {
    /// From now on the client's connection ends once it has taken nothing of the response for a second, and in 20 seconds
    /// at the latest if it has not taken all of it.
    pub fn recall(self) {
        // It may be over.
        let _ = self.0.send(clock::now());
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
    Lent(oneshot::Receiver<Instant>),
    Recalled(Instant),
    Kept,
}

impl Loan {
    /// When it was recalled, if it was. Wakes when it is.
    pub(crate) fn poll_recalled(&self, context: &mut Context<'_>) -> Option<Instant> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Lent(recalled) = &mut *state {
            match Pin::new(recalled).poll(context) {
                Poll::Ready(Ok(at)) => *state = State::Recalled(at),
                Poll::Ready(Err(_)) => *state = State::Kept,
                Poll::Pending => {}
            }
        }
        if let State::Recalled(at) = *state { Some(at) } else { None }
    }
}

/// When a client has lost what others want, of which it has taken nothing since then, and which was recalled or not.
pub(super) fn lost(since: Instant, recalled: Option<Instant>) -> Instant {
    let stalled = since + STALL_TIME;
    recalled.map_or(stalled, |at| stalled.min(at + RECALLED_TIME))
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_loan_is_recalled_kept_or_over() {
        let mut context = Context::from_waker(Waker::noop());
        let (lender, loan) = lend();
        assert_eq!(loan.poll_recalled(&mut context), None);
        let before = clock::now();
        lender.recall();
        let at = loan.poll_recalled(&mut context).unwrap();
        assert!((before..=clock::now()).contains(&at));
        assert_eq!(loan.poll_recalled(&mut context), Some(at), "it is the same for ever");
        let (lender, loan) = lend();
        drop(lender);
        assert_eq!([(); 2].map(|()| loan.poll_recalled(&mut context)), [None; 2]);
        let (lender, loan) = lend();
        let other = loan.clone();
        drop(loan);
        assert!(!lender.is_over());
        drop(other);
        assert!(lender.is_over());
        lender.recall();
    }

    #[test]
    fn whoever_goes_on_taking_has_a_time_for_all_of_it() {
        let start = clock::now();
        let check = |since: u64, recalled: Option<u64>, expected: u64| {
            let at = |seconds| start + Duration::from_secs(seconds);
            assert_eq!(lost(at(since), recalled.map(at)), at(expected), "{since} {recalled:?}");
        };
        // Its place is wanted, and not its bytes.
        check(7, None, 8);
        check(900, None, 901);
        check(0, Some(0), 1);
        // It has long taken nothing.
        check(5, Some(60), 6);
        check(78, Some(60), 79);
        check(79, Some(60), 80);
        // However lately it has taken some.
        check(80, Some(60), 80);
        check(900, Some(60), 80);
    }
}
