//! The command line: one file per command. Exit codes: 0 done, 1 failed, 64 wrong usage or configuration.

mod check;
mod config;
mod connect;
mod consumer;
mod curl;
mod delayed;
mod failure;
mod health;
mod http;
mod init;
mod interrupt;
mod manual;
mod messages;
mod output;
mod pace;
mod pattern;
mod prism_api;
mod reconcile;
mod redrive;
mod replay;
mod send;
mod spool;
mod tail;
mod top;
mod topology;
mod transfer;
mod vectors;
mod verify;

use std::cell::Cell;
use std::io::ErrorKind::NotFound;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use tracing::info;

use failure::{EXIT_USAGE, Failure};

use crate::config::{Config, ConfigError, Purpose, described};
use crate::{logging, relay};

/// The variable that names the configuration file.
const FILE_VARIABLE: &str = "PRISM_RELAY_CONFIG";
/// The configuration file of the Debian package.
const USUAL_FILE: &str = "/etc/prism-relay/relay.toml";

/// The version with its commit, such as `0.1.0 (3f2a9c01b7de)`. build.rs provides the commit.
const LONG_VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("PRISM_RELAY_COMMIT"), ")");

/// A durable webhook-to-RabbitMQ relay for the Prism body-scan API.
///
/// Every setting has a default. Set it in a TOML file, or in the environment as PRISM_RELAY__SECTION__KEY. To begin:
/// `prism-relay init`.
#[derive(Parser)]
#[command(name = "prism-relay", version, long_version = LONG_VERSION)]
struct Arguments {
    /// Configuration file (TOML) [default: $PRISM_RELAY_CONFIG, else /etc/prism-relay/relay.toml if it exists].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the relay (the default).
    Serve,
    /// Check configuration, broker, topology and spool, without changing anything.
    Check(check::Options),
    /// Send signed webhooks as Prism does, with Prism's retries.
    Send(send::Options),
    /// Print events as they are published.
    Tail(tail::Options),
    /// Show the console's answers in a terminal, live.
    Top(top::Options),
    /// Print, declare, compare or export the exchanges, queues and bindings.
    #[command(subcommand)]
    Topology(topology::Action),
    /// Publish dead letters or unrouted messages again.
    Redrive(redrive::Options),
    /// Publish events of the archive again, selected by time and routing key.
    Replay(replay::Options),
    /// Ask Prism's API for scans and predictions, and publish what no webhook brought.
    Reconcile(reconcile::Options),
    /// Explain how the relay answers a captured request, for example with 401.
    Verify(verify::Options),
    /// Inspect the spool, also while the relay runs.
    #[command(subcommand)]
    Spool(spool::Action),
    /// Check a running relay: exit code 0 if it is ready for webhooks, else 1.
    Health(health::Options),
    /// Print a starter configuration.
    Init(init::Options),
    /// Print the configuration.
    #[command(subcommand)]
    Config(config::Action),
    /// Print the man page.
    Man(manual::Options),
    /// Print a completion script for a shell.
    Completions { shell: clap_complete::Shell },
}

