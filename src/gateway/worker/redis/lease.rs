//! Whose turn it is to read: a key that expires, and a number that only grows.
//!
//! The value of the key is `<node>:<epoch>`. Whoever took it acknowledges only while it is still there, by the same
//! script that looks (see [`acks`](super::acks)); and by its own clock it knows, before it hands anything on, until when
//! nobody else can have taken it.

use std::time::Duration;

use redis::{Cmd, RedisResult, Value};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::broker::redis::link::{Endpoint, Link};
use crate::gateway::worker::redis::beside;

/// How long a lease lasts that is not renewed: how long nobody reads after the holder has died.
const TTL: Duration = Duration::from_secs(5);
/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_millis(1500);
/// How much earlier than Redis the holder counts it as over.
const MARGIN: Duration = Duration::from_millis(250);

const ACQUIRE: &str = "
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local epoch = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. string.format('%.0f', epoch), 'PX', ARGV[2])
return epoch";
const RENEW: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";
const RELEASE: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])";

/// The lease of one stream, as one node sees it.
pub(super) struct Lease {
    link: Link,
    key: String,
    epoch_key: String,
    node: String,
}

/// The time from taking the lease until it is lost or given back.
pub(super) struct Tenure {
    /// `<node>:<epoch>`.
    pub(super) value: String,
    /// Until when nobody else can have taken it, unless Redis has lost its memory.
    good_until: watch::Sender<Instant>,
}

impl Tenure {
    /// Whether the lease is ours for certain, by our own clock.
    pub(super) fn is_good(&self) -> bool {
        Instant::now() < *self.good_until.borrow()
    }

    /// When it will be over if nothing renews it.
    fn good_until(&self) -> Instant {
        *self.good_until.borrow()
    }
}

impl Lease {
    pub(super) fn new(endpoint: &Endpoint, stream: &str, node: &str) -> Self {
        let link = Link::new(endpoint.clone(), "lease");
        Self { link, key: beside(stream, "lease"), epoch_key: beside(stream, "epoch"), node: node.to_owned() }
    }

    /// The key that it is kept at.
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Waits until another attempt makes sense, after an error.
    pub(super) async fn pause(&self) {
        self.link.pause().await;
    }

    /// Takes the lease if nobody has it.
    ///
    /// # Errors
    /// Redis did not answer. It may have been taken: then nobody has it until it expires.
    pub(super) async fn acquire(&self) -> RedisResult<Option<Tenure>> {
        let until = Instant::now() + TTL - MARGIN;
        let mut take = redis::cmd("EVAL");
        take.arg(ACQUIRE).arg(2).arg(&self.key).arg(&self.epoch_key).arg(&self.node).arg(TTL.as_millis().to_string());
        let epoch = match self.link.query(take).await? {
            Value::Int(epoch) if epoch > 0 => epoch,
            _ => return Ok(None),
        };
        let (good_until, _) = watch::channel(until);
        Ok(Some(Tenure { value: format!("{}:{epoch}", self.node), good_until }))
    }

    /// Makes the lease last longer. False if it is not ours any more.
    ///
    /// # Errors
    /// Redis did not answer: it may last longer or not.
    pub(super) async fn renew(&self, tenure: &Tenure) -> RedisResult<bool> {
        // From before the request: Redis counts from when it arrives.
        let until = Instant::now() + TTL - MARGIN;
        let mut renew = self.command(RENEW, tenure);
        renew.arg(TTL.as_millis().to_string());
        let is_ours = self.link.query(renew).await? == Value::Int(1);
        if is_ours {
            tenure.good_until.send_if_modified(|current| {
                let is_later = until > *current;
                *current = until.max(*current);
                is_later
            });
        }
        Ok(is_ours)
    }

    /// Renews it for as long as that works; ready once it is lost.
    ///
    /// # Cancel safety
    /// Dropping it only ends the renewing.
    pub(super) async fn keep(&self, tenure: &Tenure) {
        loop {
            sleep(RENEW_EVERY).await;
            loop {
                match timeout_at(tenure.good_until(), self.renew(tenure)).await {
                    Ok(Ok(true)) => break,
                    Ok(Ok(false)) => return,
                    Ok(Err(_)) if tenure.is_good() => self.link.pause().await,
                    // Nothing says that it is ours.
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }

    /// Gives it back, so that the next node need not wait. What does not answer in `time` expires by itself.
    pub(super) async fn release(&self, tenure: &Tenure, time: Duration) {
        let release = self.link.query(self.command(RELEASE, tenure));
        drop(tokio::time::timeout(time, release).await);
    }

    fn command(&self, script: &str, tenure: &Tenure) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(script).arg(1).arg(&self.key).arg(&tenure.value);
        command
    }
}
