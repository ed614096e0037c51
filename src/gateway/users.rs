//! `GET /api/users`: who is online, here and on the other nodes.

use std::collections::BTreeMap;

use http::StatusCode;
use http::header::HeaderValue;

use crate::gateway::body::{BodyError, kept_with};
use crate::gateway::edge::ShardEdge;
use crate::gateway::response::{Answered, typed};
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
    /// Names some and counts all. What it may take while it is made and written is within the budget of bodies.
    pub(super) async fn users(&self) -> Answered {
        let (listed_max, is_alone) = {
            let settings = self.gateway.settings.load();
            (settings.users_listed_max, settings.redis.is_empty())
        };
        let registry = self.gateway.engine.hub().registry();
        let listed_max = if is_alone { listed_max.min(registry.user_count()) } else { listed_max };
        let Some(mut place) = self.gateway.bodies.place(listed_max.saturating_mul(USER_BYTES)) else {
            return BodyError::TooMany.answer();
        };
        let mut tabs: BTreeMap<UserId, usize> = registry.active_users(listed_max).into_iter().collect();
        let (mut user_count, mut tab_count) = (registry.user_count(), registry.total_connections());
        let elsewhere = self.gateway.engine.users_elsewhere(listed_max).await;
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
}
