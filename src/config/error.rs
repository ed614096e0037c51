//! Why settings were refused.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why settings were refused. No message repeats a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {}: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is not TOML.
    #[error("{}, line {line}: {reason}", .path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// There is no setting of that name.
    #[error("{place} is no setting{}", .suggestion.as_ref().map(|name| format!("; did you mean {name}?")).unwrap_or_default())]
    Unknown {
        /// The name as it was written, and where.
        place: String,
        /// The nearest name, spelt for that place.
        suggestion: Option<String>,
    },
    /// The value is not one that the setting may have.
    #[error("{place}: {reason}")]
    BadValue {
        /// The name as it was written, and where.
        place: String,
        /// What is expected.
        reason: String,
    },
    /// Every setting is fine by itself, but not together with another.
    #[error("{name}: {reason}")]
    Contradiction {
        /// The setting to change.
        name: &'static str,
        /// What it contradicts, and what to do.
        reason: String,
    },
    /// No key of any class, and an address that others can reach.
    #[error(
        "listen is {listen}, which others can reach, but no key is set: without token_keys, api_keys, openai_keys or \
         operator_keys everything is open, and tabcast listens on loopback only"
    )]
    OpenToOthers {
        /// The address.
        listen: SocketAddr,
    },
    /// One file table cannot hold the tabs.
    #[error(
        "tabs_max is {tabs_max}, but the limit of {open_files_max} open files allows {allowed} in one file table: raise \
         the limit, lower tabs_max, or set file_tables = \"per_shard\""
    )]
    TooManyTabs {
        /// The setting.
        tabs_max: usize,
        /// The process's hard limit.
        open_files_max: usize,
        /// What fits.
        allowed: usize,
    },
    /// The shards' file tables cannot hold the tabs.
    #[error(
        "shards is {shards}, but {tabs_max} tabs with a limit of {open_files_max} open files a shard need at least \
         {needed}: set shards = 0 to have the number chosen"
    )]
    TooFewShards {
        /// The setting.
        shards: usize,
        /// The setting.
        tabs_max: usize,
        /// The process's hard limit.
        open_files_max: usize,
        /// How many it takes.
        needed: usize,
    },
}
