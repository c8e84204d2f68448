//! Why certificates cannot be used.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustls::Error;
use thiserror::Error as ThisError;
use tokio_rustls::rustls;

/// Why certificates cannot be used. Each error names the file.
#[derive(Debug, ThisError)]
pub enum TlsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} contains no {what} in PEM format", path.display())]
    Empty { path: PathBuf, what: &'static str },
    #[error("{} {reason}", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("{} expired on {at:.0}", path.display())]
    Expired { path: PathBuf, at: Timestamp },
    #[error("{} is not valid before {at:.0}", path.display())]
    NotYetValid { path: PathBuf, at: Timestamp },
    #[error("certificate {} and private key {} do not match: {reason}", certificate.display(), private_key.display())]
    Mismatch { certificate: PathBuf, private_key: PathBuf, reason: String },
    #[error(
        "{} has {count} certificates where the one in use has {previous}, and ends with an unknown issuer, {issuer}: \
         the file may have lost an intermediate certificate; if it is right, restart the relay",
        path.display()
    )]
    Shorter { path: PathBuf, count: usize, previous: usize, issuer: String },
    #[error("the system has no readable certificate authorities")]
    NoSystemAuthorities,
    #[error("TLS cannot be set up: {0}")]
    Rustls(#[from] Error),
}

impl TlsError {
    /// `reason` completes the sentence "the file ...".
    pub(super) fn unusable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unusable { path: path.to_owned(), reason: reason.into() }
    }
}
