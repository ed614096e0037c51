//! The README's tables say what the code says. Its commands are run by `tests/readme.sh`, its Rust is a doctest.
#![cfg(feature = "gateway")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tabcast::config::{Machine, Settings, Sources};
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::event::ErrorCode;

const README: &str = include_str!("../README.md");
const MACHINE: Machine = Machine { cores: 2, open_files_max: 20_000 };

/// The section under a heading.
fn section(heading: &str) -> &'static str {
    let (_, rest) = README.split_once(&format!("\n## {heading}\n")).expect("the section is there");
    rest.split_once("\n## ").map_or(rest, |(section, _)| section)
}

/// The cells of a section's tables, without their code marks, heads and rules.
fn rows(section: &'static str) -> Vec<Vec<String>> {
    let cells = |line: &str| line.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "")).collect();
    section.lines().filter(|line| line.starts_with("| ")).map(cells).collect()
}

fn settings(sources: Sources) -> Vec<String> {
    sources.load(MACHINE).expect("usable settings").to_toml().lines().map(str::to_owned).collect()
}

#[test]
fn every_close_code_is_in_its_table_with_its_advice() {
    let rows = rows(section("Codes"));
    for ending in Disconnect::ALL {
        let code = ending.close_code().to_string();
        let row = rows.iter().find(|row| row[0] == code).unwrap_or_else(|| panic!("{code} is not there"));
        assert_eq!(row[1], ending.reason(), "{code}");
        assert_eq!(row[2].starts_with("yes"), ending.is_retryable(), "{code}");
    }
    let count = rows.iter().filter(|row| row.len() == 3 && row[0].parse::<u16>().is_ok()).count();
    assert_eq!(count, Disconnect::ALL.len(), "a code that does not exist");
}

/// What stands between backticks and looks like a code.
fn codes(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).filter(|word| is_code(word)).collect()
}

fn is_code(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[test]
fn the_codes_of_error_frames_are_these_and_no_others() {
    let (_, list) = section("Codes").split_once("leaves the connection open. Its codes:").expect("the list is there");
    let (list, _) = list.split_once("\n\n").expect("the list ends");
    assert_eq!(codes(list), ErrorCode::ALL.iter().map(|code| code.as_str()).collect());
}

/// The arguments of a call, whose parenthesis is open before `text`.
fn arguments(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut is_text, mut is_escaped) = (0, 0, false, false);
    let mut arguments = Vec::new();
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            _ if is_text => {}
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' if depth == 0 => {
                arguments.push(text[start..at].trim());
                break;
            }
            b')' | b']' | b'}' => depth -= 1,
            b',' if depth == 0 => {
                arguments.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    arguments
}

/// The codes that a file of the source gives to HTTP errors: as literals of the functions that make them, and of those that
/// name the code of a type.
fn codes_of(path: &str, text: &str, found: &mut BTreeSet<String>) {
    let text = text.split_once("\n#[cfg(test)]\nmod tests").map_or(text, |(code, _)| code);
    let literal =
        |text: &str| text.strip_prefix('"')?.strip_suffix('"').filter(|word| is_code(word)).map(str::to_owned);
    let calls: &[&str] = if path.ends_with("openai/failed.rs") { &["Self::new("] } else { &["error(", "error_with("] };
    for call in calls {
        for (at, _) in text.match_indices(call) {
            if !text[..at].ends_with(|before: char| before.is_alphanumeric() || "_.!".contains(before)) {
                found.extend(arguments(&text[at + call.len()..]).into_iter().skip(1).take(2).filter_map(literal));
            }
        }
    }
    for head in ["fn code(self)", "pub const fn as_str(self)"] {
        let is_list = head.starts_with("fn") || path.ends_with("api/error.rs");
        for (_, body) in text.split(head).skip(1).filter(|_| is_list).filter_map(|rest| rest.split_once('{')) {
            let body = body.split_once("\n    }").map_or(body, |(body, _)| body);
            found.extend(body.split('"').skip(1).step_by(2).filter(|word| is_code(word)).map(str::to_owned));
        }
    }
    if path.ends_with("openai/failed.rs") {
        found.extend(text.split("=> (ErrorKind::").skip(1).filter_map(|rest| literal(arguments(rest).get(1)?)));
    }
}

