//! `health`: requests `/readyz` of a running relay, for container engines and scripts without an HTTP client.

use std::time::Duration;

use anyhow::Context;
use hyper::Uri;

use super::failure::Failure;
use super::http::{OpsResource, ops_url};
use super::output::say;
use crate::config::Config;

/// Maximum time for the relay's answer: less than the timeouts of container engines, so that the command can print the
/// reason.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(clap::Args)]
pub(super) struct Options {
    /// Address of the relay's operators' listener [default: ops.listen]
    #[arg(long, value_parser = ops_url)]
    url: Option<Uri>,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let ready = OpsResource::new(config, options.url, "/readyz", ANSWER_TIMEOUT)?;
    ready.get().await.context("not ready")?;
    say("ready");
    Ok(())
}
