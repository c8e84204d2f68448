//! Connects a command to the broker.

use anyhow::anyhow;

use crate::broker::{BrokerAccess, BrokerConnection};
use crate::config::Config;

/// Connects to the first reachable broker of `broker.urls`. If none is reachable, returns the last broker's error.
pub(super) async fn connect(config: &Config, name: &str) -> anyhow::Result<BrokerConnection> {
    let access = BrokerAccess::new(&config.broker)?;
    let mut failure = anyhow!("broker.urls is empty");
    for index in 0..config.broker.urls.len() {
        match access.open(index, name).await {
            Ok(broker) => return Ok(broker),
            Err(error) => failure = error.into(),
        }
    }
    Err(failure.context("none of the brokers could be reached"))
}
