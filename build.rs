//! Tells the code which commit it is: `PRISM_RELAY_COMMIT` where there is no repository, as in a container, else git's
//! own word.

#![expect(clippy::disallowed_methods, reason = "cargo tells build scripts by the environment")]

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=PRISM_RELAY_COMMIT");
    println!("cargo::rerun-if-changed=build.rs");
    // Written with each commit and checkout; in a work tree of its own it is somewhere else.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo::rerun-if-changed={log}");
    }
    let given = std::env::var("PRISM_RELAY_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit =
        given.or_else(|| git(&["rev-parse", "--short=12", "HEAD"])).unwrap_or_else(|| "unknown commit".to_owned());
    println!("cargo::rustc-env=PRISM_RELAY_COMMIT={commit}");
}

/// What git says of this repository, and not of one that the sources happen to lie in.
fn git(arguments: &[&str]) -> Option<String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").ok()?;
    let git = Command::new("git").args(["--git-dir", &format!("{root}/.git")]).args(arguments).output();
    let git = git.ok().filter(|git| git.status.success())?;
    String::from_utf8(git.stdout).ok().map(|said| said.trim().to_owned())
}
