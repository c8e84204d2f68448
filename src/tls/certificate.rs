//! What a certificate says about itself, as far as rustls does not tell: its validity, its issuer, and whether its kind
//! is supported.

use std::path::Path;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use tokio_rustls::rustls;
use x509_cert::certificate::Version;
use x509_cert::der::asn1::{ObjectIdentifier, UintRef};
use x509_cert::der::{Decode, Reader, SliceReader};
use x509_cert::name::Name;
use x509_cert::time::Time;

use super::error::TlsError;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
const ELLIPTIC_CURVE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const P521: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.35");

/// Minimum size of an RSA key, in bits: ring supports no smaller one.
const RSA_BITS_MIN: usize = 2048;

/// The kinds of keys that are supported.
pub(super) const KEYS: &str = "P-256, P-384, Ed25519, or RSA with at least 2048 bits";

/// A parsed certificate of a file.
pub(super) struct Parsed<'a> {
    certificate: x509_cert::Certificate,
    path: &'a Path,
}

impl<'a> Parsed<'a> {
    pub(super) fn new(certificate: &CertificateDer<'_>, path: &'a Path) -> Result<Self, TlsError> {
        let unreadable = |error| TlsError::unusable(path, format!("is broken: a certificate cannot be read: {error}"));
        let certificate = x509_cert::Certificate::from_der(certificate).map_err(unreadable)?;
        Ok(Self { certificate, path })
    }

    /// The first and the last instant at which the certificate is valid.
    pub(super) fn validity(&self) -> Result<(Timestamp, Timestamp), TlsError> {
        let validity = self.certificate.tbs_certificate().validity();
        let at = |time: Time| {
            let seconds = i64::try_from(time.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
            Timestamp::from_second(seconds)
                .map_err(|error| TlsError::unusable(self.path, format!("is broken: {error}")))
        };
        Ok((at(validity.not_before)?, at(validity.not_after)?))
    }

    pub(super) fn issuer(&self) -> &Name {
        self.certificate.tbs_certificate().issuer()
    }

    pub(super) fn subject(&self) -> &Name {
        self.certificate.tbs_certificate().subject()
    }

    /// Checks that version and key are supported, by the relay and by its peers.
    pub(super) fn check_kind(&self) -> Result<(), TlsError> {
        let certificate = self.certificate.tbs_certificate();
        if certificate.version() != Version::V3 {
            let reason = "is an X.509 certificate of version 1, which clients reject; issue one with the extension \
                          subjectAltName, which makes it version 3";
            return Err(TlsError::unusable(self.path, reason));
        }
        let key = certificate.subject_public_key_info();
        let curve = || key.algorithm.parameters.as_ref()?.decode_as::<ObjectIdentifier>().ok();
        let fault = match key.algorithm.oid {
            RSA => match rsa_bits(key.subject_public_key.raw_bytes()) {
                Some(bits) if bits < RSA_BITS_MIN => format!("an RSA key of {bits} bits"),
                Some(_) | None => return Ok(()),
            },
            ED25519 => return Ok(()),
            ELLIPTIC_CURVE => match curve() {
                Some(P256 | P384) => return Ok(()),
                Some(P521) => "a key on the curve P-521".to_owned(),
                Some(_) | None => "a key on an unusual curve".to_owned(),
            },
            _ => "a key of an unusual kind".to_owned(),
        };
        let reason = format!("has {fault}, which is not supported; use {KEYS}");
        Err(TlsError::unusable(self.path, reason))
    }
}

/// The size of the modulus (RFC 8017, appendix A.1.1).
fn rsa_bits(key: &[u8]) -> Option<usize> {
    let mut reader = SliceReader::new(key).ok()?;
    reader
        .sequence(|reader| {
            let modulus = UintRef::decode(reader)?;
            let _exponent = UintRef::decode(reader)?;
            Ok::<_, x509_cert::der::Error>(modulus.as_bytes().len() * 8)
        })
        .ok()
}
