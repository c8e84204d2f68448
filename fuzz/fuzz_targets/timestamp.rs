//! Timestamps of any shape under a signature that is right: they are read within the tolerance, or refused.
//!
//! Input: eight bytes of clock (seconds since 1970, little-endian), then the timestamp.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use prism_relay::secret::Secret;
use prism_relay::signature::{Rejection, Verifier, sign};

const TOLERANCE: Duration = Duration::from_secs(300);

static SECRET: LazyLock<Secret> = LazyLock::new(|| Secret::new("whsec_known"));
static VERIFIER: LazyLock<Verifier> =
    LazyLock::new(|| Verifier::new(std::slice::from_ref(&*SECRET), true, TOLERANCE));

fuzz_target!(|input: &[u8]| {
    let Some((clock, text)) = input.split_first_chunk() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let (first, last) = (Timestamp::MIN.as_second(), Timestamp::MAX.as_second());
    let now = Timestamp::from_second(i64::from_le_bytes(*clock).clamp(first, last)).unwrap();
    let signature = sign(&SECRET, text, b"{}");
    match VERIFIER.verify(Some(text.as_bytes()), Some(signature.as_bytes()), b"{}", now) {
        Ok(accepted) => {
            let signed_at: Timestamp = text.parse().expect("an accepted timestamp is one");
            assert!(accepted.authentic() && now.duration_since(signed_at).unsigned_abs() <= TOLERANCE);
        }
        Err(rejection) => {
            assert!(!matches!(rejection, Rejection::InvalidSignature | Rejection::Missing(_)), "{rejection}");
        }
    }
});
