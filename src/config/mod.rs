//! Reads file and environment into the settings of the parts. Every value is bounded and checked against the others.
//!
//! [`Config::load`] merges the layers (in `raw`), reads every key, and reports all mistakes at once, each with its
//! key. No other module reads the configuration file or the environment.

mod note;
mod raw;
mod secrets;
mod sections;
mod show;

use std::path::Path;
use std::time::Duration;

use thiserror::Error;

use note::Findings;
pub use note::Note;
pub use raw::DEFAULT_TOML;
use raw::Raw;
pub use secrets::{api_key_in, notify_secret_in, password_in, read_secret, secrets_in, token_in};
pub use sections::Purpose;
use sections::{HOUR, MILLISECOND};

use crate::spool::dedupe;
use crate::{broker, ingress, logging, ops, publisher, reconcile, signature, spool, topology, traces};

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
    /// How events that no webhook brought are found.
    pub reconcile: reconcile::Settings,
    /// Where RabbitMQ is.
    pub broker: broker::Settings,
    /// How events are published.
    pub publisher: publisher::Settings,
    /// What must exist on the broker.
    pub topology: topology::Spec,
    /// The operators' listener.
    pub ops: ops::Settings,
    /// Where notices go.
    pub notify: ops::NotifySettings,
    /// Format and filter of the log.
    pub log: logging::Settings,
    /// Where spans are exported to.
    pub traces: traces::Settings,
    /// How the relay stops.
    pub shutdown: Shutdown,
    /// What an operator may not have meant. `serve` logs it, `check` shows it.
    pub notes: Vec<Note>,
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
    /// Which configuration it is, as in [`described`].
    read_from: String,
    mistakes: Vec<String>,
    notes: Vec<Note>,
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
        let hints = self.notes.iter().map(|Note { key, text }| format!("\n  hint: {key} {text}"));
        let (mistakes, hints) = (self.mistakes.join("\n  "), hints.collect::<String>());
        format!("the configuration has {count} ({}):\n  {mistakes}{hints}", self.read_from)
    }
}

/// Names the configuration that was read, for errors.
pub fn described(file: Option<&Path>) -> String {
    match file {
        Some(file) => format!("configuration file: {}", file.display()),
        None => "no configuration file, only defaults and environment".to_owned(),
    }
}

impl Config {
    /// Reads the defaults, then `file`, then the variables in `environment` that start with `PRISM_RELAY__`.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        purpose: Purpose,
    ) -> Result<Self, ConfigError> {
        read(file, environment, purpose).map(|(config, _)| config)
    }
}

/// The configuration as TOML: each key with its value and where it was set. Secrets are replaced by `***`.
pub fn shown(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<String, ConfigError> {
    read(file, environment, Purpose::Client).map(|(_, raw)| show::toml(&raw.settings()))
}

fn read(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    purpose: Purpose,
) -> Result<(Config, Raw), ConfigError> {
    let error = |mistakes, notes, log_format| ConfigError { read_from: described(file), mistakes, notes, log_format };
    let mut raw =
        Raw::merge(file, environment).map_err(|mistake| error(vec![mistake], Vec::new(), logging::Format::Auto))?;
    // In the order of the file, in which mistakes are listed.
    let http = sections::http(&mut raw, purpose);
    let signature = sections::signature(&mut raw, purpose);
    let spool = sections::spool(&mut raw, http.body_bytes_max as u64);
    let dedupe = sections::dedupe(&mut raw);
    let reconcile = sections::reconcile(&mut raw);
    let (broker, publisher) = sections::broker(&mut raw);
    let topology = sections::topology(&mut raw, &publisher.exchange);
    let ops = sections::ops(&mut raw);
    let notify = sections::notify(&mut raw);
    let log = sections::log(&mut raw);
    let traces = sections::traces(&mut raw);
    let shutdown = Shutdown { grace: raw.duration("shutdown.grace", MILLISECOND..=HOUR) };
    match raw.finish() {
        Findings { mistakes, notes } if mistakes.is_empty() => {
            let config = Config {
                http,
                signature,
                spool,
                dedupe,
                reconcile,
                broker,
                publisher,
                topology,
                ops,
                notify,
                log,
                traces,
                shutdown,
                notes,
            };
            Ok((config, raw))
        }
        Findings { mistakes, notes } => Err(error(mistakes, notes, log.format)),
    }
}

#[cfg(test)]
mod tests;
