//! The only place that chooses a status: turns the outcome of a webhook into the HTTP answer.

use std::borrow::Cow;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::event::NotAnEnvelope;
use crate::health::Health;
use crate::signature::Rejection;
use crate::spool::{AppendError, Receipt};

/// Seconds after which a sender should try again. Prism's own retries come after 0, 5 and 30 s.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// Defines [`Code`] from a table: each row is a code once, with its status, its text and its title.
macro_rules! codes {
    ($($code:ident: $status:ident, $text:literal, $title:literal;)+) => {
        /// Why a webhook was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Code {
            $($code,)+
        }

        impl Code {
            pub(crate) const ALL: [Self; [$($text),+].len()] = [$(Self::$code),+];

            fn status(self) -> StatusCode {
                match self {
                    $(Self::$code => StatusCode::$status,)+
                }
            }

            /// The `code` of the answer, also used in metrics and logs.
            pub(crate) fn text(self) -> &'static str {
                match self {
                    $(Self::$code => $text,)+
                }
            }

            fn title(self) -> &'static str {
                match self {
                    $(Self::$code => $title,)+
                }
            }
        }
    };
}

codes! {
    NotFound: NOT_FOUND, "not-found", "Nothing here";
    MethodNotAllowed: METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed";
    SourceNotAllowed: FORBIDDEN, "source-not-allowed", "Source not allowed";
    MissingSignature: UNAUTHORIZED, "missing-signature", "Signature missing";
    InvalidSignature: UNAUTHORIZED, "invalid-signature", "Signature invalid";
    InvalidTimestamp: UNAUTHORIZED, "invalid-timestamp", "Timestamp invalid";
    StaleTimestamp: UNAUTHORIZED, "stale-timestamp", "Timestamp too far from now";
    RequestTimeout: REQUEST_TIMEOUT, "request-timeout", "Request too slow";
    Overloaded: SERVICE_UNAVAILABLE, "overloaded", "Overloaded";
    BodyTooLarge: PAYLOAD_TOO_LARGE, "body-too-large", "Body too large";
    UnreadableBody: BAD_REQUEST, "unreadable-body", "Body unreadable";
    InvalidEncoding: BAD_REQUEST, "invalid-encoding", "Body is not UTF-8";
    InvalidJson: BAD_REQUEST, "invalid-json", "Body is not JSON";
    NotAnEnvelope: UNPROCESSABLE_ENTITY, "not-an-envelope", "Body is not an event";
    SpoolFull: SERVICE_UNAVAILABLE, "spool-full", "Spool full";
    SpoolUnavailable: SERVICE_UNAVAILABLE, "spool-unavailable", "Spool unavailable";
    ShuttingDown: SERVICE_UNAVAILABLE, "shutting-down", "Shutting down";
}

/// A webhook that was not accepted.
#[derive(Debug)]
pub(super) struct Refusal {
    pub code: Code,
    /// One sentence for the sender. It never quotes the body or a secret.
    pub detail: Cow<'static, str>,
    /// The value of the header `Allow`.
    allow: Option<&'static str>,
}

/// RFC 9457, with the relay's own `code`.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
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
        let status = self.code.status();
        let problem = Problem {
            r#type: "about:blank",
            title: self.code.title(),
            status: status.as_u16(),
            detail: &self.detail,
            code: self.code.text(),
        };
        let mut response = json(status, "application/problem+json", &problem);
        let headers = response.headers_mut();
        if let Some(allowed) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allowed));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
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
        let code = match error {
            AppendError::Full => Code::SpoolFull,
            AppendError::Unavailable => Code::SpoolUnavailable,
            AppendError::Closed => Code::ShuttingDown,
        };
        Self::new(code, error.to_string())
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
    json(StatusCode::OK, "application/json", &body)
}

/// The answer to `GET /healthz`.
pub(super) fn readiness(health: &Health) -> Response<Full<Bytes>> {
    match health.blocker() {
        None => json(StatusCode::OK, "application/json", &serde_json::json!({ "ready": true })),
        Some(reason) => Refusal::from(reason).response(),
    }
}

fn json(status: StatusCode, content_type: &'static str, body: &impl Serialize) -> Response<Full<Bytes>> {
    // These types are made of strings and numbers, so serialising them cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
