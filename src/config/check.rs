//! What is checked once all settings are known, and what is derived from the machine.

use std::time::Duration;

use super::keys::KEY_BYTES_MIN;
use super::memory::LISTED_USER_BYTES;
use super::{ConfigError, FileTables, ProxyProtocol, Recovery, Settings, TokenAlgorithm, Worker, base64_bytes};

/// The most tabs that are chosen without being asked for.
const TABS_DERIVED_MAX: usize = 1_000_000;
/// JSON around a file's base64 in a frame and in a request: names, ids, escapes of a long filename.
const FILE_JSON_BYTES: usize = 8 << 10;
const LEEWAY_MAX: Duration = Duration::from_secs(600);
/// Times in which somebody waits; a moment that is later than the clock's end would be a panic.
const LONG_TIME_MAX: Duration = Duration::from_secs(24 * 3600);
const FILES_TIME_MAX: Duration = Duration::from_secs(3650 * 24 * 3600);
/// A digest's length: what RFC 7518 §3.2 asks of an HS256 secret.
const HS256_SECRET_BYTES_MIN: usize = 32;

/// What the settings that are left to be derived depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Cores that this process may use.
    pub cores: usize,
    /// The hard limit of open files, of a process or of a thread with a file table of its own.
    pub open_files_max: usize,
}

impl Machine {
    /// This machine, as this process sees it.
    #[must_use]
    pub fn here() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        Self { cores, open_files_max: files.and_then(|files| files.try_into().ok()).unwrap_or(usize::MAX) }
    }

    /// Sessions that one file table holds: 95 % of it, the rest is for listeners, requests and wakers.
    #[must_use]
    pub const fn tabs_per_table(self) -> usize {
        let part = self.open_files_max / 20;
        if part == 0 { 1 } else { part.saturating_mul(19) }
    }
}

fn contradiction(name: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Contradiction { name, reason: reason.into() }
}

fn ensure(holds: bool, name: &'static str, reason: &str) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(contradiction(name, reason)) }
}

impl Settings {
    /// Checks the settings against each other and fills in what was left to be derived: afterwards `shards` and
    /// `tabs_max` are at least 1, and `file_tables` is not [`FileTables::Auto`].
    ///
    /// # Errors
    /// The first contradiction: see [`ConfigError`].
    pub fn checked(mut self, machine: Machine) -> Result<Self, ConfigError> {
        if self.is_development() && !self.listen.ip().is_loopback() {
            return Err(ConfigError::OpenToOthers { listen: self.listen });
        }
        self.fit_files(machine)?;
        self.check_sizes()?;
        self.check_times()?;
        self.check_worker()?;
        self.check_redis()?;
        self.check_tokens()?;
        self.check_addresses()?;
        Ok(self)
    }

