//! Stripes: what keeps the frames of a channel in one order, and what its readers can get again.
//!
//! A channel has one stripe. Posts to several shards hold it for their pushes, so that every tab of the channel sees
//! one order. With recovery, every post to a user that a tab may want again holds it, and so does a tab that connects:
//! its replay, and what it gets live from then on, meet without a gap and without a double.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::fast::FixedState;

use crate::fanout::backlog::{Backlog, Bounds, Displaced};
use crate::id::{ChannelId, MessageId, UserId};
use crate::proto::frame::Frame;
use crate::proto::limits::RecoveryLimits;

/// How many there are.
const STRIPES: usize = 64;
/// What a user's backlog costs beside its frames.
const USER_BYTES: usize = 256;
/// The newest message of a user is kept so many times as long as the others.
const TAIL_LIFETIMES: u64 = 30;

/// The backlogs of the users of one stripe.
#[derive(Default)]
pub(crate) struct Stripe {
    users: HashMap<UserId, Backlog, FixedState>,
    /// Who has a backlog, each once, by when it was last looked at.
    by_age: VecDeque<(u64, UserId)>,
}

/// A stripe, held.
pub(crate) type Held<'a> = MutexGuard<'a, Stripe>;

pub(crate) struct Stripes {
    stripes: Box<[Mutex<Stripe>]>,
    limits: RecoveryLimits,
    /// Bytes of all backlogs.
    ///
    /// # Ordering
    /// Relaxed: a bound, publishes nothing.
    bytes: AtomicUsize,
    /// Seconds since the engine began, as the last sweep saw them.
    ///
    /// # Ordering
    /// Relaxed: a coarse clock; who reads it a little late keeps a frame a little longer.
    now: AtomicU64,
}

impl Stripes {
    pub(crate) fn new(limits: RecoveryLimits) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self { stripes, limits, bytes: AtomicUsize::new(0), now: AtomicU64::new(0) }
    }

    /// Holds the stripe of a channel.
    pub(crate) fn hold(&self, channel: &ChannelId) -> Held<'_> {
        self.stripes[stripe_of(channel)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a frame to a user is one to keep.
    pub(crate) fn keeps(&self, frame: &Frame) -> bool {
        self.limits.is_on() && Backlog::wants(frame.kind())
    }

    /// Keeps a frame for a user who is here, or was: nobody has a position in what was sent to a stranger.
    pub(crate) fn keep(
        &self,
        stripe: &mut Stripe,
        user: &UserId,
        frame: &Frame,
        presence: Presence,
        displaced: &mut Displaced,
    ) {
        let now = self.now();
        let bounds = Bounds { frames_max: self.limits.frames_max, bytes_max: self.limits.bytes_max };
        let backlog = match stripe.users.entry(user.clone()) {
            Entry::Vacant(_) if presence == Presence::Absent => return,
            Entry::Vacant(entry) => {
                stripe.by_age.push_back((now, user.clone()));
                self.bytes.fetch_add(USER_BYTES, Ordering::Relaxed);
                entry.insert(Backlog::default())
            }
            Entry::Occupied(entry) => entry.into_mut(),
        };
        self.change(backlog, |backlog| {
            backlog.keep(frame, now, bounds, displaced);
            backlog.expire(now, self.limits.lifetime, displaced);
        });
        while self.bytes.load(Ordering::Relaxed) > self.limits.total_bytes_max {
            let Some((_, oldest)) = stripe.by_age.pop_front() else { return };
            self.forget(stripe, &oldest, displaced);
        }
    }

    /// What a user's tab has missed since the first of `positions` that is known; None if none is.
    pub(crate) fn since(&self, stripe: &Stripe, user: &UserId, positions: &[MessageId]) -> Option<Vec<Frame>> {
        let backlog = stripe.users.get(user)?;
        positions.iter().find_map(|position| backlog.since(*position))
    }

    /// What is held of a user, oldest first.
    pub(crate) fn history(&self, channel: &ChannelId) -> Vec<Frame> {
        let ChannelId::User(user) = channel else { return Vec::new() };
        let stripe = self.hold(channel);
        stripe.users.get(user).map(|backlog| backlog.frames().cloned().collect()).unwrap_or_default()
    }

    /// Bytes of all backlogs, users' and streams'.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The coarse clock: seconds, as the last sweep saw them.
    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    pub(crate) fn limits(&self) -> &RecoveryLimits {
        &self.limits
    }

    /// Moves the coarse clock on, and lets go what is too old. To be called about once a second.
    pub(crate) fn sweep(&self, now: u64) {
        self.now.fetch_max(now, Ordering::Relaxed);
        let lifetime = self.limits.lifetime.as_secs();
        for stripe in &self.stripes {
            let mut displaced = Displaced::new();
            let mut held = stripe.lock().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..held.by_age.len() {
                if held.by_age.front().is_none_or(|(looked_at, _)| looked_at.saturating_add(lifetime) > now) {
                    break;
                }
                let Some((_, user)) = held.by_age.pop_front() else { break };
                let Some(backlog) = held.users.get_mut(&user) else { continue };
                self.change(backlog, |backlog| backlog.expire(now, self.limits.lifetime, &mut displaced));
                let end = backlog.newest().unwrap_or(0).saturating_add(lifetime.saturating_mul(TAIL_LIFETIMES));
                if end > now {
                    held.by_age.push_back((now, user));
                } else {
                    self.forget(&mut held, &user, &mut displaced);
                }
            }
            drop(held);
        }
    }

    /// Changes a backlog and counts its bytes, those of streams too.
    pub(crate) fn change(&self, backlog: &mut Backlog, change: impl FnOnce(&mut Backlog)) {
        let before = backlog.bytes();
        change(backlog);
        self.count(before, backlog.bytes());
    }

    /// A backlog is gone.
    pub(crate) fn release(&self, backlog: &Backlog) {
        self.count(backlog.bytes(), 0);
    }

    fn count(&self, before: usize, after: usize) {
        if after >= before {
            self.bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    fn forget(&self, stripe: &mut Stripe, user: &UserId, displaced: &mut Displaced) {
        if let Some(backlog) = stripe.users.remove(user) {
            self.count(backlog.bytes() + USER_BYTES, 0);
            displaced.extend(backlog.frames().cloned());
        }
    }
}

/// Whether a user has a session here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Present,
    Absent,
}

#[expect(clippy::cast_possible_truncation, reason = "a remainder of a few dozen")]
fn stripe_of(channel: &ChannelId) -> usize {
    (FixedState::default().hash_one(channel) % STRIPES as u64) as usize
}
