//! What crosses threads: counts that each thread writes and all may read, numbers of published messages, and how far
//! the run is. Nothing here is touched per delivery.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::Thread;

use hdrhistogram::Histogram;
use mio::Waker;

use super::plan::Plan;

/// Notes about what went wrong that are kept; the rest is only counted.
const NOTES_MAX: usize = 8;
/// A latency is counted from a microsecond on; a longer one than this counts as this.
const LATENCY_NANOS_MAX: u64 = 600_000_000_000;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Clients are being opened.
    Opening,
    /// All are there, or have failed; nothing happens while memory is looked at.
    Resting,
    /// Nothing is published.
    Holding,
    /// Messages that do not count.
    WarmUp,
    /// The warm-up is over, and what it published has come.
    Warm,
    /// Threads take note of what was published before, and of the time from which latencies count.
    Ready,
    Measuring,
    Measured,
    /// Clients that never read do so now; then the threads end.
    Finishing,
}

impl Phase {
    const ALL: [Self; 9] = [
        Self::Opening,
        Self::Resting,
        Self::Holding,
        Self::WarmUp,
        Self::Warm,
        Self::Ready,
        Self::Measuring,
        Self::Measured,
        Self::Finishing,
    ];
}

/// What a thread counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    /// Clients that are open now.
    Open,
    /// Handshakes that were completed.
    Opened,
    /// Clients that could not be opened.
    Failed,
    /// Connections that the server ended though their client wanted to stay.
    Cut,
    /// Messages that came, each counted once; those to clients that never read are not in it.
    Delivered,
    /// The same, doubled ones too, to those whom everything has to reach: what a closed loop waits for.
    Awaited,
    Doubled,
    Misordered,
    /// Messages for another user.
    Misaddressed,
    /// Messages that had to come to clients that left since, and had not.
    Lost,
    /// Messages that were passed over and may still come, late.
    Missing,
    Pings,
    /// Frames and events without a message of ours.
    Others,
    BytesIn,
    /// Clients that left by themselves.
    Left,
    SilentOpen,
    SilentDelivered,
    SilentLost,
    SilentCut,
    /// Requests that were sent, messages in them, and how they were answered.
    Requests,
    Published,
    Refused,
    Unanswered,
}

const COUNTS: usize = Count::Unanswered as usize + 1;

/// The counts of one thread, or of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally([u64; COUNTS]);

impl Tally {
    pub(super) fn of(&self, count: Count) -> u64 {
        self.0[count as usize]
    }

    pub(super) fn add(&mut self, count: Count, amount: u64) {
        self.0[count as usize] += amount;
    }

    pub(super) fn set(&mut self, count: Count, value: u64) {
        self.0[count as usize] = value;
    }

    pub(super) fn subtract(&mut self, count: Count, amount: u64) {
        let value = &mut self.0[count as usize];
        *value = value.saturating_sub(amount);
    }

    /// What was counted since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let mut difference = *self;
        for (value, earlier) in difference.0.iter_mut().zip(earlier.0) {
            *value = value.saturating_sub(earlier);
        }
        difference
    }
}

/// The counts of one thread, where the others see them. Apart from other threads' by two cache lines.
#[derive(Debug)]
#[repr(align(128))]
struct Published([AtomicU64; COUNTS]);

/// What the publishing thread found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Measured {
    /// From the first message to the last delivery.
    pub(super) nanos: u64,
    /// Something that was published never came.
    pub(super) is_stalled: bool,
    /// How long one message took to be everywhere, if it came.
    pub(super) broadcast_nanos: Option<u64>,
    /// How long one message took to all tabs of a single user, if it came.
    pub(super) direct_nanos: Option<u64>,
}

/// Latencies of a thread since somebody asked last.
pub(super) type Latencies = Histogram<u64>;

/// An empty histogram of nanoseconds with three digits.
pub(super) fn latencies() -> Latencies {
    // The bounds are constants that fit each other.
    Histogram::new_with_bounds(1_000, LATENCY_NANOS_MAX, 3).unwrap_or_else(|_| unreachable!())
}

/// See the module.
pub(super) struct Shared {
    phase: AtomicU8,
    /// Threads that have seen [`Phase::Ready`].
    ready: AtomicU32,
    /// Messages whose intended time is before this do not count for latencies.
    measured_from: AtomicU64,
    counts: Box<[Published]>,
    /// Messages published so far, by channel (0 is the room's, then the users') and publisher.
    issued: Box<[AtomicU32]>,
    publishers: usize,
    /// Clients that a message on each channel has to reach.
    reach: Box<[AtomicU32]>,
    pub(super) wakers: Vec<Waker>,
    mailboxes: Vec<Mutex<Latencies>>,
    notes: Mutex<Vec<String>>,
    measured: Mutex<Measured>,
    /// The thread that waits for phases.
    main: Thread,
}

impl Shared {
    pub(super) fn new(plan: &Plan, wakers: Vec<Waker>) -> Self {
        let channels = 1 + if plan.target == super::plan::Target::Room { 0 } else { plan.mix.users() };
        let zeros = |count: usize| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self {
            phase: AtomicU8::new(Phase::Opening as u8),
            ready: AtomicU32::new(0),
            measured_from: AtomicU64::new(u64::MAX),
            counts: (0..plan.threads).map(|_| Published(std::array::from_fn(|_| AtomicU64::new(0)))).collect(),
            issued: zeros(channels * plan.publishers()),
            publishers: plan.publishers(),
            reach: zeros(channels),
            wakers,
            mailboxes: (0..plan.threads).map(|_| Mutex::new(latencies())).collect(),
            notes: Mutex::new(Vec::new()),
            measured: Mutex::new(Measured::default()),
            main: std::thread::current(),
        }
    }

