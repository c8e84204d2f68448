//! RabbitMQ's management API, which knows what AMQP cannot ask for: bindings and policies
//! (<https://www.rabbitmq.com/docs/management#http-api>).

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::header::{AUTHORIZATION, HeaderName};
use hyper::{Method, Uri};
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use super::settings::Settings;
use super::url::BrokerUrl;
use crate::http_client::{HttpClient, Limits, NoAnswer, ask, http_client};
use crate::tls;

/// Limits for an answer. A broker with ten thousand queues answers less.
const LIMITS: Limits = Limits { deadline: Duration::from_secs(10), bytes_max: 64 * 1024 * 1024 };

/// Why the management API gave no answer.
#[derive(Debug, Error)]
pub(crate) enum ManagementError {
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    #[error("unexpected answer from {url}")]
    Unexpected { url: String, source: serde_json::Error },
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
pub(crate) struct Management {
    client: HttpClient,
    /// The address without `/` at the end.
    base: String,
    login: (HeaderName, String),
    vhost: String,
    /// The broker's AMQP port, if the address is a guess: another broker may have its API there.
    guessed_for: Option<u16>,
}

impl Management {
    /// The address without `/` at the end: `broker.management_url`, else the default port on the host of `url`.
    pub(crate) fn place(broker: &Settings, url: &BrokerUrl) -> String {
        let base = broker.management_url.as_ref().map_or_else(|| default_address(url), Uri::to_string);
        base.trim_end_matches('/').to_owned()
    }

    /// A client that logs in as `url` does.
    pub(crate) fn new(broker: &Settings, url: &BrokerUrl) -> Result<Self, tls::TlsError> {
        let base = Self::place(broker, url);
        let tls = if base.starts_with("https") { broker.tls.load()? } else { tls::client_without_authorities()? };
        let login = &url.expose().authority.userinfo;
        let login = format!("{}:{}", login.username, login.password);
        Ok(Self {
            client: http_client(tls),
            base,
            login: (AUTHORIZATION, format!("Basic {}", BASE64_STANDARD.encode(login))),
            vhost: url.vhost().to_owned(),
            guessed_for: broker.management_url.is_none().then(|| url.port()),
        })
    }

    /// The address without `/` at the end.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// The virtual host of the broker's URL.
    pub(crate) fn vhost(&self) -> &str {
        &self.vhost
    }

    /// RabbitMQ's version, such as `4.0.5`. An error if the API belongs to another broker.
    pub(crate) async fn version(&self) -> Result<String, ManagementError> {
        let overview: Value = self.get("overview").await?;
        let listens = |port| move |listener: &Value| listener["port"] == port;
        if let (Some(port), Some(listeners)) = (self.guessed_for, overview["listeners"].as_array())
            && !listeners.iter().any(listens(port))
        {
            return Err(ManagementError::OtherBroker { url: self.base.clone() });
        }
        Ok(overview["rabbitmq_version"].as_str().unwrap_or_default().to_owned())
    }

    /// The answer of a health check below `/api/health/checks/`: 503 says that something is wrong.
    pub(crate) async fn health_check(&self, path: &str) -> Result<Value, ManagementError> {
        let url = format!("{}/api/health/checks/{path}", self.base);
        let answer = ask(&self.client, Method::GET, &url, Some(&self.login), &LIMITS).await?;
        match answer.status().as_u16() {
            200 | 503 => read(answer.body()).map_err(|source| ManagementError::Unexpected { url, source }),
            status => Err(ManagementError::Refused { url, status }),
        }
    }

    /// The JSON at this path below `/api/`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ManagementError> {
        let url = format!("{}/api/{path}", self.base);
        let answer = ask(&self.client, Method::GET, &url, Some(&self.login), &LIMITS).await?;
        if !answer.status().is_success() {
            return Err(ManagementError::Refused { url, status: answer.status().as_u16() });
        }
        read(answer.body()).map_err(|source| ManagementError::Unexpected { url, source })
    }
}

/// Reads an answer. A field that occurs twice counts with its last value: RabbitMQ 3.10 sends `online` twice for a
/// queue that has lost its leader.
fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice::<Value>(json).and_then(serde_json::from_value)
}

/// RabbitMQ's default.
fn default_address(url: &BrokerUrl) -> String {
    let host = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
    if url.uses_tls() { format!("https://{host}:15671") } else { format!("http://{host}:15672") }
}

/// Encodes a text as one segment of a path (RFC 3986).
pub(crate) fn encoded(segment: &str) -> String {
    percent_encoding::utf8_percent_encode(segment, percent_encoding::NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_occurs_twice_counts_with_its_last_value() {
        #[derive(serde::Deserialize)]
        struct Queue {
            online: Vec<String>,
        }
        let queue: Queue = read(br#"{"online":["a","b"],"online":["a"]}"#).unwrap();
        assert_eq!(queue.online, ["a"]);
    }
}
