//! What happens to what a thread's clients get: each message is found, placed in its lane, and counted.

use std::sync::Arc;

use crate::bench::client::Sink;
use crate::bench::lanes::{Arrival, Lanes};
use crate::bench::plan::{Plan, Target};
use crate::bench::record::Records;
use crate::bench::shared::{Count, Latencies, Shared, Tally, latencies};
use crate::bench::websocket::{FRAME_BYTES_MAX, Fault};
use crate::proto::deflate::Inflater;

/// What happens to what a client got: apart from the clients, so that both can be borrowed.
pub(super) struct Check {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    records: Records,
    /// Of the thread's clients all together: a message's compressed form stands for itself.
    inflater: Inflater,
    lanes: Lanes,
    lanes_per_client: usize,
    pub(super) tally: Tally,
    pub(super) latencies: Latencies,
    /// Messages from before do not count for latencies.
    pub(super) measured_from: u64,
}

/// One client's view of it, for the time of one read.
pub(super) struct Seeing<'a> {
    check: &'a mut Check,
    local: usize,
    index: usize,
    now: u64,
    is_steady: bool,
    is_silent: bool,
    pub(super) was_opened: bool,
    pub(super) is_subscribed: bool,
}

impl Sink for Seeing<'_> {
    fn opened(&mut self) {
        self.was_opened = true;
        if self.check.plan.joining.subscribed.is_none() || self.check.plan.mix.is_stream(self.index) {
            self.subscribed();
        }
    }

    fn message(&mut self, payload: &[u8]) {
        let mut found = false;
        let Self { check, local, index, now, is_steady, is_silent, .. } = self;
        let Check { records, plan, lanes, lanes_per_client, tally, latencies, measured_from, .. } = &mut **check;
        let publishers = plan.publishers();
        records.each(payload, |record| {
            found = true;
            let kind = match (record.user, plan.target) {
                (None, _) => 0,
                (Some(user), _) if user as usize != plan.mix.user(*index) => {
                    tally.add(Count::Misaddressed, 1);
                    return;
                }
                (Some(_), Target::Mixed) => 1,
                (Some(_), _) => 0,
            };
            let number = record.number as usize;
            let lane = *local * *lanes_per_client + kind * publishers + number % publishers;
            let arrival = lanes.arrive(lane, record.number / u32::try_from(publishers).unwrap_or(1));
            if *is_steady {
                tally.add(Count::Awaited, 1);
            }
            match arrival {
                Arrival::Doubled => return tally.add(Count::Doubled, 1),
                Arrival::Misordered => tally.add(Count::Misordered, 1),
                Arrival::Next => {}
            }
            tally.add(if *is_silent { Count::SilentDelivered } else { Count::Delivered }, 1);
            if record.sent_at >= *measured_from && !*is_silent {
                latencies.saturating_record(now.saturating_sub(record.sent_at));
            }
        });
        if !found {
            self.other(payload);
        }
    }

    fn deflated(&mut self, payload: &[u8]) -> Result<(), Fault> {
        if !self.check.plan.joining.deflates {
            return Err(Fault::Reserved);
        }
        let mut inflater = std::mem::take(&mut self.check.inflater);
        let result = inflater.inflate(payload, FRAME_BYTES_MAX, |message| self.message(message));
        self.check.inflater = inflater;
        result.map_err(|_| Fault::Deflate)
    }

    fn ping(&mut self) {
        self.check.tally.add(Count::Pings, 1);
    }
}

impl<'a> Seeing<'a> {
    pub(super) fn new(check: &'a mut Check, local: usize, index: usize, now: u64) -> Self {
        let mix = &check.plan.mix;
        let (is_steady, is_silent) = (mix.is_steady(index), mix.is_silent(index));
        Self { check, local, index, now, is_steady, is_silent, was_opened: false, is_subscribed: false }
    }

    /// A frame without a message of ours: it may be the answer that says the client hears everything.
    fn other(&mut self, payload: &[u8]) {
        self.check.tally.add(Count::Others, 1);
        if self.is_subscribed {
            return;
        }
        let said = self.check.plan.joining.subscribed.as_deref();
        if said.is_some_and(|said| memchr::memmem::find(payload, said.as_bytes()).is_some()) {
            self.subscribed();
        } else if memchr::memmem::find(payload, br#""type":"error""#).is_some() {
            self.check.shared.note(|| format!("refused: {}", String::from_utf8_lossy(payload)));
        }
    }

    /// From here on everything has to come.
    fn subscribed(&mut self) {
        self.is_subscribed = true;
        // Who says so by an answer says it for sure; who does not is asked for what is published once all are there.
        if self.check.plan.publishing.as_ref().is_some_and(|publishing| publishing.is_tabcast) {
            self.check.require(self.local, self.index);
        }
    }
}

impl Check {
    pub(super) fn new(plan: Arc<Plan>, shared: Arc<Shared>, clients: usize) -> Self {
        let lanes_per_client = plan.lanes_per_client();
        Self {
            plan,
            shared,
            records: Records::default(),
            inflater: Inflater::default(),
            lanes: Lanes::new(clients * lanes_per_client),
            lanes_per_client,
            tally: Tally::default(),
            latencies: latencies(),
            measured_from: u64::MAX,
        }
    }

    /// What the others may see.
    pub(super) fn shown(&mut self) -> &Tally {
        self.tally.set(Count::Missing, self.lanes.missing());
        &self.tally
    }

    /// Losses of which nothing more is remembered than that.
    pub(super) fn lost_for_good(&self) -> u64 {
        self.lanes.lost()
    }

    /// The channels that a client hears, and the first lane of each.
    pub(super) fn channels(&self, local: usize, index: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let plan = &self.plan;
        let lane = local * self.lanes_per_client;
        let user = 1 + plan.mix.user(index);
        let room = plan.hears_room(index).then_some((0, lane));
        let user = match plan.target {
            Target::Room => None,
            Target::Users => Some((user, lane)),
            Target::Mixed => Some((user, lane + plan.publishers())),
        };
        room.into_iter().chain(user)
    }

    /// Whatever is published from now on has to come to the client.
    pub(super) fn require(&mut self, local: usize, index: usize) {
        for (channel, lane) in self.channels(local, index) {
            for publisher in 0..self.plan.publishers() {
                self.lanes.require(lane + publisher, self.shared.issued(channel, publisher));
            }
        }
    }

    /// Where a client's lanes have to be if it goes now, in the order of its lanes.
    pub(super) fn ends(&self, local: usize, index: usize) -> Vec<u32> {
        let mut ends = vec![0; self.lanes_per_client];
        for (channel, lane) in self.channels(local, index) {
            for publisher in 0..self.plan.publishers() {
                ends[lane - local * self.lanes_per_client + publisher] = self.shared.issued(channel, publisher);
            }
        }
        ends
    }

    pub(super) fn has_reached(&self, local: usize, ends: &[u32]) -> bool {
        let lane = local * self.lanes_per_client;
        ends.iter().enumerate().all(|(at, end)| self.lanes.has_reached(lane + at, *end))
    }

    /// What the client did not get and should have. Its lanes begin anew.
    pub(super) fn settle(&mut self, local: usize, ends: &[u32]) -> u64 {
        let lane = local * self.lanes_per_client;
        ends.iter().enumerate().map(|(at, end)| self.lanes.settle(lane + at, *end)).sum()
    }
}
