//! What one run does: checked settings, without a flag or a default in sight.

use std::net::SocketAddr;
use std::time::Duration;

use super::template::Template;

/// Connections from one source address, as far as it is for us to choose: the kernel has ports for some 28,000, but looks
/// for a free one ever longer, and at 25,000 a handshake takes ten times as long as at 5,000.
pub(super) const CONNECTIONS_PER_SOURCE: usize = 8_000;
/// Publishers, so that a message's number has bits left.
pub(super) const PUBLISHERS_MAX: usize = 256;

/// Whom messages are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Everybody: one channel that all clients hear.
    Room,
    /// One user at random each, and nobody else.
    Users,
    /// The room and users in turn.
    Mixed,
}

impl Target {
    /// How many channels each client hears.
    #[must_use]
    pub fn channels_per_client(self) -> usize {
        if self == Self::Mixed { 2 } else { 1 }
    }
}

/// How messages follow each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// Nothing is published for that long, then one message to all and one to a single user.
    Idle {
        /// How long nothing happens.
        duration: Duration,
    },
    /// The next request leaves when all tabs have what an earlier one published: never more than that many at once.
    Closed {
        /// Requests whose messages are under way.
        in_flight: usize,
        /// Messages in all.
        messages: usize,
    },
    /// So many messages a second, whether or not the server keeps up.
    Open {
        /// Messages a second.
        rate: f64,
        /// How long.
        duration: Duration,
    },
}

/// How messages are published.
#[derive(Debug, Clone)]
pub struct Publishing {
    /// Where to.
    pub address: SocketAddr,
    /// The whole request, or what stands before the body if there is more than one message in it.
    pub request: Template,
    /// One message in the body of a request.
    pub line: Template,
    /// True if each request is answered before the next.
    pub is_http: bool,
    /// What a connection begins with.
    pub first: Option<String>,
    /// Connections, with one request under way each.
    pub publishers: usize,
    /// Messages in one request.
    pub batch: usize,
    /// True if this is tabcast's own API: only then there are users to publish to.
    pub is_tabcast: bool,
}

/// What a client says and what it waits for.
#[derive(Debug, Clone)]
pub struct Joining {
    /// What is asked for by WebSocket clients: path and query.
    pub path: Template,
    /// What is asked for by event streams.
    pub stream_path: Template,
    /// `Host`.
    pub host: String,
    /// Whole header lines, each with its CR LF.
    pub headers: Template,
    /// What clients say who they are with, in turn; none if they do not.
    pub tokens: Vec<String>,
    /// Compression is offered (permessage-deflate without context takeover).
    pub deflates: bool,
    /// A first message.
    pub subscribe: Option<Template>,
    /// True if that is a binary message.
    pub subscribe_binary: bool,
    /// What a frame has in it that says the client hears everything from now on. Without one, its handshake says so.
    pub subscribed: Option<String>,
}

/// Which of the clients are special. They stand in this order: those that come and go, all others, those that never
/// read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mix {
    /// All of them.
    pub tabs: usize,
    /// How many tabs each user has.
    pub tabs_per_user: usize,
    /// Of all clients, so many are event streams.
    pub stream_share: f64,
    /// So many come and go.
    pub churners: usize,
    /// So many never read.
    pub silent: usize,
}

impl Mix {
    /// Users, the last of whom may have fewer tabs.
    #[must_use]
    pub fn users(&self) -> usize {
        self.tabs.div_ceil(self.tabs_per_user.max(1))
    }

    /// Whose client it is.
    #[must_use]
    pub fn user(&self, index: usize) -> usize {
        index / self.tabs_per_user.max(1)
    }

    /// True if the client is an event stream. They are spread evenly.
    #[must_use]
    pub fn is_stream(&self, index: usize) -> bool {
        let below = |index: usize| (index as f64 * self.stream_share).floor();
        below(index + 1) > below(index)
    }

    /// True if the client comes and goes.
    #[must_use]
    pub fn is_churner(&self, index: usize) -> bool {
        index < self.churners
    }

    /// True if the client never reads.
    #[must_use]
    pub fn is_silent(&self, index: usize) -> bool {
        index >= self.tabs - self.silent.min(self.tabs)
    }

    /// True if everything that is published has to reach the client, all the time.
    #[must_use]
    pub fn is_steady(&self, index: usize) -> bool {
        !self.is_churner(index) && !self.is_silent(index)
    }
}

/// What one run does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What is measured, for people.
    pub label: String,
    /// The server.
    pub address: SocketAddr,
    /// What a client says at the beginning.
    pub joining: Joining,
    /// Certificates that are trusted, if the connection is encrypted.
    pub tls: Option<super::tls::Trust>,
    /// The clients.
    pub mix: Mix,
    /// Handshakes under way at once, at most.
    pub connecting: usize,
    /// Source addresses, `127.0.1.1` and following; with one, whatever the kernel takes.
    pub sources: usize,
    /// Threads with clients.
    pub threads: usize,
    /// A file table for each of them.
    pub own_file_tables: bool,
    /// How messages are published; nothing is without it.
    pub publishing: Option<Publishing>,
    /// Whom they are for.
    pub target: Target,
    /// Bytes of a message's text.
    pub size: usize,
    /// Messages before those that count, one at a time.
    pub warm_up: usize,
    /// How they follow each other.
    pub shape: Shape,
    /// Clients that leave and come back, a second.
    pub churn_rate: f64,
    /// What random choices begin with.
    pub seed: u64,
    /// Nothing has arrived for so long: it never will.
    pub stall: Duration,
    /// Processes of the server.
    pub pids: Vec<u32>,
}

impl Plan {
    /// Publishers, at least one, as lanes are counted by them.
    #[must_use]
    pub fn publishers(&self) -> usize {
        self.publishing.as_ref().map_or(1, |publishing| publishing.publishers).max(1)
    }

    /// Lanes of one client.
    #[must_use]
    pub fn lanes_per_client(&self) -> usize {
        self.target.channels_per_client() * self.publishers()
    }

    /// The clients of a thread.
    #[must_use]
    pub fn clients_of(&self, thread: usize) -> std::ops::Range<usize> {
        let edge = |thread: usize| self.mix.tabs * thread / self.threads.max(1);
        edge(thread)..edge(thread + 1)
    }

    /// True if messages to everybody reach the client too: tabcast's event streams are in no room.
    #[must_use]
    pub fn hears_room(&self, index: usize) -> bool {
        let is_tabcast = self.publishing.as_ref().is_some_and(|publishing| publishing.is_tabcast);
        self.target != Target::Users && !(is_tabcast && self.mix.is_stream(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_what_their_place_says() {
        let mix = Mix { tabs: 10, tabs_per_user: 3, stream_share: 0.3, churners: 2, silent: 3 };
        assert_eq!(mix.users(), 4);
        let which = |is: &dyn Fn(usize) -> bool| (0..10).filter(|index| is(*index)).collect::<Vec<_>>();
        assert_eq!(which(&|index| mix.is_churner(index)), [0, 1]);
        assert_eq!(which(&|index| mix.is_steady(index)), [2, 3, 4, 5, 6]);
        assert_eq!(which(&|index| mix.is_silent(index)), [7, 8, 9]);
        assert_eq!(which(&|index| mix.is_stream(index)), [3, 6, 9]);
        assert_eq!((mix.user(2), mix.user(3), mix.user(9)), (0, 1, 3));
        let all = Mix { stream_share: 1.0, ..mix };
        assert!((0..10).all(|index| all.is_stream(index)));
    }
}
