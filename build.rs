//! Tells the code which commit it is: `PRISM_RELAY_COMMIT` where there is no repository, as in a container, else git's own word.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=PRISM_RELAY_COMMIT");
    // Written with each commit and checkout. Where there is no repository, cargo would run this each time.
    if std::path::Path::new(".git/logs/HEAD").exists() {
        println!("cargo::rerun-if-changed=.git/logs/HEAD");
    } else {
        println!("cargo::rerun-if-changed=build.rs");
    }
    let given = std::env::var("PRISM_RELAY_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(of_the_repository).unwrap_or_else(|| "unknown commit".to_owned());
    println!("cargo::rustc-env=PRISM_RELAY_COMMIT={commit}");
}

/// Of this one, and not of one that the sources happen to lie in.
fn of_the_repository() -> Option<String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").ok()?;
    let git =
        Command::new("git").args(["--git-dir", &format!("{root}/.git"), "rev-parse", "--short=12", "HEAD"]).output();
    let git = git.ok().filter(|git| git.status.success())?;
    String::from_utf8(git.stdout).ok().map(|commit| commit.trim().to_owned())
}
