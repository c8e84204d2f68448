//! The log on standard error: readable lines on a terminal, JSON elsewhere. No line quotes a body or a secret.
//!
//! A thread of its own writes the lines. A pipe that is not read (a container engine whose log driver is blocked) would
//! otherwise stop every task that logs: here lines are dropped and counted.

use std::any::Any;
use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing::error;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

/// Maximum number of lines that wait to be written. Each has some 300 bytes.
const LINES_MAX: usize = 8192;

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// The section `[log]`.
#[derive(Debug)]
pub struct Settings {
    pub format: Format,
    pub filter: Targets,
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
    let base = fmt::layer().with_writer(writer);
    let layer = if json {
        base.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        base.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    let filter = quiet(settings.filter.clone()).and(filter_fn(is_discreet));
    let _ = registry().with(layer.with_filter(filter)).try_init();
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
