//! The tables of attacks (`src/gateway/security.rs`) name tests that are there, and have a row for everything that has to
//! be defended against.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// The rows that there are, in their order: words of the first cell that no other row has.
const ROWS: [&str; 69] = [
    "alg: none",
    "text of a public key",
    "another key's `kid`",
    "an expired token",
    "after its user was cut",
    "a token of another service",
    "claims that are there twice",
    "a token of 64 KiB",
    "a `sub` that is the bot's id",
    "byte by byte",
    "one after the other, until one fits",
    "a key of one class",
    "from a log",
    "a token read from an address",
    "watched without an operator's key",
    "an operator's key read from an address",
    "somebody else's answer",
    "a room that the token does not name",
    "cross-site WebSocket hijacking",
    "the same in development mode",
    "posts to `/api`",
    "posts to `/events`",
    "speaks as somebody else",
    "DNS rebinding",
    "forwarding headers",
    "CORS",
    "clickjacking",
    "break out of a header",
    "in an event stream",
    "a line of the log",
    "`traceparent`",
    "exported spans",
    "labels of metrics",
    "markup and scripts",
    "in the operator's status page",
    "HTML, SVG or XML",
    "backwards",
    "in the markdown of `/v1`",
    "into the links of files",
    "paths out of `/files`",
    "in Redis",
    "10,000 levels",
    "a key twice",
    "that the JSON library gives a meaning",
    "lone surrogates",
    "a small body that becomes large",
    "the `Idempotency-Key`",
    "a webhook called by somebody else",
    "a flood of pings",
    "a flood of POSTs",
    "pongs pile up",
    "a million fragments",
    "claimed and not sent",
    "a deflate bomb",
    "frames that are wrong",
    "a byte at a time",
    "a request within a request",
    "`tabcast.py`'s webhook",
    "a TLS handshake that never ends",
    "tabs that never read",
    "more tabs than there is room for",
    "connections that are no sessions",
    "bodies that are begun and held",
    "questions to `/v1` without end",
    "answers of `/v1` in one piece",
    "responses taken a few bytes at a time",
    "links of files that another node has",
    "a flood of handshakes",
    "a flood of tokens",
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

/// Whether a file declares that test, in its language, and lets it run.
fn has_test(path: &str, text: &str, name: &str) -> bool {
    if path.ends_with(".rs") {
        let Some((before, _)) = text.split_once(&format!("fn {name}(")) else { return false };
        // The attributes are the item's own.
        let own = &before[before.rfind(['}', ';']).map_or(0, |end| end + 1)..];
        let is_test = ["#[test]", "#[tokio::test"].iter().any(|attribute| own.contains(attribute));
        return is_test && !["#[ignore", ", ignore"].iter().any(|attribute| own.contains(attribute));
    }
    if path.ends_with(".py") {
        let Some((before, _)) = text.split_once(&format!("    def {name}(self")) else { return false };
        // Decorators stand right above, without an empty line between.
        let own = before.rsplit("\n\n").next().unwrap_or_default();
        return name.starts_with("test_")
            && !["@unittest.skip", "@unittest.expectedFailure"].iter().any(|it| own.contains(it));
    }
    // Options stand behind the name, in braces, and may be `skip` or `todo`: a test of this table has none.
    ["it", "test"]
        .iter()
        .any(|it| text.contains(&format!("{it}(\"{name}\", async")) || text.contains(&format!("{it}(\"{name}\", (")))
}

#[test]
fn every_row_names_tests_that_are_there() {
    let mut files: HashMap<String, String> = HashMap::new();
    for row in rows() {
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
fn every_attack_that_has_to_have_a_row_has_one_and_every_row_is_asked_for() {
    let attacks: Vec<String> = rows().into_iter().map(|mut row| row.swap_remove(0)).collect();
    for words in ROWS {
        let count = attacks.iter().filter(|attack| attack.contains(words)).count();
        assert_eq!(count, 1, "rows for {words}");
    }
    // Whatever is taken out, or moved into another's place, is seen here; and whatever is new has to be named above.
    for (attack, words) in attacks.iter().zip(ROWS) {
        assert!(attack.contains(words), "{words} is not where the row of {attack} is");
    }
    assert_eq!(attacks.len(), ROWS.len(), "the last row is {:?}", attacks.last());
}

#[test]
fn a_test_that_is_not_there_or_does_not_run_is_missed() {
    let rust = "#[test]\nfn one() {}\n\nfn two() {}\n#[tokio::test]\nasync fn three() {}\n#[test]\n#[cfg(x)]\nfn four() {}\n\
                #[test]\n#[ignore]\nfn five() {}\n#[ignore = \"why\"]\n#[test]\nfn six() {}\n\
                #[cfg_attr(x, ignore)]\n#[test]\nfn seven() {}\n#[test]\nfn eight() {}\n";
    let is_there = ["one", "three", "four", "eight"];
    for name in ["one", "two", "three", "four", "five", "six", "seven", "eight", "thre"] {
        assert_eq!(has_test("a.rs", rust, name), is_there.contains(&name), "{name}");
    }
    let python = "    def test_one(self):\n        pass\n\n    def other(self):\n        pass\n\n    @unittest.skip(\"why\")\n\
                  \u{20}   def test_two(self):\n        pass\n\n    def test_three(self):\n";
    for (name, expected) in [("test_one", true), ("other", false), ("test_two", false), ("test_three", true)] {
        assert_eq!(has_test("a.py", python, name), expected, "{name}");
    }
    let script = "  it(\"does one thing\", async () => {\n  it(\"does two\", { skip: true }, async () => {\n\
                  it.skip(\"does three\", async () => {\n  test(\"does four\", () => {\n";
    for (name, expected) in
        [("does one thing", true), ("does one", false), ("does two", false), ("does three", false), ("does four", true)]
    {
        assert_eq!(has_test("a.mjs", script, name), expected, "{name}");
    }
}
