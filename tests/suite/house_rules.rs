//! The rules of the house, kept by a test: which module may use which, a module doc on every file, and no unfinished
//! work.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Every module of the crate, from the bottom to the top, with all modules that it may use. A line names only modules
/// above it, so there can be no circle.
const MAY_USE: [(&str, &[&str]); 34] = [
    ("text", &[]),
    ("secret", &[]),
    ("backoff", &[]),
    ("log_limiter", &[]),
    ("metrics", &[]),
    ("logging", &[]),
    ("service_manager", &[]),
    ("first_bytes", &[]),
    ("tls", &["text"]),
    ("http_client", &["text", "tls"]),
    ("reload", &["metrics"]),
    ("schemas", &[]),
    ("signature", &["secret", "text"]),
    ("event", &["signature", "text"]),
    ("subject", &["event"]),
    ("spool", &["event", "log_limiter", "metrics", "subject", "text"]),
    ("broker", &["first_bytes", "http_client", "secret", "tls"]),
    ("traces", &["event", "log_limiter", "tls"]),
    ("topology", &["broker", "event", "schemas", "text"]),
    ("publisher", &["backoff", "broker", "event", "log_limiter", "metrics", "spool", "text", "topology", "traces"]),
    ("server", &["first_bytes", "log_limiter", "metrics", "text", "tls"]),
    ("problem", &[]),
    ("health", &["problem", "spool"]),
    ("recent", &["event"]),
    (
        "reconcile",
        &[
            "backoff",
            "event",
            "http_client",
            "log_limiter",
            "metrics",
            "recent",
            "secret",
            "spool",
            "subject",
            "text",
            "tls",
        ],
    ),
    ("drift", &["event", "log_limiter", "metrics", "schemas"]),
    (
        "ingress",
        &[
            "drift",
            "event",
            "health",
            "log_limiter",
            "metrics",
            "problem",
            "recent",
            "server",
            "signature",
            "spool",
            "subject",
            "tls",
            "traces",
        ],
    ),
    (
        "ops",
        &[
            "backoff",
            "drift",
            "event",
            "health",
            "http_client",
            "log_limiter",
            "logging",
            "metrics",
            "publisher",
            "recent",
            "reconcile",
            "secret",
            "server",
            "signature",
            "spool",
            "subject",
            "text",
            "tls",
            "topology",
        ],
    ),
    (
        "config",
        &[
            "broker",
            "ingress",
            "logging",
            "ops",
            "publisher",
            "reconcile",
            "secret",
            "signature",
            "spool",
            "text",
            "tls",
            "topology",
            "traces",
        ],
    ),
    (
        "relay",
        &[
            "broker",
            "config",
            "drift",
            "health",
            "ingress",
            "logging",
            "logging",
            "metrics",
            "ops",
            "publisher",
            "recent",
            "reconcile",
            "reload",
            "secret",
            "server",
            "service_manager",
            "signature",
            "spool",
            "text",
            "tls",
            "traces",
        ],
    ),
    (
        "cli",
        &[
            "broker",
            "config",
            "event",
            "http_client",
            "logging",
            "metrics",
            "problem",
            "publisher",
            "reconcile",
            "relay",
            "secret",
            "server",
            "signature",
            "spool",
            "subject",
            "text",
            "tls",
            "topology",
        ],
    ),
    ("lib", &[]),
    ("main", &["cli"]),
    ("build", &[]),
];

/// Libraries that only these modules may name, so that the spool knows neither HTTP nor AMQP.
const LIBRARIES: [(&str, &[&str]); 3] = [
    ("lapin", &["broker", "cli", "publisher", "topology"]),
    (
        "hyper",
        &[
            "broker",
            "cli",
            "config",
            "health",
            "http_client",
            "ingress",
            "ops",
            "problem",
            "reconcile",
            "server",
            "traces",
        ],
    ),
    ("rusqlite", &["spool"]),
];

