//! Keeps the floors: which module may import which, and what the pure ones never name. The table is the map in the
//! crate's documentation, as data; a new edge is one visible line there, one here, and one `use`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What each module may import beside itself. A module that is not here is an error, and so is one that is gone.
const ALLOWED: [(&str, &[&str]); 16] = [
    ("id", &[]),
    ("proto", &["id"]),
    // Its labels are the closed enums of proto (why sessions end), so that no list is written twice.
    ("metrics", &["proto"]),
    ("traces", &["id", "proto"]),
    // These two do not know each other: the engine joins them.
    ("platform", &["id", "proto"]),
    ("fanout", &["id", "metrics", "proto"]),
    ("broker", &["id", "metrics", "proto", "traces"]),
    ("engine", &["id", "metrics", "proto", "traces", "platform", "fanout", "broker"]),
    ("driver", &["id", "metrics", "proto", "platform", "fanout", "broker", "engine"]),
    // Below the gateway, which is built from it: settings are ids and limits, and know nothing of what they configure.
    ("config", &["id", "proto"]),
    ("gateway", &["id", "metrics", "proto", "traces", "platform", "fanout", "broker", "engine", "driver", "config"]),
    // How lines look is a setting.
    ("logs", &["driver", "config"]),
    // Clients of the gateway that know nothing of how it is made: a clock, and numbers as the log has them.
    ("terminal", &["driver", "logs"]),
    // Of everything below it needs one thing: a file table for each of its threads.
    ("bench", &["proto", "driver"]),
    // Reads settings and starts the gateway, or the load generator; by the library's public name.
    ("main", &["config", "gateway", "logs", "terminal", "bench"]),
    // Documentation alone.
    ("guide", &[]),
];

/// Modules that name no runtime, socket, file or clock.
const PURE: [&str; 5] = ["id", "metrics", "proto", "platform", "fanout"];
const IMPURE: [&str; 8] =
    ["tokio::", "mio::", "hyper::", "std::net", "std::fs", "Instant::now", "SystemTime::now", "available_parallelism"];
/// What no code outside of tests has.
const UNFINISHED: [&str; 4] = ["todo!", "unimplemented!", "dbg!", ".unwrap()"];
/// What no file has, comments included.
const NOTES: [&str; 2] = ["TODO", "FIXME"];
const FILE_LINES_MAX: usize = 600;

/// A source file: its path below `src`, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The top-level module that it belongs to.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// How many modules deep it is: 1 for `id.rs` and `engine/mod.rs`, 2 for `engine/client.rs`.
    fn depth(&self) -> usize {
        let path = self.path.strip_suffix("/mod.rs").unwrap_or(&self.path);
        path.split('/').count()
    }
}

/// Everything that is wrong with `sources`, a line each.
fn violations(sources: &[Source]) -> Vec<String> {
    let tests = test_modules(sources);
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| source.path != "lib.rs") {
        for note in NOTES {
            for (at, _) in source.text.match_indices(note) {
                found.push(format!("{}:{}: {note}", source.path, line_of(&source.text, at)));
            }
        }
        if tests
            .iter()
            .any(|module| source.path == format!("{module}.rs") || source.path.starts_with(&format!("{module}/")))
        {
            continue;
        }
        let code = without_tests(&without_comments_and_literals(&source.text));
        check_edges(source, &code, &mut found);
        check_words(source, &code, &mut found);
        let lines = code.lines().filter(|line| *line != REMOVED).count();
        if lines > FILE_LINES_MAX {
            found.push(format!("{}: {lines} lines before the tests; at most {FILE_LINES_MAX}", source.path));
        }
    }
    found
}

