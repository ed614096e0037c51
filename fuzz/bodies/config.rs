//! Whatever is written in a file, a variable or a flag is settings or a refusal that says why; and no secret is repeated.

use tabcast::config::{ConfigError, Machine, Settings, Sources};

const MACHINE: Machine = Machine { cores: 4, open_files_max: 1 << 20 };

/// More lines than these say nothing new.
const SETTINGS_MAX: usize = 6;

/// What `$` stands for in a secret.
const HUSH: &str = "hush-0123456789abcdef0123456789abcdef";

/// The bytes are a file if they do not begin with a line feed; else they are lines, a setting each: `f` for the file, `v`
/// for a variable or `a` for a flag, its name, `=`, its value.
pub(crate) fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Some(lines) = text.strip_prefix('\n') else { return file(&text) };
    let settings: Vec<Setting<'_>> = lines.lines().filter_map(Setting::read).take(SETTINGS_MAX).collect();
    if let Some(setting) = settings.first() {
        // A variable and a flag say the same.
        let (variable, flag) = (setting.variable(Sources::new()), setting.flag(Sources::new()));
        match (check(variable), check(flag)) {
            (Ok(variable), Ok(flag)) => assert_eq!(variable.to_toml(), flag.to_toml()),
            (Err(_), Err(_)) => {}
            (variable, flag) => panic!("{}: {:?} and {:?}", setting.name, variable.err(), flag.err()),
        }
    }
    let mut toml = String::new();
    let mut sources = Sources::new();
    for setting in &settings {
        match setting.place {
            b'v' => sources = setting.variable(sources),
            b'a' => sources = setting.flag(sources),
            _ => toml.push_str(&setting.toml()),
        }
    }
    let _ = check(sources.with_toml(&toml));
}

fn file(text: &str) {
    // Nothing is read from whatever path comes to its mind.
    let text = text.replace("file:", "fi1e:").replace("_file", "_fi1e");
    let first = Sources::new().with_toml(&text).load(MACHINE);
    let again = Sources::new().with_toml(&text).load(MACHINE);
    assert_eq!(first.as_ref().err(), again.as_ref().err());
    shown(&first);
}

/// Loads, and looks for a secret in all that is ever shown.
fn check(sources: Sources) -> Result<Settings, ConfigError> {
    let loaded = sources.load(MACHINE);
    for text in shown(&loaded) {
        assert!(!text.contains("hush"), "{text}");
    }
    loaded
}

fn shown(loaded: &Result<Settings, ConfigError>) -> Vec<String> {
    match loaded {
        Ok(settings) => {
            let toml = settings.to_toml();
            // What is shown of settings is a file of settings, but for the secrets.
            let read = Sources::new().with_toml(&toml).load(MACHINE);
            assert!(!matches!(read, Err(ConfigError::NotToml { .. } | ConfigError::Unknown { .. })), "{toml}");
            vec![toml, format!("{settings:?}"), settings.warnings().join("\n")]
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            vec![error.to_string(), format!("{error:?}")]
        }
    }
}

struct Setting<'a> {
    place: u8,
    name: &'a str,
    value: String,
}

impl<'a> Setting<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let (name, value) = line.split_once('=')?;
        let (place, name) = (*name.as_bytes().first()?, name.get(1..)?);
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        // Variables that are read by others, and flags that do not exist.
        if matches!(name, "config" | "key" | "port" | "service_host") || name.starts_with("service_port") {
            return None;
        }
        // A name, and the value of most settings, is no secret, and is repeated.
        if name.is_empty() || !name.bytes().all(is_name) || line.contains("hush") {
            return None;
        }
        // No file is read, whose path would be repeated too.
        let unread = || value.replace('/', "_").replace("file:", "fi1e:");
        let value = match name {
            "token_keys" => unread().replace("secret=$", &format!("secret={HUSH}")),
            "api_keys" | "operator_keys" | "webhook_secret" => unread().replace('$', HUSH),
            "openai_keys" => unread().replace(":$", &format!(":{HUSH}")),
            _ => value.to_owned(),
        };
        Some(Self { place, name, value })
    }

    fn variable(&self, sources: Sources) -> Sources {
        sources.with_variable(&format!("TABCAST_{}", self.name.to_uppercase()), &self.value)
    }

    fn flag(&self, sources: Sources) -> Sources {
        sources.with_flag(&self.name.replace('_', "-"), vec![self.value.clone()])
    }

    /// A text, or a list of one.
    fn toml(&self) -> String {
        let quoted: String = self.value.chars().map(|c| format!("\\U{:08x}", u32::from(c))).collect();
        let is_list = self.name.ends_with("_keys") || self.name == "allowed_origins" || self.name == "redis";
        if is_list { format!("{} = [\"{quoted}\"]\n", self.name) } else { format!("{} = \"{quoted}\"\n", self.name) }
    }
}
