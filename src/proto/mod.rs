//! Pure bytes: what is published, its JSON, its wire forms, RFC 6455, event-stream lines, and why sessions end.
//!
//! An [`event`] is what an application says; its [`json`] is written straight into a [`frame`], which holds the form of
//! every wire ([`websocket`], [`sse`]) in one allocation, and perhaps a compressed one beside it ([`deflate`]). A [`completion`] makes an OpenAI-style answer of the frames of
//! one stream. [`delivery`] is what became of a frame, [`trace`] what it belongs to, [`disconnect`] why a session ended, and [`limits`] how much of all
//! this there may be.

pub mod completion;
pub mod deflate;
pub mod delivery;
pub mod disconnect;
pub mod event;
pub mod frame;
pub mod json;
pub mod limits;
pub mod sse;
pub mod trace;
pub mod websocket;
