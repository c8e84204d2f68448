//! An event as a shell command that posts it to a relay with curl. The command holds no secret: the shell signs with
//! `$PRISM_SECRET`, and each `userToken` is hidden.

use anyhow::Context;
use serde_json::Value;

use super::http::listener_url;
use crate::config::Config;
use crate::topology::quote;

/// Printed in place of a `userToken`.
const HIDDEN: &str = "[hidden]";

/// The command. The body is serialised again, so its bytes, its signature and its fingerprint are not those of the
/// event.
pub(super) fn command(config: &Config, body: &[u8]) -> anyhow::Result<String> {
    let mut json: Value = serde_json::from_slice(body).context("cannot print a body that is not JSON")?;
    let is_hidden = hide(&mut json);
    let url = match listener_url(config.http.listen, "http.listen", &config.http.path) {
        Ok(url) if config.http.tls.is_none() => format!("${{PRISM_URL:-{}}}", quote(&url)),
        _ => "${PRISM_URL:?set PRISM_URL to the URL for webhooks}".to_owned(),
    };
    let is_signed = config.signature.required || !config.signature.secrets.is_empty();
    let command = text(&json.to_string(), &url, is_signed);
    Ok(if is_hidden { format!("{TO_REPLACE}\n{command}") } else { command })
}

/// The first line of a command whose event is not complete.
const TO_REPLACE: &str = "# a userToken is hidden: put the real one in before you post";

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

/// Hides every `userToken` at any depth. Returns whether there was one. serde_json limits the depth to 128, so the
/// recursion is safe.
pub(super) fn hide(json: &mut Value) -> bool {
    match json {
        Value::Object(members) => members.iter_mut().fold(false, |found, (name, value)| match name.as_str() {
            "userToken" => {
                *value = HIDDEN.into();
                true
            }
            _ => hide(value) || found,
        }),
        // Not `any`, which would stop at the first one.
        Value::Array(items) => items.iter_mut().map(hide).filter(|hidden| *hidden).count() > 0,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_a_hidden_user_token_says_so_first() {
        let config = Config::load(None, [], crate::config::Purpose::Client).unwrap();
        let printed = command(&config, br#"{"a":[{"userToken":"hunter2"},{"userToken":"hunter2"},1],"b":{}}"#).unwrap();
        assert!(printed.starts_with(&format!("{TO_REPLACE}\nbody=")) && !printed.contains("hunter2"), "{printed}");
        assert!(command(&config, br#"{"a":[1]}"#).unwrap().starts_with("body="));
    }

    #[test]
    fn an_unsigned_event_needs_no_secret() {
        assert_eq!(
            text(r#"{"a":"it's"}"#, "http://127.0.0.1:8080/x", false),
            "body='{\"a\":\"it'\\''s\"}'\nurl=http://127.0.0.1:8080/x\n\
             printf %s \"$body\" | curl -sS -H 'content-type: application/json' --data-binary @- \"$url\""
        );
    }
}
