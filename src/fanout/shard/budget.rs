//! The byte budget: past it the fattest queues are cut first, whichever shard they are on.

use std::time::{Duration, Instant};

use crate::fanout::hub::{Classes, NOBODY};
use crate::fanout::shard::Shard;
use crate::fanout::shard::slab::State;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame;

/// Sessions that are cut in one turn while the process is over its budget.
const CUTS_PER_TURN: usize = 8;
/// For so long the others' answers are good: a turn comes in every second, if not before.
const ANSWERS_LIFETIME: Duration = Duration::from_secs(2);

/// The sessions of one shard that are cut first.
pub(super) struct Fattest {
    /// Their size class, [`NOBODY`] if there are none: one more than the power of two of bytes, rounded down.
    class: u32,
    /// The fattest last.
    slots: Vec<u32>,
}

impl Shard {
    /// Cuts the fattest queues, a few a turn, while the process is over its byte budget and no other shard of this hub
    /// has fatter ones. What is cut frees its memory a little later: until the next tick it counts as free.
    pub(super) fn keep_to_budget(&mut self, now: Instant) {
        let asked = self.asked.take();
        let sealed = usize::try_from(self.metrics.sealed_bytes.value()).unwrap_or(usize::MAX);
        let entries = self.pool.lent_bytes() + self.frames.own_bytes() + sealed;
        self.metrics.queue_entry_bytes.store(entries as u64);
        let known = frame::live_bytes() + entries + self.entries_elsewhere;
        // The other shards' part is looked up once a tick, and when it may matter.
        if known <= self.bytes_budget / 4 * 3 {
            return;
        }
        self.look_elsewhere();
        let held = frame::live_bytes() + entries + self.entries_elsewhere;
        if held <= self.bytes_budget {
            return;
        }
        self.asked = asked;
        self.relief.begin(self.timers.tick());
        if !self.relief.is_wanted(held - self.bytes_budget) || self.is_in_vain(now) {
            return;
        }
        // The others go by this until it is looked for again: they cut nothing for what these are about to bring.
        let fattest = self.weigh();
        if fattest.class == NOBODY {
            self.relief.exhaust();
        } else if self.is_heaviest(fattest.class, now) {
            self.cut_fattest(fattest, held - self.bytes_budget);
        }
    }

    fn cut_fattest(&mut self, fattest: Fattest, bytes_over: usize) {
        for slot in fattest.slots.into_iter().rev().take(CUTS_PER_TURN) {
            self.relief.count(self.weight(slot));
            match self.slab.get(slot).state {
                State::Closing => self.finish(slot),
                _ => self.cut(slot, Disconnect::OverBudget),
            }
            if !self.relief.is_wanted(bytes_over) {
                return;
            }
        }
    }

    /// What the queues of the other shards cost beside their frames.
    pub(super) fn look_elsewhere(&mut self) {
        let all = self.hub.metrics().sum(|shard| &shard.queue_entry_bytes);
        let own = self.metrics.queue_entry_bytes.value();
        self.entries_elsewhere = usize::try_from(all.saturating_sub(own)).unwrap_or(usize::MAX);
    }

    /// Whether the others are known to have nobody of a higher class. They are asked, which wakes those that sleep, and
    /// wake this one when they have told; one that says nothing for a second is not waited for.
    fn is_heaviest(&mut self, class: u32, now: Instant) -> bool {
        let others = self.told_lately(now).unwrap_or_else(|| {
            self.asked = Some(now);
            self.hub.ask_for_classes(self.index, now);
            self.hub.classes_elsewhere(self.index, now)
        });
        others.top <= class && others.are_known
    }

    /// What the others told, if they were asked not long ago.
    fn told_lately(&self, now: Instant) -> Option<Classes> {
        let is_lately = self.asked.is_some_and(|asked| now < asked + ANSWERS_LIFETIME);
        is_lately.then(|| self.hub.classes_elsewhere(self.index, now))
    }

    /// Whether nobody would be cut by what is known without a look at every session, which a shard with many of them
    /// cannot afford in each turn: the others have not answered yet, or have told of fatter ones than this shard had in
    /// this tick.
    fn is_in_vain(&self, now: Instant) -> bool {
        let tick = self.timers.tick();
        self.told_lately(now).is_some_and(|others| {
            !others.are_known || self.told.is_some_and(|(at, class)| at == tick && others.top > class)
        })
    }

    /// Looks for the fattest, and tells the other shards of what class they are.
    pub(super) fn weigh(&mut self) -> Fattest {
        let fattest = self.find_fattest();
        self.told = Some((self.timers.tick(), fattest.class));
        self.hub.note_class(self.index, fattest.class);
        fattest
    }

    /// The stalled sessions of the top size class. Answers count with what they remember, stalled or not; so do those that
    /// are only read to their end.
    fn find_fattest(&self) -> Fattest {
        let fat = |slot: &u32| {
            let session = self.slab.get(*slot);
            let is_stalled = session.blocked && !session.queue.is_empty();
            match session.state {
                State::Open => is_stalled || session.answer.is_some(),
                State::Closing => is_stalled && session.answer.is_some(),
                State::Vacant | State::Ended => false,
            }
        };
        let class = |slot: u32| self.weight(slot).checked_ilog2().unwrap_or(0) + 1;
        let Some(top) = (0..self.slab.slots()).filter(fat).map(class).max() else {
            return Fattest { class: NOBODY, slots: Vec::new() };
        };
        let mut slots: Vec<u32> = (0..self.slab.slots()).filter(fat).filter(|slot| class(*slot) == top).collect();
        slots.sort_unstable_by_key(|slot| self.weight(*slot));
        Fattest { class: top, slots }
    }
}
