//! The settings of the public listener.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::tls::ServerFiles;

/// Answers like `/readyz` on the public listener, for load balancers.
pub const HEALTH_PATH: &str = "/healthz";

/// The section `[http]`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen; port 0 takes any free port.
    pub listen: SocketAddr,
    /// Starts with `/`, and is not [`HEALTH_PATH`].
    pub path: String,
    /// Largest body, in bytes.
    pub body_bytes_max: usize,
    /// For all bodies together; at least `body_bytes_max`.
    pub buffer_bytes_max: usize,
    /// For a TLS handshake, and for a request head.
    pub header_timeout: Duration,
    /// For a whole body.
    pub body_timeout: Duration,
    /// At least 1.
    pub connections_max: usize,
    /// At least 1.
    pub connections_per_source_max: usize,
    /// Most header fields of a request.
    pub headers_max: usize,
    /// Largest request head, in bytes.
    pub header_bytes_max: usize,
    /// `None`: plain HTTP.
    pub tls: Option<ServerFiles>,
    /// Empty: everyone.
    pub allowed_sources: Vec<IpNet>,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
}
