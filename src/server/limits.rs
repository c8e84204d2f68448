//! The limits for the clients of a listener.

use std::error::Error;
use std::time::Duration;

use ipnet::IpNet;

/// The error of an answer whose body fails while it is sent.
pub(super) type BodyError = Box<dyn Error + Send + Sync>;

/// The limits of a listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections in all.
    pub connections_max: usize,
    /// For one source: an IPv4 address or an IPv6 /64.
    pub connections_per_source_max: usize,
    /// Peers without a limit for their source: proxies.
    pub unlimited_sources: Vec<IpNet>,
    /// For a TLS handshake, for a request head, and for a connection without a request.
    pub header_timeout: Duration,
    /// For a client that reads none of its answer.
    pub write_timeout: Duration,
    /// Header fields of a request.
    pub headers_max: usize,
    /// The size of a request head.
    pub header_bytes_max: usize,
}
