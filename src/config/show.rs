//! Prints settings as TOML, section by section in the order of `config/default.toml`.

use config::{Value, ValueKind};

use super::raw::{DEFAULT_TOML, Setting};

/// One line for each key, with where it was set as a comment.
pub(super) fn toml(settings: &[Setting]) -> String {
    let mut sections: Vec<&str> = settings.iter().map(|setting| section(&setting.key)).collect();
    sections.dedup();
    sections.sort_by_key(|section| DEFAULT_TOML.find(&format!("\n[{section}]")));
    let mut text = String::new();
    for name in sections {
        let separator = if text.is_empty() { "" } else { "\n" };
        text.push_str(&format!("{separator}[{name}]\n"));
        for Setting { key, value, origin } in settings.iter().filter(|setting| section(&setting.key) == name) {
            let key = key.strip_prefix(name).unwrap_or(key).trim_start_matches('.');
            text.push_str(&format!("{:<60} # {origin}\n", format!("{key} = {}", literal(value))));
        }
    }
    text
}

fn section(key: &str) -> &str {
    key.split('.').next().unwrap_or(key)
}

fn literal(value: &Value) -> String {
    match &value.kind {
        ValueKind::Array(items) => format!("[{}]", items.iter().map(literal).collect::<Vec<_>>().join(", ")),
        ValueKind::Table(table) => {
            let mut fields: Vec<_> = table.iter().map(|(name, value)| format!("{name} = {}", literal(value))).collect();
            fields.sort();
            format!("{{ {} }}", fields.join(", "))
        }
        ValueKind::String(text) => quoted(text),
        // With a decimal point, which TOML requires.
        ValueKind::Float(number) => format!("{number:?}"),
        kind => kind.to_string(),
    }
}

/// TOML knows all string escapes of JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