    /// What is allowed but weak, for the log at the start. Names no secret.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.is_development() {
            warnings.push("development mode: no key is set, every route is open to this machine".to_owned());
        }
        for key in &self.token_keys {
            if key.algorithm == TokenAlgorithm::Hs256 && key.material.expose().len() < HS256_SECRET_BYTES_MIN {
                warnings.push(format!(
                    "the secret of token key `{}` has less than {HS256_SECRET_BYTES_MIN} bytes and can be guessed",
                    key.kid
                ));
            }
        }
        let short_keys = [
            ("api_keys", self.api_keys.iter().filter(|key| key.is_short()).count()),
            ("openai_keys", self.openai_keys.iter().filter(|key| key.digest.is_short()).count()),
            ("operator_keys", self.operator_keys.iter().filter(|key| key.is_short()).count()),
        ];
        for (class, count) in short_keys.into_iter().filter(|(_, count)| *count > 0) {
            warnings.push(format!("{class}: {count} with less than {KEY_BYTES_MIN} bytes, which can be guessed"));
        }
        if self.webhook_secret.as_ref().is_some_and(|secret| secret.expose().len() < KEY_BYTES_MIN) {
            warnings.push(format!("webhook_secret has less than {KEY_BYTES_MIN} bytes and can be guessed"));
        }
        if self.allowed_origins.iter().any(|origin| origin == "*") {
            warnings.push(
                "allowed_origins has `*`: any page may connect with a token that it has; cookies do not count"
                    .to_owned(),
            );
        }
        if self.tls_cert.is_some() && !self.redis.is_empty() && self.node_url.is_none() {
            warnings.push(
                "node_url is not set: the other nodes look for this one's files under the address of listen, and get them \
                 only if the certificate is for that address"
                    .to_owned(),
            );
        }
        warnings
    }

    fn fit_files(&mut self, machine: Machine) -> Result<(), ConfigError> {
        let per_table = machine.tabs_per_table();
        if self.tabs_max == 0 {
            let tables = if self.file_tables == FileTables::PerShard { self.shards.max(1) } else { 1 };
            self.tabs_max = per_table.saturating_mul(tables).min(TABS_DERIVED_MAX);
        }
        if self.file_tables == FileTables::Shared && self.tabs_max > per_table {
            let (tabs_max, open_files_max) = (self.tabs_max, machine.open_files_max);
            return Err(ConfigError::TooManyTabs { tabs_max, open_files_max, allowed: per_table });
        }
        if self.file_tables == FileTables::Auto {
            self.file_tables = if self.tabs_max > per_table { FileTables::PerShard } else { FileTables::Shared };
        }
        let needed = if self.file_tables == FileTables::PerShard { self.tabs_max.div_ceil(per_table) } else { 1 };
        if self.shards == 0 {
            self.shards = needed.max(machine.cores).max(1);
        } else if self.shards < needed {
            return Err(ConfigError::TooFewShards {
                shards: self.shards,
                tabs_max: self.tabs_max,
                open_files_max: machine.open_files_max,
                needed,
            });
        }
        ensure(self.shards <= 1024, "shards", "at most 1024")
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let counts = [
            ("tabs_per_user_max", self.tabs_per_user_max),
            ("session_queue_frames_max", self.session_queue_frames_max),
            ("session_queue_bytes_max", self.session_queue_bytes_max),
            ("message_bytes_max", self.message_bytes_max),
            ("text_chars_max", self.text_chars_max),
            ("inbox_posts_max", self.inbox_posts_max),
            ("http_connections_max", self.http_connections_max),
            ("batch_lines_max", self.batch_lines_max),
            ("batch_line_bytes_max", self.batch_line_bytes_max),
            ("files_max", self.files_max),
            ("worker_queue_max", self.worker_queue_max),
            ("webhook_in_flight_max", self.webhook_in_flight_max),
            ("bad_frames_max", usize::from(self.bad_frames_max)),
            ("models", self.models.len()),
            ("completion_bytes_max", self.completion_bytes_max),
            ("answers_max", self.answers_max),
            ("answers_per_user_max", self.answers_per_user_max),
            ("users_listed_max", self.users_listed_max),
            ("recovery_frames_max", self.recovery_frames_max),
        ];
        for (name, count) in counts {
            ensure(count > 0, name, "must be more than 0")?;
        }
        let rate = "must be at most 256MiB";
        ensure(self.inbound_bytes_per_second_max <= 256 << 20, "inbound_bytes_per_second_max", rate)?;
        ensure(self.header_bytes_max >= 8 << 10, "header_bytes_max", "must be at least 8KiB")?;
        let file = base64_bytes(self.file_bytes_max).saturating_add(FILE_JSON_BYTES);
        let holds_file = |name, bytes: usize| {
            let reason = format!("must be at least {file}: a file of file_bytes_max as base64 in JSON");
            ensure(bytes >= file, name, &reason)
        };
        holds_file("body_bytes_max", self.body_bytes_max)?;
        holds_file("inbox_bytes_max", self.inbox_bytes_max)?;
        holds_file("bytes_budget", self.bytes_budget)?;
        let half = "must be at most half of what a session's queue holds, or a replay could fill it";
        ensure(self.recovery_frames_max <= self.session_queue_frames_max / 2, "recovery_frames_max", half)?;
        ensure(self.recovery_bytes_max <= self.session_queue_bytes_max / 2, "recovery_bytes_max", half)?;
        let part = "must be at least 128 times recovery_bytes_max: each of its 64 parts holds at least a user or two";
        let parts_bytes = self.recovery_bytes_max.saturating_mul(128);
        ensure(self.recovery_total_bytes_max >= parts_bytes, "recovery_total_bytes_max", part)?;
        let kept = "must leave half of bytes_budget, of which it and answers_bytes_max are a part";
        let kept_bytes = self.recovery_total_bytes_max.saturating_add(self.answers_bytes_max);
        ensure(kept_bytes <= self.bytes_budget / 2, "recovery_total_bytes_max", kept)?;
        let body = "must be at least body_bytes_max";
        ensure(self.bodies_bytes_max >= self.body_bytes_max, "bodies_bytes_max", body)?;
        let listing = "must be at least 1 KiB for each of users_listed_max";
        let listing_bytes = self.users_listed_max.saturating_mul(LISTED_USER_BYTES);
        ensure(self.bodies_bytes_max >= listing_bytes, "bodies_bytes_max", listing)?;
        ensure(self.whole_answer_bytes_max >= 1 << 10, "whole_answer_bytes_max", "must be at least 1KiB")?;
        let answer = "must be at least whole_answer_bytes_max";
        ensure(self.whole_answers_bytes_max >= self.whole_answer_bytes_max, "whole_answers_bytes_max", answer)?;
        let message = self.message_bytes_max.saturating_add(base64_bytes(self.attachment_bytes_max));
        let fits = "must be at least message_bytes_max and the base64 form of attachment_bytes_max together";
        ensure(self.inbound_bytes_max >= message, "inbound_bytes_max", fits)?;
        ensure(self.worker_queue_bytes_max >= message, "worker_queue_bytes_max", fits)
    }

    fn check_times(&self) -> Result<(), ConfigError> {
        let times = [
            ("heartbeat_interval", self.heartbeat_interval),
            ("heartbeat_timeout", self.heartbeat_timeout),
            ("close_timeout", self.close_timeout),
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("webhook_timeout", self.webhook_timeout),
            ("recovery_time", self.recovery_time),
            ("answer_timeout", self.answer_timeout),
            ("redis_timeout", self.redis_timeout),
            ("redis_canary_deadline", self.redis_canary_deadline),
        ];
        for (name, time) in times {
            ensure(time >= Duration::from_millis(100), name, "must be at least 100ms")?;
            ensure(time <= Duration::from_secs(3600), name, "must be at most 1h")?;
        }
        let long_times = [
            ("webhook_backoff_min", self.webhook_backoff_min),
            ("webhook_backoff_max", self.webhook_backoff_max),
            ("drain_spread", self.drain_spread),
            ("drain_deadline", self.drain_deadline),
        ];
        for (name, time) in long_times {
            ensure(time <= LONG_TIME_MAX, name, "must be at most 1d")?;
        }
        ensure(self.publish_deadline <= Duration::from_secs(60), "publish_deadline", "must be at most 1m")?;
        ensure(self.files_time >= Duration::from_secs(1), "files_time", "must be at least 1s")?;
        ensure(self.files_time <= FILES_TIME_MAX, "files_time", "must be at most 3650d")?;
        ensure(self.token_leeway <= LEEWAY_MAX, "token_leeway", "must be at most 10m")?;
        let backoff = "must be at least webhook_backoff_min";
        ensure(self.webhook_backoff_max >= self.webhook_backoff_min, "webhook_backoff_max", backoff)?;
        let rate = "must be more than 0";
        ensure(self.drain_closes_per_second_max > 0, "drain_closes_per_second_max", rate)?;
        let drain = "must be at least drain_spread and close_timeout together, or tabs are cut before their turn";
        ensure(self.drain_deadline >= self.drain_spread + self.close_timeout, "drain_deadline", drain)
    }

    fn check_worker(&self) -> Result<(), ConfigError> {
        ensure(self.webhook_attempts_max > 0, "webhook_attempts_max", "must be more than 0")?;
        let Some(url) = &self.webhook_url else {
            return ensure(self.worker != Worker::Webhook, "webhook_url", "is needed with worker = \"webhook\"");
        };
        ensure(is_web_url(url), "webhook_url", "must be an http or https URL with a host, without user or password")
    }

    fn check_redis(&self) -> Result<(), ConfigError> {
        let has_redis = !self.redis.is_empty();
        ensure(has_redis || self.worker != Worker::Redis, "redis", "is needed with worker = \"redis\"")?;
        ensure(has_redis || self.recovery != Recovery::Redis, "redis", "is needed with recovery = \"redis\"")?;
        ensure(has_redis || !self.redis_cluster, "redis", "is needed with redis_cluster = true")?;
        let one = "has several servers: they are the seeds of a cluster, and need redis_cluster = true";
        ensure(self.redis.len() < 2 || self.redis_cluster, "redis", one)?;
        for url in &self.redis {
            let schemes = ["redis://", "rediss://", "redis+unix://", "unix://"];
            let is_url = schemes.iter().any(|scheme| url.len() > scheme.len() && url.starts_with(scheme));
            ensure(is_url, "redis", "must be a URL that begins with redis://, rediss:// or redis+unix://")?;
        }
        ensure(!self.redis_prefix.is_empty(), "redis_prefix", "must not be empty")?;
        ensure(!self.redis_prefix.contains(['{', '}']), "redis_prefix", "must have no braces: they choose a slot")?;
        ensure(self.redis_stream_entries_max >= 1_000, "redis_stream_entries_max", "must be at least 1000")?;
        ensure(self.redis_spool_bytes_max > 0, "redis_spool_bytes_max", "must be more than 0")?;
        let names = [
            ("redis_inbound_stream", &self.redis_inbound_stream),
            ("redis_inbound_group", &self.redis_inbound_group),
            ("redis_outbound_stream", &self.redis_outbound_stream),
            ("redis_outbound_group", &self.redis_outbound_group),
        ];
        for (name, value) in names {
            ensure(value.as_deref().is_none_or(|value| !value.is_empty()), name, "must not be empty")?;
        }
        let node = self.node_url.as_deref().is_none_or(|url| is_web_url(url) && !url.contains(['?', '#']));
        ensure(node, "node_url", "must be an http or https URL such as http://10.0.0.7:8080")
    }

    fn check_tokens(&self) -> Result<(), ConfigError> {
        for (at, key) in self.token_keys.iter().enumerate() {
            if self.token_keys[..at].iter().any(|other| other.kid == key.kid) {
                return Err(contradiction("token_keys", format!("two keys have the kid `{}`", key.kid)));
            }
        }
        let classes = [
            ("api_keys", self.api_keys.iter().collect::<Vec<_>>()),
            ("openai_keys", self.openai_keys.iter().map(|key| &key.digest).collect()),
            ("operator_keys", self.operator_keys.iter().collect()),
        ];
        let mut seen = std::collections::HashMap::new();
        for (class, keys) in classes {
            for key in keys {
                if let Some(other) = seen.insert(key.as_bytes(), class) {
                    return Err(contradiction(class, format!("a key is there twice, or also in {other}")));
                }
            }
        }
        let openai_user_is_bot = self.openai_keys.iter().any(|key| key.user == self.bot_user_id);
        ensure(!openai_user_is_bot, "openai_keys", "no key may name the bot's own user id")
    }

    fn check_addresses(&self) -> Result<(), ConfigError> {
        ensure(self.tls_key.is_some() || self.tls_cert.is_none(), "tls_key", "is needed with tls_cert")?;
        ensure(self.tls_cert.is_some() || self.tls_key.is_none(), "tls_cert", "is needed with tls_key")?;
        let development = "is not for development mode, which serves its own machine only: set a key";
        ensure(self.trusted_proxies.is_empty() || !self.is_development(), "trusted_proxies", development)?;
        let needed = "is needed with proxy_protocol = \"v2\": nobody else may connect then";
        let is_off = self.proxy_protocol == ProxyProtocol::Off;
        ensure(is_off || !self.trusted_proxies.is_empty(), "trusted_proxies", needed)?;
        for origin in &self.allowed_origins {
            if origin != "*" && !is_origin(origin) {
                let reason = format!("`{origin}` is neither an origin such as https://example.org nor `*`");
                return Err(contradiction("allowed_origins", reason));
            }
        }
        let public = self.public_url.as_deref().is_none_or(|url| is_web_url(url) && !url.contains(['?', '#']));
        ensure(public, "public_url", "must be an http or https URL such as https://chat.example.org")
    }
}

