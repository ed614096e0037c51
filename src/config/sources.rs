//! Where settings come from: a file, the environment, flags; the later wins.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{ConfigError, Machine, Settings};

const PREFIX: &str = "TABCAST_";
/// No settings: what names the file, and the key that `tabcast top` and `tabcast tail` show.
const OTHER_VARIABLES: [&str; 2] = ["TABCAST_CONFIG", "TABCAST_KEY"];

/// What was given, not yet read.
#[derive(Debug, Default)]
pub struct Sources {
    file: Option<(PathBuf, String)>,
    variables: Vec<(String, Option<String>)>,
    flags: Vec<(String, Vec<String>)>,
}

impl Sources {
    /// Nothing: every setting has its default.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The text of a file.
    #[must_use]
    pub fn with_toml(mut self, text: &str) -> Self {
        self.file = Some((PathBuf::from("the configuration"), text.to_owned()));
        self
    }

    /// A file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn with_file(mut self, path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
        self.file = Some((path.to_owned(), text));
        Ok(self)
    }

    /// One variable of the environment; what does not start with `TABCAST_` is passed over.
    #[must_use]
    pub fn with_variable(self, name: &str, value: &str) -> Self {
        self.with_variables([(OsString::from(name), OsString::from(value))])
    }

    /// The environment. Variables that do not start with `TABCAST_` are passed over, and so are those that Kubernetes
    /// sets for a service that is called tabcast (`TABCAST_SERVICE_HOST`, `TABCAST_PORT`, …).
    #[must_use]
    pub fn with_variables(mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| is_ours(name)) else { continue };
            self.variables.push((name.to_owned(), value.into_string().ok()));
        }
        self
    }

    /// A flag, by the name of its setting, with every value it was given.
    #[must_use]
    pub fn with_flag(mut self, name: &str, values: Vec<String>) -> Self {
        self.flags.push((name.to_owned(), values));
        self
    }

    /// Reads, checks and completes the settings.
    ///
    /// # Errors
    /// The first thing that is wrong: see [`ConfigError`].
    pub fn load(self, machine: Machine) -> Result<Settings, ConfigError> {
        self.unchecked()?.checked(machine)
    }

    pub(super) fn unchecked(self) -> Result<Settings, ConfigError> {
        let mut settings = Settings::default();
        if let Some((path, text)) = self.file {
            read_file(&mut settings, &path, &text)?;
        }
        for (variable, value) in self.variables {
            let name = variable[PREFIX.len()..].to_lowercase();
            let read = match &value {
                Some(value) => settings.assign_texts(&name, std::slice::from_ref(value)),
                None => settings.assign_texts(&name, &[]).map(|_| Err("is not UTF-8".to_owned())),
            };
            assigned(read, variable, || nearest(&name, |name| format!("{PREFIX}{}", name.to_uppercase())))?;
        }
        for (name, values) in self.flags {
            let name = name.replace('-', "_");
            let read = settings.assign_texts(&name, &values);
            let spell = |name: &str| format!("--{}", name.replace('_', "-"));
            assigned(read, spell(&name), || nearest(&name, spell))?;
        }
        Ok(settings)
    }
}

fn read_file(settings: &mut Settings, path: &Path, text: &str) -> Result<(), ConfigError> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        // The parser's own text quotes the line, and the line may hold a secret.
        let before = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.as_bytes()[..before].iter().filter(|byte| **byte == b'\n').count() + 1;
        ConfigError::NotToml { path: path.to_owned(), line, reason: error.message().to_owned() }
    })?;
    for (name, value) in table {
        let place = format!("{name} in {}", path.display());
        assigned(settings.assign_toml(&name, value), place, || nearest(&name, str::to_owned))?;
    }
    Ok(())
}

fn assigned(
    read: Option<Result<(), String>>,
    place: String,
    suggestion: impl FnOnce() -> Option<String>,
) -> Result<(), ConfigError> {
    match read {
        Some(Ok(())) => Ok(()),
        Some(Err(reason)) => Err(ConfigError::BadValue { place, reason }),
        None => Err(ConfigError::Unknown { place, suggestion: suggestion() }),
    }
}

/// The setting whose name is most like `name`, if one is like it at all.
fn nearest(name: &str, spell: impl Fn(&str) -> String) -> Option<String> {
    let likeness = |setting: &super::Setting| strsim::jaro_winkler(setting.name, name);
    let best = Settings::ALL.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) > 0.8).then(|| spell(best.name))
}

