//! Platforms: the trait that every chat platform implements, and WebChat, the browser's dialect of it.
//!
//! Outwards, a bot calls the [`adapter`]'s methods; [`webchat`] makes events of them and gives them to an
//! [`Outlet`](adapter::Outlet), which the engine is. Inwards, [`inbound`] makes commands of what a browser says, and
//! [`openai`] requests of what an API client says; [`dispatch`] is the queue from which a worker gets each [`message`].
//! Nothing here knows what a tab is.

pub mod adapter;
pub mod dispatch;
pub(crate) mod history;
pub mod inbound;
pub(crate) mod json_value;
pub mod message;
pub mod openai;
#[cfg(test)]
pub(crate) mod recording;
pub mod view;
pub mod webchat;