fn web_uri(text: &str) -> Option<http::Uri> {
    let uri: http::Uri = text.parse().ok()?;
    let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
    let authority = uri.authority()?;
    (is_web && !authority.host().is_empty() && !authority.as_str().contains('@')).then_some(uri)
}

fn is_web_url(text: &str) -> bool {
    web_uri(text).is_some()
}

/// Scheme, host and perhaps a port, as browsers send it: no path, not even a slash.
fn is_origin(text: &str) -> bool {
    web_uri(text).is_some_and(|uri| {
        let scheme_and_host = uri.scheme_str().unwrap_or_default().len() + "://".len();
        text.len() == scheme_and_host + uri.authority().map_or(0, |authority| authority.as_str().len())
    })
}

#[cfg(test)]
mod tests {
    use super::super::Sources;
    use super::*;

    const MACHINE: Machine = Machine { cores: 2, open_files_max: 20_000 };
    const KEY: &str = "api_keys = ['a-key-of-24-random-bytes']\n";

    fn load(toml: &str) -> Result<Settings, ConfigError> {
        Sources::new().with_toml(toml).load(MACHINE)
    }

    #[test]
    fn the_defaults_are_fine_and_get_completed() {
        let settings = load("").unwrap();
        assert_eq!((settings.tabs_max, settings.shards, settings.file_tables), (19_000, 2, FileTables::Shared));
        assert!(settings.warnings()[0].starts_with("development mode"));
        assert!(load(KEY).unwrap().warnings().is_empty());
        assert!(Machine::here().cores >= 1 && Machine::here().open_files_max > 0);
    }

