//! The book of presence: what is written in Redis of this node's users, and what has to be. Time is an argument.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::id::UserId;

/// A user stays for so long after the last tab has left.
const OFF_AFTER: Duration = Duration::from_secs(3);
/// A user whose tab was expected and did not come stays for so long.
const HOLD: Duration = Duration::from_secs(10);
/// When what is written is written again: a third of its lifetime.
const REFRESH: Duration = Duration::from_secs(40);

/// What is written of one user.
struct Entry {
    tabs: usize,
    hold: Instant,
    /// When it is to be written again at the latest.
    refresh: Instant,
}

/// What is to be written of one user.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    On { user: UserId, tabs: usize, is_new: bool },
    Off { user: UserId },
}

/// What is written, and who is to be looked at when.
#[derive(Default)]
pub(super) struct Book {
    written: HashMap<UserId, Entry>,
    /// Those whose last tab has left.
    due: VecDeque<(Instant, UserId)>,
    /// Those whose tab was expected.
    held: VecDeque<(Instant, UserId)>,
    refresh: VecDeque<(Instant, UserId)>,
}

impl Book {
    /// What was written may be gone: whoever has tabs is written as if new.
    pub(super) fn doubt(&mut self) {
        self.written.values_mut().for_each(|entry| entry.tabs = 0);
    }

    /// Adds those who are to be looked at by `now`, up to `users_max` in all.
    pub(super) fn take_due(&mut self, now: Instant, users_max: usize, users: &mut HashMap<UserId, bool>) {
        for queue in [&mut self.due, &mut self.held, &mut self.refresh] {
            while users.len() < users_max
                && let Some((_, user)) = queue.pop_front_if(|(at, _)| *at <= now)
            {
                users.entry(user).or_insert(false);
            }
        }
    }

    /// What has to be written of `users`, who have so many `tabs` now; of those who are marked a tab is about to come.
    pub(super) fn changes(
        &mut self,
        tabs: impl Fn(&UserId) -> usize,
        users: HashMap<UserId, bool>,
        now: Instant,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for (user, is_expected) in users {
            let tabs = tabs(&user);
            let entry = self.written.get_mut(&user);
            if is_expected || tabs > 0 {
                if is_expected {
                    self.held.push_back((now + HOLD, user.clone()));
                }
                changes.push(Change::On { is_new: tabs > 0 && entry.is_none_or(|entry| entry.tabs == 0), user, tabs });
            } else if let Some(entry) = entry {
                if entry.tabs > 0 {
                    // The last one left just now: it is looked at again.
                    entry.tabs = 0;
                    entry.hold = entry.hold.max(now + OFF_AFTER);
                    self.due.push_back((now + OFF_AFTER, user));
                } else if now >= entry.hold {
                    changes.push(Change::Off { user });
                }
            }
        }
        changes
    }

    /// These changes are written. Gives those who are gone.
    pub(super) fn note(&mut self, changes: Vec<Change>, now: Instant) -> Vec<UserId> {
        let mut gone = Vec::new();
        for change in changes {
            match change {
                Change::On { user, tabs, .. } => {
                    let entry = self.written.entry(user.clone()).or_insert(Entry { tabs, hold: now, refresh: now });
                    entry.tabs = tabs;
                    // Who was expected and has come is not waited for any more.
                    entry.hold = if tabs == 0 { now + HOLD } else { now };
                    if now >= entry.refresh {
                        entry.refresh = now + REFRESH;
                        self.refresh.push_back((entry.refresh, user));
                    }
                }
                Change::Off { user } => {
                    self.written.remove(&user);
                    gone.push(user);
                }
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A book and the tabs that there really are, with what was written as lines.
    struct Day {
        book: Book,
        tabs: HashMap<UserId, usize>,
        now: Instant,
    }

    impl Day {
        /// A second later, those are looked at who are due, and these: `+name` for one whose tab is expected.
        fn look(&mut self, names: &str) -> String {
            self.now += Duration::from_secs(1);
            let user = |name: &str| UserId::parse(name.trim_start_matches('+')).unwrap();
            let mut users: HashMap<_, _> =
                names.split_whitespace().map(|name| (user(name), name.starts_with('+'))).collect();
            self.book.take_due(self.now, 100, &mut users);
            let changes = self.book.changes(|user| self.tabs.get(user).copied().unwrap_or(0), users, self.now);
            let mut lines: Vec<_> = changes
                .iter()
                .map(|change| match change {
                    Change::On { user, tabs, is_new: true } => format!("{user}={tabs}!"),
                    Change::On { user, tabs, is_new: false } => format!("{user}={tabs}"),
                    Change::Off { user } => format!("{user} off"),
                })
                .collect();
            lines.sort();
            self.book.note(changes, self.now);
            lines.join(", ")
        }

        fn set(&mut self, name: &str, tabs: usize) {
            self.tabs.insert(UserId::parse(name).unwrap(), tabs);
        }

        /// What is written in so many seconds by itself.
        fn wait(&mut self, seconds: usize) -> Vec<String> {
            (0..seconds).map(|_| self.look("")).filter(|line| !line.is_empty()).collect()
        }
    }

    #[tokio::test]
    async fn users_are_written_as_they_are_and_leave_after_a_while() {
        let mut day = Day { book: Book::default(), tabs: HashMap::new(), now: Instant::now() };
        assert_eq!(day.look("+ann"), "ann=0", "expected, before its tab is there");
        day.set("ann", 1);
        assert_eq!(day.look("ann"), "ann=1!");
        day.set("ann", 2);
        assert_eq!(day.look("ann"), "ann=2");
        day.set("ann", 0);
        assert_eq!(day.look("ann"), "");
        assert_eq!(day.wait(2), [""; 0]);
        day.set("ann", 1);
        assert_eq!(day.look("ann"), "ann=1!", "back in time: it was never off");
        day.set("ann", 0);
        assert_eq!(day.look("ann"), "");
        assert_eq!(day.wait(3), ["ann off"]);
        assert_eq!(day.look("ann bob"), "");
        // Whose tab never comes is taken out again.
        assert_eq!(day.look("+bob"), "bob=0");
        assert_eq!(day.wait(9), [""; 0]);
        assert_eq!(day.wait(1), ["bob off"]);
    }

    #[tokio::test]
    async fn whoever_stays_is_written_again_in_time_whoever_else_leaves() {
        let mut day = Day { book: Book::default(), tabs: HashMap::new(), now: Instant::now() };
        for name in ["ann", "bob", "cyd"] {
            day.set(name, 1);
        }
        assert_eq!(day.look("ann bob cyd"), "ann=1!, bob=1!, cyd=1!");
        day.set("ann", 0);
        assert_eq!(day.look("ann"), "");
        assert_eq!(day.wait(5), ["ann off"]);
        for _ in 0..5 {
            // Within any two thirds of what is written lasts for.
            assert_eq!(day.wait(80).join(", ").matches("bob=1").count(), 2);
        }
        day.book.doubt();
        assert_eq!(day.look("bob cyd"), "bob=1!, cyd=1!");
    }
}
