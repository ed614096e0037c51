//! Clients that leave and come back: they take with them everything that was published before they were chosen to go, so
//! that nothing that had to come to them goes unchecked.

use std::collections::HashMap;

use super::Reader;
use crate::bench::client::State;
use crate::bench::clock;
use crate::bench::shared::Count;
use crate::bench::websocket::Opcode;

/// A client that goes as soon as it has everything that was published before.
#[derive(Debug)]
struct Leaving {
    /// By lane, the number that it has to have reached.
    ends: Vec<u32>,
    /// When it goes anyway.
    deadline: u64,
}

/// Who of a thread's clients is about to leave.
#[derive(Debug, Default)]
pub(super) struct Churn {
    leaving: HashMap<usize, Leaving>,
    /// When the first was due.
    since: Option<u64>,
    /// How many were chosen so far.
    count: u64,
    /// Whose turn it is.
    cursor: usize,
}

impl Churn {
    /// The client leaves no more. Where its lanes had to be, if it was about to.
    pub(super) fn forget(&mut self, local: usize) -> Option<Vec<u32>> {
        self.leaving.remove(&local).map(|leaving| leaving.ends)
    }
}

impl Reader {
    /// Lets as many clients go as are due, and those whose time is up.
    pub(super) fn come_and_go(&mut self, now: u64) {
        let mine = self.plan.mix.churners.saturating_sub(self.first).min(self.clients.len());
        if mine == 0 {
            return;
        }
        #[expect(clippy::cast_possible_truncation, reason = "positive, and far below 2^52")]
        let due = {
            let share = self.plan.churn_rate * mine as f64 / self.plan.mix.churners as f64;
            let since = *self.churn.since.get_or_insert(now);
            ((now - since) as f64 / 1e9 * share) as u64
        };
        // What could not be done when it was due is not made up for all at once.
        self.churn.count = self.churn.count.max(due.saturating_sub(mine as u64));
        let mut tried = 0;
        while self.churn.count < due && tried < mine {
            let local = self.churn.cursor % mine;
            self.churn.cursor += 1;
            tried += 1;
            let client = &mut self.clients[local];
            if client.state == State::Closed && self.next > local {
                // Its last attempt failed, or the server cut it.
                self.connect(local);
                self.churn.count += 1;
            } else if client.is_subscribed && !client.is_leaving {
                client.is_leaving = true;
                let ends = self.check.ends(local, self.first + local);
                let deadline = now + clock::nanos_of(self.plan.stall);
                self.churn.leaving.insert(local, Leaving { ends, deadline });
                self.leave_if_it_may(local, now);
                self.churn.count += 1;
            }
        }
        let is_late = |leaving: &Leaving| leaving.deadline < now;
        let late: Vec<usize> =
            self.churn.leaving.iter().filter(|(_, leaving)| is_late(leaving)).map(|(local, _)| *local).collect();
        for local in late {
            self.leave_if_it_may(local, now);
        }
    }

    /// The client goes if it has what was published before that was decided, or has waited too long for it; then it
    /// comes back at once. Every other one says goodbye.
    pub(super) fn leave_if_it_may(&mut self, local: usize, now: u64) {
        let Some(leaving) = self.churn.leaving.get(&local) else { return };
        if !self.check.has_reached(local, &leaving.ends) && now < leaving.deadline {
            return;
        }
        let Some(Leaving { ends, .. }) = self.churn.leaving.remove(&local) else { return };
        let lost = self.check.settle(local, &ends);
        let client = &mut self.clients[local];
        if self.churn.count.is_multiple_of(2) && !client.is_stream {
            client.write_frame(Opcode::Close, &1000u16.to_be_bytes());
        }
        client.close();
        self.check.tally.add(Count::Lost, lost);
        self.check.tally.subtract(Count::Open, 1);
        self.check.tally.add(Count::Left, 1);
        self.connect(local);
    }
}
