//! Stripes: what keeps the frames of a channel in one order, and what its readers can get again.
//!
//! A channel has one stripe. Posts to several shards hold it for their pushes, so that every tab of the channel sees
//! one order. With recovery, every post to a user that a tab may want again holds it, and so does a tab that connects:
//! its replay, and what it gets live from then on, meet without a gap and without a double.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use foldhash::fast::{FixedState, RandomState};

use crate::fanout::backlog::{Backlog, Bounds, Displaced, Edits};
use crate::id::{ChannelId, MessageId, UserId};
use crate::proto::frame::Frame;
use crate::proto::limits::RecoveryLimits;

/// How many there are.
const STRIPES: usize = 64;
/// What a user's backlog costs beside its frames.
const USER_BYTES: usize = 256;
/// The newest message of a user is kept so many times as long as the others.
const TAIL_LIFETIMES: u64 = 30;

/// The backlogs of the users of one stripe. On lines of its own, as its lock is.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Stripe {
    users: HashMap<UserId, Backlog, RandomState>,
    /// Who has a backlog, each once, by when it was last seen to be used.
    by_age: VecDeque<(u64, UserId)>,
    /// Memory of all of them.
    bytes: usize,
}

/// A stripe, held.
pub(crate) type Held<'a> = MutexGuard<'a, Stripe>;

pub(crate) struct Stripes {
    stripes: Box<[Mutex<Stripe>]>,
    limits: RecoveryLimits,
    /// Seconds since the engine began, as the last sweep saw them.
    ///
    /// # Ordering
    /// Relaxed: a coarse clock; who reads it a little late keeps a frame a little longer.
    now: AtomicU64,
}

impl Stripes {
    pub(crate) fn new(limits: RecoveryLimits) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self { stripes, limits, now: AtomicU64::new(0) }
    }

    /// Holds the stripe of a channel.
    pub(crate) fn hold(&self, channel: &ChannelId) -> Held<'_> {
        lock(&self.stripes[stripe_of(channel)])
    }

    /// Whether a frame to a user is one to keep.
    pub(crate) fn keeps(&self, frame: &Frame) -> bool {
        self.limits.is_on() && Backlog::wants(frame.kind())
    }

    /// Keeps a frame for a user who is here, or was: nobody has a position in what was sent to a stranger. Each stripe
    /// has an equal share of all bytes; past it the users go whose last frame is the oldest.
    pub(crate) fn keep(
        &self,
        stripe: &mut Stripe,
        user: &UserId,
        frame: &Frame,
        presence: Presence,
        displaced: &mut Displaced,
    ) {
        let now = self.now();
        let RecoveryLimits { frames_max, bytes_max, lifetime, total_bytes_max } = self.limits;
        let bounds = Bounds { frames_max, bytes_max, edits: Edits::Posted };
        let mut keep = |backlog: &mut Backlog| {
            backlog.keep(frame, now, bounds, displaced);
            backlog.expire(now, lifetime, displaced);
        };
        if stripe.change(user, &mut keep).is_none() {
            if presence == Presence::Absent {
                return;
            }
            stripe.by_age.push_back((now, user.clone()));
            stripe.bytes += USER_BYTES;
            stripe.users.insert(user.clone(), Backlog::default());
            stripe.change(user, &mut keep);
        }
        while stripe.bytes > total_bytes_max / STRIPES {
            let Some((seen, oldest)) = stripe.by_age.pop_front() else { return };
            match stripe.users.get(&oldest).and_then(Backlog::newest) {
                Some(newest) if newest > seen => stripe.by_age.push_back((newest, oldest)),
                _ => stripe.forget(&oldest, displaced),
            }
        }
    }

    /// What a user's tab has missed since the first of `positions` that is known; None if none is.
    pub(crate) fn since(&self, stripe: &Stripe, user: &UserId, positions: &[MessageId]) -> Option<Vec<Frame>> {
        let backlog = stripe.users.get(user)?;
        positions.iter().find_map(|position| backlog.since(*position))
    }

    /// Lets go all that is held of a user: it has holes from now on. `meanwhile` is done before anything of the user is
    /// posted, kept or looked up again.
    pub(crate) fn forget<R>(&self, user: &UserId, meanwhile: impl FnOnce() -> R) -> R {
        let mut displaced = Displaced::new();
        let mut stripe = self.hold(&ChannelId::User(user.clone()));
        stripe.forget(user, &mut displaced);
        let result = meanwhile();
        drop(stripe);
        result
    }

    /// The same of anybody. Holds all stripes at once, always in the same order; nobody else holds two.
    pub(crate) fn forget_all<R>(&self, meanwhile: impl FnOnce() -> R) -> R {
        let mut held: Vec<_> = self.stripes.iter().map(lock).collect();
        let forgotten: Vec<_> = held.iter_mut().map(|stripe| std::mem::take(&mut **stripe)).collect();
        let result = meanwhile();
        drop(held);
        drop(forgotten);
        result
    }

    /// The same if the stripe is not held just now.
    #[cfg(test)]
    pub(crate) fn try_history(&self, user: &UserId) -> Option<Vec<Frame>> {
        let stripe = self.stripes[stripe_of(&ChannelId::User(user.clone()))].try_lock().ok()?;
        Some(stripe.users.get(user).map(|backlog| backlog.frames().cloned().collect()).unwrap_or_default())
    }

    /// What is held of a user, oldest first.
    pub(crate) fn history(&self, channel: &ChannelId) -> Vec<Frame> {
        let ChannelId::User(user) = channel else { return Vec::new() };
        let stripe = self.hold(channel);
        stripe.users.get(user).map(|backlog| backlog.frames().cloned().collect()).unwrap_or_default()
    }

    /// Memory of all users' backlogs. Holds each stripe in turn.
    pub(crate) fn bytes(&self) -> usize {
        self.stripes.iter().map(|stripe| lock(stripe).bytes).sum()
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
            let mut held = lock(stripe);
            for _ in 0..held.by_age.len() {
                if held.by_age.front().is_none_or(|(seen, _)| seen.saturating_add(lifetime) > now) {
                    break;
                }
                let Some((_, user)) = held.by_age.pop_front() else { break };
                let newest = held.change(&user, |backlog| {
                    backlog.expire(now, self.limits.lifetime, &mut displaced);
                    backlog.newest()
                });
                let end = newest.flatten().unwrap_or(0).saturating_add(lifetime.saturating_mul(TAIL_LIFETIMES));
                if end > now {
                    held.by_age.push_back((now, user));
                } else {
                    held.forget(&user, &mut displaced);
                }
            }
            drop(held);
        }
    }
}

