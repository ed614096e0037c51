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
