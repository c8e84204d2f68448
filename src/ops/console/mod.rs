//! The console's files, compiled in; the page loads nothing from other hosts. uPlot is by Leon Sorokin (MIT, see
//! uplot.LICENSE).

use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{HeaderMap, Response, StatusCode};

use super::response::{Answer, response};
use crate::secret::Secret;

const PAGE: &str = include_str!("index.html");
const LOGIN: &str = include_str!("login.html");
/// The page around the text of the runbook, which build.rs makes from deploy/runbook.md.
const BOOK: &str = include_str!("runbook.html");
const RUNBOOK: &str = include_str!(concat!(env!("OUT_DIR"), "/runbook.html"));

/// The placeholder in the page for the action token.
const ACTION_TOKEN: &str = "__ACTION_TOKEN__";

/// Scripts, styles and data come from this listener only, and no page may frame it. Inline styles are allowed because
/// uPlot sets them on its elements.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; \
                      img-src 'self' data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// The console page, with the token that its actions need.
pub(super) fn page(action_token: &Secret) -> Response<Answer> {
    html(PAGE.replace(ACTION_TOKEN, action_token.expose()))
}

pub(super) fn login() -> Response<Answer> {
    html(LOGIN.to_owned())
}

/// The runbook. It is public, so it needs no token.
pub(super) fn runbook() -> Response<Answer> {
    html(BOOK.replace("__RUNBOOK__", RUNBOOK))
}

/// The scripts and styles of the pages. They hold nothing secret, so they need no token.
pub(super) fn file(path: &str) -> Option<Response<Answer>> {
    let (content_type, content) = match path {
        "/console.css" => ("text/css; charset=utf-8", include_str!("console.css")),
        "/console.js" => ("text/javascript; charset=utf-8", include_str!("console.js")),
        "/uplot.css" => ("text/css; charset=utf-8", include_str!("uplot.css")),
        "/uplot.js" => ("text/javascript; charset=utf-8", include_str!("uplot.js")),
        _ => return None,
    };
    let mut response = response(StatusCode::OK, content_type, content);
    protect(response.headers_mut());
    Some(response)
}

fn html(content: String) -> Response<Answer> {
    let mut response = response(StatusCode::OK, "text/html; charset=utf-8", content);
    protect(response.headers_mut());
    response
}

fn protect(headers: &mut HeaderMap) {
    let lines: [(HeaderName, &'static str); 4] = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // After an upgrade the browser must not mix old files with new ones.
        (CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in lines {
        headers.insert(name, HeaderValue::from_static(value));
    }
    debug_assert!(headers.contains_key(CONTENT_TYPE));
}
