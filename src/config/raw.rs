//! Merges the layers into one flat table of keys, each of which is read once and by name.
//!
//! A key that was not read by the end is unknown. Mistakes are collected, so that all of them can be shown at once.
//! They quote the value, unless it was read as a secret.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use config::{ConfigError, Environment, File, FileFormat, Map, Source, Value, ValueKind};

use super::note::{Findings, Note};
use super::secrets::{read_secret, trimmed};

/// The defaults. The file is also the documentation of every key.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// How similar an unknown key must be to a known one to be suggested as a typing error (Jaro-Winkler, 0 to 1).
const SIMILARITY_MIN: f64 = 0.85;

/// How much of a value may be shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quote {
    Value,
    /// The value is a secret. Mistakes do not quote it.
    Nothing,
    /// The value is a URL that may contain a password. Mistakes do not quote it.
    UrlWithoutPassword,
    /// The value is a URL with a key in its path. Mistakes do not quote it.
    UrlOrigin,
    /// The value is the path of a file with a secret. Mistakes quote it only if it is a path, because the secret itself
    /// may have been set in its place.
    SecretPath,
}

/// Where a value was set. A later origin wins over an earlier one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Default,
    File,
    Environment,
}

/// A key with a value that may be shown.
pub(super) struct Setting {
    pub key: String,
    pub value: Value,
    /// Where the value was set.
    pub origin: String,
}

#[derive(Clone)]
struct Entry {
    value: Value,
    origin: Origin,
}

pub(super) struct Raw {
    entries: BTreeMap<String, Entry>,
    file: Option<PathBuf>,
    /// The keys that were read, with how much of their values may be shown.
    known: BTreeMap<String, Quote>,
    /// Variables that look like ours, but do not begin as ours do.
    ignored: Vec<String>,
    mistakes: Vec<String>,
    notes: Vec<Note>,
}

impl Raw {
    /// Merges the defaults, the file and the environment; the last one wins.
    pub(super) fn merge(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, String> {
        let (ours, ignored): (Map<String, String>, Vec<_>) = {
            let (ours, others): (Vec<_>, Vec<_>) =
                environment.into_iter().partition(|(name, _)| name.starts_with("PRISM_RELAY__"));
            (ours.into_iter().collect(), others.into_iter().map(|(name, _)| name).collect())
        };
        let mut entries = BTreeMap::new();
        add(Origin::Default, File::from_str(DEFAULT_TOML, FileFormat::Toml), &mut entries)
            .map_err(|error| error.to_string())?;
        if let Some(path) = file {
            // Read here, because the library's error does not say why the file cannot be read.
            let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
            add(Origin::File, File::from_str(&text, FileFormat::Toml), &mut entries)
                .map_err(|error| syntax_error(&error, path, &text))?;
        }
        let environment =
            Environment::with_prefix("PRISM_RELAY").prefix_separator("__").separator("__").source(Some(ours));
        add(Origin::Environment, environment, &mut entries).map_err(|error| error.to_string())?;
        let file = file.map(Path::to_owned);
        Ok(Self { entries, file, known: BTreeMap::new(), ignored, mistakes: Vec::new(), notes: Vec::new() })
    }

    /// Adds a mistake in this key.
    pub(super) fn mistake(&mut self, key: &str, what: impl Display) {
        self.mistakes.push(format!("{key}: {what}"));
    }

    /// Adds a mistake in the value of this key, with where it was set.
    pub(super) fn mistake_in_value(&mut self, key: &str, what: impl Display) {
        let origin = self.entries.get(key).map(|entry| self.set_in(entry.origin)).unwrap_or_default();
        self.mistake(key, format_args!("{what}{origin}"));
    }

    /// Adds a note about a value that is valid.
    pub(super) fn note(&mut self, key: &str, text: impl Display) {
        self.notes.push(Note { key: key.to_owned(), text: text.to_string() });
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

    /// Reads a URL that may contain a login, so that no mistake may quote it.
    pub(super) fn url<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.single(key, Quote::UrlWithoutPassword, &parse)
    }

    /// Reads a URL that is a secret but for scheme and host.
    pub(super) fn secret_url<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.single(key, Quote::UrlOrigin, &parse)
    }

