//! RabbitMQ's management API, which knows what AMQP cannot ask for: bindings and policies
//! (<https://www.rabbitmq.com/docs/management#http-api>).

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::AUTHORIZATION;
use hyper::{Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use tokio::time::timeout;

use super::{BrokerUrl, Settings};
use crate::text::chain;
use crate::tls;

/// For one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// More than a broker with ten thousand queues answers.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Why the management API gave no answer.
#[derive(Debug, Error)]
pub enum ManagementError {
    #[error("no answer from {url}: {reason}")]
    NoAnswer { url: String, reason: String },
    #[error("{url} belongs to another broker; set broker.management_url")]
    OtherBroker { url: String },
    #[error("{url} answers {status}{}", self.hint())]
    Refused { url: String, status: u16 },
}

impl ManagementError {
    fn hint(&self) -> &'static str {
        match self {
            Self::Refused { status: 401, .. } => {
                ": the user needs a password and the tag monitoring, management or administrator"
            }
            _ => "",
        }
    }
}

/// A client for the management API of one broker.
pub struct Management {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    /// The address without `/` at the end.
    base: String,
    login: String,
    vhost: String,
    /// The broker's AMQP port, if the address is a guess: another broker may have its API there.
    guessed_for: Option<u16>,
}

impl Management {
    /// The address without `/` at the end: `broker.management_url`, else the default port on the host of `url`.
    pub fn place(broker: &Settings, url: &BrokerUrl) -> String {
        let base = broker.management_url.as_ref().map_or_else(|| default_address(url), Uri::to_string);
        base.trim_end_matches('/').to_owned()
    }

    /// A client that logs in as `url` does.
    pub fn new(broker: &Settings, url: &BrokerUrl) -> Result<Self, tls::TlsError> {
        let base = Self::place(broker, url);
        let tls = if base.starts_with("https") { broker.tls.load()? } else { tls::client_without_authorities()? };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(Arc::unwrap_or_clone(tls))
            .https_or_http()
            .enable_http1()
            .build();
        let login = &url.expose().authority.userinfo;
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            base,
            login: format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{}", login.username, login.password))),
            vhost: url.vhost().to_owned(),
            guessed_for: broker.management_url.is_none().then(|| url.port()),
        })
    }

    /// The virtual host of the broker's URL.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// RabbitMQ's version, such as `4.0.5`. An error if the API belongs to another broker.
    pub async fn version(&self) -> Result<String, ManagementError> {
        let overview: Value = self.get("overview").await?;
        let listens = |port| move |listener: &Value| listener["port"] == port;
        if let (Some(port), Some(listeners)) = (self.guessed_for, overview["listeners"].as_array())
            && !listeners.iter().any(listens(port))
        {
            return Err(ManagementError::OtherBroker { url: self.base.clone() });
        }
        Ok(overview["rabbitmq_version"].as_str().unwrap_or_default().to_owned())
    }

    /// The JSON at this path below `/api/`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ManagementError> {
        let url = format!("{}/api/{path}", self.base);
        let failed = |reason: String| ManagementError::NoAnswer { url: url.clone(), reason };
        let request = Request::get(&url).header(AUTHORIZATION, &self.login).body(Empty::new());
        let request = request.map_err(|error| failed(error.to_string()))?;
        let answer = async {
            let response = self.client.request(request).await.map_err(|error| failed(chain(&error)))?;
            let status = response.status();
            if !status.is_success() {
                return Err(ManagementError::Refused { url: url.clone(), status: status.as_u16() });
            }
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| failed(error.to_string()))?.to_bytes();
            serde_json::from_slice(&body).map_err(|error| failed(format!("unexpected answer: {error}")))
        };
        timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(failed("not in time".to_owned())))
    }
}

/// RabbitMQ's default.
fn default_address(url: &BrokerUrl) -> String {
    let host = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
    if url.uses_tls() { format!("https://{host}:15671") } else { format!("http://{host}:15672") }
}

/// Encodes a text as one segment of a path (RFC 3986).
pub fn encoded(segment: &str) -> String {
    percent_encoding::utf8_percent_encode(segment, percent_encoding::NON_ALPHANUMERIC).to_string()
}
