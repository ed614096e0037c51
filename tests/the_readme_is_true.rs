//! The README's tables say what the code says. Its commands are run by `tests/readme.sh`, its Rust is a doctest.
#![cfg(feature = "gateway")]

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

#[test]
fn every_code_of_an_error_frame_is_named() {
    let codes = [
        ErrorCode::BadFrame,
        ErrorCode::BadField,
        ErrorCode::TooLarge,
        ErrorCode::Forbidden,
        ErrorCode::LimitReached,
        ErrorCode::RateLimited,
        ErrorCode::Overloaded,
        ErrorCode::Draining,
    ];
    for code in codes {
        assert!(section("Codes").contains(&format!("`{}`", code.as_str())), "{}", code.as_str());
    }
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
