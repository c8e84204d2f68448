//! The answers of the operators' listener: status, content type and body. Knows no route and no state.

use std::convert::Infallible;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::{Either, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;

type EventStream = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>;

/// A body: either complete at once, or a stream of server-sent events.
pub(super) type Answer = Either<Full<Bytes>, StreamBody<EventStream>>;

pub(super) fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Answer> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(super) fn text(status: StatusCode, text: &'static str) -> Response<Answer> {
    response(status, "text/plain; charset=utf-8", text)
}

pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response<Answer> {
    // The reports hold only strings and numbers, so serialising them cannot fail.
    let mut response = response(status, "application/json", serde_json::to_vec(body).unwrap_or_default());
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An error as RFC 9457 defines it.
pub(super) fn problem(status: StatusCode, detail: &str) -> Response<Answer> {
    let title = status.canonical_reason().unwrap_or_default();
    let problem = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail });
    response(status, "application/problem+json", problem.to_string())
}

pub(super) fn not_found() -> Response<Answer> {
    text(StatusCode::NOT_FOUND, "not found; try /, /livez, /readyz, /metrics or /api/status\n")
}

pub(super) fn method_not_allowed(allowed: &'static str) -> Response<Answer> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "this path does not support the method\n");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

/// The location is relative to the request, so that it is right below any path of a proxy.
pub(super) fn see_other(location: &'static str) -> Response<Answer> {
    let mut response = text(StatusCode::SEE_OTHER, "");
    response.headers_mut().insert(LOCATION, HeaderValue::from_static(location));
    response
}

/// A stream of messages made by [`server_sent_event`].
pub(super) fn event_stream(messages: impl Stream<Item = Bytes> + Send + 'static) -> Response<Answer> {
    let frames: EventStream = Box::pin(messages.map(|message| Ok(Frame::data(message))));
    let mut response = Response::new(Either::Right(StreamBody::new(frames)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would collect the messages.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// One message of an event stream (the HTML standard, section 9.2).
pub(super) fn server_sent_event(name: &str, data: &impl Serialize) -> Bytes {
    // The reports hold only strings and numbers, so serialising them cannot fail.
    let data = serde_json::to_string(data).unwrap_or_default();
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