    /// Reads a list of URLs that may contain logins.
    pub(super) fn urls<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        self.items(key, Quote::UrlWithoutPassword, &parse)
    }

    /// Reads an array, or a text with commas as in the environment. Skips empty items.
    pub(super) fn list<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        self.items(key, Quote::Value, &parse)
    }

    /// Reads the texts of a list of secrets.
    pub(super) fn secrets(&mut self, key: &str) -> Vec<String> {
        self.items(key, Quote::Nothing, &|text| Ok(text.to_owned()))
    }

    fn single<T>(&mut self, key: &str, quote: Quote, parse: &impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let entry = self.take(key, quote)?;
        match scalar(&entry.value) {
            Some(text) => self.checked(key, quote, &entry, trimmed(&text), parse),
            None => {
                self.mistake(key, "takes a single value, not a list");
                None
            }
        }
    }

    fn items<T>(&mut self, key: &str, quote: Quote, parse: &impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let Some(entry) = self.take(key, quote) else { return Vec::new() };
        let items: Vec<Option<String>> = match &entry.value.kind {
            ValueKind::Array(items) => items.iter().map(scalar).collect(),
            _ => separated(&scalar(&entry.value).unwrap_or_default()).map(Some).collect(),
        };
        let mut read = Vec::new();
        for item in items {
            // Blanks around the item of a list mean nothing, unless they could be part of a secret.
            let text = item.as_deref().map(trimmed);
            match text.map(|text| if quote == Quote::Nothing { text } else { text.trim() }) {
                Some("") => {}
                Some(text) => read.extend(self.checked(key, quote, &entry, text, parse)),
                None => self.mistake(key, "takes a list of single values"),
            }
        }
        read
    }

    /// Reads a list of tables: an array, or a text in TOML's notation for one. Returns how many there are; the keys of
    /// the first one are then at `key[0].`.
    pub(super) fn tables(&mut self, key: &str) -> usize {
        let Some(Entry { value, origin }) = self.take(key, Quote::Value) else { return 0 };
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
                flatten(&format!("{key}[{index}].{name}"), value.clone(), origin, &mut self.entries);
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

    /// Reads the path of a file with a secret.
    pub(super) fn secret_path<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.single(key, Quote::SecretPath, &parse)
    }

    /// Reads the secret in the file that `key` names. Returns it with the file's path.
    pub(super) fn file<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<(PathBuf, T)> {
        let twin = key.trim_end_matches("_file");
        self.secret_path(key, |text| {
            let path = PathBuf::from(text);
            if !is_path(&path) {
                return Err(format!("is not the path of a file; a secret itself goes into {twin}"));
            }
            read_secret(&path, &parse).map(|secret| (path, secret))
        })
    }

    /// Ends the reading. Each key that was not read is a mistake.
    pub(super) fn finish(&mut self) -> Findings {
        let unknown: Vec<_> = self.entries.keys().filter(|key| !self.known.contains_key(*key)).cloned().collect();
        for key in unknown {
            let is_section = self.known.keys().any(|known| known.starts_with(&format!("{key}.")));
            let what = match self.nearest(&key) {
                _ if is_section => format!("is a section, [{key}], not a value"),
                Some(near) => format!("unknown key; did you mean {near}?"),
                None => "unknown key".to_owned(),
            };
            if key.is_empty() {
                self.mistake("\"\"", "is not a key: a name is missing, such as in PRISM_RELAY__");
            } else {
                self.mistake_in_value(&key, what);
            }
        }
        for name in std::mem::take(&mut self.ignored) {
            if let Some(meant) = self.meant(&name) {
                self.note(&name, format_args!("is ignored; write {meant}"));
            }
        }
        Findings { mistakes: std::mem::take(&mut self.mistakes), notes: std::mem::take(&mut self.notes) }
    }

    /// The variable that was meant by one that is not ours, if it differs from one of ours only by underscores and
    /// case. Others are not ours: Kubernetes sets PRISM_RELAY_PORT for a service of this name.
    fn meant(&self, name: &str) -> Option<String> {
        let plain = |text: &str| text.to_ascii_uppercase().replace(['.', '_'], "");
        let name = plain(name);
        let known = self.known.keys().find(|known| name == format!("PRISMRELAY{}", plain(known)))?;
        Some(format!("PRISM_RELAY__{}", known.to_ascii_uppercase().replace('.', "__")))
    }

    /// Every key that is set, with as much of its value as may be shown. Only after everything was read is it known
    /// which values are secrets.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let entries = self.entries.iter().filter(|(key, _)| !key.contains('['));
        let setting = |(key, entry): (&String, &Entry)| Setting {
            key: key.clone(),
            value: shown(&entry.value, self.known.get(key).copied().unwrap_or(Quote::Nothing)),
            origin: self.name(entry.origin),
        };
        entries.map(setting).collect()
    }

    fn take(&mut self, key: &str, quote: Quote) -> Option<Entry> {
        self.known.insert(key.to_owned(), quote);
        self.entries.get(key).cloned()
    }

    fn checked<T>(
        &mut self,
        key: &str,
        quote: Quote,
        entry: &Entry,
        text: &str,
        parse: &impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let may_quote = match quote {
            Quote::Value => true,
            Quote::SecretPath => is_path(Path::new(text)),
            Quote::Nothing | Quote::UrlWithoutPassword | Quote::UrlOrigin => false,
        };
        let shown = if may_quote { format!("{text:?}") } else { "the value".to_owned() };
        // A shell removes quotation marks; `docker --env-file` and Kubernetes pass them on.
        let parsed = match entry.origin {
            Origin::Environment if is_quoted(text) => Err("is in quotation marks; remove them".to_owned()),
            Origin::Default | Origin::File | Origin::Environment => parse(text),
        };
        let set_in = self.set_in(entry.origin);
        parsed.map_err(|what| self.mistake(key, format_args!("{shown} {what}{set_in}"))).ok()
    }

    fn set_in(&self, origin: Origin) -> String {
        match origin {
            // The defaults have no mistakes.
            Origin::Default => String::new(),
            Origin::File | Origin::Environment => format!(" (set in {})", self.name(origin)),
        }
    }

    fn name(&self, origin: Origin) -> String {
        match (origin, &self.file) {
            (Origin::File, Some(file)) => file.display().to_string(),
            (Origin::Environment, _) => "the environment".to_owned(),
            (Origin::Default, _) | (Origin::File, None) => "default".to_owned(),
        }
    }

    fn nearest(&self, key: &str) -> Option<&str> {
        let similarity = |known: &String| strsim::jaro_winkler(known, key);
        let nearest = self.known.keys().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
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

/// Adds a layer, whose values replace those of the layers before it.
fn add(
    origin: Origin,
    layer: impl Source + Send + Sync + 'static,
    into: &mut BTreeMap<String, Entry>,
) -> Result<(), ConfigError> {
    let layer = config::Config::builder().add_source(layer).build()?;
    flatten("", layer.cache, origin, into);
    Ok(())
}

fn flatten(prefix: &str, value: Value, origin: Origin, into: &mut BTreeMap<String, Entry>) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, value) in table {
                let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                flatten(&key, value, origin, into);
            }
        }
        _ => {
            into.insert(prefix.to_owned(), Entry { value, origin });
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match &value.kind {
        ValueKind::Table(_) | ValueKind::Array(_) => None,
        kind => Some(kind.to_string()),
    }
}

