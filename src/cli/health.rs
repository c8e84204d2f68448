//! `health`: for container engines and scripts that have no HTTP client. Asks a running relay what `/readyz` says.

use std::time::Duration;

use anyhow::{anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::timeout;

use super::{Failure, clean, say};
use crate::config::Config;
use crate::text::chain;

/// Less than the patience of who asks, so that there is an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_BYTES_MAX: usize = 64 * 1024;

#[derive(clap::Args)]
pub struct Options {
    /// Where the relay's operators' listener is [default: ops.listen of the configuration]
    #[arg(long)]
    url: Option<Uri>,
}

pub async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let url = super::ops_url(config, options.url, "/readyz")?;
    timeout(ANSWER_TIMEOUT, ask(&url)).await.map_err(|_| anyhow!("no answer from {url}: not in time"))??;
    say("ready");
    Ok(())
}

async fn ask(url: &Uri) -> anyhow::Result<()> {
    let failed = |reason: String| anyhow!("no answer from {url}: {reason}");
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let response = client.get(url.clone()).await.map_err(|error| failed(chain(&error)))?;
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(());
    }
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| failed(error.to_string()))?.to_bytes();
    let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
    let detail = clean(answer["detail"].as_str().unwrap_or("is that the operators' listener?"));
    bail!("not ready: {url} answers {}: {detail}", status.as_u16())
}