    #[test]
    fn development_mode_listens_on_loopback_only() {
        for listen in ["0.0.0.0:80", "[::]:80", "192.168.0.1:80"] {
            let toml = format!("listen = '{listen}'");
            assert!(matches!(load(&toml), Err(ConfigError::OpenToOthers { .. })), "{listen}");
            assert!(load(&format!("{toml}\n{KEY}")).is_ok(), "{listen}");
        }
        for listen in ["127.0.0.2:80", "[::1]:80", "localhost:80"] {
            assert!(load(&format!("listen = '{listen}'")).is_ok(), "{listen}");
        }
    }

    #[test]
    fn tabs_shards_and_file_tables_fit_each_other() {
        let fit = |toml: &str, shards: usize, tables: FileTables| {
            let settings = load(toml).unwrap();
            assert_eq!((settings.shards, settings.file_tables), (shards, tables), "{toml}");
        };
        fit("tabs_max = 300_000", 16, FileTables::PerShard);
        fit("tabs_max = 1_000_000", 53, FileTables::PerShard);
        fit("tabs_max = 300_000\nshards = 20", 20, FileTables::PerShard);
        fit("tabs_max = 1000", 2, FileTables::Shared);
        fit("tabs_max = 1000\nfile_tables = 'per_shard'", 2, FileTables::PerShard);
        fit("tabs_max = 19_000\nshards = 1", 1, FileTables::Shared);
        assert_eq!(load("file_tables = 'per_shard'\nshards = 3").unwrap().tabs_max, 57_000);
        assert_eq!(
            load("tabs_max = 19_001\nfile_tables = 'shared'").unwrap_err(),
            ConfigError::TooManyTabs { tabs_max: 19_001, open_files_max: 20_000, allowed: 19_000 }
        );
        let needed = ConfigError::TooFewShards { shards: 15, tabs_max: 300_000, open_files_max: 20_000, needed: 16 };
        assert_eq!(load("tabs_max = 300_000\nshards = 15").unwrap_err(), needed);
        let huge = Sources::new().load(Machine { cores: 1, open_files_max: usize::MAX }).unwrap();
        assert_eq!(huge.tabs_max, TABS_DERIVED_MAX);
        assert_eq!(Sources::new().load(Machine { cores: 0, open_files_max: 3 }).unwrap().tabs_max, 1);
    }