fn files_below(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("the source is there") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files_below(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn the_codes_of_http_errors_are_these_and_no_others() {
    let (_, list) = section("Codes").split_once("HTTP errors are").expect("the list is there");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![source.join("proto/completion.rs")];
    files_below(&source.join("gateway"), &mut files);
    files_below(&source.join("driver"), &mut files);
    let mut found = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a file of the source");
        codes_of(file.to_str().expect("a plain path"), &text, &mut found);
    }
    assert!(found.len() > 30, "only {found:?}");
    let named = codes(list);
    let found: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    assert_eq!(found.difference(&named).collect::<Vec<_>>(), Vec::<&&str>::new(), "not in the README");
    assert_eq!(named.difference(&found).collect::<Vec<_>>(), Vec::<&&str>::new(), "in the README only");
}

#[test]
fn every_limit_has_the_default_that_its_row_says() {
    let defaults = settings(Sources::new());
    let mut checked = 0;
    for row in rows(section("Limits")) {
        let [name, default] = [&row[0], &row[1]];
        if name == "setting" {
            continue;
        }
        let variable = format!("TABCAST_{}", name.to_uppercase());
        assert_eq!(settings(Sources::new().with_variable(&variable, default)), defaults, "{name} = {default}");
        checked += 1;
    }
    assert!(checked > 20, "only {checked} limits");
}

#[test]
fn every_setting_in_its_table_exists() {
    let (_, table) = section("Settings").split_once("| setting |").expect("the table is there");
    let rows = rows(table);
    assert!(rows.len() > 8, "only {} rows", rows.len());
    for name in rows.iter().flat_map(|row| row[0].split(", ")) {
        assert!(Settings::ALL.iter().any(|setting| setting.name == name), "{name} is no setting");
    }
}

/// The settings of one column of the table of memories.
fn sized(rows: &[Vec<String>], column: usize) -> Settings {
    let mut sources = Sources::new().with_toml("api_keys = ['with-keys']");
    for row in rows {
        sources = sources.with_variable(&format!("TABCAST_{}", row[0].to_uppercase()), &row[column]);
    }
    sources.load(Machine { cores: 8, open_files_max: 2_000_000 }).expect("usable settings")
}

#[test]
fn every_size_of_memory_is_enough_for_its_settings() {
    let (_, table) = section("Security").split_once("| the process may take |").expect("the table is there");
    let (sizes, table) = table.split_once('\n').expect("its head is a line");
    let sizes: Vec<&str> = sizes.trim_matches(['|', ' ']).split(" | ").collect();
    let rows: Vec<_> =
        rows(table).into_iter().filter(|row| row[0].chars().all(|c| c.is_lowercase() || c == '_')).collect();
    assert!(rows.len() > 10, "only {} settings", rows.len());
    let units = |size: &str| match size.split_once(' ') {
        Some((count, "MiB")) => count.parse::<u64>().expect("a number") << 20,
        Some((count, "GiB")) => count.parse::<u64>().expect("a number") << 30,
        _ => panic!("{size} is no size"),
    };
    assert_eq!(sizes.len(), 3, "{sizes:?}");
    for (at, size) in sizes.into_iter().enumerate() {
        let sum: u64 = sized(&rows, at + 1).memory_worst_case().iter().map(|(_, bytes)| bytes).sum();
        let most = units(size);
        assert!(sum <= most, "{size}: {sum} bytes are more");
        assert!(sum >= most / 4 * 3, "{size}: {sum} bytes leave much unused");
    }
}
