//! `health`: for container engines and scripts that have no HTTP client. Asks a running relay what `/readyz` says.

use std::time::Duration;

use anyhow::Context;
use hyper::Uri;

use super::failure::Failure;
use super::http::OpsResource;
use super::output::say;
use crate::config::Config;

/// Less than the timeouts of container engines, so that the reason is printed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(clap::Args)]
pub(super) struct Options {
    /// The address of the relay's operators' listener [default: ops.listen of the configuration]
    #[arg(long)]
    url: Option<Uri>,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let ready = OpsResource::new(config, options.url, "/readyz", ANSWER_TIMEOUT)?;
    ready.get().await.context("not ready")?;
    say("ready");
    Ok(())
}
