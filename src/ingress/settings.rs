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
    /// The path for webhooks. It starts with `/`, and is not [`HEALTH_PATH`].
    pub path: String,
    /// Maximum size of a body, in bytes.
    pub body_bytes_max: usize,
    /// Maximum memory for all bodies together, in bytes; at least `body_bytes_max`.
    pub buffer_bytes_max: usize,
    /// Maximum time for a TLS handshake, and for a request head.
    pub header_timeout: Duration,
    /// Maximum time between two requests of a connection.
    pub idle_timeout: Duration,
    /// Maximum time for a whole body.
    pub body_timeout: Duration,
    /// Maximum number of open connections; at least 1.
    pub connections_max: usize,
    /// Maximum number of open connections from one source; at least 1.
    pub connections_per_source_max: usize,
    /// Maximum number of header fields of a request.
    pub headers_max: usize,
    /// Maximum size of a request head, in bytes.
    pub header_bytes_max: usize,
    /// Certificate files of the listener; `None`: plain HTTP.
    pub tls: Option<ServerFiles>,
    /// Networks that may send; empty: every network.
    pub allowed_sources: Vec<IpNet>,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
}
