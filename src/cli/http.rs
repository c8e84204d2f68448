//! Addresses of a relay's listeners, and requests to its operators' listener.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::bail;
use hyper::Uri;
use hyper::http::uri::{InvalidUri, Scheme};
use serde_json::Value;

use super::failure::Failure;
use crate::config::Config;
use crate::http_client::{HttpClient, Limits, get, http_client};
use crate::secret::Secret;
use crate::text::clean;
use crate::tls;

/// Maximum size of an answer, in bytes: far larger than any status.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A resource of the operators' listener.
pub(super) struct OpsResource {
    client: HttpClient,
    url: String,
    authorization: Option<String>,
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
        Ok(Self { client, url, authorization: None, limits })
    }

    pub(super) fn with_token(mut self, token: Option<&Secret>) -> Self {
        self.authorization = token.map(|token| format!("Bearer {}", token.expose()));
        self
    }

    /// Returns the body as JSON, or `null` if it is not JSON. A status other than 2xx is an error.
    pub(super) async fn get(&self) -> anyhow::Result<Value> {
        let Self { client, url, authorization, limits } = self;
        let answer = get(client, url, authorization.as_deref(), limits).await?;
        let json: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        if answer.status.is_success() {
            return Ok(json);
        }
        let detail = clean(json["detail"].as_str().unwrap_or("not an operators' listener; see ops.listen"));
        bail!("{url} answers {}: {detail}", answer.status.as_u16());
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
