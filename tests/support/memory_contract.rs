//! The table of what things cost, as the crate's documentation has it.
#![allow(clippy::unwrap_used, reason = "a test's helper fails the test")]

const DOCUMENTATION: &str = include_str!("../../src/lib.rs");

/// The most bytes of a row.
#[track_caller]
pub(crate) fn most(row: &str) -> usize {
    let (_, section) = DOCUMENTATION.split_once("\n//! # Memory\n").unwrap();
    let section = section.split("\n//! # ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("//! | "));
    let bytes = rows.filter_map(|line| line.split_once(" | ")).find(|(name, _)| *name == row);
    let (_, bytes) = bytes.unwrap_or_else(|| panic!("the table has no row {row:?}"));
    bytes.split(' ').next().unwrap().parse().unwrap()
}
