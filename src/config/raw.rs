//! Merges the layers into one flat table of keys, each of which is read once and by name.
//!
//! A key that was not read by the end is unknown. Mistakes are collected, so that all of them can be shown at once.
//! They quote the value, unless it was read as a secret.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use config::{Environment, File, FileFormat, Map, Value, ValueKind};

use super::secrets::read_secret;

/// The defaults. The file is also the documentation of every key.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// How similar an unknown key must be to a known one to be suggested as a typing error (Jaro-Winkler, 0 to 1).
const SIMILARITY_MIN: f64 = 0.85;

/// Whether a mistake may quote the value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quote {
    Value,
    /// The value is a secret, or may contain one.
    Nothing,
}

pub(super) struct Raw {
    values: BTreeMap<String, Value>,
    file: Option<PathBuf>,
    known: BTreeSet<String>,
    mistakes: Vec<String>,
}

impl Raw {
    /// Merges the defaults, the file and the environment; the last one wins.
    pub(super) fn merge(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, String> {
        let environment: Map<String, String> =
            environment.into_iter().filter(|(name, _)| name.starts_with("PRISM_RELAY__")).collect();
        let mut layers = config::Config::builder().add_source(File::from_str(DEFAULT_TOML, FileFormat::Toml));
        if let Some(path) = file {
            // Read here, because the library's error does not say why the file cannot be read.
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            layers = layers.add_source(File::from_str(&text, FileFormat::Toml));
        }
        let merged = layers
            .add_source(
                Environment::with_prefix("PRISM_RELAY")
                    .prefix_separator("__")
                    .separator("__")
                    .source(Some(environment)),
            )
            .build()
            .map_err(|error| syntax_error(&error, file))?;
        let mut values = BTreeMap::new();
        flatten("", merged.cache, &mut values);
        Ok(Self { values, file: file.map(Path::to_owned), known: BTreeSet::new(), mistakes: Vec::new() })
    }

    /// Adds a mistake in this key.
    pub(super) fn mistake(&mut self, key: &str, what: impl Display) {
        self.mistakes.push(format!("{key}: {what}"));
    }

    /// Whether there is a mistake in this key.
    pub(super) fn has_mistake(&self, key: &str) -> bool {
        self.mistakes.iter().any(|mistake| mistake.starts_with(&format!("{key}:")))
    }

    /// Reads a single value with `parse`, whose error completes the sentence "the value ...".
    pub(super) fn read<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.single(key, Quote::Value, &parse)
    }