/// Whether a variable is meant for us.
fn is_ours(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let from_kubernetes = rest == "SERVICE_HOST"
        || rest == "PORT"
        || rest.starts_with("SERVICE_PORT")
        || rest.strip_prefix("PORT_").is_some_and(|port| port.starts_with(|c: char| c.is_ascii_digit()));
    !OTHER_VARIABLES.contains(&name) && !from_kubernetes
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn refused(sources: Sources) -> String {
        sources.unchecked().unwrap_err().to_string()
    }

    #[test]
    fn flags_win_over_the_environment_over_the_file_over_the_default() {
        let file = || Sources::new().with_toml("rooms_max = 1\nlisten = '127.0.0.1:1'\nlog = 'debug'");
        let rooms = |sources: Sources| sources.unchecked().unwrap().rooms_max;
        assert_eq!(rooms(Sources::new()), 64);
        assert_eq!(rooms(file()), 1);
        let variable = || file().with_variable("TABCAST_ROOMS_MAX", "2");
        assert_eq!(rooms(variable()), 2);
        assert_eq!(rooms(variable().with_flag("rooms-max", vec!["3".to_owned()])), 3);
        assert_eq!(rooms(file().with_flag("rooms_max", vec!["3".to_owned()])), 3);
        let settings = variable().unchecked().unwrap();
        assert_eq!((settings.listen.port(), settings.log.as_str()), (1, "debug"));
    }

    #[test]
    fn a_later_list_replaces_an_earlier_one() {
        let settings = Sources::new()
            .with_toml("allowed_origins = ['https://a', 'https://b']")
            .with_flag("allowed-origins", vec!["https://c".to_owned(), "https://d,https://e".to_owned()])
            .unchecked()
            .unwrap();
        assert_eq!(settings.allowed_origins, ["https://c", "https://d", "https://e"]);
    }

    #[test]
    fn what_is_no_setting_is_refused_with_the_nearest_name_in_its_spelling() {
        assert_eq!(
            refused(Sources::new().with_toml("lisen = 'x'")),
            "lisen in the configuration is no setting; did you mean listen?"
        );
        assert_eq!(
            refused(Sources::new().with_variable("TABCAST_TAB_MAX", "1")),
            "TABCAST_TAB_MAX is no setting; did you mean TABCAST_TABS_MAX?"
        );
        assert_eq!(
            refused(Sources::new().with_flag("api-key", vec![])),
            "--api-key is no setting; did you mean --api-keys?"
        );
        assert_eq!(refused(Sources::new().with_variable("TABCAST_ZZZ", "1")), "TABCAST_ZZZ is no setting");
        assert_eq!(refused(Sources::new().with_toml("[server]\nx = 1")), "server in the configuration is no setting");
    }

    #[test]
    fn bad_values_are_refused_by_their_place() {
        let variable = |name: &str, value: &str| refused(Sources::new().with_variable(name, value));
        assert!(variable("TABCAST_LISTEN", "nowhere").starts_with("TABCAST_LISTEN: expected an address"));
        assert!(
            variable("TABCAST_WORKER", "robot")
                .starts_with("TABCAST_WORKER: expected one of demo, webhook, redis, none")
        );
        assert!(variable("TABCAST_ECHO_TO_TABS", "yes").contains("true or false"));
        assert!(variable("TABCAST_BOT_USER_ID", "").contains("empty"));
        assert!(variable("TABCAST_SHARDS", "4KiB").contains("is a count"));
        assert!(refused(Sources::new().with_toml("shards = '4KiB'")).contains("is a count"));
        assert!(refused(Sources::new().with_toml("shards = true")).contains("expected an integer, found boolean"));
        assert!(refused(Sources::new().with_toml("listen = 8080")).contains("expected a string, found integer"));
        assert!(
            refused(Sources::new().with_flag("shards", vec!["1".to_owned(), "2".to_owned()]))
                .starts_with("--shards: is given more than once")
        );
    }

    #[test]
    fn a_file_that_is_not_toml_is_refused_by_its_line_and_without_its_text() {
        let reason = refused(Sources::new().with_toml("listen = '127.0.0.1:1'\nwebhook_secret = hush"));
        assert!(reason.starts_with("the configuration, line 2: "), "{reason}");
        assert!(!reason.contains("hush"), "{reason}");
        let twice = refused(Sources::new().with_toml("shards = 1\nshards = 2"));
        assert!(twice.contains("duplicate key"), "{twice}");
    }

    #[test]
    fn a_file_is_read_from_its_path() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"[[token_keys]]\nkid = 'a'\nalg = 'HS256'\nsecret = 'hush'\n").unwrap();
        let settings = Sources::new().with_file(file.path()).unwrap().unchecked().unwrap();
        assert_eq!(settings.token_keys[0].material.expose(), b"hush");
        let missing = Sources::new().with_file(Path::new("/nowhere.toml")).unwrap_err();
        assert!(missing.to_string().starts_with("cannot read /nowhere.toml: "));
        let in_table = Sources::new().with_toml("[[token_keys]]\nkid = 'a'\nalgo = 'HS256'");
        assert!(refused(in_table).contains("a token key has no field `algo`"));
    }

    #[test]
    fn foreign_variables_are_passed_over() {
        let settings = Sources::new()
            .with_variable("PATH", "/bin")
            .with_variable("TABCAST_CONFIG", "x.toml")
            .with_variable("TABCAST_KEY", "an operator's")
            .with_variable("TABCAST_PORT", "tcp://10.0.0.1:80")
            .with_variable("TABCAST_PORT_80_TCP_ADDR", "10.0.0.1")
            .with_variable("TABCAST_SERVICE_PORT_HTTP", "80")
            .with_variable("TABCAST_SERVICE_HOST", "10.0.0.1");
        assert!(settings.unchecked().is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn a_value_that_is_not_utf_8_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        let value = OsString::from_vec(vec![0xff]);
        let sources = Sources::new().with_variables([(OsString::from("TABCAST_LOG"), value)]);
        assert_eq!(refused(sources), "TABCAST_LOG: is not UTF-8");
    }
}
