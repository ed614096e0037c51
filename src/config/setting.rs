//! What a setting is, and the macro that makes all of them from one table.

use super::value::Value;

/// When a setting that is changed in its file counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// From the next SIGHUP on.
    Reload,
    /// From the next start on.
    Restart,
}

/// One line of the table of settings.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The heading above it: those after it that have none belong to the same group.
    pub group: Option<&'static str>,
    /// Its name in TOML.
    pub name: &'static str,
    /// Its name as a flag, without the dashes in front.
    pub flag: &'static str,
    /// What it is, its default, and what it costs.
    pub help: &'static str,
    /// What values look like.
    pub form: &'static str,
    /// What a number counts, or how a time is written; empty where neither is.
    pub unit: &'static str,
    /// When a change counts.
    pub effect: Effect,
    /// Whether its flag may be repeated.
    pub is_list: bool,
}

impl Setting {
    /// Its name in the environment.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("TABCAST_{}", self.name.to_uppercase())
    }

    /// What it is, and what it takes of memory: none if that is nothing that counts.
    #[must_use]
    pub fn about(&self) -> (&'static str, Option<&'static str>) {
        let help = self.help.trim();
        help.split_once(" Memory: ").map_or((help, None), |(about, memory)| (about, Some(memory)))
    }
}

/// A setting whose value in the file is another one than that in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The setting's name.
    pub name: &'static str,
    /// Both values, secrets as counts: `32 → 16`.
    pub values: String,
    /// When it counts.
    pub effect: Effect,
}

/// What a number counts: what its line says, or bytes if its name says so; of other types their own.
pub(super) const fn unit_of<T: Value>(name: &'static str, written: &'static str) -> &'static str {
    if !written.is_empty() {
        return written;
    }
    if T::IS_NUMBER && names_bytes(name) { "bytes" } else { T::UNIT }
}

const fn names_bytes(name: &str) -> bool {
    let (name, bytes) = (name.as_bytes(), b"bytes");
    let mut at = 0;
    while at + bytes.len() <= name.len() {
        let mut same = 0;
        while same < bytes.len() && name[at + same] == bytes[same] {
            same += 1;
        }
        if same == bytes.len() {
            return true;
        }
        at += 1;
    }
    false
}

/// Units of bytes belong to bytes: `shards = "4KiB"` is a mistake.
pub(super) fn units_fit<T: Value>(name: &str, texts: &[String]) -> Result<(), String> {
    if T::IS_NUMBER && !names_bytes(name) && texts.iter().any(|text| text.trim_end().ends_with("iB")) {
        return Err("is a count; KiB, MiB and GiB are for bytes".to_owned());
    }
    Ok(())
}

/// `name` with dashes for underscores.
pub(super) const fn with_dashes<const N: usize>(name: &str) -> [u8; N] {
    let mut flag = [b'-'; N];
    let mut at = 0;
    while at < N {
        if name.as_bytes()[at] != b'_' {
            flag[at] = name.as_bytes()[at];
        }
        at += 1;
    }
    flag
}

/// When a line's change counts: with `live` at the next reload.
macro_rules! effect {
    () => {
        $crate::config::Effect::Restart
    };
    (live) => {
        $crate::config::Effect::Reload
    };
}

macro_rules! settings {
    ($(
        $([$group:literal])?
        $(#[doc = $doc:literal])+
        $name:ident: $kind:ty $([$unit:literal])? = $default:expr $(, $live:ident)?;
    )+) => {
        /// Every setting, typed. From [`Sources::load`] it is checked, and what was left to be derived is filled in.
        #[derive(Debug, Clone)]
        pub struct Settings {
            $($(#[doc = $doc])+ pub $name: $kind,)+
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        impl Settings {
            /// Every setting, in order.
            pub const ALL: &'static [Setting] = &[
                $(Setting {
                    group: { let group: &[&str] = &[$($group)?]; group.first().copied() },
                    name: stringify!($name),
                    flag: {
                        const FLAG: [u8; stringify!($name).len()] = setting::with_dashes(stringify!($name));
                        match std::str::from_utf8(&FLAG) {
                            Ok(flag) => flag,
                            Err(_) => stringify!($name),
                        }
                    },
                    help: concat!($($doc),+),
                    form: <$kind as Value>::FORM,
                    unit: setting::unit_of::<$kind>(stringify!($name), concat!($($unit)?)),
                    effect: setting::effect!($($live)?),
                    is_list: <$kind as Value>::IS_LIST,
                },)+
            ];

            /// Reads the texts of a flag, or the one text of a variable. `None`: there is no such setting.
            fn assign_texts(&mut self, name: &str, texts: &[String]) -> Option<Result<(), String>> {
                match name {
                    $(stringify!($name) => {
                        let value = units_fit::<$kind>(name, texts).and_then(|()| Value::from_texts(texts));
                        Some(value.map(|value| self.$name = value))
                    })+
                    _ => None,
                }
            }

            /// Reads a TOML value. `None`: there is no such setting.
            fn assign_toml(&mut self, name: &str, value: toml::Value) -> Option<Result<(), String>> {
                match name {
                    $(stringify!($name) => {
                        let text: Vec<String> = value.as_str().map(str::to_owned).into_iter().collect();
                        let value = units_fit::<$kind>(name, &text).and_then(|()| Value::from_toml(value));
                        Some(value.map(|value| self.$name = value))
                    })+
                    _ => None,
                }
            }

            /// Every setting as a line of TOML, secrets masked.
            #[must_use]
            pub fn to_toml(&self) -> String {
                let lines = [$(format!("{} = {}\n", stringify!($name), self.$name.to_toml())),+];
                lines.concat()
            }

            /// The values of all settings as TOML, in order, secrets masked.
            fn values(&self) -> Vec<String> {
                vec![$(self.$name.to_toml()),+]
            }

            /// What is another value in `new`, in the order of the table. No secret is in it.
            #[must_use]
            pub fn changes_to(&self, new: &Self) -> Vec<Change> {
                let mut changes = Vec::new();
                $(if self.$name != new.$name {
                    let (name, effect) = (stringify!($name), setting::effect!($($live)?));
                    changes.push(Change { name, values: self.$name.change_to(&new.$name), effect });
                })+
                changes
            }

            /// These settings with the values of `new` where a reload may change them.
            #[must_use]
            pub fn with_reloaded(&self, new: &Self) -> Self {
                let mut reloaded = self.clone();
                $(if matches!(setting::effect!($($live)?), Effect::Reload) {
                    reloaded.$name.clone_from(&new.$name);
                })+
                reloaded
            }
        }
    };
}

pub(super) use effect;
pub(super) use settings;
