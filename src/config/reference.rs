//! The reference of all settings, from the table that makes them.

use std::fmt::Write;

use super::{Effect, Setting, Settings};

/// How the reference is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReferenceForm {
    /// For people: a table for each group.
    #[default]
    Markdown,
    /// A whole file with every default, its lines commented out, that `check-config` accepts with and without the marks.
    Toml,
}

const INTRODUCTION: &str = "\
# Settings of tabcast

A setting has one name in three spellings: `tabs_max` in the file, `--tabs-max` as a flag, `TABCAST_TABS_MAX` in the
environment. A flag wins over the environment, the environment over the file, the file over the default. Bytes are whole
numbers or have a unit (`64MiB`), durations always have one (`25s`). Lists are arrays in the file; in a flag, which may
be repeated, and in a variable their entries are separated by commas, of `token_keys` by semicolons. `file:PATH` stands
for a key or a secret that is in a file.

*On change*: a setting with *reload* counts from the next SIGHUP on, one with *restart* from the next start on. All
memory that the settings allow is a sum, which is printed at the start.
";

impl Settings {
    /// The reference of all settings: spellings, form, unit, default, when a change counts, meaning, memory.
    #[must_use]
    pub fn reference(form: ReferenceForm) -> String {
        let defaults = Self::default().values();
        let rows = Self::ALL.iter().zip(defaults);
        let mut out = match form {
            ReferenceForm::Markdown => INTRODUCTION.to_owned(),
            ReferenceForm::Toml => {
                "# Every setting of tabcast with its default. See `tabcast config-reference`.\n".to_owned()
            }
        };
        for (setting, default) in rows {
            match form {
                ReferenceForm::Markdown => write_row(&mut out, setting, &default),
                ReferenceForm::Toml => write_entry(&mut out, setting, &default),
            }
        }
        out
    }
}

const fn on_change(effect: Effect) -> &'static str {
    match effect {
        Effect::Reload => "reload",
        Effect::Restart => "restart",
    }
}

fn form_and_unit(setting: &Setting) -> String {
    if setting.unit.is_empty() { setting.form.to_owned() } else { format!("{}: {}", setting.form, setting.unit) }
}

/// What `fmt::Write` for a `String` cannot refuse.
fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn write_row(out: &mut String, setting: &Setting, default: &str) {
    if let Some(group) = setting.group {
        put(out, format_args!("\n## {group}\n\n"));
        out.push_str("| setting | flag | variable | value: unit | default | on change | what it is | memory |\n");
        out.push_str("|---|---|---|---|---|---|---|---|\n");
    }
    let (about, memory) = setting.about();
    let (Setting { name, flag, effect, .. }, variable) = (setting, setting.variable());
    let (form, change, memory) = (form_and_unit(setting), on_change(*effect), memory.unwrap_or("none that counts"));
    // A bar would end its cell.
    let [about, memory] = [about, memory].map(|text| text.replace('|', "\\|"));
    put(
        out,
        format_args!(
            "| `{name}` | `--{flag}` | `{variable}` | {form} | `{default}` | {change} | {about} | {memory} |\n"
        ),
    );
}

