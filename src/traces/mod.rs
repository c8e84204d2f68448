//! Traces: the sender's trace is continued through the relay into the message, and, if `traces.endpoint` is set, told to an
//! OpenTelemetry collector. Without the cargo feature `otlp`, or without an endpoint, the context is passed on as it came.
//!
//! Two spans an event, because it may lie on disk in between: the webhook, once it is believed, and the publish. Names and
//! attributes are those of OpenTelemetry's semantic conventions for HTTP and messaging.

#[cfg(feature = "otlp")]
mod otlp;
#[cfg(not(feature = "otlp"))]
mod off;

use hyper::Uri;

#[cfg(not(feature = "otlp"))]
pub use off::{Publishing, Traces, Webhook};
#[cfg(feature = "otlp")]
pub use otlp::{Publishing, Traces, Webhook};

/// The section `[traces]`.
#[derive(Debug)]
pub struct Settings {
    /// A collector that accepts OTLP over HTTP; `None`: no spans are exported.
    pub endpoint: Option<Uri>,
    /// Share of the traces that begin in the relay to be exported, 0 to 1.
    pub sample_ratio: f64,
}