impl Stripe {
    /// Changes a user's backlog and counts its bytes.
    fn change<R>(&mut self, user: &UserId, change: impl FnOnce(&mut Backlog) -> R) -> Option<R> {
        let backlog = self.users.get_mut(user)?;
        let before = backlog.bytes();
        let result = change(backlog);
        self.bytes = self.bytes - before + backlog.bytes();
        Some(result)
    }

    fn forget(&mut self, user: &UserId, displaced: &mut Displaced) {
        if let Entry::Occupied(entry) = self.users.entry(user.clone()) {
            let backlog = entry.remove();
            self.bytes -= backlog.bytes() + USER_BYTES;
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

fn lock(stripe: &Mutex<Stripe>) -> Held<'_> {
    stripe.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::cast_possible_truncation, reason = "a remainder of a few dozen")]
fn stripe_of(channel: &ChannelId) -> usize {
    (FixedState::default().hash_one(channel) % STRIPES as u64) as usize
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::proto::event::{Event, Timestamp};

    #[test]
    fn the_users_whose_last_frame_is_the_oldest_go_first_and_nobody_elses_stripe_pays() {
        let frame = |text: &str| {
            let timestamp = Timestamp::from_micros(1);
            Frame::encode(&Event::Message { id: MessageId::random(), text, sender: "s", reply_to: None, timestamp })
        };
        // Room for about four users in each stripe.
        let total_bytes_max = STRIPES * 4 * (USER_BYTES + frame("x").bytes() + 64);
        let limits =
            RecoveryLimits { total_bytes_max, lifetime: Duration::from_secs(1_000), ..RecoveryLimits::default() };
        let stripes = Stripes::new(limits);
        let mut of_one_stripe = (0..)
            .map(|n| UserId::parse(&format!("u{n}")).unwrap())
            .filter(|user| stripe_of(&ChannelId::User(user.clone())) == 7);
        let users: Vec<_> = of_one_stripe.by_ref().take(6).collect();
        let say = |user: &UserId, now: u64| {
            stripes.sweep(now);
            let mut stripe = stripes.hold(&ChannelId::User(user.clone()));
            stripes.keep(&mut stripe, user, &frame("x"), Presence::Present, &mut Displaced::new());
        };
        let has = |user: &UserId| !stripes.history(&ChannelId::User(user.clone())).is_empty();
        let in_stripe_8 = |user: &UserId| stripe_of(&ChannelId::User(user.clone())) == 8;
        let neighbour = (0..).map(|n| UserId::parse(&format!("n{n}")).unwrap()).find(in_stripe_8).unwrap();
        say(&neighbour, 1);
        for (now, user) in (2..).zip(&users[..4]) {
            say(user, now);
        }
        assert!(users[..4].iter().all(has));
        // The first comes back: the second is the one whose last frame is the oldest.
        say(&users[0], 6);
        say(&users[4], 7);
        assert!(has(&users[0]) && !has(&users[1]) && has(&users[4]));
        assert!(has(&neighbour));
        assert!(stripes.bytes() <= total_bytes_max);
    }
}
