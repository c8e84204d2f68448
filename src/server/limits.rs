//! The limits for the clients of a listener.

use std::error::Error;
use std::time::Duration;

use ipnet::IpNet;

/// The error of an answer whose body fails while it is sent.
pub(super) type BodyError = Box<dyn Error + Send + Sync>;

/// The limits of a listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum number of open connections.
    pub connections_max: usize,
    /// Maximum number of open connections from one source: an IPv4 address or an IPv6 /64.
    pub connections_per_source_max: usize,
    /// Networks to which the limit per source does not apply: proxies.
    pub unlimited_sources: Vec<IpNet>,
    /// Maximum time for a TLS handshake, for the first request head, and for a later one from its first byte.
    pub header_timeout: Duration,
    /// Maximum time between two requests of a connection; at least `header_timeout`.
    pub idle_timeout: Duration,
    /// Maximum time during which a client reads nothing of its answer.
    pub write_timeout: Duration,
    /// Maximum number of header fields of a request.
    pub headers_max: usize,
    /// Maximum size of a request head, in bytes.
    pub header_bytes_max: usize,
}