    #[test]
    fn no_time_is_so_long_that_the_clock_ends_before_it() {
        let times: Vec<_> =
            Settings::ALL.iter().filter(|setting| setting.form == "duration").map(|setting| setting.name).collect();
        assert!(times.len() > 15, "{}", times.len());
        for name in times {
            let reason = load(&format!("{name} = '{}s'", u64::MAX)).unwrap_err().to_string();
            assert!(reason.starts_with(&format!("{name}: must be at most ")), "{name}: {reason}");
        }
        assert!(load("drain_deadline = '1d'\ndrain_spread = '23h'\nwebhook_backoff_max = '1d'").is_ok());
    }

    #[test]
    fn contradictions_are_refused_by_the_setting_to_change() {
        let check = |toml: &str, setting: &str| {
            let reason = load(toml).unwrap_err().to_string();
            assert!(reason.starts_with(&format!("{setting}: ")), "{toml}: {reason}");
        };
        check("worker = 'webhook'", "webhook_url");
        check("webhook_url = 'ftp://example.org'", "webhook_url");
        check("webhook_url = 'https://user:pass@example.org/'", "webhook_url");
        check("webhook_url = '/hook'", "webhook_url");
        check("webhook_attempts_max = 0", "webhook_attempts_max");
        check("webhook_backoff_max = '1ms'", "webhook_backoff_max");
        check("body_bytes_max = '16MiB'", "body_bytes_max");
        check("inbox_bytes_max = '16MiB'", "inbox_bytes_max");
        check("bytes_budget = '16MiB'", "bytes_budget");
        check("bodies_bytes_max = '16MiB'", "bodies_bytes_max");
        check("inbound_bytes_max = '1MiB'", "inbound_bytes_max");
        check("worker_queue_bytes_max = '1MiB'", "worker_queue_bytes_max");
        check("tabs_per_user_max = 0", "tabs_per_user_max");
        check("bad_frames_max = 0", "bad_frames_max");
        check("inbound_bytes_per_second_max = '257MiB'", "inbound_bytes_per_second_max");
        check("files_max = 0", "files_max");
        check("files_time = '999ms'", "files_time");
        check("models = []", "models");
        check("recovery_frames_max = 600", "recovery_frames_max");
        check("recovery_bytes_max = '600KiB'", "recovery_bytes_max");
        check("recovery_total_bytes_max = '200MiB'", "recovery_total_bytes_max");
        check("recovery_total_bytes_max = '7MiB'", "recovery_total_bytes_max");
        check("answer_timeout = '2h'", "answer_timeout");
        check("users_listed_max = 0", "users_listed_max");
        check("users_listed_max = 1_000_000", "bodies_bytes_max");
        check("whole_answer_bytes_max = 1023", "whole_answer_bytes_max");
        check("whole_answers_bytes_max = '7MiB'", "whole_answers_bytes_max");
        check("header_bytes_max = 100", "header_bytes_max");
        check("heartbeat_interval = '1ms'", "heartbeat_interval");
        check("header_timeout = '2h'", "header_timeout");
        check("publish_deadline = '2m'", "publish_deadline");
        check("token_leeway = '11m'", "token_leeway");
        check("drain_deadline = '12s'", "drain_deadline");
        check("drain_closes_per_second_max = 0", "drain_closes_per_second_max");
        check("shards = 1025", "shards");
        check("redis_stream_entries_max = 999", "redis_stream_entries_max");
        assert!(load("redis_stream_entries_max = 1000").is_ok());
        check("allowed_origins = ['example.org']", "allowed_origins");
        check("allowed_origins = ['https://example.org/']", "allowed_origins");
        check("allowed_origins = ['null']", "allowed_origins");
        check("public_url = 'chat.example.org'", "public_url");
        check("trusted_proxies = ['10.0.0.1']", "trusted_proxies");
        check("api_keys = ['k']\nproxy_protocol = 'v2'", "trusted_proxies");
        check("tls_cert = 'chain.pem'", "tls_key");
        check("tls_key = 'key.pem'", "tls_cert");
        check("public_url = 'https://chat.example.org/?x'", "public_url");
        check("openai_keys = ['star:k']", "openai_keys");
        check("openai_keys = ['a:k', 'b:k']", "openai_keys");
        check("api_keys = ['k']\noperator_keys = ['k']", "operator_keys");
        check("token_keys = ['kid=a,alg=HS256,secret=1', 'kid=a,alg=HS256,secret=2']", "token_keys");
        assert!(load("allowed_origins = ['https://example.org:8443', '*']").is_ok());
        assert!(load("public_url = 'https://example.org/chat/'").is_ok());
        assert!(load(&format!("{KEY}proxy_protocol = 'v2'\ntrusted_proxies = ['10.0.0.0/8', '::1']")).is_ok());
        assert!(load("files_bytes_max = 0\nfiles_time = '1y'").is_ok());
        assert!(load("worker = 'webhook'\nwebhook_url = 'http://127.0.0.1:9/hook?x=1'").is_ok());
    }

