//! The keys of `config/default.toml` and the table of them in `config/README.md`.

use std::fmt::Write as _;
use std::fs;

use super::page::root;

/// A key of the configuration.
pub struct Key {
    /// With its section: `http.listen`.
    pub name: String,
    /// The default as TOML, or `None` if the key has no default.
    default: Option<String>,
    meaning: String,
}

/// All keys, in the order of the file. A key that is shown more than once, with parts of its value, comes once.
pub fn keys() -> Vec<Key> {
    let file = fs::read_to_string(root().join("config/default.toml")).unwrap();
    let (mut keys, mut section, mut comment): (Vec<Key>, String, Vec<String>) = (Vec::new(), String::new(), Vec::new());
    let mut lines = file.lines();
    // The introduction ends at the first section.
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix('[').filter(|_| !line.contains('=')) {
            (section, comment) = (name.trim_end_matches(']').to_owned(), Vec::new());
        } else if section.is_empty() {
        } else if let Some((name, text)) = option_of_a_queue(line) {
            keys.push(Key { name: format!("{section}.queues.{name}"), default: None, meaning: text });
        } else if let Some(text) = line.strip_prefix("#    ").filter(|_| keys.last().is_some_and(of_a_queue)) {
            let key = keys.last_mut().expect("just looked at");
            key.meaning = format!("{} {}", key.meaning, text.trim());
        } else if let Some((name, mut value)) = assignment(line) {
            let commented = line.starts_with('#');
            while value == "[" || (value.starts_with('[') && !value.ends_with(']')) {
                value = format!("{value} {}", lines.next().expect("an array ends").trim()).replace(",  ]", " ]");
            }
            let default = (!commented).then(|| value.replace(", ]", " ]"));
            add(&mut keys, format!("{section}.{name}"), default, &std::mem::take(&mut comment));
        } else if let Some(text) = line.strip_prefix("# ").filter(|text| !text.starts_with("Optional keys of")) {
            comment.push(text.to_owned());
        } else {
            comment.clear();
        }
    }
    keys
}

fn of_a_queue(key: &Key) -> bool {
    key.name.starts_with("topology.queues.")
}

/// A line such as `#   ttl = "1h"          What it does.`
fn option_of_a_queue(line: &str) -> Option<(String, String)> {
    let line = line.strip_prefix("#   ").filter(|rest| !rest.starts_with(' '))?;
    let (name, rest) = line.split_once(" = ")?;
    let (_, text) = rest.split_once("  ")?;
    Some((name.to_owned(), text.trim().to_owned()))
}

/// A line such as `key = value`, in a comment or not.
fn assignment(line: &str) -> Option<(String, String)> {
    let (name, value) = line.trim_start_matches("# ").split_once(" = ")?;
    let is_key = name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    is_key.then(|| (name.to_owned(), value.to_owned()))
}

fn add(keys: &mut Vec<Key>, name: String, default: Option<String>, comment: &[String]) {
    let meaning = comment.join(" ");
    match keys.iter_mut().find(|key| key.name == name) {
        Some(key) => key.meaning = format!("{} {meaning}", key.meaning).trim_end().to_owned(),
        None => {
            // Keys that share a comment have it at the first of them.
            keys.push(Key { name, default, meaning });
        }
    }
}

/// The table in Markdown.
pub fn table() -> String {
    let mut table = "| key | default | meaning |\n|---|---|---|\n".to_owned();
    let cell = |text: &str| text.replace('|', "\\|");
    for key in keys() {
        let default = key.default.as_deref().map_or(String::new(), |value| format!("`{}`", cell(value)));
        let meaning = if key.meaning.is_empty() { "see the key above".to_owned() } else { cell(&key.meaning) };
        writeln!(table, "| `{}` | {default} | {meaning} |", key.name).unwrap();
    }
    table
}
