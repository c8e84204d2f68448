//! Reads secrets from files, at the start and again when a file changes. No error quotes a secret.

use std::path::Path;

use crate::secret::Secret;
use crate::signature::SECRETS_MAX;

/// Random letters and digits of this length cannot be guessed.
const TOKEN_CHARS_MIN: usize = 16;

/// Reads one secret per line. Skips empty lines.
pub fn secrets_in(text: &str) -> Result<Vec<Secret>, String> {
    let lines = text.lines().filter(|line| !line.is_empty());
    let secrets: Vec<_> = lines.map(Secret::new).collect();
    match secrets.len() {
        0 => Err("holds no secret".to_owned()),
        count if count > SECRETS_MAX => Err(format!("holds {count} secrets; {SECRETS_MAX} are allowed")),
        _ => Ok(secrets),
    }
}

/// Reads a password: the file's only line.
pub fn password_in(text: &str) -> Result<Secret, String> {
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err("is empty".to_owned()),
        password if password.contains(['\r', '\n']) => Err("has more than one line".to_owned()),
        password => Ok(Secret::new(password)),
    }
}

/// Reads the operators' token: one line that is long enough.
pub fn token_in(text: &str) -> Result<Secret, String> {
    match text.trim_end_matches(['\r', '\n']) {
        short if short.chars().count() < TOKEN_CHARS_MIN => {
            Err(format!("is shorter than {TOKEN_CHARS_MIN} characters; make one with: openssl rand -hex 24"))
        }
        token if token.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(Secret::new(token)),
        _ => Err("takes one line of ASCII without blanks".to_owned()),
    }
}

/// Reads a file that holds a secret. The error completes the sentence "the file ...", and does not quote it.
pub fn read_secret<T>(path: &Path, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, String> {
    let text = std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    parse(std::str::from_utf8(&text).map_err(|_| "is not UTF-8".to_owned())?)
}