    #[test]
    fn weak_settings_are_warned_about() {
        let warnings = |toml: &str| load(toml).unwrap().warnings().join("\n");
        assert!(warnings("token_keys = ['kid=a,alg=HS256,secret=short']").contains("token key `a`"));
        assert_eq!(warnings(&format!("token_keys = ['kid=a,alg=HS256,secret={}']", "s".repeat(32))), "");
        let short = "api_keys = ['short', 'not-so-short-a-key']\nopenai_keys = ['ann:15-bytes-of-key', 'bob:16-bytes-of-a-key']\n\
            operator_keys = ['sha256:0000000000000000000000000000000000000000000000000000000000000000']\nwebhook_secret = 'hush'";
        let short = warnings(short);
        assert_eq!(
            short.lines().map(|line| &line[..20]).collect::<Vec<_>>(),
            ["api_keys: 1 with les", "openai_keys: 1 with ", "webhook_secret has l"]
        );
        assert!(!short.contains("short") && !short.contains("hush"));
        assert!(warnings(&format!("{KEY}allowed_origins = ['*']")).contains("any page"));
        let nodes = format!("{KEY}redis = ['redis://h']\ntls_cert = 'c'\ntls_key = 'k'");
        assert!(warnings(&nodes).starts_with("node_url is not set"));
        assert_eq!(warnings(&format!("{nodes}\nnode_url = 'https://a.example'")), "");
    }
}
