//! How long a refusal takes tells nothing of a key: what is compared are digests, and by a function whose time does not
//! depend on them. Time itself cannot be tested honestly on a shared machine, so the source is.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};

fn source(path: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    text.split("#[cfg(test)]").next().unwrap().to_owned()
}

/// From the line that begins an item to the line that ends it.
fn item<'t>(text: &'t str, head: &str) -> &'t str {
    let start = text.find(head).unwrap_or_else(|| panic!("there is no `{head}`"));
    let indent = &text[text[..start].rfind('\n').map_or(0, |end| end + 1)..start];
    let end = text[start..].find(&format!("\n{indent}}}\n")).unwrap();
    &text[start..start + end]
}

fn files_below(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn by_their_digests_and_nowhere_else() {
    let keys = source("src/config/keys.rs");
    let (before, _) = keys.split_once("pub struct KeyDigest {").unwrap();
    let derived = before.rsplit("#[derive(").next().unwrap();
    assert!(!derived.contains("PartialEq") && !derived.contains("Hash") && !derived.contains("Ord"), "{derived}");
    let equal = item(&keys, "impl PartialEq for KeyDigest {");
    assert!(equal.contains(".ct_eq(") && !equal.contains("=="), "{equal}");

    // Every key of every class is compared, whatever the others said.
    let auth = source("src/gateway/auth.rs");
    let find = item(&auth, "fn find(&self");
    assert_eq!(find.matches(".ct_eq(").count(), 2, "{find}");
    for early in ["==", "!=", "return", "break", ".any(", ".find(", ".position(", "&&", "||"] {
        assert!(!find.contains(early), "`{early}` ends early: {find}");
    }
    let authorize = item(&auth, "pub fn authorize(");
    assert!(authorize.contains("self.find(&KeyDigest::of(key.as_bytes()))"), "{authorize}");

    // Nobody else looks into a key that somebody showed.
    let mut files = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    files_below(&root.join("src"), &mut files);
    let mut places = Vec::new();
    for file in files {
        let path = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let count = source(&path).matches("KeyDigest::of(").count();
        places.extend((count > 0).then_some((path, count)));
    }
    places.sort();
    // The caller's name, which is made of the digest and compared with nothing secret, and the one comparison.
    assert_eq!(places, [("src/gateway/auth.rs".to_owned(), 1), ("src/gateway/edge.rs".to_owned(), 1)]);
}
