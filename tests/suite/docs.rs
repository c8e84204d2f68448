//! The documents tell the truth: links lead somewhere, what is named exists, and what exists is named.
//!
//! With `PRISM_TEST_REWRITE` set, the table of keys in `config/README.md` is written in place of compared.

mod blocks;
mod keys;
mod page;
mod picture;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use page::{Page, page, root};

/// The command line: each command with its subcommand, and the options of each.
type Commands = BTreeMap<String, BTreeSet<String>>;

#[test]
fn the_readme_is_read_in_three_minutes() {
    let readme = page("README.md");
    let (words, bytes) = (readme.prose_words(), readme.text.len());
    assert!(words <= 700, "README.md has {words} words of prose; 700 are allowed");
    assert!(bytes <= 9 * 1024, "README.md has {bytes} bytes; 9 KB are allowed");
}

#[test]
fn prose_is_wrapped_at_120_columns() {
    for page in page::all() {
        let wide = page.prose_wider_than(120);
        assert!(wide.is_empty(), "{} has lines over 120 columns: {wide:#?}", page.name);
    }
}

#[test]
fn links_and_anchors_lead_somewhere() {
    let pages: BTreeMap<_, _> = page::all().into_iter().map(|page| (page.name.clone(), page)).collect();
    let (mut dead, mut followed) = (Vec::new(), 0);
    for page in pages.values() {
        for link in page.links() {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.name.clone() } else { below(&page.name, path) };
            let in_a_page = pages.get(&target).is_some_and(|page| page.anchors().contains(anchor));
            let exists = in_a_page || (anchor.is_empty() && root().join(&target).exists());
            if !exists {
                dead.push(format!("{}: {link}", page.name));
            }
            followed += 1;
        }
    }
    assert!(dead.is_empty(), "links that lead nowhere: {dead:#?}");
    assert!(followed > 80, "{followed} links");
}

/// The path of a link from this page, below the root.
fn below(page: &str, link: &str) -> String {
    let mut path = PathBuf::from(page);
    path.pop();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => assert!(path.pop(), "{page}: {link} leads out of the repository"),
            part => path.push(part),
        }
    }
    path.display().to_string()
}

#[test]
fn every_page_is_reached_from_the_readme() {
    let (mut reached, mut open) = (BTreeSet::new(), vec!["README.md".to_owned()]);
    while let Some(name) = open.pop() {
        if name.ends_with(".md") && reached.insert(name.clone()) {
            let links = page(&name).links();
            let paths = links.iter().map(|link| link.split('#').next().unwrap_or_default());
            open.extend(paths.filter(|path| !path.is_empty()).map(|path| below(&name, path)));
        }
    }
    let lost: Vec<_> = page::all().into_iter().map(|page| page.name).filter(|name| !reached.contains(name)).collect();
    assert!(lost.is_empty(), "no link leads to {lost:?}");
}

/// The lines of `--help` below a heading, by their first word.
fn help(arguments: &[&str], heading: &str) -> Vec<String> {
    let relay = env!("CARGO_BIN_EXE_prism-relay");
    let output = Command::new(relay).args(arguments).arg("--help").output().expect("start the relay");
    let text = String::from_utf8(output.stdout).expect("help is UTF-8");
    let below = text.lines().skip_while(|line| *line != heading).skip(1);
    below.take_while(|line| line.starts_with(' ') || line.is_empty()).map(str::to_owned).collect()
}

fn subcommands(arguments: &[&str]) -> Vec<String> {
    let names = help(arguments, "Commands:").into_iter().filter_map(|line| {
        let name = line.strip_prefix("  ")?.split(' ').next()?.to_owned();
        (!name.is_empty() && name != "help").then_some(name)
    });
    names.collect()
}

fn options(arguments: &[&str]) -> BTreeSet<String> {
    let lines = help(arguments, "Options:").join("\n");
    let words = lines.split([' ', '\n', ',', '=', '[']);
    words.filter(|word| word.starts_with("--")).map(str::to_owned).collect()
}

fn commands() -> Commands {
    let mut commands = Commands::new();
    for command in subcommands(&[]) {
        let inner = subcommands(&[&command]);
        for name in &inner {
            commands.insert(format!("{command} {name}"), options(&[&command, name]));
        }
        if inner.is_empty() {
            commands.insert(command.clone(), options(&[&command]));
        }
    }
    assert!(commands.len() > 15, "{commands:?}");
    commands
}