#[test]
fn every_module_uses_only_what_it_may() {
    let (mut modules, mut wrong) = (BTreeSet::new(), Vec::new());
    for Source { name, module, code, .. } in crate_sources() {
        let (_, may_use) = MAY_USE
            .iter()
            .find(|(listed, _)| *listed == module)
            .unwrap_or_else(|| panic!("{name}: the module {module} is not in MAY_USE"));
        let used = paths_after(&code, "crate::").into_iter().filter(|used| *used != module);
        wrong.extend(used.filter(|used| !may_use.contains(&used.as_str())).map(|used| format!("{name} uses {used}")));
        for (library, users) in LIBRARIES.iter().filter(|(_, users)| !users.contains(&module.as_str())) {
            let paths = [format!("{library}::"), format!("use {library};")];
            if paths.iter().any(|path| names(&code, path)) {
                wrong.push(format!("{name} names {library}, which is for {users:?}"));
            }
        }
        modules.insert(module);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(modules.len() > 20, "found {} modules", modules.len());
}

#[test]
fn the_allow_list_has_no_circle() {
    for (index, (module, may_use)) in MAY_USE.iter().enumerate() {
        for used in *may_use {
            let position = MAY_USE.iter().position(|(listed, _)| listed == used);
            assert!(position.is_some_and(|position| position < index) || *module == "main", "{module} lists {used}");
        }
    }
}

#[test]
fn the_files_of_a_module_import_each_other_one_way() {
    let sources: Vec<_> = crate_sources().into_iter().filter(|source| source.name.contains('/')).collect();
    let files: BTreeSet<_> = sources.iter().map(|source| source.name.clone()).collect();
    // The file of a path such as `spool/store`, or else the face of its folder.
    let resolve = |folder: &str, name: &str| {
        let candidates = [format!("{folder}/{name}.rs"), format!("{folder}/{name}/mod.rs")];
        candidates.into_iter().find(|file| files.contains(file)).unwrap_or_else(|| format!("{folder}/mod.rs"))
    };
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Source { name, module, code } in &sources {
        let path = name.trim_end_matches("/mod.rs").trim_end_matches(".rs");
        let mut targets = BTreeSet::new();
        if name.ends_with("/mod.rs") {
            targets.extend(children(code).iter().map(|child| resolve(path, child)));
        }
        for (levels, names) in relative_paths(code) {
            let folder = Path::new(path).ancestors().nth(levels).expect("no path leads out of the crate").display();
            targets.extend(names.iter().map(|used| resolve(&folder.to_string(), used)));
        }
        targets.extend(paths_after(code, &format!("crate::{module}::")).iter().map(|used| resolve(module, used)));
        targets.remove(name);
        edges.insert(name.clone(), targets);
    }
    // One circle for each module, if there is any.
    let modules: BTreeSet<_> = sources.iter().map(|source| source.module.as_str()).collect();
    let of_module = |module: &str| {
        let edges = edges.iter().filter(|(name, _)| name.split('/').next() == Some(module));
        edges.map(|(name, targets)| (name.clone(), targets.clone())).collect()
    };
    let circles: Vec<_> = modules.iter().filter_map(|module| find_circle(&of_module(module))).collect();
    assert!(circles.is_empty(), "these files import each other in circles: {circles:#?}");
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 50, "imports between files were found");
}

