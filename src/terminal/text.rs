//! What a terminal may be shown, and numbers as people read them.

use std::time::Duration;

pub(super) use crate::logs::grouped;

/// `text` without anything that a terminal obeys, or that makes a text look like another one: control characters (C0, DEL,
/// C1, and so every escape sequence) and marks of direction are written out, as `\u{1b}`.
pub(super) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\t' => out.push(' '),
            _ if character.is_control() || is_mark(character) => out.extend(character.escape_unicode()),
            _ => out.push(character),
        }
    }
    out
}

/// Characters that have no place of their own: directions, joiners, separators of lines, tags.
const fn is_mark(character: char) -> bool {
    matches!(
        character,
        '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
    )
}

/// A text that was cleaned.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(from = "String")]
pub(super) struct Clean(String);

impl From<String> for Clean {
    fn from(text: String) -> Self {
        Self(clean(&text))
    }
}

impl std::ops::Deref for Clean {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Clean {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// At most `chars_max` characters of a text; what is cut off is an ellipsis.
pub(super) fn cut(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    text.chars().take(chars_max.saturating_sub(1)).chain(['…']).collect()
}

/// A count of the wire: a number that may be anything.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, and NaN is 0")]
pub(super) fn whole(number: f64) -> u64 {
    number.round() as u64
}

/// `1,234`.
pub(super) fn count(number: f64) -> String {
    grouped(whole(number))
}

/// A rate: with a tenth where it is small.
pub(super) fn rate(number: f64) -> String {
    if number.is_finite() && (0.05..100.0).contains(&number) { format!("{number:.1}") } else { count(number) }
}

/// `12 B`, `1.5 MiB`.
pub(super) fn bytes(number: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut rest = if number.is_finite() { number.max(0.0) } else { 0.0 };
    let mut unit = 0;
    while rest >= 1024.0 && unit + 1 < UNITS.len() {
        rest /= 1024.0;
        unit += 1;
    }
    let unit_name = UNITS[unit];
    if unit == 0 || rest >= 99.95 { format!("{rest:.0} {unit_name}") } else { format!("{rest:.1} {unit_name}") }
}

/// `40 µs`, `1.2 ms`, `3.0 s`.
pub(super) fn micros(number: f64) -> String {
    match number {
        _ if number < 1_000.0 => format!("{number:.0} µs"),
        _ if number < 1_000_000.0 => format!("{:.1} ms", number / 1_000.0),
        _ => format!("{:.1} s", number / 1_000_000.0),
    }
}

/// `12.0 s`, `5 m 3 s`, `3 h 12 m`, `4 d 3 h`.
pub(super) fn seconds(number: f64) -> String {
    let total = whole(number);
    let (days, hours, minutes, rest) = (total / 86_400, total / 3_600 % 24, total / 60 % 60, total % 60);
    match total {
        0..60 => format!("{:.1} s", if number.is_finite() { number.max(0.0) } else { 0.0 }),
        60..3_600 => format!("{minutes} m {rest} s"),
        3_600..86_400 => format!("{hours} h {minutes} m"),
        _ => format!("{} d {hours} h", grouped(days)),
    }
}

/// The time of day of a Unix time, in UTC.
pub(super) fn time_of_day(at: f64) -> String {
    let second = whole(at.floor()) % 86_400;
    format!("{:02}:{:02}:{:02}", second / 3_600, second / 60 % 60, second % 60)
}

/// `3 %` of a share of one.
pub(super) fn percent(share: f64) -> String {
    format!("{} %", count(share * 100.0))
}

/// How long ago, in whole seconds.
pub(super) fn ago(time: Duration) -> String {
    seconds(time.as_secs_f64().floor()).replace(".0 s", " s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        for (text, expected) in [
            ("ann", "ann"),
            ("zoë 猫 👩", "zoë 猫 👩"),
            ("\u{1b}[31mred\u{1b}]0;title\u{7}", "\\u{1b}[31mred\\u{1b}]0;title\\u{7}"),
            ("a\u{9b}2Jb", "a\\u{9b}2Jb"),
            ("a\r\nb\tc\u{7f}", "a\\u{d}\\nb c\\u{7f}"),
            ("\u{202e}nimda\u{2066}", "\\u{202e}nimda\\u{2066}"),
            ("a\u{200b}b", "a\\u{200b}b"),
        ] {
            assert_eq!(clean(text), expected);
        }
        assert!((0..=u32::from(char::MAX)).filter_map(char::from_u32).all(|any| {
            let shown = clean(&any.to_string());
            !shown.chars().any(|character| character.is_control() || is_mark(character))
        }));
    }

    #[test]
    fn numbers_are_short_whatever_they_are() {
        assert_eq!([0.0, 999.4, 1_234_567.0, -5.0, f64::NAN].map(count), ["0", "999", "1,234,567", "0", "0"]);
        assert_eq!([0.0, 0.04, 4.96, 99.9, 1234.4].map(rate), ["0", "0", "5.0", "99.9", "1,234"]);
        assert_eq!([0.0, 1023.0, 1024.0, 1.5e6, 2.7e11].map(bytes), ["0 B", "1023 B", "1.0 KiB", "1.4 MiB", "251 GiB"]);
        assert_eq!([40.0, 1_240.0, 3e6].map(micros), ["40 µs", "1.2 ms", "3.0 s"]);
        assert_eq!([12.04, 303.0, 11_520.0, 356_400.0].map(seconds), ["12.0 s", "5 m 3 s", "3 h 12 m", "4 d 3 h"]);
        assert_eq!([bytes(f64::INFINITY), seconds(f64::NAN)], ["0 B", "0.0 s"]);
        assert_eq!(time_of_day(1_764_115_199.5), "23:59:59");
        assert_eq!((percent(0.031), ago(Duration::from_millis(7_900))), ("3 %".to_owned(), "7 s".to_owned()));
        assert_eq!((cut("abcdef", 4), cut("abcd", 4)), ("abc…".to_owned(), "abcd".to_owned()));
    }
}
