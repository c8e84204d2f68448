//! What the code may assume: every value here has been read, bounded and checked against the others.
//!
//! [`Config::load`] merges the layers (in `raw`), reads every key, and reports all mistakes at once, each with its
//! key. Nobody else reads a file or the environment.

mod broker_url;
mod raw;
mod secrets;
mod sections;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Uri;
use ipnet::IpNet;
use thiserror::Error;

pub use broker_url::BrokerUrl;
use raw::Raw;
pub use secrets::{password_in, read_secret, secrets_in, token_in};
use sections::{HOUR, MILLISECOND};

use crate::secret::Secret;
use crate::tls::{ClientFiles, ServerFiles};

/// The defaults, which are also the documentation of every key.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

#[derive(Debug)]
pub struct Config {
    pub http: Http,
    pub signature: Signature,
    pub spool: Spool,
    pub dedupe: Dedupe,
    pub broker: Broker,
    pub topology: Topology,
    pub ops: Ops,
    pub log: Log,
    pub traces: Traces,
    pub shutdown: Shutdown,
}

#[derive(Clone, Debug)]
pub struct Http {
    pub listen: SocketAddr,
    /// Starts with `/`.
    pub path: String,
    pub body_bytes_max: usize,
    /// Not below `body_bytes_max`.
    pub buffer_bytes_max: usize,
    pub header_timeout: Duration,
    pub body_timeout: Duration,
    /// At least 1.
    pub connections_max: usize,
    /// At least 1.
    pub connections_per_source_max: usize,
    pub headers_max: usize,
    pub header_bytes_max: usize,
    pub streams_max: u32,
    /// `None`: without TLS.
    pub tls: Option<ServerFiles>,
    /// Empty: everyone.
    pub allowed_sources: Vec<IpNet>,
    pub trusted_proxies: Vec<IpNet>,
}

#[derive(Debug)]
pub struct Signature {
    pub required: bool,
    /// At most [`SECRETS_MAX`].
    pub secrets: Vec<Secret>,
    /// Where the secrets come from, if it is a file that may change.
    pub secrets_file: Option<PathBuf>,
    pub tolerance: Duration,
}

#[derive(Clone, Debug)]
pub struct Spool {
    pub path: PathBuf,
    pub max_bytes: u64,
    pub durability: Durability,
}

/// What an event survives once it has been answered 200.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power loss: every commit is synced to the disk.
    Disk,
    /// A crash of the relay, but not one of the machine.
    Process,
}

#[derive(Clone, Debug)]
pub struct Dedupe {
    /// Zero: off.
    pub window: Duration,
    pub entries_max: usize,
}

#[derive(Clone, Debug)]
pub struct Broker {
    /// At least one.
    pub urls: Vec<BrokerUrl>,
    /// Where the password in the urls comes from, if it is a file that may change.
    pub password_file: Option<PathBuf>,
    /// For the urls that want TLS.
    pub tls: ClientFiles,
    /// The name in the broker's certificate; `None`: the host of the url.
    pub server_name: Option<String>,
    pub exchange: String,
    /// At least 1.
    pub window: usize,
    /// Not below the heartbeat, which is in the urls.
    pub confirm_timeout: Duration,
    pub connect_timeout: Duration,
    pub reconnect_min: Duration,
    pub reconnect_max: Duration,
    pub parked_retry: Duration,
    /// Of the management API; `None`: on the host of the url, at the port that RabbitMQ gives it.
    pub management_url: Option<Uri>,
}

#[derive(Clone, Debug)]
pub struct Topology {
    pub declare: Declare,
    pub queues: Vec<Queue>,
    pub archive: Option<Archive>,
}

/// What the relay does about the topology when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declare {
    /// Creates what is missing.
    Active,
    /// Checks that everything exists.
    Passive,
    /// Nothing.
    Off,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    pub name: String,
    /// At least one.
    pub bindings: Vec<String>,
    /// Returns to the queue before a message is given up.
    pub delivery_limit: u32,
    /// How long a rejected message waits before each further try; after the last one it is given up.
    pub retry_delays: Vec<Duration>,
    /// Implied by `partitions`.
    pub single_active_consumer: bool,
    /// At least two.
    pub partitions: Option<usize>,
    /// Messages in each queue; the relay keeps what is beyond.
    pub max_length: Option<usize>,
    /// After it a message that nobody has taken is given up.
    pub ttl: Option<Duration>,
}

/// A stream of everything, from which can be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    pub name: String,
    pub max_age: Duration,
    pub max_bytes: Option<u64>,
}

#[derive(Debug)]
pub struct Ops {
    pub listen: SocketAddr,
    /// For the console and `/api`.
    pub token: Option<Secret>,
    /// Where the token comes from, if it is a file that may change.
    pub token_file: Option<PathBuf>,
}

#[derive(Debug)]
pub struct Log {
    pub format: LogFormat,
    pub filter: tracing_subscriber::filter::Targets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Auto,
    Pretty,
    Json,
}

#[derive(Debug)]
pub struct Traces {
    /// Of a collector that speaks OTLP over HTTP; `None`: nobody is told.
    pub endpoint: Option<Uri>,
    /// Of the traces that begin here, 0 to 1.
    pub sample_ratio: f64,
}

#[derive(Debug)]
pub struct Shutdown {
    pub grace: Duration,
}

/// All that is wrong with a configuration, one line a mistake.
#[derive(Debug, Error)]
#[error("{}", self.list())]
pub struct ConfigError {
    mistakes: Vec<String>,
}

impl ConfigError {
    fn list(&self) -> String {
        let count = match self.mistakes.len() {
            1 => "a mistake".to_owned(),
            count => format!("{count} mistakes"),
        };
        format!("the configuration has {count}:\n  {}", self.mistakes.join("\n  "))
    }
}

/// Who asks: the client commands work without the secret that the relay itself cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Serve,
    Client,
}

/// Enough for any rotation, and few enough to try each of them for every request.
pub const SECRETS_MAX: usize = 8;

impl Config {
    /// Reads the defaults, then `file`, then the variables in `environment` that start with `PRISM_RELAY__`.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        purpose: Purpose,
    ) -> Result<Self, ConfigError> {
        let mut raw = Raw::merge(file, environment).map_err(|mistake| ConfigError { mistakes: vec![mistake] })?;
        // In the order of the file, in which mistakes are listed.
        let http = Http::read(&mut raw, purpose);
        let signature = Signature::read(&mut raw, purpose);
        let spool = Spool::read(&mut raw);
        let dedupe = Dedupe::read(&mut raw);
        let broker = Broker::read(&mut raw);
        let topology = Topology::read(&mut raw, &broker);
        let ops = Ops::read(&mut raw);
        let log = Log::read(&mut raw);
        let traces = Traces::read(&mut raw);
        let shutdown = Shutdown { grace: raw.duration("shutdown.grace", MILLISECOND..=HOUR) };
        let config = Self { http, signature, spool, dedupe, broker, topology, ops, log, traces, shutdown };
        match raw.finish() {
            mistakes if mistakes.is_empty() => Ok(config),
            mistakes => Err(ConfigError { mistakes }),
        }
    }
}

#[cfg(test)]
mod tests;