    /// Reads a single value that no mistake may quote.
    pub(super) fn secret<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.single(key, Quote::Nothing, &parse)
    }

    /// Reads an array, or a text with commas as in the environment. Skips empty items.
    pub(super) fn list<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        self.items(key, Quote::Value, &parse)
    }

    /// Reads a list of values that no mistake may quote.
    pub(super) fn secrets<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        self.items(key, Quote::Nothing, &parse)
    }

    fn single<T>(&mut self, key: &str, quote: Quote, parse: &impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let value = self.take(key)?;
        match scalar(&value) {
            Some(text) => self.checked(key, quote, &value, &text, parse),
            None => {
                self.mistake(key, "takes a single value, not a list");
                None
            }
        }
    }

    fn items<T>(&mut self, key: &str, quote: Quote, parse: &impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let items: Vec<Option<String>> = match &value.kind {
            ValueKind::Array(items) => items.iter().map(scalar).collect(),
            _ => scalar(&value).unwrap_or_default().split(',').map(|item| Some(item.trim().to_owned())).collect(),
        };
        let mut read = Vec::new();
        for item in items {
            match item.as_deref() {
                Some("") => {}
                Some(text) => read.extend(self.checked(key, quote, &value, text, parse)),
                None => self.mistake(key, "takes a list of single values"),
            }
        }
        read
    }

    /// Reads a list of tables: an array, or a text in TOML's notation for one. Returns how many there are; the keys of
    /// the first one are then at `key[0].`.
    pub(super) fn tables(&mut self, key: &str) -> usize {
        let Some(value) = self.take(key) else { return 0 };
        let array = match &value.kind {
            ValueKind::String(text) => config::Config::builder()
                .add_source(File::from_str(&format!("list = {text}"), FileFormat::Toml))
                .build()
                .and_then(|parsed| parsed.get_array("list")),
            _ => value.into_array(),
        };
        let Ok(items) = array.and_then(|items| items.into_iter().map(Value::into_table).collect::<Result<Vec<_>, _>>())
        else {
            self.mistake(key, "takes a list of tables, such as [{ name = \"...\", bindings = [\"...\"] }]");
            return 0;
        };
        for (index, table) in items.iter().enumerate() {
            for (name, value) in table {
                flatten(&format!("{key}[{index}].{name}"), value.clone(), &mut self.values);
            }
        }
        items.len()
    }

    pub(super) fn duration(&mut self, key: &str, range: RangeInclusive<Duration>) -> Duration {
        self.optional_duration(key, range).unwrap_or_default()
    }

    pub(super) fn optional_duration(&mut self, key: &str, range: RangeInclusive<Duration>) -> Option<Duration> {
        self.read(key, |text| duration_in(text, &range))
    }

    pub(super) fn durations(&mut self, key: &str, range: RangeInclusive<Duration>) -> Vec<Duration> {
        self.list(key, |text| duration_in(text, &range))
    }

    pub(super) fn bytes(&mut self, key: &str, range: RangeInclusive<u64>) -> u64 {
        self.optional_bytes(key, range).unwrap_or_default()
    }

    pub(super) fn optional_bytes(&mut self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let parse = |text: &str| match text.parse::<ByteSize>() {
            Ok(size) if range.contains(&size.as_u64()) => Ok(size.as_u64()),
            Ok(_) => Err(format!("is not between {} and {}", ByteSize(*range.start()), ByteSize(*range.end()))),
            Err(_) => Err("is not a size such as 64KiB or 1GiB".to_owned()),
        };
        self.read(key, parse)
    }

    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<usize>) -> usize {
        self.optional_number(key, range).unwrap_or_default()
    }

    pub(super) fn optional_number(&mut self, key: &str, range: RangeInclusive<usize>) -> Option<usize> {
        let parse = |text: &str| match text.parse() {
            Ok(number) if range.contains(&number) => Ok(number),
            _ => Err(format!("is not a whole number between {} and {}", range.start(), range.end())),
        };
        self.read(key, parse)
    }

    /// Reads `true` or `false`; a missing key is `false`.
    pub(super) fn flag(&mut self, key: &str) -> bool {
        self.one_of(key, &[("false", false), ("true", true)])
    }

    pub(super) fn one_of<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> T {
        let parse = |text: &str| {
            let found = choices.iter().find(|(name, _)| *name == text);
            found.map(|(_, choice)| *choice).ok_or_else(|| {
                let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
                format!("is not one of {}", names.join(", "))
            })
        };
        self.read(key, parse).unwrap_or(choices[0].1)
    }

    /// Reads the secret in the file that `key` names. Returns it with the file's path.
    pub(super) fn file<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<(PathBuf, T)> {
        self.read(key, |path| {
            let path = PathBuf::from(path);
            read_secret(&path, &parse).map(|secret| (path, secret))
        })
    }

    /// Returns all mistakes, with one for each key that was not read.
    pub(super) fn finish(mut self) -> Vec<String> {
        for (key, value) in std::mem::take(&mut self.values) {
            let is_section = self.known.iter().any(|known| known.starts_with(&format!("{key}.")));
            let what = match self.nearest(&key) {
                _ if is_section => format!("is a section, [{key}], not a value"),
                Some(near) => format!("unknown key; did you mean {near}?"),
                None => "unknown key".to_owned(),
            };
            self.mistake(&key, format_args!("{what}{}", self.origin(&value)));
        }
        self.mistakes
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.known.insert(key.to_owned());
        self.values.remove(key)
    }

    fn checked<T>(
        &mut self,
        key: &str,
        quote: Quote,
        value: &Value,
        text: &str,
        parse: &impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let shown = if quote == Quote::Value { format!("{text:?}") } else { "the value".to_owned() };
        parse(text).map_err(|what| self.mistake(key, format_args!("{shown} {what}{}", self.origin(value)))).ok()
    }

    /// Where a value was set. The defaults have no mistakes, so a value without an origin comes from the file.
    fn origin(&self, value: &Value) -> String {
        match (value.origin(), &self.file) {
            (Some(origin), _) => format!(" (set in {origin})"),
            (None, Some(file)) => format!(" (set in {})", file.display()),
            (None, None) => String::new(),
        }
    }

    fn nearest(&self, key: &str) -> Option<&str> {
        let similarity = |known: &String| strsim::jaro_winkler(known, key);
        let nearest = self.known.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
        (similarity(nearest) >= SIMILARITY_MIN).then_some(nearest)
    }
}

fn duration_in(text: &str, range: &RangeInclusive<Duration>) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if range.contains(&duration) => Ok(duration),
        Ok(_) => Err(format!(
            "is not between {} and {}",
            humantime::format_duration(*range.start()),
            humantime::format_duration(*range.end())
        )),
        Err(_) => Err("is not a duration such as 500ms, 10s or 2m".to_owned()),
    }
}

fn flatten(prefix: &str, value: Value, into: &mut BTreeMap<String, Value>) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                flatten(&key, value, into);
            }
        }
        _ => {
            into.insert(prefix.to_owned(), value);
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match &value.kind {
        ValueKind::Table(_) | ValueKind::Array(_) => None,
        kind => Some(kind.to_string()),
    }
}

/// Shortens a syntax error to its first line (where) and its last (what). The lines between quote the file, which may
/// contain a secret.
fn syntax_error(error: &config::ConfigError, file: Option<&Path>) -> String {
    let text = error.to_string();
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let (first, last) = (lines.next().unwrap_or_default(), lines.next_back().unwrap_or("invalid"));
    format!("{}: {first}: {last}", file.unwrap_or(Path::new("configuration")).display())
}
