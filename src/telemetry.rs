//! Logs: to standard error, for people on a terminal and as JSON elsewhere.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

use crate::config::{Log, LogFormat};

/// lapin logs each returned message with its payload here. Payloads carry `userToken`.
const LEAKS_PAYLOADS: [&str; 2] = ["lapin::returned_messages", "lapin::channel"];

/// Installs the subscriber for the whole process. A second call does nothing.
pub fn init(log: &Log) {
    let json = match log.format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Pretty => false,
        LogFormat::Json => true,
    };
    let filter =
        LEAKS_PAYLOADS.iter().fold(log.filter.clone(), |filter, target| filter.with_target(*target, LevelFilter::OFF));
    let base = fmt::layer().with_writer(std::io::stderr);
    let layer = if json {
        base.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        base.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed()
    };
    let _ = registry().with(layer.with_filter(filter)).try_init();
}