/// The items of a list in one text. Blanks around a comma belong to the list; those at the ends do not, because a
/// secret must not have any.
fn separated(text: &str) -> impl Iterator<Item = String> {
    let items: Vec<_> = text.split(',').collect();
    let last = items.len() - 1;
    let item = move |(position, item): (usize, &str)| {
        let item = if position > 0 { item.trim_start() } else { item };
        (if position < last { item.trim_end() } else { item }).to_owned()
    };
    items.into_iter().enumerate().map(item).collect::<Vec<_>>().into_iter()
}

/// The value without secrets.
fn shown(value: &Value, quote: Quote) -> Value {
    let kind = match &value.kind {
        ValueKind::Array(items) => ValueKind::Array(items.iter().map(|item| shown_item(item, quote)).collect()),
        // Only a text is a list with commas. In the item of an array a comma belongs to the URL.
        kind if quote == Quote::UrlWithoutPassword => {
            let urls: Vec<_> = kind.to_string().split(',').map(without_password).collect();
            ValueKind::String(urls.join(","))
        }
        _ => return shown_item(value, quote),
    };
    Value::new(None, kind)
}

/// A single value without secrets.
fn shown_item(value: &Value, quote: Quote) -> Value {
    let kind = match (&value.kind, quote) {
        (ValueKind::Nil, _) => ValueKind::Nil,
        (kind, Quote::Value | Quote::SecretPath) => kind.clone(),
        (kind, Quote::UrlWithoutPassword) => ValueKind::String(without_password(&kind.to_string())),
        (kind, Quote::UrlOrigin) => ValueKind::String(only_origin(&kind.to_string())),
        (_, Quote::Nothing) => ValueKind::String("***".to_owned()),
    };
    Value::new(None, kind)
}

