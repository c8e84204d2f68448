//! Headers and bodies from a client without the secret: none is ever accepted.
//!
//! Input: timestamp, line feed, signature, line feed, body.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use prism_relay::secret::Secret;
use prism_relay::signature::Verifier;

static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let secrets = [Secret::new("whsec_unknown to the fuzzer"), Secret::new("whsec_the old one")];
    Verifier::new(&secrets, true, Duration::from_secs(300))
});

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |byte| *byte == b'\n');
    let (timestamp, signature, body) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
    let now = Timestamp::from_second(1_759_353_977).unwrap();
    assert!(VERIFIER.verify(timestamp, signature, body, now).is_err());
});
