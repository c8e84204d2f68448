//! Reads file and environment into the settings of the parts. Every value is bounded and checked against the others.
//!
//! [`Config::load`] merges the layers (in `raw`), reads every key, and reports all mistakes at once, each with its
//! key. No other module reads the configuration file or the environment.

mod raw;
mod secrets;
mod sections;

use std::path::Path;
use std::time::Duration;

use thiserror::Error;

pub use raw::DEFAULT_TOML;
use raw::Raw;
pub use secrets::{password_in, read_secret, secrets_in, token_in};
pub use sections::Purpose;
use sections::{HOUR, MILLISECOND};

use crate::spool::dedupe;
use crate::{broker, ingress, logging, ops, publisher, signature, spool, topology, traces};

/// The whole configuration, checked.
#[derive(Debug)]
pub struct Config {
    /// The public listener.
    pub http: ingress::Settings,
    /// Who may send.
    pub signature: signature::Settings,
    /// The file of accepted events.
    pub spool: spool::Settings,
    /// How re-sends are recognised.
    pub dedupe: dedupe::Settings,
    /// Where RabbitMQ is.
    pub broker: broker::Settings,
    /// How events are published.
    pub publisher: publisher::Settings,
    /// What must exist on the broker.
    pub topology: topology::Spec,
    /// The operators' listener.
    pub ops: ops::Settings,
    /// Format and filter of the log.
    pub log: logging::Settings,
    /// Where spans are exported to.
    pub traces: traces::Settings,
    /// How the relay stops.
    pub shutdown: Shutdown,
}

/// The section `[shutdown]`.
#[derive(Debug)]
pub struct Shutdown {
    /// Maximum time for open requests and deliveries after SIGTERM or SIGINT.
    pub grace: Duration,
}

/// All mistakes in a configuration, one per line.
#[derive(Debug, Error)]
#[error("{}", self.list())]
pub struct ConfigError {
    mistakes: Vec<String>,
    log_format: logging::Format,
}

impl ConfigError {
    /// The format of the log, if the configuration names one that can be read.
    pub fn log_format(&self) -> logging::Format {
        self.log_format
    }

    fn list(&self) -> String {
        let count = match self.mistakes.len() {
            1 => "a mistake".to_owned(),
            count => format!("{count} mistakes"),
        };
        format!("the configuration has {count}:\n  {}", self.mistakes.join("\n  "))
    }
}

impl Config {
    /// Reads the defaults, then `file`, then the variables in `environment` that start with `PRISM_RELAY__`.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        purpose: Purpose,
    ) -> Result<Self, ConfigError> {
        let mut raw = Raw::merge(file, environment)
            .map_err(|mistake| ConfigError { mistakes: vec![mistake], log_format: logging::Format::Auto })?;
        // In the order of the file, in which mistakes are listed.
        let http = sections::http(&mut raw, purpose);
        let signature = sections::signature(&mut raw, purpose);
        let spool = sections::spool(&mut raw);
        let dedupe = sections::dedupe(&mut raw);
        let (broker, publisher) = sections::broker(&mut raw);
        let topology = sections::topology(&mut raw, &publisher.exchange);
        let ops = sections::ops(&mut raw);
        let log = sections::log(&mut raw);
        let traces = sections::traces(&mut raw);
        let shutdown = Shutdown { grace: raw.duration("shutdown.grace", MILLISECOND..=HOUR) };
        let config = Self { http, signature, spool, dedupe, broker, publisher, topology, ops, log, traces, shutdown };
        match raw.finish() {
            mistakes if mistakes.is_empty() => Ok(config),
            mistakes => Err(ConfigError { mistakes, log_format: config.log.format }),
        }
    }
}

#[cfg(test)]
mod tests;
