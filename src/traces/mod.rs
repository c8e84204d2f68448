//! The sender's trace continues through the relay into the message. With `traces.endpoint`, the relay adds its own
//! spans and exports them to an OpenTelemetry collector. Without the endpoint, or without the cargo feature `otlp`, the
//! sender's context is passed on unchanged.
//!
//! An event has two spans, because it may wait on disk between them: the webhook, from the time that its signature is
//! verified, and the publish. Names and attributes follow OpenTelemetry's semantic conventions for HTTP and messaging.

#[cfg(feature = "otlp")]
mod otlp;
#[cfg(not(feature = "otlp"))]
mod off;
mod settings;

#[cfg(not(feature = "otlp"))]
pub use off::{PublishSpan, Traces, WebhookSpan};
#[cfg(feature = "otlp")]
pub use otlp::{PublishSpan, Traces, WebhookSpan};
pub use settings::{Settings, TracesError};
