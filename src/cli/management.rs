//! What RabbitMQ's management API tells of a virtual host, where there is one that answers: bindings and policies, of which AMQP
//! says nothing (<https://www.rabbitmq.com/docs/management#http-api>).

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

use crate::config::{Broker, BrokerUrl};
use crate::telemetry::chain;
use crate::tls;
use crate::topology::{Live, encoded};

/// For one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A broker with ten thousand queues tells less.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Why it tells nothing.
#[derive(Debug, Error)]
pub enum ManagementError {
    #[error("no answer from {url}: {reason}")]
    NoAnswer { url: String, reason: String },
    #[error("{url} is of another broker; set broker.management_url")]
    OtherBroker { url: String },
    #[error("{url} answers {status}{}", self.hint())]
    Refused { url: String, status: u16 },
}

impl ManagementError {
    fn hint(&self) -> &'static str {
        match self {
            Self::Refused { status: 401, .. } => {
                ": it lets in users with the tag monitoring, management or administrator, by password"
            }
            _ => "",
        }
    }
}

/// The API of a broker.
pub struct Management {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    /// Without `/` at the end.
    base: String,
    login: String,
    vhost: String,
    /// The broker's port for AMQP, if the address is a guess: another broker may have its API there.
    port: Option<u16>,
}

impl Management {
    /// Where it is looked for, without `/` at the end: beside one of the broker's urls, unless the configuration tells another
    /// place.
    pub fn place(broker: &Broker, url: &BrokerUrl) -> String {
        let base = broker.management_url.as_ref().map_or_else(|| beside(url), Uri::to_string);
        base.trim_end_matches('/').to_owned()
    }

    /// With the login of that url.
    pub fn new(broker: &Broker, url: &BrokerUrl) -> Result<Self, tls::TlsError> {
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
            port: broker.management_url.is_none().then(|| url.port()),
        })
    }

    pub async fn look(&self) -> Result<Live, ManagementError> {
        let vhost = encoded(&self.vhost);
        let overview: Value = self.get("overview").await?;
        let listens = |port| move |listener: &Value| listener["port"] == port;
        if let (Some(port), Some(listeners)) = (self.port, overview["listeners"].as_array())
            && !listeners.iter().any(listens(port))
        {
            return Err(ManagementError::OtherBroker { url: self.base.clone() });
        }
        Ok(Live {
            version: overview["rabbitmq_version"].as_str().unwrap_or_default().to_owned(),
            exchanges: self.get(&format!("exchanges/{vhost}")).await?,
            queues: self.get(&format!("queues/{vhost}")).await?,
            bindings: self.get(&format!("bindings/{vhost}")).await?,
            policies: self.get(&format!("policies/{vhost}")).await?,
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ManagementError> {
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
            serde_json::from_slice(&body).map_err(|error| failed(format!("that is not what was expected: {error}")))
        };
        timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err(failed("not in time".to_owned())))
    }
}

/// Where RabbitMQ has it by default.
fn beside(url: &BrokerUrl) -> String {
    let host = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
    if url.wants_tls() { format!("https://{host}:15671") } else { format!("http://{host}:15672") }
}
