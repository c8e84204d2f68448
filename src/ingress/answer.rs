//! The only place that chooses a status: from what became of a webhook to the HTTP answer.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::event::NotAnEnvelope;
use crate::health::Health;
use crate::server::Vouched;
use crate::signature::Rejection;
use crate::spool::{AppendError, Receipt};

/// Seconds after which a sender may try again. Prism's own retries come after 0, 5 and 30 s.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// Why a webhook was not taken.
#[derive(Debug)]
pub enum Refusal {
    NotFound,
    /// With the methods that are allowed.
    MethodNotAllowed(&'static str),
    SourceNotAllowed,
    Unauthenticated(Rejection),
    TimedOut,
    /// There is no memory for it at the moment.
    Overloaded,
    /// With the limit in bytes.
    TooLarge(usize),
    /// The body broke off or was framed wrongly.
    Unreadable(String),
    NotAnEnvelope(NotAnEnvelope),
    NotStored(AppendError),
}

/// RFC 9457, with the relay's own `code`.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'a str,
    title: &'a str,
    status: u16,
    detail: String,
    code: &'a str,
}

/// Every `code` there is, for counters that should be there before they count.
pub const CODES: [&str; 17] = [
    "not-found",
    "method-not-allowed",
    "source-not-allowed",
    "missing-signature",
    "invalid-signature",
    "invalid-timestamp",
    "stale-timestamp",
    "request-timeout",
    "overloaded",
    "body-too-large",
    "unreadable-body",
    "invalid-encoding",
    "invalid-json",
    "not-an-envelope",
    "spool-full",
    "spool-unavailable",
    "shutting-down",
];

impl Refusal {
    /// What tells this refusal from the others, in answers, metrics and logs.
    pub fn code(&self) -> &'static str {
        self.facts().1
    }

    fn facts(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Nothing here"),
            Self::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed"),
            Self::SourceNotAllowed => (StatusCode::FORBIDDEN, "source-not-allowed", "Source not allowed"),
            Self::Unauthenticated(Rejection::Missing(_)) => {
                (StatusCode::UNAUTHORIZED, "missing-signature", "Signature missing")
            }
            Self::Unauthenticated(Rejection::InvalidSignature) => {
                (StatusCode::UNAUTHORIZED, "invalid-signature", "Signature invalid")
            }
            Self::Unauthenticated(Rejection::InvalidTimestamp) => {
                (StatusCode::UNAUTHORIZED, "invalid-timestamp", "Timestamp invalid")
            }
            Self::Unauthenticated(Rejection::StaleTimestamp { .. }) => {
                (StatusCode::UNAUTHORIZED, "stale-timestamp", "Timestamp too far from now")
            }
            Self::TimedOut => (StatusCode::REQUEST_TIMEOUT, "request-timeout", "Request too slow"),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", "Overloaded"),
            Self::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", "Body too large"),
            Self::Unreadable(_) => (StatusCode::BAD_REQUEST, "unreadable-body", "Body unreadable"),
            Self::NotAnEnvelope(NotAnEnvelope::Encoding) => {
                (StatusCode::BAD_REQUEST, "invalid-encoding", "Body is not UTF-8")
            }
            Self::NotAnEnvelope(NotAnEnvelope::Json(_)) => {
                (StatusCode::BAD_REQUEST, "invalid-json", "Body is not JSON")
            }
            Self::NotAnEnvelope(NotAnEnvelope::EventType) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "not-an-envelope", "Body is not an event")
            }
            Self::NotStored(AppendError::Full) => (StatusCode::SERVICE_UNAVAILABLE, "spool-full", "Spool full"),
            Self::NotStored(AppendError::Unavailable) => {
                (StatusCode::SERVICE_UNAVAILABLE, "spool-unavailable", "Spool unavailable")
            }
            Self::NotStored(AppendError::Closed) => (StatusCode::SERVICE_UNAVAILABLE, "shutting-down", "Shutting down"),
        }
    }

    /// One sentence for the sender. It never quotes the body or a secret.
    pub fn detail(&self) -> String {
        match self {
            Self::NotFound => "webhooks are posted to the configured path, http.path".to_owned(),
            Self::MethodNotAllowed(allowed) => format!("this path takes {allowed}"),
            Self::SourceNotAllowed => "the sender's address is not in http.allowed_sources".to_owned(),
            Self::Unauthenticated(rejection) => rejection.to_string(),
            Self::TimedOut => "the body did not arrive within http.body_timeout".to_owned(),
            Self::Overloaded => "there is no memory for the body at the moment (http.buffer_bytes_max)".to_owned(),
            Self::TooLarge(limit) => format!("the body is larger than http.body_bytes_max, {limit} bytes"),
            Self::Unreadable(cause) => format!("the body could not be read: {cause}"),
            Self::NotAnEnvelope(reason) => reason.to_string(),
            Self::NotStored(reason) => reason.to_string(),
        }
    }

    pub fn response(&self) -> Response<Full<Bytes>> {
        let (status, code, title) = self.facts();
        let problem = Problem { r#type: "about:blank", title, status: status.as_u16(), detail: self.detail(), code };
        let mut response = json(status, "application/problem+json", &problem);
        let headers = response.headers_mut();
        match self {
            Self::MethodNotAllowed(allowed) => {
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            Self::NotStored(_) | Self::Overloaded => {
                headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
            }
            _ => {}
        }
        response
    }
}

/// The 200, which may be sent only with a receipt in hand.
pub fn accepted(receipt: &Receipt) -> Response<Full<Bytes>> {
    #[derive(Serialize)]
    struct Accepted {
        ok: bool,
        id: uuid::Uuid,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        duplicate: bool,
    }
    let body = Accepted { ok: true, id: receipt.id, duplicate: receipt.duplicate };
    let mut response = json(StatusCode::OK, "application/json", &body);
    // Whoever has sent an event may stay when places are short. Whoever repeats one may have captured it.
    if !receipt.duplicate {
        response.extensions_mut().insert(Vouched);
    }
    response
}

/// The answer to `GET /healthz`.
pub fn readiness(health: &Health) -> Response<Full<Bytes>> {
    match health.blocker() {
        None => json(StatusCode::OK, "application/json", &serde_json::json!({ "ready": true })),
        Some(reason) => Refusal::NotStored(reason).response(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_on_the_list() {
        let refusals = [
            Refusal::NotFound,
            Refusal::MethodNotAllowed("POST"),
            Refusal::SourceNotAllowed,
            Refusal::Unauthenticated(Rejection::Missing("a")),
            Refusal::Unauthenticated(Rejection::InvalidSignature),
            Refusal::Unauthenticated(Rejection::InvalidTimestamp),
            Refusal::Unauthenticated(Rejection::StaleTimestamp { age: 0, tolerance: 0 }),
            Refusal::TimedOut,
            Refusal::Overloaded,
            Refusal::TooLarge(0),
            Refusal::Unreadable(String::new()),
            Refusal::NotAnEnvelope(NotAnEnvelope::Encoding),
            Refusal::NotAnEnvelope(NotAnEnvelope::Json(serde_json::from_str::<()>("x").unwrap_err())),
            Refusal::NotAnEnvelope(NotAnEnvelope::EventType),
            Refusal::NotStored(AppendError::Full),
            Refusal::NotStored(AppendError::Unavailable),
            Refusal::NotStored(AppendError::Closed),
        ];
        assert!(refusals.iter().all(|refusal| CODES.contains(&refusal.code())));
        assert!(CODES.iter().all(|code| refusals.iter().any(|refusal| refusal.code() == *code)));
    }
}
