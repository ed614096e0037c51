//! Tabs that come back to a node that does not have what they missed: it is kept elsewhere, and read from there.
//!
//! From before that is read until the tab is registered, what is posted to its user is collected here. So the tab gets
//! all that was kept, then what was posted meanwhile and was not among it, then what is live. What was kept and has
//! not been posted yet on its way here is posted to the user's other tabs only. A replay is whole, or there is none; or
//! it begins with a gap, if meanwhile something was lost on its way here: it may have been said after what is kept was
//! read.

use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;

use crate::fanout::registry::Sessions;
use crate::fanout::session::Address;
use crate::id::{MessageId, UserId};
use crate::proto::event::{GapReason, Notice};
use crate::proto::frame::{Class, Frame};

/// Frames that are collected for one user. As many as a session's queue may hold: more could not be replayed.
const FRAMES_MAX: usize = 512;
/// Their bytes, after which no more are collected.
const BYTES_MAX: usize = 1 << 20;

/// For so many seconds after a replay, what was in it may still be on its way here.
const LATE_SECONDS: u64 = 15;

/// What is collected for users whose tabs are coming back.
#[derive(Default)]
pub(crate) struct Returning {
    users: Mutex<HashMap<UserId, State>>,
    /// How many users there are.
    ///
    /// # Ordering
    /// Acquire and Release: who was told to read what is kept only after this was raised posts only after it, too.
    count: AtomicUsize,
    digests: RandomState,
}

#[derive(Default)]
struct State {
    /// Tabs that are on their way.
    tabs: usize,
    posted: Vec<Frame>,
    bytes: usize,
    /// More was posted than is collected.
    is_over: bool,
    /// How often something to the user, or to anybody, was lost on its way here.
    losses: u64,
    late: Vec<Late>,
}

/// What a tab has, and may come again live.
struct Late {
    tab: Address,
    /// From its replay.
    frames: HashSet<u64>,
    /// From before.
    messages: Vec<MessageId>,
    until: u64,
}

impl Late {
    fn has(&self, frame: &Frame, digest: u64) -> bool {
        self.frames.contains(&digest) || is_one_of(frame, &self.messages)
    }
}

fn is_one_of(frame: &Frame, messages: &[MessageId]) -> bool {
    frame.class() == Class::Ordered && frame.message_id().is_some_and(|id| messages.contains(&id))
}

/// What a tab has missed, as it was kept elsewhere. While it lives, what is posted to its user is collected.
pub struct Missed {
    returning: Arc<Returning>,
    user: UserId,
    /// What the tab says that it has.
    messages: Vec<MessageId>,
    /// Of the user, as this began.
    losses: u64,
    found: Mutex<Option<Found>>,
}

/// What was found.
struct Found {
    /// What the tab does not have, oldest first.
    frames: Vec<Frame>,
    /// All that was kept.
    kept: HashSet<u64>,
}

impl std::fmt::Debug for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Missed").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Drop for Missed {
    fn drop(&mut self) {
        let mut users = self.returning.users();
        if let Some(state) = users.get_mut(&self.user) {
            state.tabs -= 1;
            if state.tabs == 0 {
                (state.posted, state.bytes) = (Vec::new(), 0);
                state.is_over = false;
                if state.late.is_empty() {
                    users.remove(&self.user);
                }
            }
        }
        self.returning.count.store(users.len(), Ordering::Release);
    }
}

impl Missed {
    /// Notes what was found: all that is kept, and what of it the tab does not have.
    pub(crate) fn set(&self, kept: &[Frame], frames: Vec<Frame>) {
        // An edit that comes twice changes nothing; one that is left out could leave an older one as the last.
        let kept = kept.iter().filter(|frame| frame.class() == Class::Ordered);
        let kept = kept.map(|frame| self.returning.digest(frame)).collect();
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(Found { frames, kept });
    }
}

