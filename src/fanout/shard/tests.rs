//! Shards in simulated time: every rule of a session's life, without a socket and without a clock.

mod answers;
mod counting;
mod deflated;
mod endings;
mod fan_out;
mod heartbeat;
mod messages;
mod model;
mod rates;
mod recovery;
mod rig;
mod rooms;
mod slow_tabs;
mod watching;