/// The command that a piece of code runs, with the rest of the line: `prism-relay [--config FILE] COMMAND ...`.
fn commands_in(code: &str) -> Vec<Vec<&str>> {
    let pieces = code.split(['|', ';', '&', '(', ')', '"', '#']);
    let command = |piece| {
        let mut words = str::split_whitespace(piece);
        words.find(|word| *word == "prism-relay" || word.ends_with("/prism-relay"))?;
        let mut rest: Vec<_> = words.collect();
        if rest.first() == Some(&"--config") {
            rest.drain(..2.min(rest.len()));
        }
        let is_command = rest.first().is_some_and(|word| word.chars().all(|c| c.is_ascii_lowercase()));
        is_command.then_some(rest)
    };
    pieces.filter_map(command).collect()
}

#[test]
fn every_command_and_option_in_a_page_exists() {
    let commands = commands();
    let (mut wrong, mut named) = (Vec::new(), 0);
    for page in page::all() {
        for code in page.code() {
            for words in commands_in(&code) {
                named += 1;
                let two = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
                let group = format!("{} ", words[0]);
                match commands.get(&two).or_else(|| commands.get(words[0])) {
                    Some(options) => {
                        let long = words.iter().filter(|word| word.starts_with("--") && word.len() > 2);
                        let names = long.map(|word| word.split('=').next().unwrap_or_default());
                        wrong.extend(
                            names
                                .filter(|name| !options.contains(*name))
                                .map(|name| (page.name.clone(), two.clone(), name.to_owned())),
                        );
                    }
                    // A group alone, as in `prism-relay topology`, is a name as well.
                    None if words.len() == 1 && commands.keys().any(|name| name.starts_with(&group)) => {}
                    None => wrong.push((page.name.clone(), two, String::new())),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "these commands or options do not exist: {wrong:#?}");
    assert!(named > 40, "{named} commands are named");
}

#[test]
fn every_command_is_in_the_reference() {
    let spans = page("deploy/reference.md").code_spans();
    for command in commands().keys() {
        let named = spans.iter().any(|span| span == command || span.starts_with(&format!("{command} ")));
        assert!(named, "deploy/reference.md does not name `{command}`");
    }
}

#[test]
fn every_key_in_a_page_exists() {
    let keys: BTreeSet<String> = keys::keys().into_iter().map(|key| key.name).collect();
    let sections: BTreeSet<_> = keys.iter().filter_map(|key| key.split('.').next()).collect();
    let (mut wrong, mut named) = (Vec::new(), 0);
    for page in page::all() {
        for span in page.code_spans() {
            let span =
                span.strip_prefix("PRISM_RELAY__").map_or(span.clone(), |rest| rest.replace("__", ".").to_lowercase());
            let name: String = span.chars().take_while(|c| c.is_ascii_lowercase() || "._".contains(*c)).collect();
            let Some((section, _)) = name.split_once('.') else { continue };
            let is_file = name.starts_with("spool.db") || name.ends_with(".rs");
            if !sections.contains(section) || is_file {
                continue;
            }
            named += 1;
            // The parts of a table, such as broker.tls.ca, stand in the comment of its key.
            let known = keys.contains(&name) || keys.iter().any(|key| name.starts_with(&format!("{key}.")));
            if !known {
                wrong.push((page.name.clone(), name));
            }
        }
    }
    assert!(wrong.is_empty(), "these keys do not exist: {wrong:#?}");
    assert!(named > 100, "{named} keys are named");
}

#[test]
fn the_table_of_keys_is_that_of_the_defaults() {
    let (file, page) = (root().join("config/README.md"), page("config/README.md"));
    let (begin, end) = ("<!-- keys -->\n", "<!-- /keys -->");
    let (before, rest) = page.text.split_once(begin).expect("the mark of the table");
    let (_, after) = rest.split_once(end).expect("the mark behind the table");
    let expected = format!("{before}{begin}{}{end}{after}", keys::table());
    if std::env::var_os("PRISM_TEST_REWRITE").is_some() {
        fs::write(file, expected).expect("write the page");
    } else {
        assert!(
            page.text == expected,
            "config/README.md has another table of keys than config/default.toml; to write it: \
             PRISM_TEST_REWRITE=1 ./tests/run.sh --test suite docs::the_table"
        );
    }
}

#[test]
fn every_metric_in_a_page_exists() {
    let source = fs::read_to_string(root().join("src/metrics.rs")).unwrap();
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let strings = source.split('"').skip(1).step_by(2);
    let names: BTreeSet<_> = strings.filter_map(|text| text.strip_prefix("prism_relay_")).collect();
    let rows: Vec<_> = {
        let reference = page("deploy/reference.md");
        let metrics = reference.text.split("\n## Metrics").nth(1).expect("a section on metrics");
        let rows = metrics.lines().take_while(|line| !line.starts_with("## "));
        rows.filter_map(|row| row.strip_prefix("| `")?.split(['`', '{']).next().map(str::to_owned)).collect()
    };
    let mut documented = BTreeSet::new();
    for name in rows {
        assert!(!documented.contains(&name), "deploy/reference.md has the metric {name} twice");
        documented.insert(name);
    }
    for name in &documented {
        assert!(names.contains(name.as_str()), "deploy/reference.md has the metric {name}, which does not exist");
    }
    for name in &names {
        assert!(documented.contains(*name), "deploy/reference.md does not have the metric {name}");
    }
    assert!(documented.len() > 20, "{documented:?}");
    for page in page::all() {
        for span in page.code_spans() {
            let name: String = span.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            let is_metric = !name.is_empty() && (span[name.len()..].starts_with('{') || name.ends_with("_total"));
            assert!(
                !is_metric || documented.contains(&name),
                "{} names the metric {name}, which does not exist",
                page.name
            );
        }
    }
}

#[test]
fn every_alert_has_its_entry_in_the_runbook() {
    let rules = fs::read_to_string(root().join("deploy/prometheus/prism-relay.rules.yml")).unwrap();
    let alerts: BTreeSet<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let runbook = page("deploy/runbook.md");
    let entries: BTreeSet<_> = runbook.headings().filter(|heading| heading.starts_with("PrismRelay")).collect();
    assert_eq!(alerts, entries, "left: alerts; right: entries of deploy/runbook.md");
    assert!(alerts.len() > 20, "{alerts:?}");
    for page in page::all() {
        let words = page.text.split(|c: char| !c.is_ascii_alphanumeric());
        for name in words.filter(|word| word.starts_with("PrismRelay") && word.len() > 10) {
            assert!(alerts.contains(name), "{} names the alert {name}, which does not exist", page.name);
        }
    }
    every_entry_has_its_four_lines(&runbook);
}

fn every_entry_has_its_four_lines(runbook: &Page) {
    for entry in runbook.text.split("\n### ").skip(1) {
        for part in ["**Severity:**", "**Consequence:**", "**Look", "do"] {
            assert!(entry.to_lowercase().contains(&part.to_lowercase()), "an entry has no line {part}: {entry}");
        }
    }
}

/// The words that an operator sees are those of the program.
#[test]
fn every_message_in_the_runbook_is_in_the_source() {
    let mut source = String::new();
    for entry in sources(&root().join("src")) {
        let text = fs::read_to_string(entry).unwrap();
        // A string goes on in the next line after a backslash.
        let mut lines = text.split("\\\n");
        source.push_str(lines.next().unwrap_or_default());
        lines.for_each(|line| source.push_str(line.trim_start()));
    }
    let runbook = page("deploy/runbook.md");
    let (_, symptoms) = runbook.text.split_once("\n## By symptom").expect("a section");
    let rows = symptoms.lines().take_while(|line| !line.starts_with("## ")).filter_map(|row| row.split(" | ").next());
    let mut found = 0;
    for message in rows.flat_map(|cell| cell.split('`').skip(1).step_by(2)).filter(|span| span.contains(' ')) {
        let parts = message.split(": ");
        let exists = source.contains(message) || parts.clone().all(|part| source.contains(part));
        assert!(exists, "the runbook has the message {message:?}, which the relay does not print");
        found += 1;
    }
    assert!(found > 10, "{found} messages");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// The severity of an entry is that of its rule.
#[test]
fn the_runbook_has_the_severities_of_the_rules() {
    let rules = fs::read_to_string(root().join("deploy/prometheus/prism-relay.rules.yml")).unwrap();
    let runbook = page("deploy/runbook.md");
    for rule in rules.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap();
        let severity =
            rule.split("severity: ").nth(1).and_then(|rest| rest.split(['\n', ' ', '}', ','].as_slice()).next());
        let entry = runbook.text.split(&format!("\n### {name}\n")).nth(1).unwrap_or_else(|| panic!("no entry {name}"));
        let line = format!("- **Severity:** {}", severity.unwrap_or_else(|| panic!("{name} has no severity")));
        assert!(entry.starts_with(&line), "the entry {name} does not begin with {line}");
    }
}
