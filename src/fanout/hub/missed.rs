//! What other nodes said and never came here, or found no room: everybody whom it may have been for is told.

use std::sync::PoisonError;

use crate::fanout::hub::{Hub, Post, Pushed, Shards, shard_number, shards_of};
use crate::id::{ChannelId, UserId};

/// Channels that a shard is told of one by one. Past that all users, or all rooms, are told there: it costs them a gap,
/// and the shard a bounded list.
const CHANNELS_MAX: usize = 64;

/// For whom something is lost.
#[derive(Clone, Copy)]
enum Lost<'a> {
    Rooms,
    Users,
    To(&'a ChannelId),
}

/// What a shard is yet to tell of.
#[derive(Default)]
pub(crate) struct Untold {
    /// Everybody who is in a room.
    pub(crate) rooms: bool,
    /// Every user's tabs.
    pub(crate) users: bool,
    /// Users and rooms beside those, each once.
    pub(crate) channels: Vec<ChannelId>,
}

impl Untold {
    fn is_empty(&self) -> bool {
        !self.rooms && !self.users && self.channels.is_empty()
    }

    fn note(&mut self, lost: Lost<'_>) {
        match lost {
            Lost::Rooms => {
                self.rooms = true;
                self.channels.retain(|channel| !matches!(channel, ChannelId::Room(_)));
            }
            Lost::Users => {
                self.users = true;
                self.channels.retain(|channel| !matches!(channel, ChannelId::User(_)));
            }
            Lost::To(channel) => self.note_channel(channel),
        }
    }

    fn note_channel(&mut self, channel: &ChannelId) {
        let (are_told, all) = match channel {
            ChannelId::User(_) => (self.users, Lost::Users),
            ChannelId::Room(_) => (self.rooms, Lost::Rooms),
            // Its reader is told by the stream itself.
            ChannelId::Stream(_) => return,
        };
        if are_told || self.channels.contains(channel) {
            return;
        }
        if self.channels.len() < CHANNELS_MAX {
            self.channels.push(channel.clone());
        } else {
            self.note(all);
        }
    }
}

impl Hub {
    /// Tells everybody who is in a room that something may be missing.
    pub(crate) fn tell_rooms_of_gap(&self) {
        self.ring(self.note_lost(&self.all_shards(), Lost::Rooms));
    }

    /// Tells every tab that something to its user may be missing. What is kept here of users is not whole any more.
    pub(crate) fn tell_users_of_gap(&self) {
        let shards = self.all_shards();
        let parked = self.stripes.forget_all(|| {
            self.returning.lose(None);
            self.note_lost(&shards, Lost::Users)
        });
        self.ring(parked);
    }

    /// Tells the tabs of one user, or whoever is in one room, that something is missing there.
    pub(crate) fn tell_channel_of_gap(&self, channel: &ChannelId) {
        let parked = match channel {
            ChannelId::User(user) => self.stripes.forget(user, || {
                self.returning.lose(Some(user));
                self.note_lost_to(user, channel)
            }),
            ChannelId::Room(name) => {
                let room = self.rooms.find(name);
                let shards = room.iter().flat_map(|room| room.shards()).map(|(shard, _)| shard_number(shard));
                self.note_lost(&shards.collect::<Shards>(), Lost::To(channel))
            }
            ChannelId::Stream(_) => return,
        };
        self.ring(parked);
        self.miss_for_watchers(channel);
    }

    /// The tabs of a user are to be told that something is missing. Under the stripe; whoever is returned is to be rung.
    pub(super) fn note_lost_to(&self, user: &UserId, channel: &ChannelId) -> Shards {
        let shards = self.registry.get_sessions(user).map(|sessions| shards_of(&sessions));
        self.note_lost(&shards.unwrap_or_default(), Lost::To(channel))
    }

    fn all_shards(&self) -> Shards {
        (0..self.inboxes.len()).map(shard_number).collect()
    }

    /// One post for all that is noted before a shard takes it: room is not asked for, as one at a time is on its way. It is
    /// pushed before the note is let go, so that whoever finds it noted knows that it stands before what is pushed next:
    /// a tab has to be told before it reads what came behind the loss, as its position is past it then. For the same
    /// reason there is no pause between two of them, and what is kept of users is let go under the stripes that are
    /// held for this: whatever is kept from then on stands behind the gap in every inbox. Whoever is returned is to be
    /// rung.
    fn note_lost(&self, shards: &[u16], lost: Lost<'_>) -> Shards {
        let mut parked = Shards::new();
        for shard in shards {
            let inbox = &self.inboxes[usize::from(*shard)];
            let mut untold = inbox.untold.lock().unwrap_or_else(PoisonError::into_inner);
            let is_first = untold.is_empty();
            untold.note(lost);
            if is_first && !untold.is_empty() {
                inbox.room.take(1, 0);
                if inbox.queue.push(Post::Missed) == Pushed::Ring {
                    parked.push(*shard);
                }
            }
        }
        parked
    }

    /// The shard tells of it now: what is lost from here on has to be told anew.
    pub(crate) fn take_untold(&self, shard: u16) -> Untold {
        let mut untold = self.inboxes[usize::from(shard)].untold.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut untold)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::sync::{Arc, PoisonError};
    use std::time::Duration;