/// Whether a text is a path, as far as it shows: the file exists, or one of the folders in front of it.
fn is_path(path: &Path) -> bool {
    path.ancestors().any(|part| part.file_name().is_some() && part.symlink_metadata().is_ok())
}

/// A URL whose password is replaced.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rsplit_once('@').and_then(|(login, _)| login.split_once(':')) {
        Some((user, password)) => format!("{scheme}://{user}:***{}", &rest[user.len() + 1 + password.len()..]),
        None => url.to_owned(),
    }
}

/// Scheme and host of a URL.
fn only_origin(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "***".to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}/***")
}

fn is_quoted(text: &str) -> bool {
    text.len() >= 2 && ['"', '\''].iter().any(|mark| text.starts_with(*mark) && text.ends_with(*mark))
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    let advice = match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "; run the command as a user who can read it, or name another file with --config"
        }
        _ => "",
    };
    format!("cannot read {}: {error}{advice}", path.display())
}

/// Shortens a syntax error to its first line (where) and its last (what). The lines between quote the file, which may
/// contain a secret.
fn syntax_error(error: &ConfigError, path: &Path, file: &str) -> String {
    let text = error.to_string();
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let (first, last) = (lines.next().unwrap_or_default(), lines.next_back().unwrap_or("invalid"));
    let advice = other_format(file).map(|name| {
        format!("; the file looks like {name}, but the configuration is TOML (prism-relay init prints an example)")
    });
    format!("{}: {first}: {last}{}", path.display(), advice.unwrap_or_default())
}

/// The format of a file that is not TOML, by its first lines.
fn other_format(file: &str) -> Option<&'static str> {
    let line = file.lines().map(str::trim_end).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let is_mapping = |line: &str| line.split_once(':').is_some_and(|(name, _)| name.chars().all(is_key_character));
    match line {
        line if line.starts_with('{') => Some("JSON"),
        line if ["---", "- "].iter().any(|mark| line.starts_with(mark)) || is_mapping(line) => Some("YAML"),
        _ => None,
    }
}

fn is_key_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}
