//! `GET /api/users`: who is online, here and on the other nodes.

use std::collections::BTreeMap;

use http::StatusCode;
use http::header::HeaderValue;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use crate::engine::Engine;
use crate::gateway::apart::apart_if_large;
use crate::gateway::body::{BodyError, kept_with};
use crate::gateway::edge::ShardEdge;
use crate::gateway::response::{Answered, error, typed};
use crate::id::UserId;

/// What a user takes while a listing is made and written: the id twice, once escaped, in what grows by doubling.
const USER_BYTES: usize = crate::config::LISTED_USER_BYTES;

#[derive(serde::Serialize)]
struct Listing<'l> {
    users: Vec<Listed<'l>>,
    user_count: usize,
    tab_count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    this_node_only: Option<bool>,
}

#[derive(serde::Serialize)]
struct Listed<'l> {
    user_id: &'l str,
    tabs: usize,
}

impl ShardEdge {
    /// Names some, and counts all of this node and as many of the others' as it may name. What it may take while it is made and written is within the budget of bodies.
    pub(super) async fn users(&self) -> Answered {
        let (listed_max, is_alone) = {
            let settings = self.gateway.settings.load();
            (settings.users_listed_max, settings.redis.is_empty())
        };
        let (engine, control) = (&self.gateway.engine, &self.gateway.control);
        let user_count = engine.hub().registry().user_count();
        let listed_max = if is_alone { listed_max.min(user_count) } else { listed_max };
        let bytes = listed_max.saturating_mul(USER_BYTES);
        let Some(place) = self.gateway.bodies.place(bytes) else { return BodyError::TooMany.answer() };
        answer(engine, control, (listed_max, place)).await
    }
}

/// Names `listed_max` at the most. More than a few are listed, and what other nodes say of them read, on the threads of
/// `control`, to which the place goes along.
async fn answer(engine: &Engine, control: &Handle, (listed_max, place): (usize, OwnedSemaphorePermit)) -> Answered {
    let listing = listing(engine.clone(), listed_max, place);
    let listed = apart_if_large(control, listed_max.saturating_mul(USER_BYTES), listing).await;
    listed.unwrap_or_else(|| error(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request was not carried out"))
}

async fn listing(engine: Engine, listed_max: usize, mut place: OwnedSemaphorePermit) -> Answered {
    let registry = engine.hub().registry();
    let mut tabs: BTreeMap<UserId, usize> = registry.active_users(listed_max).into_iter().collect();
    let (mut user_count, mut tab_count) = (registry.user_count(), registry.total_connections());
    let elsewhere = engine.users_elsewhere(listed_max).await;
    // Redis cannot be asked now: these are the users of this node, and the answer says so.
    let this_node_only = elsewhere.is_none().then_some(true);
    for other in elsewhere.into_iter().flatten() {
        tab_count += other.tabs;
        user_count += usize::from(!registry.is_online(&other.user));
        if tabs.len() < listed_max || tabs.contains_key(&other.user) {
            *tabs.entry(other.user).or_default() += other.tabs;
        }
    }
    let users = tabs.iter().map(|(user, tabs)| Listed { user_id: user.as_str(), tabs: *tabs }).collect();
    // Every key is a string, so this cannot fail.
    let body = serde_json::to_vec(&Listing { users, user_count, tab_count, this_node_only }).unwrap_or_default();
    drop(place.split(place.num_permits().saturating_sub(body.capacity())));
    typed(StatusCode::OK, HeaderValue::from_static("application/json"), kept_with(body, place))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::thread::{self, ThreadId};

    use tokio::sync::Semaphore;

    use super::*;
    use crate::broker::{Broker, BrokerFuture, Forwarded, NodeId, OnlineUser, Peer, SpoolFull};
    use crate::engine::EngineSettings;
    use crate::gateway::apart::APART_BYTES;
    use crate::id::ChannelId;
    use crate::proto::disconnect::Disconnect;
    use crate::proto::frame::{Frame, Kind};

    /// Knows of no other user, and on which thread it was last asked.
    #[derive(Default)]
    struct Elsewhere(Mutex<Option<ThreadId>>);

    impl Broker for Elsewhere {
        fn attach(&self, _: &Arc<dyn Peer>) -> NodeId {
            NodeId::new(0)
        }

        fn wants(&self, _: NodeId, _: &ChannelId, _: Kind) -> bool {
            false
        }

        fn forward(&self, _: NodeId, _: &ChannelId, _: &Frame) -> Result<Forwarded, SpoolFull> {
            Err(SpoolFull)
        }

        fn is_online_elsewhere<'a>(&'a self, _: NodeId, _: &'a UserId) -> BrokerFuture<'a, bool> {
            Box::pin(std::future::ready(false))
        }

        fn end_elsewhere<'a>(&'a self, _: NodeId, _: &'a UserId, _: Disconnect) -> BrokerFuture<'a, usize> {
            Box::pin(std::future::ready(0))
        }

        fn users_elsewhere(&self, _: NodeId, _: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
            *self.0.lock().unwrap() = Some(thread::current().id());
            Box::pin(std::future::ready(Some(Vec::new())))
        }
    }

    #[test]
    fn a_long_listing_is_not_made_on_the_shards_thread() {
        let control = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let shard = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let elsewhere = Arc::new(Elsewhere::default());
        let settings = EngineSettings { shards: 1, ..EngineSettings::default() };
        let engine = Engine::with_broker(settings, Arc::clone(&elsewhere) as Arc<dyn Broker>);
        let few = APART_BYTES / USER_BYTES;
        for (listed_max, is_here) in [(0, true), (few, true), (few + 1, false)] {
            let budget = Arc::new(Semaphore::new(1 << 20));
            let place = Arc::clone(&budget).try_acquire_many_owned(1 << 20).unwrap();
            let answered = shard.block_on(answer(&engine, control.handle(), (listed_max, place)));
            assert_eq!(answered.status(), StatusCode::OK);
            let was_here = *elsewhere.0.lock().unwrap() == Some(thread::current().id());
            assert_eq!(was_here, is_here, "{listed_max} users");
            drop(answered);
            assert_eq!(budget.available_permits(), 1 << 20);
        }
    }
}