    use crate::fanout::hub::{Hub, Post};
    use crate::fanout::session::{Address, Identity, SessionRef};
    use crate::fanout::shard::Resume;
    use crate::id::{ChannelId, MessageId, UserId};
    use crate::proto::event::{Event, Timestamp};
    use crate::proto::frame::{Frame, Kind};
    use crate::proto::limits::{HubLimits, SessionLimits};

    fn message(text: &str) -> Frame {
        let timestamp = Timestamp::from_micros(1);
        Frame::encode(&Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp })
    }

    /// Whoever has a position behind a gap has read the gap.
    fn check(tell: impl Fn(&Hub) + Sync) {
        let hub = Hub::new(1, &HubLimits::default(), &SessionLimits::default());
        let user = UserId::parse("ann").unwrap();
        let channel = ChannelId::User(user.clone());
        let session =
            SessionRef::new(Address::new(0, 0, 0), Arc::new(Identity::new(user.clone(), Timestamp::from_micros(0))));
        hub.connect(session, &Resume::Fresh).unwrap();
        hub.post(&channel, &message("before")).unwrap();
        let meanwhile = message("meanwhile");
        let (has_posted, posted) = sync_channel(1);
        std::thread::scope(|scope| {
            // The teller comes to a stop between letting go of the past and the push.
            let untold = hub.inboxes[0].untold.lock().unwrap_or_else(PoisonError::into_inner);
            scope.spawn(|| tell(&hub));
            while hub.stripes.try_history(&user).is_some_and(|history| !history.is_empty()) {
                std::thread::yield_now();
            }
            scope.spawn(|| {
                hub.post(&channel, &meanwhile).unwrap();
                let _ = has_posted.send(());
            });
            // It has to wait; one that need not is given the time to show it.
            let _ = posted.recv_timeout(Duration::from_millis(100));
            drop(untold);
        });
        let posts: Vec<_> = hub.take(0).collect();
        assert!(
            matches!(posts[..], [Post::Sessions { .. }, Post::Missed, Post::Sessions { .. }]),
            "the post that came meanwhile is kept, and so stands behind the gap"
        );
        let kept: Vec<_> = hub.history(&channel).iter().map(|frame| frame.json().to_vec()).collect();
        assert_eq!(kept, [meanwhile.json().to_vec()]);
    }

    #[test]
    fn what_is_posted_while_all_are_told_of_a_gap_is_not_kept_in_front_of_it() {
        check(Hub::tell_users_of_gap);
    }

    #[test]
    fn what_is_posted_while_a_user_is_told_of_a_gap_is_not_kept_in_front_of_it() {
        check(|hub| hub.tell_channel_of_gap(&ChannelId::parse("ann").unwrap()));
    }

    /// It is registered nowhere yet, and what is kept of it may have been read before what is lost was said.
    #[test]
    fn who_is_on_the_way_back_is_told_as_it_comes() {
        let ann = ChannelId::parse("ann").unwrap();
        let check = |tell: &dyn Fn(&Hub), is_told: bool| {
            let hub = Hub::new(1, &HubLimits::default(), &SessionLimits::default());
            let user = UserId::parse("ann").unwrap();
            let missed = hub.begin_return(&user, &[]);
            tell(&hub);
            missed.set(&[], vec![message("kept")]);
            let identity = Arc::new(Identity::new(user, Timestamp::from_micros(0)));
            let session = SessionRef::new(Address::new(0, 0, 0), identity);
            let replay = hub.connect(session, &Resume::Missed(Arc::new(missed))).unwrap().unwrap();
            let kinds: Vec<_> = replay.iter().map(Frame::kind).collect();
            let expected: &[_] = if is_told { &[Kind::Gap, Kind::Message] } else { &[Kind::Message] };
            assert_eq!(kinds, expected);
        };
        check(&Hub::tell_users_of_gap, true);
        check(&|hub| hub.tell_channel_of_gap(&ann), true);
        check(&|hub| hub.tell_channel_of_gap(&ChannelId::parse("bob").unwrap()), false);
        check(&Hub::tell_rooms_of_gap, false);
    }

    #[test]
    fn what_finds_no_room_and_cannot_be_refused_is_told_and_there_for_who_comes_back() {
        let limits = HubLimits { inbox_posts_max: 1, ..HubLimits::default() };
        let hub = Hub::new(1, &limits, &SessionLimits::default());
        let user = UserId::parse("ann").unwrap();
        let identity = Arc::new(Identity::new(user.clone(), Timestamp::from_micros(0)));
        let session = |slot| SessionRef::new(Address::new(0, slot, 0), Arc::clone(&identity));
        hub.connect(session(0), &Resume::Fresh).unwrap();
        let (before, frame) = (message("before"), message("no room"));
        hub.post_or_keep(&user, &before);
        let coming = hub.begin_return(&user, &[]);
        assert_eq!(hub.post_or_keep(&user, &frame).tabs, 0);
        let posts: Vec<_> = hub.take(0).collect();
        assert!(matches!(posts[..], [Post::Sessions { .. }, Post::Missed]), "one was posted, and one is told of");
        let json = |frames: Vec<Frame>| frames.iter().map(|frame| frame.json().to_vec()).collect::<Vec<_>>();
        coming.set(&[], Vec::new());
        let replay = hub.connect(session(1), &Resume::Missed(Arc::new(coming))).unwrap().unwrap();
        assert_eq!(json(replay), [frame.json().to_vec()]);
        let after = Resume::After(vec![before.message_id().unwrap()]);
        assert_eq!(json(hub.connect(session(2), &after).unwrap().unwrap()), [frame.json().to_vec()]);
    }
}