impl Returning {
    fn users(&self) -> MutexGuard<'_, HashMap<UserId, State>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn digest(&self, frame: &Frame) -> u64 {
        self.digests.hash_one(frame.json())
    }

    /// Begins to collect for a tab of the user. Call it before what is kept is read.
    pub(crate) fn begin(self: &Arc<Self>, user: &UserId, messages: &[MessageId]) -> Missed {
        let mut users = self.users();
        let state = users.entry(user.clone()).or_default();
        state.tabs += 1;
        let losses = state.losses;
        self.count.store(users.len(), Ordering::Release);
        drop(users);
        let (returning, messages) = (Arc::clone(self), messages.to_vec());
        Missed { returning, user: user.clone(), messages, losses, found: Mutex::new(None) }
    }

    /// Something was lost on its way here, to this user or to anybody: tabs on their way back are told as they come. Under
    /// the channel's lock, or everybody's.
    pub(crate) fn lose(&self, user: Option<&UserId>) {
        if !self.is_busy() {
            return;
        }
        let mut users = self.users();
        match user {
            Some(user) => users.get_mut(user).into_iter().for_each(|state| state.losses += 1),
            None => users.values_mut().for_each(|state| state.losses += 1),
        }
    }

    /// Whether a post has to be shown to [`Self::pass`].
    pub(crate) fn is_busy(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Collects a frame, and says who is to get it: all but those who have it. Under the channel's lock.
    pub(crate) fn pass(&self, user: &UserId, frame: &Frame, sessions: Option<Sessions>) -> Option<Sessions> {
        let mut users = self.users();
        let Some(state) = users.get_mut(user) else { return sessions };
        if state.tabs > 0 {
            if state.posted.len() < FRAMES_MAX && state.bytes < BYTES_MAX {
                state.bytes += frame.bytes();
                state.posted.push(frame.clone());
            } else {
                state.is_over = true;
            }
        }
        let sessions = sessions?;
        let digest = self.digest(frame);
        let has_it = |tab: Address| state.late.iter().any(|late| late.tab == tab && late.has(frame, digest));
        if !sessions.iter().any(|session| has_it(session.address())) {
            return Some(sessions);
        }
        Some(sessions.iter().filter(|session| !has_it(session.address())).cloned().collect())
    }

    /// What a tab gets before anything live; None if that is not known. Under the channel's lock, with which the tab is
    /// also registered. `now` counts seconds.
    pub(crate) fn finish(&self, missed: &Missed, tab: Address, now: u64) -> Option<Vec<Frame>> {
        let Found { mut frames, mut kept } = missed.found.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let mut users = self.users();
        let state = users.get_mut(&missed.user)?;
        if state.is_over {
            return None;
        }
        for frame in &state.posted {
            // What was both kept and posted has come: it does not come again.
            if !kept.remove(&self.digest(frame)) && !is_one_of(frame, &missed.messages) {
                frames.push(frame.clone());
            }
        }
        if state.losses > missed.losses {
            // Before anything that may have been said behind what was lost: its position is past it then.
            frames.insert(0, Frame::notice(&Notice::Gap { reason: GapReason::LostBetweenNodes, count: None }));
        }
        let messages = missed.messages.clone();
        state.late.push(Late { tab, frames: kept, messages, until: now + LATE_SECONDS });
        Some(frames)
    }

    /// Forgets what cannot be late any more. To be called about once a second.
    pub(crate) fn sweep(&self, now: u64) {
        if !self.is_busy() {
            return;
        }
        let mut users = self.users();
        users.retain(|_, state| {
            state.late.retain(|late| late.until > now);
            state.tabs > 0 || !state.late.is_empty()
        });
        self.count.store(users.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fanout::session::{Identity, SessionRef};
    use crate::proto::event::{Event, Timestamp};

    fn frame(text: &str) -> Frame {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        Frame::encode(&Event::Message { id, text, sender: "star", reply_to: None, timestamp })
    }

    fn user() -> UserId {
        UserId::parse("u").unwrap()
    }

    fn tab(slot: u32) -> SessionRef {
        let identity = Identity::new(user(), Timestamp::from_micros(0));
        SessionRef::new(Address::new(0, slot, 0), Arc::new(identity))
    }

    fn same(left: &[Frame], right: &[&Frame]) -> bool {
        left.len() == right.len() && left.iter().zip(right).all(|(left, right)| left.json() == right.json())
    }

    #[test]
    fn what_was_kept_comes_first_then_what_was_posted_meanwhile_and_nothing_twice() {
        let returning = Arc::new(Returning::default());
        let all: Vec<_> = ["old", "both", "on its way", "live"].iter().map(|text| frame(text)).collect();
        let [old, both, late, live] = &all[..] else { panic!() };
        assert!(!returning.is_busy());
        let before = frame("had before, and on its way");
        let missed = returning.begin(&user(), &[before.message_id().unwrap()]);
        assert!(returning.is_busy());
        let others: Sessions = Arc::from([tab(1)]);
        for posted in [both, &before, live] {
            let addressed = returning.pass(&user(), posted, Some(Arc::clone(&others))).unwrap();
            assert_eq!(addressed.len(), 1);
        }
        missed.set(&all[..3], vec![both.clone(), late.clone()]);
        let replay = returning.finish(&missed, tab(2).address(), 0).unwrap();
        assert!(same(&replay, &[both, late, live]), "{replay:?} without {old:?}");
        drop(missed);
        // What comes late is for the others, and for whoever came after.
        let both_tabs: Sessions = Arc::from([tab(1), tab(2)]);
        let addressed = |frame| returning.pass(&user(), frame, Some(Arc::clone(&both_tabs))).unwrap();
        assert_eq!(addressed(&before).len(), 1);
        assert_eq!(addressed(late).iter().map(|tab| tab.address().slot()).collect::<Vec<_>>(), [1]);
        let next = frame("next");
        assert_eq!(addressed(&next).len(), 2);
        returning.sweep(LATE_SECONDS);
        assert!(!returning.is_busy());
        assert_eq!(addressed(late).len(), 2);
    }

    #[test]
    fn a_replay_begins_with_a_gap_if_something_was_lost_on_the_way() {
        let returning = Arc::new(Returning::default());
        let (kept, live) = (frame("kept"), frame("live"));
        let gap = Frame::notice(&Notice::Gap { reason: GapReason::LostBetweenNodes, count: None });
        let check = |lost: &[Option<&UserId>], expected: &[&Frame]| {
            let missed = returning.begin(&user(), &[]);
            lost.iter().for_each(|user| returning.lose(*user));
            assert!(returning.pass(&user(), &live, None).is_none());
            missed.set(&[], vec![kept.clone()]);
            let replay = returning.finish(&missed, tab(2).address(), 0).unwrap();
            assert!(same(&replay, expected), "{replay:?} after {lost:?}");
        };
        let other = UserId::parse("other").unwrap();
        check(&[], &[&kept, &live]);
        check(&[Some(&other)], &[&kept, &live]);
        check(&[Some(&user())], &[&gap, &kept, &live]);
        // What was lost before a tab began to come back is among what is kept.
        check(&[], &[&kept, &live]);
        check(&[None, Some(&user())], &[&gap, &kept, &live]);
        returning.sweep(LATE_SECONDS);
        assert!(!returning.is_busy(), "whoever is lost to is not kept for it");
    }

    #[test]
    fn a_replay_that_is_not_whole_is_none() {
        let returning = Arc::new(Returning::default());
        let missed = returning.begin(&user(), &[]);
        assert!(returning.finish(&missed, tab(1).address(), 0).is_none(), "nothing was found");
        missed.set(&[], Vec::new());
        for _ in 0..=FRAMES_MAX {
            assert!(returning.pass(&user(), &frame("x"), None).is_none());
        }
        assert!(returning.finish(&missed, tab(1).address(), 0).is_none());
        drop(missed);
        assert!(!returning.is_busy());
    }
}
