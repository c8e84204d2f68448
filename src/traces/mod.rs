//! The sender's trace continues through the relay into the message. With `traces.endpoint`, the relay adds its own spans
//! and exports them to an OpenTelemetry collector. Without the endpoint, or without the cargo feature `otlp`, the
//! sender's context is passed on unchanged.
//!
//! An event has two spans, because it may wait on disk between them: the webhook, from the time that its signature is
//! verified, and the publish. Names and attributes follow OpenTelemetry's semantic conventions for HTTP and messaging.

#[cfg(feature = "otlp")]
mod otlp;
#[cfg(not(feature = "otlp"))]
mod off;

use hyper::Uri;
use thiserror::Error;

#[cfg(not(feature = "otlp"))]
pub use off::{PublishSpan, Traces, WebhookSpan};
#[cfg(feature = "otlp")]
pub use otlp::{PublishSpan, Traces, WebhookSpan};

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
    #[error("cannot use TLS for traces.endpoint: {0}")]
    Tls(#[from] TlsError),
    #[error("cannot make an exporter for traces.endpoint: {0}")]
    Exporter(String),
}