#[test]
fn a_circle_is_found() {
    let edges = |pairs: &[(&str, &str)]| {
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in pairs {
            edges.entry((*from).to_owned()).or_default().insert((*to).to_owned());
        }
        edges
    };
    assert_eq!(find_circle(&edges(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    assert!(find_circle(&edges(&[("a", "b"), ("b", "c"), ("c", "b")])).is_some());
}

#[test]
fn imports_are_read_from_code() {
    let code =
        "use crate::{text, spool::{Spool, Ledger}};\nlet x = crate::tls::load();\nuse super::store::{self, Store};";
    assert_eq!(paths_after(code, "crate::"), ["spool", "text", "tls"].map(str::to_owned).into());
    assert_eq!(relative_paths(code), [(1, ["store"].map(str::to_owned).into())]);
    let nested = relative_paths("use super::super::{reader::X, types};");
    assert_eq!(nested, [(2, ["reader", "types"].map(str::to_owned).into())]);
    assert_eq!(children("mod a;\npub mod b;\nuse a::X;"), ["a", "b"].map(str::to_owned).into());
}

#[test]
fn every_file_has_a_module_doc() {
    for (name, text) in all_sources() {
        assert!(text.starts_with("//! "), "{name} has no module doc");
    }
}

#[test]
fn no_line_is_longer_than_120_columns() {
    let mut long = Vec::new();
    for (name, text) in all_sources() {
        let lines = (1..).zip(text.lines()).filter(|(_, line)| line.chars().count() > 120);
        long.extend(lines.map(|(number, _)| format!("{name}:{number}")));
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn no_test_is_switched_off_and_no_work_is_unfinished() {
    for (name, text) in all_sources().into_iter().filter(|(name, _)| !name.ends_with("house_rules.rs")) {
        for mark in ["todo!(", "unimplemented!(", "dbg!(", "TODO", "FIXME", "#[ignore"] {
            assert!(!text.contains(mark), "{mark} in {name}");
        }
    }
}

#[test]
fn every_test_that_the_docs_name_exists() {
    let faults = fs::read_to_string(root().join("tests/FAULTS.md")).unwrap();
    let code: String = all_sources().into_iter().map(|(_, text)| text).collect();
    let mut named = 0;
    for name in faults.split('`').filter(|name| name.contains("::") && !name.contains(' ')) {
        let function = name.rsplit("::").next().unwrap();
        assert!(code.contains(&format!("fn {function}(")), "there is no test {name}");
        named += 1;
    }
    assert!(named > 50, "{named} tests are named");
}

/// A file of the crate, without its tests and comments.
struct Source {
    /// Below `src/`.
    name: String,
    /// The module of the crate that it belongs to.
    module: String,
    code: String,
}

fn crate_sources() -> Vec<Source> {
    let of_crate = |(name, text): (String, String)| {
        let name = name.strip_prefix("src/")?.to_owned();
        let is_test = name.ends_with("tests.rs") || name.contains("/tests/");
        let module = name.split(['/', '.']).next()?.to_owned();
        (!is_test).then(|| Source { name, module, code: without_tests_and_comments(&text) })
    };
    all_sources().into_iter().filter_map(of_crate).collect()
}

/// Unit tests stand at the end of their file and may use anything.
fn without_tests_and_comments(text: &str) -> String {
    let code = text.split("\n#[cfg(test)]\n").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The first names behind each `prefix`, also those in braces: `crate::{a, b::{c, d}}` uses `a` and `b`.
fn paths_after(code: &str, prefix: &str) -> BTreeSet<String> {
    code.match_indices(prefix).flat_map(|(at, _)| first_names(&code[at + prefix.len()..])).collect()
}

/// The first names behind each chain of `super::`, with the length of the chain.
fn relative_paths(code: &str) -> Vec<(usize, BTreeSet<String>)> {
    const SUPER: &str = "super::";
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find(SUPER) {
        rest = &rest[at..];
        let mut levels = 0;
        while let Some(next) = rest.strip_prefix(SUPER) {
            (rest, levels) = (next, levels + 1);
        }
        found.push((levels, first_names(rest)));
    }
    found
}

/// The name at the beginning of a path, or those of a group in braces.
fn first_names(path: &str) -> BTreeSet<String> {
    let Some(group) = path.strip_prefix('{') else { return identifier(path).into_iter().collect() };
    let (mut found, mut depth, mut item) = (BTreeSet::new(), 0, String::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => found.extend(identifier(&std::mem::take(&mut item))),
            c if depth == 0 => item.push(c),
            _ => {}
        }
    }
    found.extend(identifier(&item));
    found
}

fn identifier(text: &str) -> Option<String> {
    let name: String = text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty() && name != "self").then_some(name)
}

/// The files that a `mod.rs` declares.
fn children(code: &str) -> BTreeSet<String> {
    let declared = |line: &str| {
        let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
    };
    code.lines().filter_map(declared).collect()
}

/// Whether the code names a path, and not merely something that ends like it.
fn names(code: &str, path: &str) -> bool {
    code.match_indices(path).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_:\"".contains(c))
    })
}

/// Some files that lead back to the first of them.
fn find_circle(edges: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit(
        node: &str,
        edges: &BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> bool {
        if path.iter().any(|on_path| on_path == node) {
            path.push(node.to_owned());
            return true;
        }
        if done.contains(node) {
            return false;
        }
        path.push(node.to_owned());
        if edges.get(node).into_iter().flatten().any(|next| visit(next, edges, path, done)) {
            return true;
        }
        path.pop();
        done.insert(node.to_owned());
        false
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|node| {
        let mut path = Vec::new();
        visit(node, edges, &mut path, &mut done).then_some(path)
    })
}

fn all_sources() -> Vec<(String, String)> {
    let mut paths = vec![root().join("build.rs")];
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        collect(&root().join(folder), &mut paths);
    }
    let name = |path: &Path| path.strip_prefix(root()).unwrap().display().to_string();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
