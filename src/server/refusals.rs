//! Connections that were refused or closed early: counted by reason, and logged once a minute for each reason.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Instant;

use metrics::Counter;
use tracing::{debug, info};

use super::connection::End;
use crate::log_limiter::LogLimiter;
use crate::metrics::Metrics;

/// The counters of one listener. They are registered once, so that a refusal costs no look-up.
pub(super) struct Refusals {
    listener: &'static str,
    tls_handshake: Reason,
    malformed: Reason,
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

    /// The number of unlogged errors of `accept` before this one, if this one is to be logged.
    pub(super) fn accept_error_due(&self) -> Option<Option<NonZeroU64>> {
        self.log_limiter.due("accept", Instant::now())
    }
}