fn check_edges(source: &Source, code: &str, found: &mut Vec<String>) {
    let module = source.module();
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == module) else {
        found.push(format!("{}: the module {module} has no floor", source.path));
        return;
    };
    let root = if module == "main" { "tabcast::" } else { "crate::" };
    for at in words(code, root) {
        let line = line_of(code, at);
        let rest = code[at + root.len()..].trim_start();
        let target: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if target.is_empty() {
            found.push(format!("{}:{line}: grouped `use {root}{{…}}`: write one module a line", source.path));
        } else if target != module && !allowed.contains(&target.as_str()) {
            found.push(format!("{}:{line}: {module} imports {target}", source.path));
        }
    }
    // The other way to the root.
    for at in words(code, "super::") {
        let ends_before = code[..at].ends_with("super::");
        let count = code[at..].split("::").take_while(|part| *part == "super").count();
        if !ends_before && count >= source.depth() {
            found.push(format!("{}:{}: `super` reaches the root: write `crate::`", source.path, line_of(code, at)));
        }
    }
}

fn check_words(source: &Source, code: &str, found: &mut Vec<String>) {
    let impure: &[&str] = if PURE.contains(&source.module()) { &IMPURE } else { &[] };
    for word in impure {
        for at in words(code, word) {
            found.push(format!("{}:{}: {} names {word}", source.path, line_of(code, at), source.module()));
        }
    }
    for word in UNFINISHED {
        for at in words(code, word) {
            found.push(format!("{}:{}: {word}", source.path, line_of(code, at)));
        }
    }
}

/// Modules of tests only, as paths without `.rs`: `#[cfg(test)] mod name;` in the file of their parent.
fn test_modules(sources: &[Source]) -> Vec<String> {
    let mut modules = Vec::new();
    for source in sources {
        let code = without_comments_and_literals(&source.text);
        let directory = match source.path.strip_suffix("mod.rs").or(source.path.strip_suffix("lib.rs")) {
            Some(directory) => directory.to_owned(),
            None => format!("{}/", source.path.trim_end_matches(".rs")),
        };
        for range in test_items(&code) {
            let item = code[range].trim_end();
            let name = item.strip_suffix(';').and_then(|item| item.rsplit_once("mod ")).map(|(_, name)| name.trim());
            if let Some(name) = name {
                modules.push(format!("{directory}{name}"));
            }
        }
    }
    modules
}

/// Stands for a line that was removed, so that lines keep their numbers.
const REMOVED: &str = "\u{1}";

/// Code with every test-only item taken out. Lines keep their numbers.
fn without_tests(code: &str) -> String {
    let mut rest = code.to_owned();
    for range in test_items(code).into_iter().rev() {
        let blank: Vec<&str> = code[range.clone()].split('\n').map(|_| REMOVED).collect();
        rest.replace_range(range, &blank.join("\n"));
    }
    rest
}

/// Where items under `#[cfg(test)]` or `#[cfg(all(test, …))]` are: from the attribute to their end.
fn test_items(code: &str) -> Vec<std::ops::Range<usize>> {
    let mut items = Vec::new();
    let mut from = 0;
    while let Some(start) = ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|a| code[from..].find(a)).min() {
        let start = from + start;
        let mut depth = 0usize;
        let mut end = code.len();
        for (at, character) in code[start..].char_indices() {
            match character {
                '{' | '[' | '(' => depth += 1,
                '}' | ']' | ')' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(character, ';' | '}') {
                end = start + at + 1;
                break;
            }
        }
        items.push(start..end);
        from = end;
    }
    items
}

