//! An event as a shell command that posts it to a relay with curl. The command holds no secret: the shell signs with
//! `$PRISM_SECRET`, and each `userToken` is hidden.

use anyhow::Context;
use serde_json::Value;

use super::http::listener_url;
use crate::config::Config;
use crate::topology::quote;

/// Printed in place of a `userToken`.
const HIDDEN: &str = "[hidden]";

/// The command. The body is written anew, so its bytes, its signature and its fingerprint are not those of the event.
pub(super) fn command(config: &Config, body: &[u8]) -> anyhow::Result<String> {
    let mut json: Value = serde_json::from_slice(body).context("cannot print a body that is not JSON")?;
    hide(&mut json);
    let url = match listener_url(config.http.listen, "http.listen", &config.http.path) {
        Ok(url) if config.http.tls.is_none() => format!("${{PRISM_URL:-{}}}", quote(&url)),
        _ => "${PRISM_URL:?set PRISM_URL to the URL for webhooks}".to_owned(),
    };
    let is_signed = config.signature.required || !config.signature.secrets.is_empty();
    Ok(text(&json.to_string(), &url, is_signed))
}

/// The body goes through a pipe, because an argument of a command must be shorter than 128 KiB.
fn text(body: &str, url: &str, is_signed: bool) -> String {
    let (sign, headers) = match is_signed {
        true => (
            "timestamp=$(date -u +%Y-%m-%dT%H:%M:%SZ)\n\
             signature=$(printf %s \"$timestamp.$body\" | openssl dgst -sha256 -r \
             -hmac \"${PRISM_SECRET:?set PRISM_SECRET to a secret of the relay}\" | cut -d ' ' -f 1)\n",
            " -H \"prism-timestamp: $timestamp\" -H \"prism-signature: $signature\"",
        ),
        false => ("", ""),
    };
    format!(
        "body={}\nurl={url}\n{sign}\
         printf %s \"$body\" | curl -sS -H 'content-type: application/json'{headers} --data-binary @- \"$url\"",
        quote(body)
    )
}

/// Hides every `userToken` at any depth. serde_json limits the depth to 128, so the recursion is safe.
pub(super) fn hide(json: &mut Value) {
    match json {
        Value::Object(members) => members.iter_mut().for_each(|(name, value)| match name.as_str() {
            "userToken" => *value = HIDDEN.into(),
            _ => hide(value),
        }),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unsigned_event_needs_no_secret() {
        assert_eq!(
            text(r#"{"a":"it's"}"#, "http://127.0.0.1:8080/x", false),
            "body='{\"a\":\"it'\\''s\"}'\nurl=http://127.0.0.1:8080/x\n\
             printf %s \"$body\" | curl -sS -H 'content-type: application/json' --data-binary @- \"$url\""
        );
    }
}
