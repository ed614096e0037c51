//! How the values of settings are read, from one text or from TOML, and shown again.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use crate::id::UserId;

/// A type that a setting may have.
pub(super) trait Value: Sized + PartialEq + Clone {
    /// What values look like, in a few words.
    const FORM: &'static str;
    /// The unit of all values of the type; empty if it has none.
    const UNIT: &'static str = "";
    /// Whether the setting is a list: the flag may be repeated, and TOML takes an array.
    const IS_LIST: bool = false;
    /// Whether the value is a whole number.
    const IS_NUMBER: bool = false;

    /// Reads the value of a flag or of an environment variable. An error never repeats a secret.
    fn from_text(text: &str) -> Result<Self, String>;

    /// Reads a flag that was given once or, if the setting is a list, several times.
    fn from_texts(texts: &[String]) -> Result<Self, String> {
        match texts {
            [text] => Self::from_text(text),
            _ => Err("is given more than once".to_owned()),
        }
    }

    /// Reads a TOML value.
    fn from_toml(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::String(text) => Self::from_text(&text),
            other => Err(wrong_type("a string", &other)),
        }
    }

    /// The value as TOML, secrets masked.
    fn to_toml(&self) -> String;

    /// This value and the one that takes its place, for the log: no secret is in it.
    fn change_to(&self, new: &Self) -> String {
        format!("{} → {}", self.to_toml(), new.to_toml())
    }
}

pub(super) fn wrong_type(expected: &str, value: &toml::Value) -> String {
    format!("expected {expected}, found {}", value.type_str())
}

/// A TOML string.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Splits a list as flags and variables carry it: nothing is the empty list, an empty entry is refused.
pub(super) fn split_list(text: &str, separator: char) -> Result<Vec<&str>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let entries: Vec<&str> = text.split(separator).map(str::trim).collect();
    if entries.iter().any(|entry| entry.is_empty()) {
        return Err(format!("an entry of the list is empty (entries are separated by `{separator}`)"));
    }
    Ok(entries)
}

const SUFFIXES: [(&str, u64); 3] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

fn number(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, unit) = SUFFIXES
        .iter()
        .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits.trim_end(), *unit)))
        .unwrap_or((text, 1));
    let digits = digits.replace('_', "");
    let plain = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    plain
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| format!("expected a whole number, for bytes also with KiB, MiB or GiB, found `{text}`"))
}

macro_rules! numbers {
    ($($kind:ty),*) => {
        $(impl Value for $kind {
            const FORM: &'static str = "whole number";
            const IS_NUMBER: bool = true;

            fn from_text(text: &str) -> Result<Self, String> {
                let number = number(text)?;
                number.try_into().map_err(|_| format!("{number} is more than {}", <$kind>::MAX))
            }

            fn from_toml(value: toml::Value) -> Result<Self, String> {
                match value {
                    toml::Value::Integer(number) => Self::from_text(&number.to_string()),
                    toml::Value::String(text) => Self::from_text(&text),
                    other => Err(wrong_type("an integer", &other)),
                }
            }

            fn to_toml(&self) -> String {
                let digits = self.to_string();
                // TOML's integers end at 2^63 - 1; as a text it is read again.
                if digits.parse::<i64>().is_ok() { digits } else { quoted(&digits) }
            }
        })*
    };
}

numbers!(u8, u32, usize);

impl Value for bool {
    const FORM: &'static str = "true or false";

    fn from_text(text: &str) -> Result<Self, String> {
        match text.trim() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(format!("expected true or false, found `{text}`")),
        }
    }

    fn from_toml(value: toml::Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| wrong_type("true or false", &value))
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    const FORM: &'static str = "text";

    fn from_text(text: &str) -> Result<Self, String> {
        if text.chars().any(char::is_control) {
            return Err("has a control character".to_owned());
        }
        Ok(text.to_owned())
    }

    fn to_toml(&self) -> String {
        quoted(self)
    }
}

impl Value for Duration {
    const FORM: &'static str = "duration";
    const UNIT: &'static str = "ms, s, m, h, d";

    fn from_text(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text.trim())
            .map_err(|_| format!("expected a duration with its unit, such as 25s or 500ms, found `{text}`"))
    }

    fn to_toml(&self) -> String {
        quoted(&humantime::format_duration(*self).to_string())
    }
}

impl Value for SocketAddr {
    const FORM: &'static str = "address:port";

