//! The log on standard error: readable lines on a terminal, JSON elsewhere. No line quotes a body or a secret.
//!
//! A thread of its own writes the lines. A pipe that is not read (a container engine whose log driver is blocked) would
//! otherwise stop every task that logs: here lines are dropped and counted.

use std::any::Any;
use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::error;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, registry, reload};

/// Maximum number of lines that wait to be written. Each has some 300 bytes.
const LINES_MAX: usize = 8192;

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// The filter in use, which can be replaced.
static CONTROL: OnceLock<Control> = OnceLock::new();

/// The level of targets that a filter does not name.
const DEFAULT_LEVEL: &str = "info";

const LEVELS: [(&str, LevelFilter); 6] = [
    ("off", LevelFilter::OFF),
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
    ("trace", LevelFilter::TRACE),
];

/// What other programs call these levels.
const OTHER_NAMES: [(&str, &str); 12] = [
    ("all", "trace"),
    ("crit", "error"),
    ("critical", "error"),
    ("err", "error"),
    ("fatal", "error"),
    ("information", "info"),
    ("none", "off"),
    ("normal", "info"),
    ("notice", "info"),
    ("quiet", "error"),
    ("silent", "off"),
    ("verbose", "debug"),
];

/// How similar a word must be to a level to be suggested as a typing error (Jaro-Winkler, 0 to 1).
const SIMILARITY_MIN: f64 = 0.8;

/// The section `[log]`.
#[derive(Debug)]
pub struct Settings {
    pub format: Format,
    pub filter: Filter,
}

/// Which lines are logged: a level, and levels of single targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    text: String,
    targets: Targets,
}

struct Control {
    handle: reload::Handle<Targets, Registry>,
    text: Mutex<String>,
}

impl Default for Filter {
    fn default() -> Self {
        let targets = Targets::new().with_default(LevelFilter::INFO);
        Self { text: DEFAULT_LEVEL.to_owned(), targets }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Reads `LEVEL` and `TARGET=LEVEL`, separated by commas. The error completes the sentence "the filter ...".
///
/// A bare word must be a level: the library would read any other one as a target, and log nothing else, errors
/// included. For the same reason targets that are not named keep the default level.
impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut rest, mut targets) = (None, Vec::new());
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some((name, level)) => targets.push((target(name.trim())?, level_named(level.trim())?)),
                None => {
                    if rest.replace(level_named(word)?).is_some() {
                        return Err(format!("has a second level, {word:?}, for all targets"));
                    }
                }
            }
        }
        if rest.is_none() && targets.is_empty() {
            return Ok(Self::default());
        }
        let default = rest.unwrap_or(LevelFilter::INFO);
        Ok(Self { text: text.trim().to_owned(), targets: Targets::new().with_default(default).with_targets(targets) })
    }
}

fn level_named(word: &str) -> Result<LevelFilter, String> {
    let name = word.to_ascii_lowercase();
    if let Some((_, level)) = LEVELS.iter().find(|(level, _)| *level == name) {
        return Ok(*level);
    }
    let similarity = |level: &str| strsim::jaro_winkler(level, &name);
    let similar = || {
        let nearest = LEVELS.iter().map(|(level, _)| *level).max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        nearest.filter(|nearest| similarity(nearest) >= SIMILARITY_MIN)
    };
    let meant = OTHER_NAMES.iter().find(|(other, _)| *other == name).map(|(_, level)| *level).or_else(similar);
    let advice = match meant {
        Some(level) => format!("; did you mean {level}?"),
        None if target(word).is_ok() => format!("; for a single target write {word}=debug"),
        None => String::new(),
    };
    Err(format!("has the word {word:?}, which is not a level (off, error, warn, info, debug, trace){advice}"))
}

fn target(name: &str) -> Result<&str, String> {
    let is_target = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_:-.".contains(c));
    match (is_target, name.contains('-')) {
        (false, _) => Err(format!("has {name:?} in front of a level, which is not a target")),
        // A target is the path of a Rust module, so it would match nothing.
        (true, true) => Err(format!("has the target {name:?}; write it with `_`: {}", name.replace('-', "_"))),
        (true, false) => Ok(name),
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Pretty on a terminal, else JSON.
    Auto,
    Pretty,
    Json,
}

/// Installs the subscriber for the whole process. Dropping the guard writes the lines that wait, for about a second at
/// most.
pub(crate) fn init(settings: &Settings) -> WorkerGuard {
    let json = is_json(settings.format);
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).finish(std::io::stderr());
    let _ = DROPPED.set(writer.error_counter());
    let base = tracing_subscriber::fmt::layer().with_writer(writer);
    let layer = if json {
        base.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        base.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    let (filter, handle) = reload::Layer::new(quiet(settings.filter.targets.clone()));
    let _ = CONTROL.set(Control { handle, text: Mutex::new(settings.filter.to_string()) });
    let _ = registry().with(layer.with_filter(filter.and(filter_fn(is_discreet)))).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        error!(place, reason = panic_reason(panic.payload()), "panicked");
    }));
    guard
}