/// Where `word` begins in `code`, not as a part of a longer word.
fn words(code: &str, word: &str) -> Vec<usize> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let starts_a_word = |at: usize| !word.starts_with(is_part) || !code[..at].ends_with(is_part);
    code.match_indices(word).map(|(at, _)| at).filter(|at| starts_a_word(*at)).collect()
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Blanks comments and the insides of literals. Lines keep their numbers.
fn without_comments_and_literals(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            'r' | 'b' | '"' if !code.ends_with(|c: char| c.is_alphanumeric() || c == '_') => literal(rest),
            '\'' => character(rest),
            _ => 0,
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[skipped..];
        }
    }
    code
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The length of the string literal at the start of `text`, or 0 if there is none.
fn literal(text: &str) -> usize {
    let head = text.strip_prefix('b').unwrap_or(text);
    if let Some(raw) = head.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if !raw[hashes..].starts_with('"') {
            return 0;
        }
        let close = format!("\"{}", "#".repeat(hashes));
        let open = text.len() - raw.len() + hashes + 1;
        return text[open..].find(&close).map_or(text.len(), |end| open + end + close.len());
    }
    if !head.starts_with('"') {
        return 0;
    }
    let open = text.len() - head.len() + 1;
    let mut escaped = false;
    for (at, character) in text[open..].char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return open + at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of the character literal at the start of `text`, or 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut inside = text[1..].char_indices();
    match inside.next() {
        // The character after the backslash is never the end.
        Some((_, '\\')) => text[3..].find('\'').map_or(0, |end| end + 4),
        Some((_, one)) if text[1 + one.len_utf8()..].starts_with('\'') => one.len_utf8() + 2,
        _ => 0,
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    fn walk(directory: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("a readable directory") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let src = root().join("src");
    let mut files = Vec::new();
    walk(&src, &mut files);
    files.sort();
    let source = |file: &PathBuf| {
        let path = file.strip_prefix(&src).expect("below src").to_str().expect("a path in UTF-8");
        Source::new(path, &fs::read_to_string(file).expect("a readable file"))
    };
    files.iter().map(source).collect()
}

#[test]
fn the_floors_hold() {
    let sources = sources();
    assert!(sources.len() > 50, "only {} sources were found", sources.len());
    let found = violations(&sources);
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn the_table_names_every_module_and_only_lower_ones() {
    let sources = sources();
    let modules: Vec<&str> = sources.iter().map(Source::module).filter(|module| *module != "lib").collect();
    let mut floors = BTreeMap::new();
    for (floor, (module, allowed)) in ALLOWED.iter().enumerate() {
        assert!(modules.contains(module), "{module} is in the table and not in src");
        for lower in *allowed {
            assert!(floors.contains_key(lower), "{module} would import {lower}, which is not below it");
        }
        floors.insert(*module, floor);
    }
    let root = sources.iter().find(|source| source.path == "lib.rs").expect("a library");
    for (module, _) in ALLOWED.iter().filter(|(module, _)| *module != "main") {
        let map = root.text.contains(&format!("| [`{module}`]"));
        assert!(map, "{module} is not in the map of the crate's documentation");
    }
}

#[test]
fn what_is_forbidden_is_found() {
    let check = |path: &str, text: &str, expected: &[&str]| {
        assert_eq!(violations(&[Source::new(path, text)]), expected, "{path}: {text}");
    };
    check("proto/frame.rs", "use crate::id::UserId;\nuse crate::proto::event::Event;\n", &[]);
    check("proto/frame.rs", "\nuse crate::fanout::hub::Hub;\n", &["proto/frame.rs:2: proto imports fanout"]);
    check("platform/mod.rs", "pub use crate::fanout::hub;", &["platform/mod.rs:1: platform imports fanout"]);
    check("fanout/hub.rs", "fn f() { crate::platform::view::f() }", &["fanout/hub.rs:1: fanout imports platform"]);
    check("config.rs", "use crate::gateway::auth::Keys;", &["config.rs:1: config imports gateway"]);
    check("gateway/edge.rs", "use crate::config::Settings;", &[]);
    check("main.rs", "use tabcast::engine::Engine;", &["main.rs:1: main imports engine"]);
    check("id.rs", "use crate::{proto};", &["id.rs:1: grouped `use crate::{…}`: write one module a line"]);
    check("id.rs", "macro_rules! m { () => { $crate::proto::f() } }", &["id.rs:1: id imports proto"]);
    check("id.rs", "use super::proto::f;", &["id.rs:1: `super` reaches the root: write `crate::`"]);
    check("proto/json/tests.rs", "use super::super::frame;", &[]);
    check("proto/json.rs", "use super::super::id;", &["proto/json.rs:1: `super` reaches the root: write `crate::`"]);
    check("strange.rs", "", &["strange.rs: the module strange has no floor"]);
    check("fanout/hub.rs", "fn f() { Instant::now(); }", &["fanout/hub.rs:1: fanout names Instant::now"]);
    check("fanout/hub.rs", "use tokio::time;", &["fanout/hub.rs:1: fanout names tokio::"]);
    check("engine/mod.rs", "use tokio::time;", &[]);
    check("engine/mod.rs", "fn f() { g().unwrap() }", &["engine/mod.rs:1: .unwrap()"]);
    check("engine/mod.rs", "// a note: TO\u{44}O\n", &["engine/mod.rs:1: TODO"]);
    check("id.rs", &"\n".repeat(601), &["id.rs: 601 lines before the tests; at most 600"]);
}

#[test]
fn what_is_allowed_is_not_found() {
    let check = |text: &str| assert_eq!(violations(&[Source::new("id.rs", text)]), [""; 0], "{text}");
    check("//! See crate::proto, tokio::spawn and x.unwrap().\n/* a /* nested */ crate::proto */");
    check("const A: &str = \"crate::proto \\\" tokio::\"; const B: &str = r#\"\" todo! \"#; const C: char = '\"';");
    check("fn f<'a>(a: &'a str) -> char { '\\'' } // dbg!");
    check("#[cfg(test)]\nmod tests {\n use tokio::time; fn f() { g(\"}\").unwrap() }\n}\nfn g() {}");
    check(&format!("#[cfg(all(test, not(loom)))]\n#[path = \"x\"]\nmod tests {{\n{}}}\n", "\n".repeat(700)));
    check("mod my_tokio { } use my_tokio::x; fn f() { a.unwrap_or(1); }");
    // After a test-only item the rest counts again.
    let rest = "#[cfg(test)]\nuse tokio::time;\nfn f() { dbg!(1) }";
    assert_eq!(violations(&[Source::new("id.rs", rest)]), ["id.rs:3: dbg!"]);
    // A file that only tests use is theirs, and so are those below it.
    let parent = Source::new("platform/mod.rs", "#[cfg(test)]\npub(crate) mod recording;\npub mod view;");
    let child = |name: &str| Source::new(&format!("platform/{name}.rs"), "use tokio::sync::mpsc;");
    let found = violations(&[parent, child("recording"), child("recording/deeper"), child("view")]);
    assert_eq!(found, ["platform/view.rs:1: platform names tokio::"]);
}

/// The packages, with their features, that a build of the library alone needs.
fn packages(features: &[&str]) -> String {
    let tree = ["tree", "--locked", "--offline", "-e", "normal", "--prefix", "none", "-f", "{p} features={f}"];
    let mut cargo = Command::new(env!("CARGO"));
    let output = cargo.current_dir(root()).args(tree).arg("--no-default-features").args(features).output();
    let output = output.expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn an_embedder_pulls_nothing_that_it_does_not_use() {
    let check = |features: &[&str], present: &[&str], absent: &[&str]| {
        let tree = packages(features);
        let has = |name: &str| tree.lines().any(|line| line.starts_with(&format!("{name} v")));
        for name in present {
            assert!(has(name), "{name} is not needed with {features:?}");
        }
        for name in absent {
            assert!(!has(name), "{name} is needed with {features:?}");
        }
        let tokio = tree.lines().find(|line| line.starts_with("tokio v")).expect("tokio is needed");
        tokio.rsplit('=').next().unwrap_or_default().split(',').any(|feature| feature == "net")
    };
    let edge = ["clap", "mimalloc", "jsonwebtoken", "rustls", "toml", "prometheus-client", "tracing-subscriber"];
    let pure = [&edge[..], &["hyper", "http", "mio", "rustix", "socket2", "fastwebsockets"]].concat();
    assert!(!check(&[], &["dashmap", "simd-json"], &pure), "the pure engine needs tokio's net");
    assert!(check(&["--features", "driver"], &["hyper", "mio"], &edge), "the driver does without tokio's net");
}
