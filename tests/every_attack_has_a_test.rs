//! The tables of attacks (`src/gateway/security.rs`) name tests that are there, and have a row for everything that has to
//! be defended against.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// What must be there: words of a row's first cell.
const REQUIRED: [&str; 27] = [
    "cross-site WebSocket hijacking",
    "from a log",
    "from an address",
    "byte by byte",
    "in Redis",
    "break out of a header",
    "in an event stream",
    "a line of the log",
    "labels of metrics",
    "in the page",
    "HTML, SVG or XML",
    "markdown",
    "paths out of `/files`",
    "10,000 levels",
    "a key twice",
    "flood of pings",
    "fragments",
    "deflate bomb",
    "after its user was cut",
    "an expired token",
    "alg: none",
    "forwarding headers",
    "DNS rebinding",
    "a form",
    "CORS",
    "clickjacking",
    "a key of one class",
];

/// The cells of each row of attacks.
fn rows() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("src/gateway/security.rs")).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("//! | "));
    let cells = |line: &str| line.trim_end_matches(" |").split(" | ").map(str::to_owned).collect();
    lines.filter(|line| !line.starts_with("attack |")).map(cells).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a file declares that test, in its language.
fn has_test(path: &str, text: &str, name: &str) -> bool {
    if path.ends_with(".rs") {
        let Some((before, _)) = text.split_once(&format!("fn {name}(")) else { return false };
        // The attribute is the item's own, with others beside it at most.
        let own = &before[before.rfind(['}', ';']).map_or(0, |end| end + 1)..];
        return ["#[test]", "#[tokio::test"].iter().any(|attribute| own.contains(attribute));
    }
    if path.ends_with(".py") {
        return name.starts_with("test_") && text.contains(&format!("def {name}(self"));
    }
    text.contains(&format!("it(\"{name}\", ")) || text.contains(&format!("test(\"{name}\", "))
}

#[test]
fn every_row_names_tests_that_are_there() {
    let rows = rows();
    assert!(rows.len() >= REQUIRED.len(), "only {} rows", rows.len());
    let mut files: HashMap<String, String> = HashMap::new();
    for row in rows {
        let [attack, happens, defence, tests] = &row[..] else { panic!("{} cells: {row:?}", row.len()) };
        assert!(![attack, happens, defence].iter().any(|cell| cell.trim().is_empty()), "{row:?}");
        let mut named = 0;
        for reference in tests.split('`').filter(|part| part.contains("::")) {
            let (path, name) = reference.split_once("::").unwrap();
            let text = files.entry(path.to_owned()).or_insert_with(|| {
                fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path} of {attack}: {error}"))
            });
            assert!(has_test(path, text, name), "{reference}, the test of {attack}, is not there");
            named += 1;
        }
        assert!(named > 0, "{attack} has no test");
    }
}

#[test]
fn every_attack_that_has_to_have_a_row_has_one() {
    let rows = rows();
    for words in REQUIRED {
        assert!(rows.iter().any(|row| row[0].contains(words)), "no row for {words}");
    }
}

#[test]
fn a_test_that_is_not_there_is_missed() {
    let rust =
        "#[test]\nfn one() {}\n\nfn two() {}\n#[tokio::test]\nasync fn three() {}\n#[test]\n#[cfg(x)]\nfn four() {}\n";
    for (name, expected) in [("one", true), ("two", false), ("three", true), ("four", true), ("thre", false)] {
        assert_eq!(has_test("a.rs", rust, name), expected, "{name}");
    }
    let python = "    def test_one(self):\n    def other(self):\n";
    assert!(has_test("a.py", python, "test_one") && !has_test("a.py", python, "other"));
    let script = "  it(\"does one thing\", async () => {\n";
    assert!(has_test("a.mjs", script, "does one thing") && !has_test("a.mjs", script, "does one"));
}