/// Whether the lines of a log in this format are JSON.
pub(crate) fn is_json(format: Format) -> bool {
    match format {
        Format::Auto => !std::io::stderr().is_terminal(),
        Format::Pretty => false,
        Format::Json => true,
    }
}

/// Replaces the filter. Returns the previous one, if it was another.
pub(crate) fn set_filter(filter: &Filter) -> Option<String> {
    let control = CONTROL.get()?;
    let mut text = control.text.lock().unwrap_or_else(PoisonError::into_inner);
    // The only error is that the subscriber is gone, at the end of the process.
    let _ = control.handle.reload(quiet(filter.targets.clone()));
    let previous = std::mem::replace(&mut *text, filter.to_string());
    (previous != *text).then_some(previous)
}

/// The filter in use, as it was written.
pub(crate) fn filter() -> String {
    CONTROL.get().map(|control| control.text.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
}

/// Lines that were dropped since the start, because standard error was not read.
pub(crate) fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// A panic's own words, if they were written in the source. Others may quote the data that led to it, a body for
/// example.
fn panic_reason(payload: &dyn Any) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("left out because it may quote data")
}

/// Every error of lapin reaches the publisher, which logs it with its consequence. To see lapin's own lines, name it in
/// the filter.
fn quiet(filter: Targets) -> Targets {
    let named = filter.iter().any(|(target, _)| target.starts_with("lapin"));
    if named { filter } else { filter.with_target("lapin", LevelFilter::OFF) }
}

/// No filter can raise these: at trace lapin prints frames, the login and the bodies among them, and it prints each
/// returned message with its payload as a warning.
fn is_discreet(metadata: &Metadata<'_>) -> bool {
    let lapin = metadata.target().starts_with("lapin");
    !lapin || (*metadata.level() <= Level::DEBUG && metadata.target() != "lapin::returned_messages")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_word_is_a_level_and_targets_that_are_not_named_keep_the_default() {
        use tracing_subscriber::filter::LevelFilter as L;
        let level = |filter: &str, target: &str| {
            let filter: Filter = filter.parse().unwrap();
            let is_enabled =
                |level: &L| level.into_level().is_none_or(|level| filter.targets.would_enable(target, &level));
            LEVELS.iter().map(|(_, level)| *level).filter(is_enabled).max().unwrap()
        };
        for (filter, target, expected) in [
            ("", "prism_relay", L::INFO),
            (" , ", "prism_relay", L::INFO),
            ("info", "lapin", L::INFO),
            ("WARN", "prism_relay", L::WARN),
            ("off", "prism_relay", L::OFF),
            ("prism_relay=debug", "prism_relay::ops", L::DEBUG),
            ("prism_relay=debug", "hyper", L::INFO),
            ("prism_relays=debug", "prism_relay", L::INFO),
            ("error, prism_relay::publisher = trace", "prism_relay::publisher", L::TRACE),
            ("error,prism_relay::publisher=trace", "prism_relay::spool", L::ERROR),
        ] {
            assert_eq!(level(filter, target), expected, "{filter:?} for {target}");
        }
        assert_eq!("".parse::<Filter>().unwrap().to_string(), "info");
        assert_eq!(" info,lapin=debug ".parse::<Filter>().unwrap().to_string(), "info,lapin=debug");
    }

    #[test]
    fn a_word_that_is_not_a_level_is_a_mistake_with_a_suggestion() {
        for (filter, expected) in [
            (
                "warning",
                "has the word \"warning\", which is not a level (off, error, warn, info, debug, trace); did \
                         you mean warn?",
            ),
            ("verbose", "did you mean debug?"),
            ("eror", "did you mean error?"),
            ("info,lapin=verbose", "has the word \"verbose\""),
            ("lapin", "for a single target write lapin=debug"),
            ("2", "for a single target write 2=debug"),
            ("info,lapin", "has the word \"lapin\", which is not a level"),
            ("prism-relay=debug", "has the target \"prism-relay\"; write it with `_`: prism_relay"),
            ("info,debug", "has a second level, \"debug\", for all targets"),
            ("=debug", "has \"\" in front of a level, which is not a target"),
            ("a=b=c", "has the word \"b=c\""),
            ("[span]=debug", "has \"[span]\" in front of a level"),
        ] {
            let mistake = filter.parse::<Filter>().unwrap_err();
            assert!(mistake.contains(expected), "{filter:?}: {mistake}");
        }
    }

    #[test]
    #[expect(clippy::string_slice, reason = "it is the panic that is wanted")]
    fn a_panic_is_not_quoted_unless_it_stands_in_the_source() {
        let body = "{\"userToken\":\"h\u{fc}nter2\"}".to_owned();
        let quoted = std::panic::catch_unwind(|| body[..16].len()).unwrap_err();
        assert!(quoted.downcast_ref::<String>().is_some_and(|words| words.contains("userToken")), "Rust quotes it");
        assert!(!panic_reason(&*quoted).contains("userToken"));
        let own = std::panic::catch_unwind(|| panic!("written in the source")).unwrap_err();
        assert_eq!(panic_reason(&*own), "written in the source");
    }
}
