//! Addresses of a relay's listeners, and requests to its operators' listener.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::bail;
use hyper::header::{AUTHORIZATION, HeaderName};
use hyper::http::uri::{InvalidUri, Scheme};
use hyper::{Method, Uri};
use serde_json::Value;

use super::failure::Failure;
use crate::config::Config;
use crate::http_client::{HttpClient, Limits, ask, http_client};
use crate::secret::Secret;
use crate::text::clean;
use crate::tls;

/// Maximum size of an answer, in bytes: far larger than any status.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The header of an action without the operators' token.
const ACTION_HEADER: HeaderName = HeaderName::from_static("x-prism-token");

/// A resource of the operators' listener.
pub(super) struct OpsResource {
    client: HttpClient,
    url: String,
    /// The header that proves who asks.
    credential: Option<(HeaderName, String)>,
    limits: Limits,
}

impl OpsResource {
    /// The resource at `path` below `base`, or below `ops.listen` of the configuration.
    pub(super) fn new(config: &Config, base: Option<Uri>, path: &str, deadline: Duration) -> Result<Self, Failure> {
        let url = match base {
            Some(base) => format!("{}{path}", base.to_string().trim_end_matches('/')),
            None => listener_url(config.ops.listen, "ops.listen", path)?,
        };
        let client = http_client(tls::client_without_authorities()?);
        let limits = Limits { deadline, bytes_max: ANSWER_BYTES_MAX };
        Ok(Self { client, url, credential: None, limits })
    }

    pub(super) fn with_token(mut self, token: Option<&Secret>) -> Self {
        self.credential = token.map(|token| (AUTHORIZATION, format!("Bearer {}", token.expose())));
        self
    }

    /// Allows this resource to change something: with the operators' token, or else with the token that the relay gives
    /// to those who may read.
    pub(super) async fn for_action(self, config: &Config, base: Option<Uri>) -> Result<Self, Failure> {
        if config.ops.token.is_some() {
            return Ok(self.with_token(config.ops.token.as_ref()));
        }
        let answer = Self::new(config, base, "/api/action-token", self.limits.deadline)?.get().await?;
        let token = answer["token"].as_str().unwrap_or_default().to_owned();
        Ok(Self { credential: Some((ACTION_HEADER, token)), ..self })
    }

    /// Returns the body as JSON, or `null` if it is not JSON. A status other than 2xx is an error.
    pub(super) async fn get(&self) -> anyhow::Result<Value> {
        self.ask(Method::GET, &self.url).await
    }

    /// Posts to this resource with a query, without a body. The answer is that of [`Self::get`].
    pub(super) async fn post(&self, query: &str) -> anyhow::Result<Value> {
        self.ask(Method::POST, &format!("{}?{query}", self.url)).await
    }

    async fn ask(&self, method: Method, url: &str) -> anyhow::Result<Value> {
        let answer = ask(&self.client, method, url, self.credential.as_ref(), &self.limits).await?;
        let json: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
        if answer.status().is_success() {
            return Ok(json);
        }
        let detail = clean(json["detail"].as_str().unwrap_or("not an operators' listener; see ops.listen"));
        bail!("{url} answers {}: {detail}", answer.status().as_u16());
    }
}

/// Parses an option that takes the address of an operators' listener, which speaks plain HTTP only.
pub(super) fn ops_url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.parse().map_err(|error: InvalidUri| error.to_string())?;
    let is_base = url.scheme() == Some(&Scheme::HTTP) && url.query().is_none();
    if is_base { Ok(url) } else { Err("must be an address such as http://127.0.0.1:9090".to_owned()) }
}

/// The URL of `path` on a listener. `key` names the setting that `address` comes from.
pub(super) fn listener_url(mut address: SocketAddr, key: &str, path: &str) -> Result<String, Failure> {
    if address.port() == 0 {
        return Err(Failure::Usage(format!("{key} has no fixed port: give the address with --url")));
    }
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    Ok(format!("http://{address}{path}"))
}
