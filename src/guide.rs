//! The guide: how to think of tabcast, what it promises, how large a machine it takes, what to turn when, and the way
//! here from a chat adapter in Python. It has no items; read it in this order, or where it hurts.

#[doc = include_str!("guide/concepts.md")]
pub mod concepts {}

#[doc = include_str!("guide/delivery.md")]
pub mod delivery {}

#[doc = include_str!("guide/sizing.md")]
pub mod sizing {}

#[doc = include_str!("guide/tuning.md")]
pub mod tuning {}

#[doc = include_str!("guide/from_fastapi.md")]
pub mod from_fastapi {}
