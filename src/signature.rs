//! Verifies Prism's signature over the raw bytes of a body. Pure; takes `now`; knows neither HTTP statuses nor JSON.
//!
//! The scheme is Prism's own: `prism-signature` is the lower-case hex of HMAC-SHA256, keyed by the secret's UTF-8
//! bytes, over `<prism-timestamp>.<raw body>`. The timestamp is signed as well, so it goes into the HMAC
//! exactly as it was received.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use jiff::{SignedDuration, Timestamp};
use sha2::Sha256;
use subtle::{ConditionallySelectable, ConstantTimeEq};
use thiserror::Error;

use crate::secret::Secret;
use crate::text::hex;

/// The header that carries the time of signing, ISO 8601.
pub const TIMESTAMP_HEADER: &str = "prism-timestamp";
/// The header that carries the signature.
pub const SIGNATURE_HEADER: &str = "prism-signature";

/// Maximum number of secrets: enough for any rotation, and few enough to try each of them for every request.
pub const SECRETS_MAX: usize = 8;

/// The section `[signature]`.
#[derive(Debug)]
pub struct Settings {
    /// Whether requests without a signature are refused.
    pub required: bool,
    /// The secrets, of which any may match; at most [`SECRETS_MAX`].
    pub secrets: Vec<Secret>,
    /// The file that holds the secrets; it is reloaded when it changes.
    pub secrets_file: Option<PathBuf>,
    /// How far the time of signing may be from now, either way.
    pub tolerance: Duration,
}

/// Why a request is not believed to come from Prism.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Rejection {
    /// The request has no such header.
    #[error("the header {0} is missing")]
    Missing(&'static str),
    /// The time of signing cannot be read.
    #[error("the header prism-timestamp is not an ISO 8601 time with an offset, such as 2025-10-01T21:26:17Z")]
    InvalidTimestamp,
    /// No configured secret made the signature.
    #[error("the signature matches none of the configured secrets")]
    InvalidSignature,
    /// The time of signing is too far from now: a clock is wrong, or the request was captured.
    #[error("the request was signed {age} s ago (negative: in the future); {tolerance} s either way are allowed")]
    StaleTimestamp {
        /// Seconds since the signing; negative if it is in the future.
        age: i64,
        /// The allowed seconds, either way.
        tolerance: u64,
    },
}

/// A body that was verified. Only this module makes one: the signature is valid, or the configuration allows unsigned
/// bodies.
pub struct Accepted<B> {
    body: B,
    signed: Option<Signed>,
}

/// Facts from a valid signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signed {
    /// The position of its secret in the list, from 0.
    pub secret: usize,
    /// Until when the same request, captured and sent again, would be accepted.
    pub valid_until: Timestamp,
}

impl<B> Accepted<B> {
    /// Whether the body has a valid signature.
    pub fn authentic(&self) -> bool {
        self.signed.is_some()
    }

    /// Which secret signed the body; `None` for an unsigned one.
    pub fn signed(&self) -> Option<Signed> {
        self.signed
    }

    /// The body as received.
    pub fn body(&self) -> &B {
        &self.body
    }

    /// The body as received, without a copy.
    pub fn into_body(self) -> B {
        self.body
    }
}

/// The body has a `userToken` in it, so it is not shown.
impl<B> fmt::Debug for Accepted<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted").field("signed", &self.signed).finish_non_exhaustive()
    }
}

/// Checks signatures against a set of secrets, which can be replaced at any time.
pub struct Verifier {
    keys: RwLock<Arc<[Hmac<Sha256>]>>,
    required: bool,
    tolerance: Duration,
}

impl Verifier {
    /// `secrets`: any of them may have signed. `tolerance`: how far the time of signing may lie from now, either way.
    pub fn new(secrets: &[Secret], required: bool, tolerance: Duration) -> Self {
        Self { keys: RwLock::new(keys(secrets)), required, tolerance }
    }

    /// How many secrets there are.
    pub fn secrets(&self) -> usize {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Replaces all secrets.
    pub fn replace(&self, secrets: &[Secret]) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys(secrets);
    }

