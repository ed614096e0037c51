//! How a node is: the frame that it sends once a second, as far as it is known here.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::text::Clean;

/// Entries of a list that are looked at: more than any node sends.
const ENTRIES_MAX: usize = 1_024;

/// One frame. What is missing is empty or zero, what is not known is passed over.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    #[serde(rename = "type")]
    kind: Clean,
    pub(super) node: Clean,
    pub(super) version: Clean,
    pub(super) mode: Clean,
    pub(super) uptime_seconds: f64,
    pub(super) health: Health,
    pub(super) sessions: Sessions,
    pub(super) rates: Rates,
    pub(super) latency_micros: Latency,
    pub(super) queues: Queues,
    pub(super) process: Process,
    pub(super) shards: Vec<Shard>,
    pub(super) redis: Option<Redis>,
    /// What was refused since the start, by why.
    pub(super) refusals: BTreeMap<Clean, f64>,
    pub(super) top_users: Vec<User>,
    pub(super) ended: Vec<Ended>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Health {
    pub(super) ready: bool,
    pub(super) draining: bool,
    pub(super) reason: Option<Clean>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Sessions {
    pub(super) now: f64,
    pub(super) max: f64,
    pub(super) users: f64,
    pub(super) rooms: f64,
    pub(super) streams: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Rates {
    pub(super) publishes: f64,
    pub(super) deliveries: f64,
    pub(super) writes: f64,
    pub(super) written_bytes: f64,
    pub(super) read_bytes: f64,
    pub(super) inbound_messages: f64,
    pub(super) handshakes: f64,
    pub(super) ended: f64,
    pub(super) refused: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Latency {
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
    pub(super) count: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Queues {
    pub(super) frames: f64,
    pub(super) bytes: f64,
    pub(super) budget_bytes: f64,
    pub(super) inbox_posts: f64,
    pub(super) inbox_bytes: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Process {
    pub(super) resident_bytes: Option<f64>,
    pub(super) cpu_share: Option<f64>,
    pub(super) open_files: Option<f64>,
    pub(super) open_files_max: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Shard {
    pub(super) sessions: f64,
    pub(super) busy_share: f64,
    pub(super) queue_bytes: f64,
    pub(super) inbox_posts: f64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Redis {
    pub(super) healthy: bool,
    pub(super) reason: Option<Clean>,
    pub(super) canary_micros: Option<f64>,
    pub(super) nodes: Option<f64>,
    pub(super) spool_bytes: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct User {
    pub(super) user_id: Clean,
    pub(super) tabs: f64,
    pub(super) queue_frames: f64,
    pub(super) queue_bytes: f64,
}

/// A session that has ended.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ended {
    pub(super) at: f64,
    pub(super) user_id: Option<Clean>,
    pub(super) session: Option<Clean>,
    pub(super) wire: Option<Clean>,
    pub(super) reason: Clean,
    pub(super) code: Option<u16>,
    pub(super) retryable: Option<bool>,
    pub(super) connected_seconds: Option<f64>,
    pub(super) queue_frames: Option<f64>,
    pub(super) queue_bytes: Option<f64>,
    pub(super) detail: Option<Clean>,
}

impl Status {
    /// Reads an event. None if it is another kind of frame.
    ///
    /// # Errors
    /// It is no frame of ours.
    pub(super) fn read(text: &str) -> Result<Option<Self>, serde_json::Error> {
        let mut status: Self = serde_json::from_str(text)?;
        if &*status.kind != "status" {
            return Ok(None);
        }
        status.shards.truncate(ENTRIES_MAX);
        status.top_users.truncate(ENTRIES_MAX);
        status.ended.truncate(ENTRIES_MAX);
        while status.refusals.len() > ENTRIES_MAX {
            status.refusals.pop_last();
        }
        Ok(Some(status))
    }

    /// How it is in a word or two, and whether that is good.
    pub(super) fn health(&self) -> (String, bool) {
        let reason = self.health.reason.as_deref().map_or_else(String::new, |reason| format!(": {reason}"));
        match (self.health.draining, self.health.ready) {
            (true, _) => (format!("DRAINING{reason}"), false),
            (false, true) => ("READY".to_owned(), true),
            (false, false) => (format!("NOT READY{reason}"), false),
        }
    }
}

impl Ended {
    pub(super) fn user(&self) -> &str {
        self.user_id.as_deref().filter(|user| !user.is_empty()).unwrap_or("(nobody)")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A frame with everything in it.
    pub(in crate::terminal) const WHOLE: &str = r#"{"type":"status","node":"n1","version":"0.1.0","mode":"development",
        "timestamp":1764115200.123,"uptime_seconds":12.5,"interval_seconds":1.0,
        "health":{"ready":true,"draining":false,"reason":null},
        "sessions":{"now":5,"max":10000,"users":3,"rooms":1,"streams":0},
        "rates":{"publishes":1.0,"deliveries":5.0,"writes":5.0,"written_bytes":1234.0,"read_bytes":10.0,
            "inbound_messages":0.5,"handshakes":0.0,"ended":0.0,"refused":0.0},
        "latency_micros":{"p50":40,"p99":120,"count":5},
        "queues":{"frames":7,"bytes":2048,"budget_bytes":268435456,"inbox_posts":0,"inbox_bytes":0},
        "process":{"resident_bytes":12345678,"cpu_share":0.03,"open_files":40,"open_files_max":20000},
        "shards":[{"sessions":2,"busy_share":0.01,"queue_bytes":0,"inbox_posts":0},
                  {"sessions":3,"busy_share":0.5,"queue_bytes":2048,"inbox_posts":4}],
        "refusals":{"tabs":3,"nothing":0},
        "redis":{"healthy":true,"reason":null,"canary_micros":140,"nodes":2,"spool_bytes":0},
        "top_users":[{"user_id":"ann","tabs":2,"queue_frames":7,"queue_bytes":2048},
                     {"user_id":"bob","tabs":1,"queue_frames":0,"queue_bytes":0}],
        "ended":[{"at":1764115199.5,"user_id":"ann","session":"123","wire":"websocket","reason":"slow consumer",
            "code":4008,"retryable":true,"connected_seconds":12.0,"queue_frames":1024,"queue_bytes":1048576,
            "detail":"its queue held 1,024 frames, 1,048,576 bytes; the limit is 1,024 frames"},
            {"at":1764115100.0,"user_id":"bob","session":"9","wire":"events","reason":"kicked","code":4003,
             "retryable":false,"connected_seconds":99.0,"queue_frames":0,"queue_bytes":0,
             "detail":"an operator ended it"}]}"#;

    #[test]
    fn what_is_missing_or_new_does_no_harm() {
        let whole = Status::read(WHOLE).unwrap().unwrap();
        assert_eq!((whole.sessions.now, whole.ended.len(), whole.health().0.as_str()), (5.0, 2, "READY"));
        let bare = Status::read(r#"{"type":"status","moon":"full","sessions":{"lost":1}}"#).unwrap().unwrap();
        assert_eq!((bare.sessions.now, bare.redis.is_none()), (0.0, true));
        assert!(Status::read(r#"{"type":"hello","session":"1"}"#).unwrap().is_none());
        let nothing = r#"{"type":"status","latency_micros":{"p50":null,"p99":null,"count":0},"redis":null}"#;
        assert_eq!(Status::read(nothing).unwrap().unwrap().latency_micros.p99, None);
        assert!(Status::read("nonsense").is_err());
        let hostile = r#"{"type":"status","ended":[{"user_id":"\u001b[2Jann","detail":"\u009b1m"}]}"#;
        let ended = Status::read(hostile).unwrap().unwrap().ended.remove(0);
        assert_eq!((ended.user(), ended.detail.as_deref()), ("\\u{1b}[2Jann", Some("\\u{9b}1m")));
    }
}
