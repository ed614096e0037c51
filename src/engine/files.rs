//! Files that workers sent, kept for a while so that their links resolve: bounded in bytes, in number and in time. The
//! oldest go first.
//!
//! A file lives on the node that it was sent to, in memory, under its message id: 122 random bits, which whoever has
//! seen the frame or the URL knows, and nobody else. What has expired is dropped when the next file comes or is asked
//! for, a few at a time, and is not found meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::id::MessageId;
use crate::platform::adapter::OutgoingFile;
use crate::proto::event::Timestamp;
use crate::proto::limits::FileLimits;

/// The most expired files that one call drops: whoever comes by with one file is not kept waiting for thousands.
const EXPIRED_AT_ONCE: usize = 64;

/// A file that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// The id of its message, and what its link is known by.
    pub id: MessageId,
    /// The raw bytes, in a buffer of their own: a small file pins no large request. They count against
    /// [`FileLimits::bytes_max`] until the last clone or slice is dropped, also when the file is no longer kept.
    pub data: Bytes,
    /// Verbatim, as its sender wrote it: a name to show, never a path.
    pub filename: Box<str>,
    /// Verbatim, as its sender wrote it: perhaps no media type at all.
    pub mimetype: Box<str>,
    /// From when on it is kept.
    pub stored_at: Timestamp,
}

impl StoredFile {
    /// What is left at `now` of the `time` that files are kept. `None`: nothing.
    #[must_use]
    pub fn time_left(&self, time: Duration, now: Timestamp) -> Option<Duration> {
        let age = Duration::from_micros(now.as_micros().saturating_sub(self.stored_at.as_micros()));
        time.checked_sub(age).filter(|left| !left.is_zero())
    }

    fn size(&self) -> usize {
        size(self.data.len(), &self.filename, &self.mimetype)
    }
}

/// What counts against [`FileLimits::bytes_max`].
fn size(bytes: usize, filename: &str, mimetype: &str) -> usize {
    bytes.saturating_add(filename.len()).saturating_add(mimetype.len())
}

/// A place in the bytes of a store, given back when it is dropped.
#[derive(Debug)]
struct Place {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What the `Bytes` of a kept file own. Fields are dropped in order: the memory is free before its place is.
struct Placed {
    bytes: Box<[u8]>,
    _place: Place,
}

impl AsRef<[u8]> for Placed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[derive(Debug, Default)]
struct Kept {
    files: HashMap<MessageId, Arc<StoredFile>>,
    /// In the order in which they came, which is that of their time.
    order: VecDeque<MessageId>,
    bytes: usize,
}

impl Kept {
    fn take(&mut self, id: MessageId) -> Option<Arc<StoredFile>> {
        let file = self.files.remove(&id)?;
        // What is taken by its id was refused, a moment after it came.
        if let Some(at) = self.order.iter().rposition(|other| *other == id) {
            self.order.remove(at);
        }
        self.bytes -= file.size();
        Some(file)
    }

    fn take_oldest(&mut self) -> Option<Arc<StoredFile>> {
        let file = self.files.remove(&self.order.pop_front()?)?;
        self.bytes -= file.size();
        Some(file)
    }

    fn take_expired(&mut self, time: Duration, now: Timestamp) -> Vec<Arc<StoredFile>> {
        let mut expired = Vec::new();
        while expired.len() < EXPIRED_AT_ONCE
            && let Some(oldest) = self.order.front().and_then(|id| self.files.get(id))
            && oldest.time_left(time, now).is_none()
        {
            expired.extend(self.take_oldest());
        }
        expired
    }

    /// Puts a file last, and returns what had to go for it.
    fn put(&mut self, file: Arc<StoredFile>, files_max: usize) -> Vec<Arc<StoredFile>> {
        let mut displaced = Vec::from_iter(self.take(file.id));
        self.bytes += file.size();
        self.order.push_back(file.id);
        self.files.insert(file.id, file);
        while self.files.len() > files_max {
            displaced.extend(self.take_oldest());
        }
        displaced
    }
}

/// The files of one engine.
#[derive(Debug)]
pub(crate) struct FileStore {
    limits: FileLimits,
    /// Bytes of all files that are kept, that are on their way in, or that are gone from here and still read.
    ///
    /// # Ordering
    /// Relaxed: it publishes no other memory. It is raised under the lock only, so that two who ask at once never get
    /// the same room; whoever sees it lowered late finds less room than there is.
    held: Arc<AtomicUsize>,
    kept: Mutex<Kept>,
}

impl FileStore {
    pub(crate) fn new(limits: FileLimits) -> Self {
        Self { limits, held: Arc::default(), kept: Mutex::default() }
    }

