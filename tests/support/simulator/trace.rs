//! What happened: a digest of all of it, and the last of it in words.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use tabcast::proto::disconnect::Disconnect;

/// Events that a failure shows.
const LAST: usize = 60;

macro_rules! counts {
    ($($name:ident,)*) => {
        /// How often the world was as hostile as it is meant to be.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub(crate) struct Counts {
            $(pub(crate) $name: u64,)*
            /// By [`Disconnect::ALL`].
            pub(crate) ended: [u64; Disconnect::ALL.len()],
        }

        impl Counts {
            /// Adds what happened in another world.
            pub(crate) fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                self.ended.iter_mut().zip(other.ended).for_each(|(sum, ended)| *sum += ended);
            }

            /// What never happened.
            pub(crate) fn missing(&self) -> Vec<&'static str> {
                let all = [$((stringify!($name), self.$name),)*];
                let endings = Disconnect::ALL.into_iter().zip(self.ended);
                // Nothing of ours is at fault in a session of a simulated world.
                let endings = endings.filter(|(reason, _)| *reason != Disconnect::InternalError);
                let all = all.into_iter().chain(endings.map(|(reason, count)| (reason.reason(), count)));
                all.filter(|(_, count)| *count == 0).map(|(what, _)| what).collect()
            }
        }
    };
}

counts! {
    opened,
    resumed,
    replayed,
    published,
    read,
    coalesced,
    dropped_typing,
    partial_writes,
    overloaded,
    spool_full,
    gaps,
    lost_messages,
    losses,
    doubled_messages,
    refused_forwards,
    drained,
    crashed,
    server_restarts,
    reused_slots,
    deflated,
}

#[derive(Default)]
pub(crate) struct Trace {
    hasher: DefaultHasher,
    last: VecDeque<String>,
    pub(crate) counts: Counts,
}

impl Trace {
    pub(crate) fn note(&mut self, event: String) {
        event.hash(&mut self.hasher);
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back(event);
    }

    /// Bytes that somebody got.
    pub(crate) fn note_bytes(&mut self, bytes: &[u8]) {
        self.hasher.write(bytes);
    }

    pub(crate) fn digest(&self) -> u64 {
        self.hasher.finish()
    }

    pub(crate) fn last(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}