    fn from_text(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        numeric.as_deref().unwrap_or(text).parse().map_err(|_| {
            format!("expected an address and a port, such as 127.0.0.1:8080 or [::1]:8080, found `{text}`")
        })
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Value for UserId {
    const FORM: &'static str = "user id";

    fn from_text(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }

    fn to_toml(&self) -> String {
        quoted(self.as_str())
    }
}

/// Absent is the empty text.
impl<T: Value> Value for Option<T> {
    const FORM: &'static str = T::FORM;
    const UNIT: &'static str = T::UNIT;

    fn from_text(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { T::from_text(text).map(Some) }
    }

    fn to_toml(&self) -> String {
        self.as_ref().map_or_else(|| quoted(""), T::to_toml)
    }
}

/// What a list may hold.
pub(super) trait Entry: Sized + PartialEq + Clone {
    /// What a list of them is called.
    const LIST_FORM: &'static str;
    /// Of secrets only their number is shown in the log.
    const IS_SECRET: bool = false;
    /// What stands between two entries in a flag or a variable.
    const SEPARATOR: char = ',';

    /// Reads one entry; some entries stand for several (a file of keys).
    fn read(text: &str) -> Result<Vec<Self>, String>;

    /// Reads one entry of a TOML array.
    fn read_toml(value: toml::Value) -> Result<Vec<Self>, String> {
        match value {
            toml::Value::String(text) => Self::read(&text),
            other => Err(wrong_type("a string", &other)),
        }
    }

    /// The entry as TOML, secrets masked.
    fn show(&self) -> String;
}

impl<T: Entry> Value for Vec<T> {
    const FORM: &'static str = T::LIST_FORM;

    const IS_LIST: bool = true;

    fn from_text(text: &str) -> Result<Self, String> {
        let mut list = Self::new();
        for entry in split_list(text, T::SEPARATOR)? {
            list.append(&mut T::read(entry)?);
        }
        Ok(list)
    }

    fn from_texts(texts: &[String]) -> Result<Self, String> {
        let mut list = Self::new();
        for text in texts {
            list.append(&mut Self::from_text(text)?);
        }
        Ok(list)
    }

    fn from_toml(value: toml::Value) -> Result<Self, String> {
        let toml::Value::Array(entries) = value else {
            return Err(wrong_type("an array", &value));
        };
        let mut list = Self::new();
        for entry in entries {
            list.append(&mut T::read_toml(entry)?);
        }
        Ok(list)
    }

    fn to_toml(&self) -> String {
        let entries: Vec<String> = self.iter().map(T::show).collect();
        format!("[{}]", entries.join(", "))
    }

    fn change_to(&self, new: &Self) -> String {
        if !T::IS_SECRET {
            return format!("{} → {}", self.to_toml(), new.to_toml());
        }
        let added = new.iter().filter(|entry| !self.contains(entry)).count();
        let gone = self.iter().filter(|entry| !new.contains(entry)).count();
        format!("{} → {} ({added} added, {gone} taken away)", self.len(), new.len())
    }
}

impl Entry for String {
    const LIST_FORM: &'static str = "list of texts";

    fn read(text: &str) -> Result<Vec<Self>, String> {
        if text.is_empty() {
            return Err("an entry of the list is empty".to_owned());
        }
        Value::from_text(text).map(|text| vec![text])
    }

    fn show(&self) -> String {
        quoted(self)
    }
}

/// An address alone is a network of one.
impl Entry for IpNet {
    const LIST_FORM: &'static str = "list of addresses or networks";

    fn read(text: &str) -> Result<Vec<Self>, String> {
        let text = text.trim();
        let network = text.parse().or_else(|_| text.parse().map(|address: IpAddr| Self::from(address.to_canonical())));
        let network: Self = network
            .map_err(|_| format!("expected an address or a network, such as 10.0.0.7 or 10.0.0.0/8, found `{text}`"))?;
        if network != network.trunc() {
            return Err(format!("`{text}` has bits behind its prefix: the network is {}", network.trunc()));
        }
        Ok(vec![network])
    }

    fn show(&self) -> String {
        quoted(&self.to_string())
    }
}

/// An enum whose values are words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[$value_doc])* $value,)+
        }

