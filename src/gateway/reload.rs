//! SIGHUP: the settings are read again, and what may change while the gateway runs does.
//!
//! All of it or nothing: what is read is checked as at the start, and once more together with what stays until a restart.
//! Sessions that are open keep what they were given: who came with a token whose key is gone stays until it leaves, and
//! is asked for a token that verifies when it comes back. `DELETE /api/users/{user_id}` ends it before. Whoever watches has
//! to show a key again once `operator_keys` have changed.

use std::sync::Arc;

use tokio::signal::unix::Signal;

use crate::config::Effect;
use crate::config::Machine;
use crate::config::Settings;
use crate::driver::addresses::AddressCounts;
use crate::gateway::auth::Keys;
use crate::gateway::edge::Gateway;
use crate::gateway::serve::connections_per_address;

type ApplyLog = Box<dyn Fn(&str) -> Result<(), String> + Send>;

/// Where settings come from when they are read again.
pub struct Reload {
    read: Box<dyn Fn() -> Result<Settings, String> + Send>,
    apply_log: ApplyLog,
}

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reload").finish_non_exhaustive()
    }
}

/// What a reload changes.
#[derive(Clone)]
pub(crate) struct Reloaded {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) connections: Option<Arc<AddressCounts>>,
}

impl Reloaded {
    fn apply(&self, new: Settings, keys: Keys) {
        let Self { gateway, connections } = self;
        gateway.keys.store(Arc::new(keys));
        if new.operator_keys != gateway.settings.load().operator_keys {
            gateway.engine.hub().end_watchers();
        }
        gateway.clients.reload(&new);
        if let Some(connections) = connections {
            connections.limit(connections_per_address(&new));
        }
        gateway.engine.hub().registry().limit_tabs_per_user(new.tabs_per_user_max);
        gateway.engine.limit_sessions(new.session_limits());
        gateway.settings.store(Arc::new(new));
    }
}

impl Reload {
    /// `read` gives settings from [`Sources::load`](crate::config::Sources::load), or says what is wrong with them, without
    /// a secret. It may take long: it is called on a thread of its own.
    #[must_use]
    pub fn new(read: impl Fn() -> Result<Settings, String> + Send + 'static) -> Self {
        Self { read: Box::new(read), apply_log: Box::new(|_| Ok(())) }
    }

    /// `apply` takes a new value of the setting `log`, which `read` has found to be right.
    #[must_use]
    pub fn with_log(self, apply: impl Fn(&str) -> Result<(), String> + Send + 'static) -> Self {
        Self { apply_log: Box::new(apply), ..self }
    }

    /// Reads, checks, and puts into effect what may change now. Every setting that is another one is a line of the log.
    ///
    /// # Errors
    /// What is wrong with what was read: nothing has changed.
    fn run(&self, running: &Reloaded) -> Result<(), String> {
        let old = running.gateway.settings.load_full();
        let read = (self.read)()?;
        let new = reloaded(&old, &read)?;
        let keys = Keys::new(&new).map_err(|error| error.to_string())?;
        running.apply(new, keys);
        // Whoever silences the log, or makes it speak, is told of it all the same.
        let is_told = tracing::enabled!(tracing::Level::INFO);
        if is_told {
            tell(&old, &read);
        }
        if read.log != old.log {
            (self.apply_log)(&read.log)?;
        }
        if !is_told {
            tell(&old, &read);
        }
        Ok(())
    }
}

/// `old` with what of `read` may change now.
fn reloaded(old: &Settings, read: &Settings) -> Result<Settings, String> {
    if old.is_development() != read.is_development() {
        return Err(
            "the first key ends development mode, and without the last it begins: that needs a restart".to_owned()
        );
    }
    // Sessions were placed by what the tables of files hold, and that is settled at the start.
    if (old.shards, old.file_tables) != (read.shards, read.file_tables) && old.tabs_max != read.tabs_max {
        return Err("tabs_max needs other shards or tables of files now: that needs a restart".to_owned());
    }
    let mixed = old.with_reloaded(read).checked(Machine::here());
    mixed.map_err(|error| format!("with what stays until a restart: {error}"))
}

fn tell(old: &Settings, read: &Settings) {
    let changes = old.changes_to(read);
    if changes.is_empty() {
        tracing::info!("SIGHUP: no setting has changed");
    }
    for change in changes {
        let (name, values) = (change.name, change.values);
        match change.effect {
            Effect::Reload => tracing::info!("SIGHUP: {name}: {values}"),
            Effect::Restart => tracing::warn!("SIGHUP: {name}: {values} needs a restart"),
        }
    }
    for warning in read.warnings() {
        tracing::warn!("{warning}");
    }
}

/// Reads the settings again at every SIGHUP: for ever. Without `reload` a SIGHUP changes no setting.
///
/// # Cancel safety
/// Dropped, a reading that has begun ends by itself, and no other begins.
pub(crate) async fn keep(reload: Option<Reload>, running: Reloaded, mut hangup: Signal) -> std::convert::Infallible {
    let Some(mut reload) = reload else { return std::future::pending().await };
    loop {
        hangup.recv().await;
        let running = running.clone();
        // A file may be on a disk that does not answer: that is for a thread that nobody waits for.
        let run = tokio::task::spawn_blocking(move || {
            if let Err(reason) = reload.run(&running) {
                tracing::error!("SIGHUP: no setting has changed: {reason}");
            }
            reload
        });
        reload = match run.await {
            Ok(reload) => reload,
            // A runtime that ends runs nothing new.
            Err(_) => return std::future::pending().await,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    const HERE: Machine = Machine { cores: 2, open_files_max: 20_000 };

    fn check(old: &str, new: &str, expected: Result<&[&str], &str>) {
        let load = |toml: &str| Sources::new().with_toml(toml).load(HERE).unwrap();
        let (old, new) = (load(old), load(new));
        let got = reloaded(&old, &new)
            .map(|reloaded| reloaded.changes_to(&new).into_iter().map(|change| change.name).collect::<Vec<_>>());
        match (got, expected) {
            (Ok(left), Ok(expected)) => assert_eq!(left, expected, "what needs a restart"),
            (Err(got), Err(expected)) => assert!(got.contains(expected), "{got}"),
            (got, expected) => panic!("{got:?} is not {expected:?}"),
        }
    }

    #[test]
    fn a_reload_is_whole_or_refused() {
        check("", "", Ok(&[]));
        check("", "tabs_per_user_max = 3\nrooms_max = 4", Ok(&[]));
        check("", "tabs_per_user_max = 3\nworker = 'none'", Ok(&["worker"]));
        check("api_keys = ['a']", "operator_keys = ['b']\nlog = 'debug'", Ok(&[]));
        check("", "api_keys = ['a']", Err("development mode"));
        check("api_keys = ['a']", "", Err("development mode"));
        check("tabs_max = 100", "tabs_max = 200", Ok(&[]));
        check("tabs_max = 100", "tabs_max = 100000", Err("tables of files"));
        // Alone it would fit; with the budget that stays until a restart it does not.
        let large = "attachment_bytes_max = '80MiB'\nworker_queue_bytes_max = '256MiB'\ninbound_bytes_max = '256MiB'";
        check("", large, Err("with what stays until a restart: "));
    }
}
