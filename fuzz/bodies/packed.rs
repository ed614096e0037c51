//! Whatever another node publishes is read to an end or refused, and what was read is written as the same again.

/// The bytes are one message.
pub(crate) fn run(bytes: &[u8]) {
    tabcast::broker::redis::packed::check(bytes);
}
