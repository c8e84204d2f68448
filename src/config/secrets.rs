//! Secrets as they stand in files of their own, which are read at the start, and anew when they change. No error quotes
//! them.

use std::path::Path;

use crate::secret::Secret;
use crate::signature::SECRETS_MAX;

/// With 16 random letters and digits nobody gets in by trying.
const TOKEN_CHARS_MIN: usize = 16;

/// One secret a line; empty lines are passed over.
pub fn secrets_in(text: &str) -> Result<Vec<Secret>, String> {
    let lines = text.lines().filter(|line| !line.is_empty());
    let secrets: Vec<_> = lines.map(Secret::new).collect();
    match secrets.len() {
        0 => Err("holds no secret".to_owned()),
        count if count > SECRETS_MAX => Err(format!("holds {count} secrets; {SECRETS_MAX} are allowed")),
        _ => Ok(secrets),
    }
}

/// The password is the file's only line.
pub fn password_in(text: &str) -> Result<Secret, String> {
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err("is empty".to_owned()),
        password if password.contains(['\r', '\n']) => Err("has more than one line".to_owned()),
        password => Ok(Secret::new(password)),
    }
}

/// The token of the operators: a line that nobody guesses.
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