    /// Accepts `body` if a secret signed it within the tolerance, or if it is unsigned and signatures are not required.
    ///
    /// A signature that is present is checked whenever there is a secret. Without a secret it is ignored if signatures
    /// are not required: an account that begins to sign must not lose its events.
    pub fn verify<B: AsRef<[u8]>>(
        &self,
        timestamp: Option<&[u8]>,
        signature: Option<&[u8]>,
        body: B,
        now: Timestamp,
    ) -> Result<Accepted<B>, Rejection> {
        let keys = Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner));
        if !self.required && (signature.is_none() || keys.is_empty()) {
            return Ok(Accepted { body, signed: None });
        }
        let signature = signature.ok_or(Rejection::Missing(SIGNATURE_HEADER))?;
        let timestamp = timestamp.ok_or(Rejection::Missing(TIMESTAMP_HEADER))?;
        let signed_at: Timestamp = std::str::from_utf8(timestamp)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(Rejection::InvalidTimestamp)?;

        let secret = signer(&keys, timestamp, body.as_ref(), signature).ok_or(Rejection::InvalidSignature)?;
        // Checked after the signature, so that this rejection means a wrong clock and not a forged request.
        let age = now.as_second() - signed_at.as_second();
        let tolerance = self.tolerance.as_secs();
        if now.duration_since(signed_at).unsigned_abs() > self.tolerance {
            return Err(Rejection::StaleTimestamp { age, tolerance });
        }
        let valid_for = SignedDuration::try_from(self.tolerance).unwrap_or(SignedDuration::MAX);
        let valid_until = signed_at.checked_add(valid_for).unwrap_or(Timestamp::MAX);
        Ok(Accepted { body, signed: Some(Signed { secret, valid_until }) })
    }
}

/// Tries every key, also after a match, so that the time taken does not reveal which one it was.
fn signer(keys: &[Hmac<Sha256>], timestamp: &[u8], body: &[u8], signature: &[u8]) -> Option<usize> {
    const NONE: u32 = u32::MAX;
    let mut found = NONE;
    for (position, key) in (0..NONE).zip(keys) {
        let matches = digest(key, timestamp, body).as_bytes().ct_eq(signature);
        found.conditional_assign(&position, matches);
    }
    (found != NONE).then_some(found as usize)
}

/// The value of `prism-signature` for this body, as Prism computes it.
pub fn sign(secret: &Secret, timestamp: &str, body: &[u8]) -> String {
    digest(&key(secret), timestamp.as_bytes(), body)
}

fn keys(secrets: &[Secret]) -> Arc<[Hmac<Sha256>]> {
    secrets.iter().map(key).collect()
}

fn key(secret: &Secret) -> Hmac<Sha256> {
    // RFC 2104: HMAC takes keys of any length, so this cannot fail.
    Hmac::new_from_slice(secret.expose().as_bytes()).expect("HMAC takes keys of any length")
}