/// Runs the command that the arguments of the process name.
pub fn run() -> ExitCode {
    let outcome = match Arguments::try_parse() {
        Ok(arguments) => execute(arguments),
        Err(error) if error.use_stderr() => {
            let _ = error.print();
            return ExitCode::from(EXIT_USAGE);
        }
        // clap returns --help and --version as errors, too.
        Err(help) => {
            let _ = output::note(help.print());
            Ok(())
        }
    };
    let outcome = match outcome {
        // What a command reports on standard output may be lost.
        Ok(()) | Err(Failure::Reported) => output::written().map_err(Failure::from).and(outcome),
        failed => failed,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn execute(arguments: Arguments) -> Result<(), Failure> {
    let command = arguments.command.unwrap_or(Command::Serve);
    let environment = environment()?;
    let file = arguments.config.or_else(|| default_file(&environment));
    let loader = Loader { file, environment, is_used: Cell::new(false) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let outcome = runtime.block_on(perform(command, &loader));
    // Do not wait for threads that hang in a name look-up or on a failing disk: the work is done.
    runtime.shutdown_background();
    outcome.map_err(|failure| if loader.is_used.get() { failure.with_configuration(loader.file()) } else { failure })
}

/// Loads the configuration for the commands that need one.
struct Loader {
    file: Option<PathBuf>,
    environment: Vec<(String, String)>,
    is_used: Cell<bool>,
}

impl Loader {
    fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    fn load(&self, purpose: Purpose) -> Result<Config, ConfigError> {
        self.is_used.set(true);
        Config::load(self.file(), self.environment.clone(), purpose)
    }

    /// The configuration for a command that is neither the relay nor its check.
    fn client(&self) -> Result<Config, Failure> {
        self.load(Purpose::Client).map_err(|error| Failure::Config(error.into()))
    }
}

async fn perform(command: Command, loader: &Loader) -> Result<(), Failure> {
    let file = loader.file();
    match command {
        Command::Serve => serve(loader).await,
        Command::Check(options) => {
            let config = loader.load(Purpose::Serve).map_err(|error| Failure::Config(error.into()))?;
            check::run(&config, file, options).await
        }
        Command::Send(options) => send::run(&loader.client()?, options).await,
        Command::Tail(options) => Ok(tail::run(&loader.client()?, options).await?),
        Command::Top(options) => top::run(&loader.client()?, options).await,
        Command::Topology(action) => topology::run(&loader.client()?, file, action).await,
        Command::Redrive(options) => redrive::run(&loader.client()?, options).await,
        Command::Replay(options) => replay::run(&loader.client()?, options).await,
        Command::Reconcile(options) => reconcile::run(&loader.client()?, options).await,
        Command::Spool(action) => spool::run(&loader.client()?, action),
        Command::Verify(options) => verify::run(&loader.client()?, &options),
        Command::Health(options) => health::run(&loader.client()?, options).await,
        Command::Init(options) => Ok(init::run(&options)?),
        Command::Config(action) => config::run(&action, file, loader.environment.clone()),
        Command::Man(options) => Ok(manual::man(Arguments::command(), options)?),
        Command::Completions { shell } => Ok(manual::completions(Arguments::command(), shell)?),
    }
}

async fn serve(loader: &Loader) -> Result<(), Failure> {
    let config = loader.load(Purpose::Serve).map_err(|error| {
        let json = logging::is_json(error.log_format());
        Failure::Config(error.into()).logged_if(json)
    })?;
    let json = logging::is_json(config.log.format);
    // Dropped at the end, before a fatal error is printed.
    let _log = logging::init(&config.log);
    info!(read = described(loader.file()), "configuration read");
    relay::serve(config).await.map_err(|error| {
        match error.is_misconfiguration() {
            true => Failure::Config(error.into()),
            false => Failure::Other(error.into()),
        }
        .logged_if(json)
    })
}

/// The file of a command without --config: the one that PRISM_RELAY_CONFIG names, else the usual one if it exists.
fn default_file(environment: &[(String, String)]) -> Option<PathBuf> {
    let named = environment.iter().find(|(name, value)| name == FILE_VARIABLE && !value.is_empty());
    named.map(|(_, value)| PathBuf::from(value)).or_else(|| {
        // Any other error is one of the configuration: the file is meant, and cannot be read.
        let is_absent = Path::new(USUAL_FILE).symlink_metadata().is_err_and(|error| error.kind() == NotFound);
        (!is_absent).then(|| PathBuf::from(USUAL_FILE))
    })
}

/// The variables of the relay, and those that only look like its own, which are reported. A value that is not UTF-8 is
/// an error.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn environment() -> Result<Vec<(String, String)>, Failure> {
    let named = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let ours = named.filter(|(name, _)| name.to_ascii_uppercase().starts_with("PRISM_RELAY_"));
    ours.map(|(name, value)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(Failure::Usage(format!("the environment variable {name} is not UTF-8"))),
    })
    .collect()
}
