//! In place of `otlp.rs` in a build without that feature: contexts are passed on unchanged, and no spans are made.
#![expect(missing_docs, reason = "otlp.rs documents the interface that both share")]

use std::time::Duration;

use jiff::Timestamp;

use uuid::Uuid;

use super::settings::{Settings, TracesError};
use crate::event::{Event, TraceContext};

pub struct Traces;
pub struct WebhookSpan(Option<TraceContext>);
pub struct PublishSpan;

impl Traces {
    pub fn new(_: &Settings) -> Result<Self, TracesError> {
        Ok(Self)
    }

    pub fn start_webhook(&self, sent: Option<TraceContext>, _started_at: Timestamp) -> WebhookSpan {
        WebhookSpan(sent)
    }

    pub fn start_publish(&self, _: &Event, _exchange: &str, _routing_key: &str) -> PublishSpan {
        PublishSpan
    }

    pub async fn export(&self) {
        std::future::pending().await
    }

    pub async fn flush(&self, _limit: Duration) {}
}

impl WebhookSpan {
    pub fn context(&self) -> Option<TraceContext> {
        self.0.clone()
    }

    pub fn accepted(self, _: Uuid, _duplicate: bool) {}

    pub fn refused(self) {}
}

impl PublishSpan {
    pub fn context(&self, event: &Event) -> Option<TraceContext> {
        event.trace.clone()
    }

    pub fn confirmed(self) {}

    pub fn failed(self, _error: &'static str) {}
}
