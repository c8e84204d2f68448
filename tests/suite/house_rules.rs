//! The rules of the house, kept by a test: who may import whom, a doc on top of every file, and what we ship parses.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn all() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        sources(&root().join(folder), &mut paths);
    }
    let name = |path: &Path| path.strip_prefix(root()).unwrap().display().to_string();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn every_file_says_what_it_is() {
    for (name, text) in all() {
        assert!(text.starts_with("//! "), "{name} has no module doc");
    }
}

#[test]
fn imports_meet_only_at_the_spool() {
    // (these modules, may not name those)
    let rules: [(&str, &[&str]); 10] = [
        ("src/ingress", &["publisher", "topology", "lapin"]),
        ("src/publisher", &["ingress", "hyper", "server"]),
        ("src/spool", &["ingress", "publisher", "topology", "hyper", "lapin", "server"]),
        ("src/signature.rs", &["ingress", "spool", "publisher", "hyper", "lapin", "config", "event"]),
        ("src/event.rs", &["ingress", "spool", "publisher", "hyper", "lapin", "config"]),
        ("src/server", &["ingress", "spool", "publisher", "lapin", "config", "event"]),
        ("src/tls.rs", &["ingress", "spool", "publisher", "hyper", "lapin", "config", "event"]),
        ("src/notices.rs", &["crate"]),
        ("src/topology", &["ingress", "spool", "publisher", "hyper"]),
        ("src/backoff.rs", &["crate"]),
    ];
    for (name, text) in all() {
        for (module, forbidden) in rules.iter().filter(|(module, _)| name.starts_with(module)) {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            for line in code {
                for other in *forbidden {
                    let names = [format!("crate::{other}"), format!("use {other}::"), format!(" {other}::")];
                    assert!(
                        !names.iter().any(|other| line.contains(other)),
                        "{name} of {module} names {other}: {line}"
                    );
                }
            }
        }
    }
}

#[test]
fn no_test_is_switched_off_and_nothing_is_left_undone() {
    for (name, text) in all().into_iter().filter(|(name, _)| !name.ends_with("house_rules.rs")) {
        for mark in ["todo!(", "unimplemented!(", "dbg!(", "TODO", "FIXME"] {
            assert!(!text.contains(mark), "{mark} in {name}");
        }
    }
}

#[test]
fn functions_fit_on_a_screen() {
    for (name, text) in all().into_iter().filter(|(name, _)| name.starts_with("src/")) {
        let mut start = None;
        for (number, line) in text.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let is_function = line.contains("fn ") && line.trim_end().ends_with('{');
            match start {
                None if is_function => start = Some((number, indent)),
                Some((first, depth)) if indent == depth && line.trim_end() == "    ".repeat(depth / 4) + "}" => {
                    assert!(number - first < 75, "{name}:{} has {} lines", first + 1, number - first + 1);
                    start = None;
                }
                _ => {}
            }
        }
    }
}

#[test]
fn every_test_that_the_docs_name_exists() {
    let faults = fs::read_to_string(root().join("tests/FAULTS.md")).unwrap();
    let code: String = all().into_iter().map(|(_, text)| text).collect();
    let mut named = 0;
    for name in faults.split('`').filter(|name| name.contains("::") && !name.contains(' ')) {
        let function = name.rsplit("::").next().unwrap();
        assert!(code.contains(&format!("fn {function}(")), "there is no test {name}");
        named += 1;
    }
    assert!(named > 50, "{named} tests are named");
}

/// The oldest Rust that Cargo.toml names is no older than what any dependency asks for. What our own code asks for is
/// clippy's business (`incompatible_msrv`).
#[test]
fn no_dependency_wants_a_newer_rust() {
    let arguments = ["metadata", "--locked", "--format-version", "1"];
    let output = std::process::Command::new(env!("CARGO")).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let parts = |version: &str| version.split('.').take(2).map(|part| part.parse().unwrap()).collect::<Vec<u32>>();
    let ours = parts(env!("CARGO_PKG_RUST_VERSION"));
    let packages = metadata["packages"].as_array().unwrap();
    for package in packages {
        if let Some(version) = package["rust_version"].as_str() {
            assert!(parts(version) <= ours, "{} wants Rust {version}", package["name"]);
        }
    }
    assert!(packages.len() > 100, "{} packages", packages.len());
}
