//! Tells the code which commit it is: `PRISM_RELAY_COMMIT` where there is no repository, as in a container, else git's
//! own word. Makes a page of the runbook, which the console shows where there is only the binary.

#![expect(clippy::disallowed_methods, reason = "cargo tells build scripts by the environment")]

use std::path::Path;
use std::process::Command;

use pulldown_cmark::{CowStr, Event, Options, Parser, Tag, TagEnd, html};

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
    make_runbook();
}

fn make_runbook() {
    const RUNBOOK: &str = "deploy/runbook.md";
    println!("cargo::rerun-if-changed={RUNBOOK}");
    let text = std::fs::read_to_string(RUNBOOK).expect("the runbook is a part of the sources");
    let mut events: Vec<Event<'_>> = Parser::new_ext(&text, Options::ENABLE_TABLES).collect();
    for place in 0..events.len() {
        match &events[place] {
            // GitHub's anchors: alerts are linked by their names.
            Event::Start(Tag::Heading { .. }) => {
                let words = events[place + 1..].iter().take_while(|event| !matches!(event, Event::End(_)));
                let words: String = words.map(|event| if let Event::Text(text) = event { text } else { "" }).collect();
                let anchor = words.to_lowercase().replace(' ', "-");
                if let Event::Start(Tag::Heading { id, .. }) = &mut events[place] {
                    *id = Some(CowStr::from(anchor));
                }
            }
            // The other pages are in the repository, not in the binary.
            Event::Start(Tag::Link { dest_url, .. }) if !dest_url.starts_with('#') => {
                let end = events[place..].iter().position(|event| matches!(event, Event::End(TagEnd::Link)));
                let end = place + end.expect("a link ends");
                let name = format!(" (deploy/{dest_url})");
                events[place] = Event::Text(CowStr::Borrowed(""));
                events[end] = Event::Text(CowStr::from(name));
            }
            _ => {}
        }
    }
    let mut page = String::new();
    html::push_html(&mut page, events.into_iter());
    let folder = std::env::var("OUT_DIR").expect("cargo sets it");
    std::fs::write(Path::new(&folder).join("runbook.html"), page).expect("cargo made the folder");
}

/// What git says of this repository, and not of one that the sources happen to lie in.
fn git(arguments: &[&str]) -> Option<String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").ok()?;
    let git = Command::new("git").args(["--git-dir", &format!("{root}/.git")]).args(arguments).output();
    let git = git.ok().filter(|git| git.status.success())?;
    String::from_utf8(git.stdout).ok().map(|said| said.trim().to_owned())
}
