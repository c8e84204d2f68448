//! The only place that chooses an answer: turns the outcome of a webhook into a code, and that into HTTP.

use std::borrow::Cow;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::event::NotAnEnvelope;
use crate::problem::{Code, json};
use crate::signature::Rejection;
use crate::spool::{AppendError, Receipt};

/// A webhook that was not accepted.
#[derive(Debug)]
pub(super) struct Refusal {
    pub code: Code,
    /// One sentence for the sender. It never quotes the body or a secret.
    pub detail: Cow<'static, str>,
    /// The value of the header `Allow`.
    allow: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: detail.into(), allow: None }
    }

    /// `allowed` are the methods that the path accepts, as in the header `Allow`.
    pub(super) fn method_not_allowed(allowed: &'static str) -> Self {
        let detail = format!("this path accepts {allowed}");
        Self { allow: Some(allowed), ..Self::new(Code::MethodNotAllowed, detail) }
    }

    /// `limit` is in bytes.
    pub(super) fn body_too_large(limit: usize) -> Self {
        Self::new(Code::BodyTooLarge, format!("the body is larger than http.body_bytes_max, {limit} bytes"))
    }

    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let mut response = self.code.response(&self.detail);
        if let Some(allowed) = self.allow {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

impl From<Rejection> for Refusal {
    fn from(rejection: Rejection) -> Self {
        let code = match rejection {
            Rejection::Missing(_) => Code::MissingSignature,
            Rejection::InvalidSignature => Code::InvalidSignature,
            Rejection::InvalidTimestamp => Code::InvalidTimestamp,
            Rejection::StaleTimestamp { .. } => Code::StaleTimestamp,
        };
        Self::new(code, rejection.to_string())
    }
}

impl From<NotAnEnvelope> for Refusal {
    fn from(reason: NotAnEnvelope) -> Self {
        let code = match reason {
            NotAnEnvelope::Encoding => Code::InvalidEncoding,
            NotAnEnvelope::Json(_) => Code::InvalidJson,
            NotAnEnvelope::EventType => Code::NotAnEnvelope,
        };
        Self::new(code, reason.to_string())
    }
}

impl From<AppendError> for Refusal {
    fn from(error: AppendError) -> Self {
        Self::new(Code::from(error), error.to_string())
    }
}

/// The 200. The receipt proves that the event is on disk.
pub(super) fn accepted(receipt: &Receipt) -> Response<Full<Bytes>> {
    #[derive(Serialize)]
    struct Accepted {
        ok: bool,
        id: uuid::Uuid,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        duplicate: bool,
    }
    let body = Accepted { ok: true, id: receipt.id, duplicate: receipt.duplicate };
    json(StatusCode::OK, &body)
}
