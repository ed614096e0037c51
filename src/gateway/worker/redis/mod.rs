//! Workers on streams of Redis: what people write is appended to one stream, and what workers answer is read from
//! another.

pub mod envelope;
