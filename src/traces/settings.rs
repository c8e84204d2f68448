//! Where traces go, and why they cannot go there.

use hyper::Uri;
use thiserror::Error;

use crate::tls::TlsError;

/// The section `[traces]`.
#[derive(Debug)]
pub struct Settings {
    /// A collector that accepts OTLP over HTTP; `None`: no spans are exported.
    pub endpoint: Option<Uri>,
    /// Share of the traces that begin in the relay to be exported, 0 to 1.
    pub sample_ratio: f64,
}

/// Why `traces.endpoint` cannot be used.
#[derive(Debug, Error)]
pub enum TracesError {
    /// TLS towards the collector cannot be set up.
    #[error("cannot use TLS for traces.endpoint: {0}")]
    Tls(#[from] TlsError),
    /// The exporter refuses its settings.
    #[error("cannot make an exporter for traces.endpoint: {0}")]
    Exporter(String),
}