        impl $name {
            /// The word in settings.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$value => $text,)+
                }
            }
        }

        impl $crate::config::value::Value for $name {
            const FORM: &'static str = $crate::config::value::one_of!($($text),+);

            fn from_text(text: &str) -> Result<Self, String> {
                match text.trim() {
                    $($text => Ok(Self::$value),)+
                    _ => Err(format!("expected one of {}, found `{text}`", [$($text),+].join(", "))),
                }
            }

            fn to_toml(&self) -> String {
                $crate::config::value::quoted(self.as_str())
            }
        }
    };
}

/// `a, b or c`.
macro_rules! one_of {
    ($last:literal) => { $last };
    ($one:literal, $last:literal) => { concat!($one, " or ", $last) };
    ($one:literal, $($rest:literal),+) => { concat!($one, ", ", $crate::config::value::one_of!($($rest),+)) };
}

pub(super) use one_of;
pub(super) use words;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_may_have_a_binary_unit() {
        let check = |text: &str, expected: Option<usize>| {
            assert_eq!(<usize as Value>::from_text(text).ok(), expected, "{text}");
        };
        check("0", Some(0));
        check("1_000", Some(1000));
        check("64KiB", Some(65_536));
        check("64 MiB", Some(64 << 20));
        check("1GiB", Some(1 << 30));
        check("64KB", None);
        check("-1", None);
        check("+1", None);
        check("1.5MiB", None);
        check("", None);
        check("KiB", None);
        check("18446744073709551615GiB", None);
        assert_eq!(u8::from_text("256"), Err("256 is more than 255".to_owned()));
    }

    #[test]
    fn a_number_is_shown_as_something_that_is_read_again() {
        for number in [0, usize::MAX >> 1, (usize::MAX >> 1) + 1, usize::MAX] {
            let shown = toml::from_str::<toml::Table>(&format!("it = {}", number.to_toml())).unwrap();
            assert_eq!(usize::from_toml(shown["it"].clone()), Ok(number));
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(Duration::from_text("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(Duration::from_text("250ms"), Ok(Duration::from_millis(250)));
        assert!(Duration::from_text("25").is_err());
        assert!(Duration::from_toml(toml::Value::Integer(25)).is_err());
        assert_eq!(Duration::from_millis(1_500).to_toml(), "\"1s 500ms\"");
    }

    #[test]
    fn lists_are_arrays_or_separated_by_commas() {
        let list = |text: &str| <Vec<String> as Value>::from_text(text);
        assert_eq!(list("a, b"), Ok(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(list(""), Ok(Vec::new()));
        assert!(list("a,,b").is_err());
        assert!(<Vec<String> as Value>::from_toml(toml::Value::String("a".to_owned())).is_err());
        assert!(<Vec<String> as Value>::from_toml(toml::Value::Array(vec![toml::Value::Integer(1)])).is_err());
        assert_eq!(list("a,b\"c").map(|l| l.to_toml()), Ok(r#"["a", 'b"c']"#.to_owned()));
        let repeated = ["a".to_owned(), "b,c".to_owned()];
        assert_eq!(<Vec<String> as Value>::from_texts(&repeated).map(|l| l.len()), Ok(3));
        assert!(bool::from_texts(&repeated).is_err());
    }

    #[test]
    fn networks_are_addresses_with_or_without_a_prefix() {
        let check = |text: &str, expected: Option<&str>| {
            let read = <Vec<IpNet> as Value>::from_text(text).ok();
            assert_eq!(read.map(|networks| networks.to_toml()).as_deref(), expected, "{text}");
        };
        check("10.0.0.7", Some(r#"["10.0.0.7/32"]"#));
        check("10.0.0.0/8, 2001:db8::/32", Some(r#"["10.0.0.0/8", "2001:db8::/32"]"#));
        check("::1", Some(r#"["::1/128"]"#));
        check("::ffff:10.0.0.7", Some(r#"["10.0.0.7/32"]"#));
        check("", Some("[]"));
        check("10.0.0.7/8", None);
        check("10.0.0.0/33", None);
        check("proxy.example", None);
    }

    #[test]
    fn addresses_are_numbers_with_a_port() {
        assert!(SocketAddr::from_text("[::1]:80").is_ok());
        assert_eq!(SocketAddr::from_text("localhost:80").map(|a| a.to_string()), Ok("127.0.0.1:80".to_owned()));
        assert!(SocketAddr::from_text("127.0.0.1").is_err());
        assert!(SocketAddr::from_text("example.org:80").is_err());
    }
}
