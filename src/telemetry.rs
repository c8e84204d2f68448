//! What the relay says: logs, to standard error, for people on a terminal and as JSON elsewhere; and errors with their
//! causes.

use std::error::Error;
use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

use crate::config::{Log, LogFormat};

/// Installs the subscriber for the whole process. A second call does nothing.
pub fn init(log: &Log) {
    let json = match log.format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Pretty => false,
        LogFormat::Json => true,
    };
    let base = fmt::layer().with_writer(std::io::stderr);
    let layer = if json {
        base.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        base.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    let filter = quiet(log.filter.clone()).and(filter_fn(is_discreet));
    let _ = registry().with(layer.with_filter(filter)).try_init();
}

/// Every error of lapin reaches the publisher, which tells it once, with what follows from it. Whoever wants to hear
/// lapin itself names it in the filter.
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

/// An error and all its causes in one line, each said once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
