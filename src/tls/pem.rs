//! Reads PEM files. A file that holds something else is described by what it holds, never quoted: that may be a private
//! key on a single line.

use std::path::Path;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls;

use super::error::TlsError;

const CERTIFICATE_BEGIN: &str = "-----BEGIN CERTIFICATE-----";

/// What a file without a certificate may hold instead, by its text.
const IN_PLACE_OF_CERTIFICATE: [(&str, &str); 4] = [
    ("CERTIFICATE REQUEST-----", "contains a certificate request; use the certificate that the authority made from it"),
    ("-----BEGIN TRUSTED CERTIFICATE", "is in OpenSSL's own format; convert it: openssl x509 -in OLD -out NEW"),
    ("-----BEGIN PKCS7", "is a PKCS #7 file; convert it: openssl pkcs7 -print_certs -in OLD -out NEW"),
    ("PRIVATE KEY-----", "contains a private key, but no certificate; the files may be swapped"),
];

/// What a file without a private key may hold instead.
const IN_PLACE_OF_KEY: [(&str, &str); 3] = [
    ("-----BEGIN OPENSSH PRIVATE KEY", "is an OpenSSH key; TLS needs a PKCS #8 or PKCS #1 key"),
    ("-----BEGIN PUBLIC KEY", "contains a public key, but no private key"),
    (CERTIFICATE_BEGIN, "contains a certificate, but no private key; the files may be swapped"),
];

/// Reads one or more certificates.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| pem_error(path, &error))?;
    let text = String::from_utf8_lossy(&text);
    let (begun, read) = (text.matches(CERTIFICATE_BEGIN).count(), certificates.len());
    if begun != read {
        let reason = format!(
            "has {begun} certificates, but only {read} can be read: each -----BEGIN must be at the beginning of a line \
             (files may have been joined without a line break)"
        );
        return Err(TlsError::unusable(path, reason));
    }
    match read {
        0 => Err(without(path, &text, &IN_PLACE_OF_CERTIFICATE, "certificate")),
        _ => Ok(certificates),
    }
}

/// Reads a private key that has no passphrase.
pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
        let reason = "is encrypted with a passphrase; decrypt it: openssl pkey -in OLD -out NEW";
        return Err(TlsError::unusable(path, reason));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        pem::Error::NoItemsFound => without(path, &text, &IN_PLACE_OF_KEY, "private key"),
        error => pem_error(path, &error),
    })
}

/// Reads a file, without a byte order mark: it would hide the first line.
fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let text = std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    Ok(text.strip_prefix("\u{feff}".as_bytes()).map(<[u8]>::to_vec).unwrap_or(text))
}

/// The error of a file that has none of what is needed.
fn without(path: &Path, text: &str, others: &[(&str, &str)], what: &'static str) -> TlsError {
    let other = others.iter().find(|(mark, _)| text.contains(mark)).map(|(_, reason)| *reason);
    // DER, and PKCS #12 as well, begin with a sequence of more than 127 bytes.
    let binary = text.starts_with("0\u{fffd}").then_some(
        "is a binary file (DER or PKCS #12); convert it to PEM: openssl x509 -inform der, or openssl pkcs12",
    );
    match other.or(binary) {
        Some(reason) => TlsError::unusable(path, reason),
        None => TlsError::Empty { path: path.to_owned(), what },
    }
}

fn pem_error(path: &Path, error: &pem::Error) -> TlsError {
    let reason = match error {
        pem::Error::MissingSectionEnd { .. } => "a section has no end; the file may have lost its line breaks",
        pem::Error::IllegalSectionStart { .. } => "the first line of a section cannot be read",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it is not a PEM file",
    };
    TlsError::unusable(path, format!("is broken: {reason}"))
}
