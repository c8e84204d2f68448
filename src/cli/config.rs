//! `config`: prints the configuration.

use std::path::Path;

use super::failure::Failure;
use super::output::out;
use crate::config::{DEFAULT_TOML, described, shown};

#[derive(clap::Subcommand)]
pub(super) enum Action {
    /// Print the configuration in effect as TOML: each key, and where it was set. Secrets are left out.
    Show {
        /// Print the built-in defaults in place of that: every key, with its documentation
        #[arg(long)]
        defaults: bool,
    },
}

pub(super) fn run(action: &Action, file: Option<&Path>, environment: Vec<(String, String)>) -> Result<(), Failure> {
    let Action::Show { defaults } = action;
    if *defaults {
        return Ok(out(DEFAULT_TOML.as_bytes())?);
    }
    let toml = shown(file, environment).map_err(|error| Failure::Config(error.into()))?;
    Ok(out(format!("# {}\n\n{toml}", described(file)).as_bytes())?)
}
