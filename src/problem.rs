//! Answers to refused requests: each code once, with its status and title, as an RFC 9457 problem.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// Seconds after which a sender should try again. Prism's own retries come after 0, 5 and 30 s.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// Defines [`Code`] from a table: each row is a code once, with its status, its text and its title.
macro_rules! codes {
    ($($code:ident: $status:ident, $text:literal, $title:literal;)+) => {
        /// Why a request was refused.
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

/// RFC 9457, with the relay's own `code`.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
}

impl Code {
    /// The answer. `detail` is one sentence for the sender.
    pub(crate) fn response(self, detail: &str) -> Response<Full<Bytes>> {
        let status = self.status();
        let (title, code) = (self.title(), self.text());
        let problem = Problem { r#type: "about:blank", title, status: status.as_u16(), detail, code };
        let mut response = json(status, &problem);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        response
    }
}

/// An answer with a JSON body.
pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    // These types are made of strings and numbers, so serialising them cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