    /// No code that can panic runs under the lock, so a poisoned state is still whole. Files are dropped outside of it.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a copy of `file` while it is being published. The same id again takes the place of the first.
    ///
    /// `None`: it is larger than the whole store, or than what readers of files that are gone leave of it.
    pub(crate) fn keep(self: &Arc<Self>, file: &OutgoingFile, now: Timestamp) -> Option<Keeping> {
        let FileLimits { bytes_max, files_max, time } = self.limits;
        if bytes_max == 0 || files_max == 0 {
            return None;
        }
        let expired = self.kept().take_expired(time, now);
        drop(expired);
        let place = self.place(size(file.data.len(), &file.filename, &file.mimetype))?;
        let stored = Arc::new(StoredFile {
            id: file.id,
            data: Bytes::from_owner(Placed { bytes: Box::from(&*file.data), _place: place }),
            filename: Box::from(&*file.filename),
            mimetype: Box::from(&*file.mimetype),
            stored_at: now,
        });
        let displaced = self.kept().put(stored, files_max);
        drop(displaced);
        Some(Keeping { store: Arc::clone(self), id: file.id, is_published: false })
    }

    pub(crate) fn find(&self, id: MessageId, now: Timestamp) -> Option<Arc<StoredFile>> {
        let time = self.limits.time;
        let (expired, found) = {
            let mut kept = self.kept();
            (kept.take_expired(time, now), kept.files.get(&id).cloned())
        };
        drop(expired);
        // A clock that was set back leaves files out of order, behind one that looks younger.
        found.filter(|file| file.time_left(time, now).is_some())
    }

