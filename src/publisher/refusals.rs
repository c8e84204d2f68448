//! Messages that the broker refuses: what its reply blames, and what it has refused recently. Pure; outlives a session.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How many refused routing keys are remembered. The next one is only found out again.
const KEYS_MAX: usize = 1000;

/// What the broker's reply names as the cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// The user may not publish with this routing key.
    Key(String),
    /// The broker takes no body above this many bytes.
    Size(usize),
    /// The reply does not say which message is to blame.
    Unnamed,
}

impl Blame {
    /// Reads the texts of RabbitMQ 3.10 to 4.3: `write access to topic 'KEY' in exchange ...` and `message size N is
    /// larger than configured max size N`. RabbitMQ cuts replies at 255 bytes; a key that is cut is not named.
    pub(super) fn parse(reply: &str) -> Self {
        if let Some((_, rest)) = reply.split_once("access to topic '")
            && let Some((key, _)) = rest.split_once("' in exchange")
        {
            return Self::Key(key.to_owned());
        }
        if reply.contains("message size")
            && let Some((_, size)) = reply.rsplit_once("max size ")
            && let Ok(size) = size.trim_end().parse()
        {
            return Self::Size(size);
        }
        Self::Unnamed
    }

    /// Whether this is to blame for a message with this key and this many bytes.
    pub(super) fn concerns(&self, key: &str, bytes: usize) -> bool {
        match self {
            Self::Key(refused) => refused == key,
            Self::Size(max) => bytes > *max,
            Self::Unnamed => false,
        }
    }
}

/// What the broker refused recently. Events that it would refuse as well are parked without a try.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    keys: HashMap<String, Refusal>,
    size: Option<(usize, Refusal)>,
}

#[derive(Debug)]
struct Refusal {
    until: Instant,
    reason: String,
}

impl Refusals {
    /// Remembers a refusal for as long as parked events wait for a retry.
    pub(super) fn remember(&mut self, blame: &Blame, reason: &str, keep: Duration, now: Instant) {
        // The sum is too large for an `Instant`. Without an entry the refusal is only found out again.
        let Some(until) = now.checked_add(keep) else { return };
        let refusal = Refusal { until, reason: reason.to_owned() };
        match blame {
            Blame::Key(key) => {
                self.keys.retain(|_, refusal| refusal.until > now);
                if self.keys.len() < KEYS_MAX {
                    self.keys.insert(key.clone(), refusal);
                }
            }
            Blame::Size(size) => self.size = Some((*size, refusal)),
            Blame::Unnamed => {}
        }
    }

    /// The broker's reply, if it would refuse a message with this key and this many bytes.
    pub(super) fn reason(&self, key: &str, bytes: usize, now: Instant) -> Option<&str> {
        let by_size = self.size.as_ref().filter(|(max, _)| bytes > *max).map(|(_, refusal)| refusal);
        let by_key = (!self.keys.is_empty()).then(|| self.keys.get(key)).flatten();
        let current = by_size.into_iter().chain(by_key).find(|refusal| refusal.until > now);
        current.map(|refusal| refusal.reason.as_str())
    }

    /// Forgets everything: a round of retries begins.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(60);

    #[test]
    fn the_replies_of_rabbitmq_name_the_key_or_the_size() {
        let key = |key: &str| Blame::Key(key.to_owned());
        for (reply, blame) in [
            // RabbitMQ 3.10.8.
            (
                "ACCESS_REFUSED - write access to topic 'scan.a-b' in exchange 'prism.events' in vhost '/' refused for \
                 user 'relay'",
                key("scan.a-b"),
            ),
            ("PRECONDITION_FAILED - message size 3000 is larger than configured max size 2000", Blame::Size(2000)),
            (
                "PRECONDITION_FAILED - message size 536870913 is larger than max size 536870912",
                Blame::Size(536_870_912),
            ),
            // Cut at 255 bytes.
            ("ACCESS_REFUSED - write access to topic 'scan.aaaa...", Blame::Unnamed),
            ("ACCESS_REFUSED - write access to exchange 'prism.events' in vhost '/' refused", Blame::Unnamed),
            ("PRECONDITION_FAILED - invalid expiration", Blame::Unnamed),
            ("message size 3000 is larger than max size ?", Blame::Unnamed),
        ] {
            assert_eq!(Blame::parse(reply), blame, "{reply}");
        }
        assert!(key("a").concerns("a", 1) && !key("a").concerns("a.b", 1));
        assert!(Blame::Size(10).concerns("a", 11) && !Blame::Size(10).concerns("a", 10));
        assert!(!Blame::Unnamed.concerns("", usize::MAX));
    }

    #[test]
    fn a_refusal_is_remembered_until_the_next_retry() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        assert_eq!(refusals.reason("a", 1000, now), None);
        refusals.remember(&Blame::Key("a".to_owned()), "no a", KEEP, now);
        refusals.remember(&Blame::Size(100), "too large", KEEP, now + KEEP / 2);
        refusals.remember(&Blame::Unnamed, "why", KEEP, now);
        assert_eq!(refusals.reason("a", 1, now), Some("no a"));
        assert_eq!(refusals.reason("b", 101, now), Some("too large"));
        assert_eq!(refusals.reason("b", 100, now), None);
        assert_eq!(
            (refusals.reason("a", 1, now + KEEP), refusals.reason("b", 101, now + KEEP)),
            (None, Some("too large"))
        );
        refusals.forget();
        assert_eq!((refusals.reason("a", 1, now), refusals.reason("b", 101, now)), (None, None));
    }

    #[test]
    fn the_memory_is_bounded_and_makes_room_for_newer_refusals() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for number in 0..2 * KEYS_MAX {
            refusals.remember(&Blame::Key(number.to_string()), "no", KEEP, now);
        }
        assert_eq!(refusals.keys.len(), KEYS_MAX);
        refusals.remember(&Blame::Key("new".to_owned()), "no", KEEP, now + KEEP);
        assert_eq!(refusals.keys.len(), 1);
    }
}