fn write_entry(out: &mut String, setting: &Setting, default: &str) {
    const WIDTH: usize = 96;
    if let Some(group) = setting.group {
        put(out, format_args!("\n# --- {group} ---\n"));
    }
    let mut line = String::from("\n#");
    for word in setting.help.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            out.push_str(&line);
            line = String::from("\n#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    let (form, change) = (form_and_unit(setting), on_change(setting.effect));
    put(out, format_args!("\n# {form}; on change: {change}\n#{} = {default}\n", setting.name));
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::{Machine, Sources};
    use super::*;

    /// The cells of each setting's row, by its name.
    fn rows(reference: &str) -> HashMap<String, Vec<String>> {
        let cells = |line: &str| -> Vec<String> {
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let rows = reference.lines().filter(|line| line.starts_with("| `")).map(cells);
        rows.map(|row| (row[0].clone(), row)).collect()
    }

    #[test]
    fn every_setting_has_a_row_with_its_spellings_unit_and_default() {
        let reference = Settings::reference(ReferenceForm::Markdown);
        let rows = rows(&reference);
        assert_eq!(rows.len(), Settings::ALL.len());
        let mut read = Settings::default();
        for setting in Settings::ALL {
            let row = &rows[setting.name];
            assert_eq!(row.len(), 8, "{row:?}");
            assert_eq!(row[1], format!("--{}", setting.flag));
            assert_eq!(row[2], setting.variable());
            let is_quantity = row[3].starts_with("whole number") || row[3].starts_with("duration");
            assert_eq!(is_quantity, row[3].contains(": "), "{}: a quantity has a unit: {}", setting.name, row[3]);
            let table: toml::Table = format!("it = {}", row[4]).parse().unwrap();
            read.assign_toml(setting.name, table["it"].clone()).unwrap().unwrap();
            assert_eq!(row[5] == "reload", setting.effect == Effect::Reload);
        }
        assert_eq!(read.changes_to(&Settings::default()), [], "what is printed as default is the default");
    }

    /// The default that the prose names, if it names one that can be read: `Default 1MiB, at most …`.
    fn told(help: &str) -> Option<String> {
        let (_, rest) = help.split_once("Default ")?;
        let told = &rest[..rest.find([',', ';', ' ']).unwrap_or(rest.len())];
        // What follows explains it, or the sentence is over.
        let told = told.strip_suffix('.').unwrap_or_else(|| told.trim_end_matches(':'));
        Some(told.to_owned()).filter(|told| told != "none")
    }

    #[test]
    fn what_the_prose_calls_the_default_is_the_default() {
        let mut checked = 0;
        for setting in Settings::ALL {
            let Some(told) = told(setting.help) else { continue };
            let mut read = Settings::default();
            let assigned = read.assign_texts(setting.name, std::slice::from_ref(&told)).unwrap();
            assert_eq!(assigned, Ok(()), "{}: {told}", setting.name);
            assert_eq!(read.changes_to(&Settings::default()), [], "{}: {told}", setting.name);
            checked += 1;
        }
        assert!(checked > 60, "only {checked} are told");
    }

    #[test]
    fn every_setting_that_the_sum_of_memory_grows_with_says_what_it_costs() {
        let machine = Machine { cores: 2, open_files_max: 20_000 };
        let sum = |sources: Sources| {
            let settings = sources.with_toml("deflate = 'on'\nredis = ['redis://h']").load(machine);
            settings.ok().map(|s| s.memory_worst_case().iter().map(|(_, bytes)| bytes).sum::<u64>())
        };
        let before = sum(Sources::new());
        let mut grown = 0;
        for (setting, default) in Settings::ALL.iter().zip(Settings::default().values()) {
            let Ok(number) = default.parse::<u64>() else { continue };
            let more = (number + number / 100).max(number + 1).to_string();
            let after = sum(Sources::new().with_variable(&setting.variable(), &more));
            if after.is_some() && after != before {
                assert!(setting.about().1.is_some(), "{} costs memory and does not say so", setting.name);
                grown += 1;
            }
        }
        assert!(grown > 14, "only {grown} settings cost anything");
    }

    #[test]
    fn the_whole_file_is_accepted_with_and_without_its_marks() {
        let file = Settings::reference(ReferenceForm::Toml);
        let machine = Machine { cores: 2, open_files_max: 20_000 };
        let default = Sources::new().load(machine).unwrap();
        assert_eq!(Sources::new().with_toml(&file).load(machine).unwrap().changes_to(&default), []);
        let is_entry = |line: &str| Settings::ALL.iter().any(|s| line.starts_with(&format!("#{} = ", s.name)));
        let entries = file.lines().filter(|line| is_entry(line)).count();
        assert_eq!(entries, Settings::ALL.len());
        let unmarked: Vec<&str> =
            file.lines().map(|line| if is_entry(line) { line.trim_start_matches('#') } else { line }).collect();
        let read = Sources::new().with_toml(&unmarked.join("\n")).load(machine).unwrap();
        assert_eq!(read.changes_to(&default), []);
        assert!(file.lines().all(|line| line.len() <= 200), "lines that can be read");
    }

    #[test]
    fn a_change_tells_numbers_in_full_and_secrets_as_counts() {
        let settings = |toml: &str| Sources::new().with_toml(toml).unchecked().unwrap();
        let old = settings("tabs_per_user_max = 32\napi_keys = ['one', 'two']\nwebhook_secret = 'hush'");
        let new = settings("tabs_per_user_max = 16\napi_keys = ['two', 'three', 'four']\nwebhook_secret = 'loud'");
        let told: Vec<_> = old.changes_to(&new).into_iter().map(|c| (c.name, c.values, c.effect)).collect();
        let expected = [
            ("tabs_per_user_max", "32 → 16".to_owned(), Effect::Reload),
            ("webhook_secret", "\"***\" → \"***\"".to_owned(), Effect::Restart),
            ("api_keys", "2 → 3 (2 added, 1 taken away)".to_owned(), Effect::Reload),
        ];
        assert_eq!(told, expected);
        let reloaded = old.with_reloaded(&new);
        assert_eq!(reloaded.changes_to(&new).len(), 1, "what needs a restart stays");
    }
}
