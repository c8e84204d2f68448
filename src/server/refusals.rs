//! Connections that were refused or closed early: counted by reason, and logged once a minute for each reason.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Instant;

use metrics::Counter;
use tracing::{debug, info, warn};

use super::connection::End;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;

const PROXY_PROTOCOL: &str = "a proxy in front sends the PROXY protocol, which the relay does not speak: all its \
                              requests fail; switch it off there (send_proxy, proxy_protocol, \
                              proxy-protocol-version), and let the proxy set X-Forwarded-For";
const TLS_ON_PLAIN_PORT: &str = "a client speaks TLS, but this listener has none: all its requests fail; \
                                 terminate TLS in the proxy in front, or set http.tls";

/// The counters of one listener. They are registered once, so that a refusal costs no look-up.
pub(super) struct Refusals {
    listener: &'static str,
    tls_handshake: Reason,
    malformed: Reason,
    proxy_protocol: Reason,
    tls_on_plain_port: Reason,
    timeout: Reason,
    evicted: Reason,
    source_limit: Reason,
    log_limiter: LogLimiter,
}

struct Reason {
    label: &'static str,
    count: Counter,
}

impl Refusals {
    /// `listener` is its name in metrics and logs.
    pub(super) fn new(listener: &'static str, metrics: &Metrics) -> Self {
        let reason = |label| Reason { label, count: metrics.refused_connections(listener, label) };
        Self {
            listener,
            tls_handshake: reason("tls-handshake"),
            malformed: reason("malformed"),
            proxy_protocol: reason("proxy-protocol"),
            tls_on_plain_port: reason("tls-on-plain-port"),
            timeout: reason("timeout"),
            evicted: reason("evicted"),
            source_limit: reason("source-limit"),
            log_limiter: LogLimiter::default(),
        }
    }

    /// Counts and logs a connection that the peer forced the relay to refuse or to close.
    pub(super) fn on_end(&self, end: &End, peer: SocketAddr) {
        let listener = self.listener;
        let (reason, error) = match end {
            End::Closed => return,
            End::Broken(error) => return debug!(%peer, listener, error, "connection ended"),
            End::TlsHandshake(error) => (&self.tls_handshake, Some(error)),
            End::Malformed(error) => (&self.malformed, Some(error)),
            End::ProxyProtocol => return self.on_other_protocol(&self.proxy_protocol, peer, PROXY_PROTOCOL),
            End::TlsOnPlainPort => return self.on_other_protocol(&self.tls_on_plain_port, peer, TLS_ON_PLAIN_PORT),
            End::TimedOut => (&self.timeout, None),
            End::Evicted => (&self.evicted, None),
            End::SourceFull => (&self.source_limit, None),
        };
        reason.count.increment(1);
        let reason = reason.label;
        debug!(%peer, listener, reason, error, "connection refused");
        if let Some(unreported) = self.log_limiter.due(reason, Instant::now()) {
            info!(
                %peer, listener, reason, error, unreported,
                "connection refused; more for this reason are only counted for a minute"
            );
        }
    }

    /// Counts and logs a protocol that no webhook can arrive with. A proxy that is set up for it sends all webhooks so.
    fn on_other_protocol(&self, reason: &Reason, peer: SocketAddr, consequence: &'static str) {
        reason.count.increment(1);
        let (listener, reason) = (self.listener, reason.label);
        debug!(%peer, listener, reason, "connection refused");
        if let Some(unreported) = self.log_limiter.due(reason, Instant::now()) {
            warn!(%peer, listener, reason, unreported, "{consequence}");
        }
    }

    /// The number of unlogged errors of `accept` before this one, if this one is to be logged.
    pub(super) fn accept_error_due(&self) -> Option<Option<NonZeroU64>> {
        self.log_limiter.due("accept", Instant::now())
    }
}