fn digest(key: &Hmac<Sha256>, timestamp: &[u8], body: &[u8]) -> String {
    let mut mac = key.clone();
    mac.update(timestamp);
    mac.update(b".");
    mac.update(body);
    hex(&mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOLERANCE: Duration = Duration::from_secs(300);

    fn verifier(secrets: &[&str], required: bool) -> Verifier {
        let secrets: Vec<_> = secrets.iter().copied().map(Secret::new).collect();
        Verifier::new(&secrets, required, TOLERANCE)
    }

    fn vectors() -> Vec<serde_json::Value> {
        serde_json::from_str(include_str!("../deploy/workers/vectors/signatures.json")).unwrap()
    }

    #[test]
    fn every_vector_passes_or_is_refused() {
        for vector in vectors() {
            let text = |name: &str| vector[name].as_str().unwrap().to_owned();
            let timestamp = text(TIMESTAMP_HEADER);
            let accepted = verifier(&["another", &text("secret")], true).verify(
                Some(timestamp.as_bytes()),
                Some(text(SIGNATURE_HEADER).as_bytes()),
                text("body"),
                timestamp.parse().unwrap(),
            );
            assert_eq!(accepted.is_ok_and(|accepted| accepted.authentic()), vector["valid"] == true, "{vector}");
            let signature = sign(&Secret::new(text("secret")), &timestamp, text("body").as_bytes());
            assert_eq!(signature == text(SIGNATURE_HEADER), vector["valid"] == true, "{vector}");
        }
    }

    #[test]
    fn a_changed_byte_anywhere_is_refused() {
        let (timestamp, body) = ("2025-10-01T21:26:17Z", b"{}".as_slice());
        let now = timestamp.parse().unwrap();
        let signature = sign(&Secret::new("s"), timestamp, body);
        let check = |timestamp: &str, signature: &str, body: &[u8]| {
            verifier(&["s"], true)
                .verify(Some(timestamp.as_bytes()), Some(signature.as_bytes()), body, now)
                .map(|accepted| accepted.authentic())
        };
        assert_eq!(check(timestamp, &signature, body), Ok(true));
        assert_eq!(check(timestamp, &signature, b"{ }"), Err(Rejection::InvalidSignature));
        assert_eq!(check("2025-10-01T21:26:18Z", &signature, body), Err(Rejection::InvalidSignature));
        for position in 0..signature.len() {
            let mut bytes = signature.clone().into_bytes();
            bytes[position] ^= 1;
            let forged = String::from_utf8(bytes).unwrap();
            assert_eq!(check(timestamp, &forged, body), Err(Rejection::InvalidSignature));
        }
        for forged in ["", "00", &signature[..63], &format!("{signature}0"), &signature.to_uppercase()] {
            assert_eq!(check(timestamp, forged, body), Err(Rejection::InvalidSignature), "{forged}");
        }
    }

    #[test]
    fn tolerance_holds_both_ways() {
        let signed_at: Timestamp = "2025-10-01T21:26:17Z".parse().unwrap();
        let check = |offset: i64| {
            let text = signed_at.to_string();
            let signature = sign(&Secret::new("s"), &text, b"{}");
            let now = Timestamp::from_second(signed_at.as_second() + offset).unwrap();
            verifier(&["s"], true).verify(Some(text.as_bytes()), Some(signature.as_bytes()), b"{}", now).map(|_| ())
        };
        assert_eq!(check(300), Ok(()));
        assert_eq!(check(-300), Ok(()));
        assert_eq!(check(301), Err(Rejection::StaleTimestamp { age: 301, tolerance: 300 }));
        assert_eq!(check(-301), Err(Rejection::StaleTimestamp { age: -301, tolerance: 300 }));
    }

    #[test]
    fn the_secret_that_signed_is_reported_and_secrets_can_be_replaced() {
        let verifier = verifier(&["new", "old"], true);
        let now: Timestamp = "2025-10-01T21:26:17Z".parse().unwrap();
        let check = |secret: &str| {
            let signed_at = "2025-10-01T21:25:17Z";
            let signature = sign(&Secret::new(secret), signed_at, b"{}");
            verifier.verify(Some(signed_at.as_bytes()), Some(signature.as_bytes()), b"{}", now).map(|a| a.signed())
        };
        let valid_until = "2025-10-01T21:30:17Z".parse().unwrap();
        assert_eq!(check("new"), Ok(Some(Signed { secret: 0, valid_until })));
        assert_eq!(check("old"), Ok(Some(Signed { secret: 1, valid_until })));
        verifier.replace(&[Secret::new("newest"), Secret::new("new")]);
        assert_eq!(check("old"), Err(Rejection::InvalidSignature));
        assert_eq!(check("new"), Ok(Some(Signed { secret: 1, valid_until })));
    }

    #[test]
    fn unsigned_requests_pass_only_where_signatures_are_not_required() {
        let now = Timestamp::UNIX_EPOCH;
        let missing = |required| verifier(&["s"], required).verify(None, None, b"{}", now).map(|a| a.authentic());
        assert_eq!(missing(true), Err(Rejection::Missing(SIGNATURE_HEADER)));
        assert_eq!(missing(false), Ok(false));
        let forged = |secrets: &[&str]| {
            let timestamp = Some(b"1970-01-01T00:00:00Z".as_slice());
            verifier(secrets, false).verify(timestamp, Some(b"00"), b"{}", now).map(|a| a.authentic())
        };
        assert_eq!(forged(&["s"]), Err(Rejection::InvalidSignature));
        assert_eq!(forged(&[]), Ok(false));
    }

    #[test]
    fn invalid_timestamps_are_rejected_as_such() {
        for bad in ["", "now", "1759353977", "2025-10-01", "2025-10-01T21:26:17", "2025-13-01T21:26:17Z"] {
            let signature = sign(&Secret::new("s"), bad, b"{}");
            let result = verifier(&["s"], true).verify(
                Some(bad.as_bytes()),
                Some(signature.as_bytes()),
                b"{}",
                Timestamp::now(),
            );
            assert_eq!(result.map(|_| ()), Err(Rejection::InvalidTimestamp), "{bad}");
        }
        let result = verifier(&["s"], true).verify(Some(b"\xff"), Some(b"00"), b"{}", Timestamp::now());
        assert_eq!(result.map(|_| ()), Err(Rejection::InvalidTimestamp));
    }

    proptest! {
        #[test]
        fn nothing_is_accepted_without_the_secret(
            timestamp in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..40),
                "[-+]?[0-9]{1,6}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{1,12})?(Z|[-+][0-9]{2}:[0-9]{2})"
                    .prop_map(String::into_bytes),
            ],
            signature in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..80),
                "[0-9a-f]{64}".prop_map(String::into_bytes),
            ],
            body in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let outcome = verifier(&["s"], true).verify(Some(&timestamp), Some(&signature), &body, Timestamp::now());
            prop_assert!(outcome.is_err());
        }

        #[test]
        fn everything_signed_within_the_tolerance_is_authentic(
            body in proptest::collection::vec(any::<u8>(), 0..100),
            offset in -299i64..299,
        ) {
            let now = Timestamp::now();
            let timestamp = (now + jiff::SignedDuration::from_secs(offset)).to_string();
            let signature = sign(&Secret::new("s"), &timestamp, &body);
            let verifier = verifier(&["other", "s"], true);
            let outcome = verifier.verify(Some(timestamp.as_bytes()), Some(signature.as_bytes()), &body, now);
            prop_assert!(outcome.is_ok_and(|accepted| accepted.authentic()));
        }
    }
}