    /// Makes room for `bytes`, if need be by letting the oldest go.
    fn place(&self, bytes: usize) -> Option<Place> {
        loop {
            let oldest = {
                let mut kept = self.kept();
                let held = self.held.load(Ordering::Relaxed);
                if held.saturating_add(bytes) <= self.limits.bytes_max {
                    self.held.fetch_add(bytes, Ordering::Relaxed);
                    return Some(Place { held: Arc::clone(&self.held), bytes });
                }
                // What is still read, or on its way in, is not freed by letting others go.
                let others = held.saturating_sub(kept.bytes);
                if others.saturating_add(bytes) > self.limits.bytes_max {
                    return None;
                }
                kept.take_oldest()?
            };
            drop(oldest);
        }
    }
}

/// A file that is kept while its publish is under way, so that whoever sees the frame can fetch it at once. Dropped
/// before it [is published](Self::published), it takes the file out again: what was refused has no link.
#[derive(Debug)]
#[must_use]
pub(crate) struct Keeping {
    store: Arc<FileStore>,
    id: MessageId,
    is_published: bool,
}

impl Keeping {
    pub(crate) fn published(mut self) {
        self.is_published = true;
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        if !self.is_published {
            let refused = self.store.kept().take(self.id);
            drop(refused);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::engine::{Engine, EngineSettings};
    use crate::fanout::session::{Address, Identity, SessionRef};
    use crate::id::{ChannelId, UserId};
    use crate::platform::adapter::Outlet;
    use crate::proto::delivery::PublishError;
    use crate::proto::limits::HubLimits;

    const AT: u64 = 1_700_000_000_000_000;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_micros(AT + seconds * 1_000_000)
    }

    fn store(bytes_max: usize, files_max: usize, seconds: u64) -> Arc<FileStore> {
        Arc::new(FileStore::new(FileLimits { bytes_max, files_max, time: Duration::from_secs(seconds) }))
    }

    /// A file whose size is `bytes`: its name and type count too.
    fn file(bytes: usize) -> OutgoingFile {
        let (filename, mimetype) = ("a".to_owned(), "b/c".to_owned());
        let data = Bytes::from(vec![7; bytes - 4]);
        OutgoingFile { id: MessageId::random(), filename, mimetype, data, timestamp: at(0) }
    }

    /// Keeps a file of that size. Its id, also if it was not kept.
    fn keep(store: &Arc<FileStore>, bytes: usize, now: Timestamp) -> MessageId {
        let file = file(bytes);
        if let Some(keeping) = store.keep(&file, now) {
            keeping.published();
        }
        file.id
    }

    fn held(store: &FileStore) -> usize {
        store.held.load(Ordering::Relaxed)
    }

    #[test]
    fn what_was_kept_is_found_as_it_was_sent() {
        let store = store(100, 10, 10);
        let mut sent = file(10);
        sent.filename = "../\r\n\"日".to_owned();
        sent.mimetype = "no type".to_owned();
        store.keep(&sent, at(1)).unwrap().published();
        let found = store.find(sent.id, at(2)).unwrap();
        let expected = StoredFile {
            id: sent.id,
            data: sent.data.clone(),
            filename: "../\r\n\"日".into(),
            mimetype: "no type".into(),
            stored_at: at(1),
        };
        assert_eq!(*found, expected);
        assert_ne!(found.data.as_ptr(), sent.data.as_ptr(), "a copy of its own");
        assert_eq!(store.find(MessageId::random(), at(2)), None);
    }

    #[test]
    fn the_oldest_go_when_bytes_or_files_are_too_many() {
        let check = |(bytes_max, files_max), sizes: &[usize], expected: &[bool]| {
            let store = store(bytes_max, files_max, 10);
            let ids: Vec<_> = sizes.iter().map(|bytes| keep(&store, *bytes, at(0))).collect();
            let found: Vec<_> = ids.iter().map(|id| store.find(*id, at(0)).is_some()).collect();
            assert_eq!(found, expected, "{bytes_max} {files_max} {sizes:?}");
            let kept: usize = sizes.iter().zip(&found).filter(|(_, found)| **found).map(|(bytes, _)| bytes).sum();
            assert_eq!(held(&store), kept, "{sizes:?}");
            let state = store.kept();
            assert_eq!((state.bytes, state.order.len()), (kept, state.files.len()), "{sizes:?}");
        };
        check((30, 9), &[10, 10, 10], &[true, true, true]);
        check((30, 9), &[10, 10, 11], &[false, true, true]);
        check((30, 9), &[10, 10, 30], &[false, false, true]);
        // Nothing goes for what is not kept.
        check((30, 9), &[10, 10, 31], &[true, true, false]);
        check((30, 2), &[5, 5, 5, 5], &[false, false, true, true]);
        check((30, 1), &[4, 4], &[false, true]);
        check((30, 0), &[5], &[false]);
        check((0, 9), &[5, 4], &[false, false]);
    }

    #[test]
    fn a_file_goes_when_its_time_has_passed() {
        let store = store(100, 10, 10);
        let (first, second) = (keep(&store, 10, at(0)), keep(&store, 10, at(4)));
        let left = |id, now| Some(store.find(id, now)?.time_left(Duration::from_secs(10), now)?.as_secs());
        assert_eq!((left(first, at(0)), left(first, at(9)), left(second, at(9))), (Some(10), Some(1), Some(5)));
        assert_eq!((left(first, at(10)), left(second, at(10)), held(&store)), (None, Some(4), 10));
        // The next file lets the expired ones go, asked for or not.
        keep(&store, 20, at(14));
        assert_eq!((held(&store), store.kept().files.len()), (20, 1));
    }

    #[test]
    fn of_many_that_have_expired_none_is_found_and_a_few_go_at_a_time() {
        let store = store(10_000, 1_000, 10);
        let ids: Vec<_> = (0..200).map(|_| keep(&store, 10, at(0))).collect();
        assert_eq!(store.find(ids[199], at(10)), None);
        assert_eq!(held(&store), (200 - EXPIRED_AT_ONCE) * 10);
        assert!(ids.iter().all(|id| store.find(*id, at(10)).is_none()));
        assert_eq!(held(&store), 0);
    }

    #[test]
    fn a_clock_that_is_set_back_shows_nothing_for_longer() {
        let store = store(100, 10, 10);
        keep(&store, 10, at(100));
        let behind = keep(&store, 10, at(50));
        assert!(store.find(behind, at(59)).is_some());
        assert_eq!(store.find(behind, at(60)), None);
    }

    #[test]
    fn what_was_refused_is_taken_out_again() {
        let store = store(100, 10, 10);
        let before = keep(&store, 10, at(0));
        let refused = file(20);
        let keeping = store.keep(&refused, at(0)).unwrap();
        assert!(store.find(refused.id, at(0)).is_some(), "there before its frame is");
        let after = keep(&store, 10, at(0));
        drop(keeping);
        assert_eq!(store.find(refused.id, at(0)), None);
        assert!(store.find(before, at(0)).is_some() && store.find(after, at(0)).is_some());
        assert_eq!((held(&store), store.kept().order.len()), (20, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_keeps_what_it_has_not_refused() {
        let hub = HubLimits { inbox_posts_max: 1, ..HubLimits::default() };
        let engine = Engine::new(EngineSettings { shards: 1, hub, ..EngineSettings::default() });
        let user = UserId::parse("u").unwrap();
        let identity = Arc::new(Identity::new(user.clone(), at(0)));
        engine.hub().registry().connect(SessionRef::new(Address::new(0, 0, 0), identity)).unwrap();
        let (channel, nobody) = (ChannelId::User(user), ChannelId::parse("room:empty").unwrap());
        // Nobody runs the shard: the first post fills its inbox. Large files are prepared on another thread.
        for (bytes, channel) in [(10, &nobody), (300 << 10, &nobody), (300 << 10, &channel)] {
            let file = file(bytes);
            engine.publish_file(channel, file.clone()).await.unwrap();
            assert_eq!(engine.file(file.id).unwrap().data, file.data);
        }
        for bytes in [10, 300 << 10] {
            let file = file(bytes);
            assert_eq!(engine.publish_file(&channel, file.clone()).await, Err(PublishError::Overloaded));
            assert_eq!(engine.file(file.id), None);
        }
        let file = file(10);
        let mut waiting = Box::pin(engine.publish_file(&channel, file.clone()));
        assert!((&mut waiting).now_or_never().is_none());
        assert!(engine.file(file.id).is_some(), "there before its frame is");
        drop(waiting);
        assert_eq!(engine.file(file.id), None);
    }

    #[test]
    fn the_same_id_again_takes_the_place_of_the_first() {
        let store = store(100, 10, 10);
        let mut file = file(30);
        store.keep(&file, at(0)).unwrap().published();
        file.data = Bytes::from_static(b"newer");
        store.keep(&file, at(0)).unwrap().published();
        assert_eq!(store.find(file.id, at(0)).unwrap().data, file.data);
        assert_eq!((held(&store), store.kept().order.len()), (9, 1));
    }

    #[test]
    fn what_is_still_read_counts_until_it_is_dropped() {
        let store = store(30, 10, 10);
        let id = keep(&store, 20, at(0));
        let part = store.find(id, at(0)).unwrap().data.slice(1..2);
        let next = keep(&store, 20, at(0));
        assert_eq!((store.find(id, at(0)), store.find(next, at(0))), (None, None), "the reader has 20 of 30");
        let small = keep(&store, 10, at(0));
        assert!(store.find(small, at(0)).is_some());
        assert_eq!((held(&store), part[0]), (30, 7));
        drop(part);
        assert_eq!(held(&store), 10);
        let again = keep(&store, 20, at(0));
        assert!(store.find(again, at(0)).is_some() && store.find(small, at(0)).is_some());
    }

    #[test]
    fn many_at_once_never_hold_more_than_the_limit() {
        let store = store(1_000, 7, 10);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..200 {
                        let id = keep(&store, 10 + number, at(0));
                        let found = store.find(id, at(0));
                        assert!(held(&store) <= 1_000);
                        drop(found);
                    }
                });
            }
        });
        let kept = store.kept();
        assert!(kept.files.len() <= 7 && kept.order.len() == kept.files.len());
        assert_eq!(kept.bytes, held(&store));
    }
}