    /// # Ordering
    /// Acquire, with [`Shared::enter`]: who sees a phase sees what was written before it was entered.
    pub(super) fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Acquire)).min(Phase::ALL.len() - 1)]
    }

    /// Goes on to a phase, and wakes everybody.
    ///
    /// # Ordering
    /// Release: see [`Shared::phase`].
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
        for waker in &self.wakers {
            // A thread that cannot be woken looks by itself within its next turn.
            let _ = waker.wake();
        }
        self.main.unpark();
    }

    /// A thread has done what a phase asks of it.
    ///
    /// # Ordering
    /// Release, with [`Shared::are_ready`]: what was done is done before anything is published on its strength.
    pub(super) fn has_entered(&self, phase: Phase) {
        if phase == Phase::Ready {
            self.ready.fetch_add(1, Ordering::Release);
            self.main.unpark();
        }
    }

    /// True once all threads have entered [`Phase::Ready`].
    ///
    /// # Ordering
    /// Acquire: see [`Shared::has_entered`].
    pub(super) fn are_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) as usize == self.counts.len()
    }

    /// # Ordering
    /// Relaxed: written before the phase that it is read in, whose own ordering publishes it.
    pub(super) fn measured_from(&self) -> u64 {
        self.measured_from.load(Ordering::Relaxed)
    }

    /// # Ordering
    /// Relaxed: see [`Shared::measured_from`].
    pub(super) fn measure_from(&self, nanos: u64) {
        self.measured_from.store(nanos, Ordering::Relaxed);
    }

    /// Shows a thread's counts to the others.
    ///
    /// # Ordering
    /// Relaxed: statistics, and a closed loop's view of what has come, which may lag.
    pub(super) fn show(&self, thread: usize, tally: &Tally) {
        for (shown, value) in self.counts[thread].0.iter().zip(tally.0) {
            shown.store(value, Ordering::Relaxed);
        }
    }

    /// One count of all threads.
    ///
    /// # Ordering
    /// Relaxed: a statistic.
    pub(super) fn sum(&self, count: Count) -> u64 {
        self.counts.iter().map(|counts| counts.0[count as usize].load(Ordering::Relaxed)).sum()
    }

    /// All counts of all threads.
    ///
    /// # Ordering
    /// Relaxed: a statistic.
    pub(super) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for counts in &self.counts {
            for (sum, value) in tally.0.iter_mut().zip(&counts.0) {
                *sum += value.load(Ordering::Relaxed);
            }
        }
        tally
    }

    /// Where a channel's numbers of a publisher are.
    fn issued_at(&self, channel: usize, publisher: usize) -> Option<&AtomicU32> {
        self.issued.get(channel * self.publishers + publisher)
    }

    /// How many messages a publisher has published on a channel, or is about to.
    ///
    /// # Ordering
    /// Acquire, with [`Shared::issue`]. What really orders the two is the connection through the server: a number is
    /// stored before its request is written, and a client reads it after an answer that the server wrote.
    pub(super) fn issued(&self, channel: usize, publisher: usize) -> u32 {
        self.issued_at(channel, publisher).map_or(0, |issued| issued.load(Ordering::Acquire))
    }

    /// Takes the next number. Only one thread publishes.
    ///
    /// # Ordering
    /// Release: see [`Shared::issued`].
    pub(super) fn issue(&self, channel: usize, publisher: usize) -> u32 {
        let Some(issued) = self.issued_at(channel, publisher) else { return 0 };
        let number = issued.load(Ordering::Relaxed);
        issued.store(number + 1, Ordering::Release);
        number
    }

    /// Clients that a message on the channel has to reach.
    ///
    /// # Ordering
    /// Relaxed: it changes only before [`Phase::Resting`], whose own ordering publishes it.
    pub(super) fn reach(&self, channel: usize) -> u64 {
        self.reach.get(channel).map_or(0, |reach| u64::from(reach.load(Ordering::Relaxed)))
    }

    /// One more client that a message on the channel has to reach.
    ///
    /// # Ordering
    /// Relaxed: see [`Shared::reach`].
    pub(super) fn reaches(&self, channel: usize) {
        if let Some(reach) = self.reach.get(channel) {
            reach.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Hands a thread's latencies over, and empties them.
    pub(super) fn hand_over(&self, thread: usize, latencies: &mut Latencies) {
        if latencies.is_empty() {
            return;
        }
        let mut mailbox = self.mailboxes[thread].lock().unwrap_or_else(PoisonError::into_inner);
        // Both have the same bounds.
        let _ = mailbox.add(&*latencies);
        latencies.reset();
    }

    /// Everything that was handed over since the last time.
    pub(super) fn take_latencies(&self) -> Latencies {
        let mut all = latencies();
        for mailbox in &self.mailboxes {
            let mut mailbox = mailbox.lock().unwrap_or_else(PoisonError::into_inner);
            if !mailbox.is_empty() {
                let _ = all.add(&*mailbox);
                mailbox.reset();
            }
        }
        all
    }

    /// Takes note of how long a single message took.
    pub(super) fn probed(&self, is_broadcast: bool, nanos: Option<u64>) {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        let probe = if is_broadcast { &mut measured.broadcast_nanos } else { &mut measured.direct_nanos };
        *probe = nanos;
    }

    /// Takes note of how long everything took.
    pub(super) fn has_measured(&self, nanos: u64, is_over: bool) {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        measured.nanos = nanos;
        measured.is_stalled = !is_over;
    }

    /// What was found out.
    pub(super) fn measured(&self) -> Measured {
        *self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps one of the first few remarks about what went wrong.
    pub(super) fn note(&self, text: impl FnOnce() -> String) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES_MAX {
            notes.push(text());
        }
    }

    /// The remarks.
    pub(super) fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
