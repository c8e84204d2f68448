//! Refused webhooks in the log: each at debug, and of each kind one a minute as a warning, so that an attack or a wrong
//! secret is seen and does not fill the disk.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::answer::Refusal;

const WARN_EVERY: Duration = Duration::from_secs(60);

/// When each kind was last warned of, and how often it has come since.
#[derive(Default)]
pub struct Notices(Mutex<HashMap<&'static str, (Instant, u64)>>);

impl Notices {
    pub fn refused(&self, refusal: &Refusal, peer: SocketAddr) {
        let (code, detail) = (refusal.code(), refusal.detail());
        debug!(%peer, code, detail, "webhook refused");
        if let Some(unreported) = self.due(code, Instant::now()) {
            warn!(%peer, code, detail, unreported, "webhook refused; further ones of this kind are counted for a minute");
        }
    }

    /// Whether it is time for a warning, and how many were passed over before it.
    fn due(&self, code: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.get_mut(code) {
            Some((warned, unreported)) if now.saturating_duration_since(*warned) < WARN_EVERY => {
                *unreported += 1;
                None
            }
            Some((warned, unreported)) => {
                *warned = now;
                Some(std::mem::take(unreported))
            }
            None => {
                kinds.insert(code, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_a_minute_for_each_kind() {
        let (notices, start) = (Notices::default(), Instant::now());
        assert_eq!(notices.due("a", start), Some(0));
        assert_eq!(notices.due("b", start), Some(0));
        assert_eq!(notices.due("a", start + WARN_EVERY / 2), None);
        assert_eq!(notices.due("a", start + WARN_EVERY), Some(1));
    }
}
