//! The section `[reconcile]`, checked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;

use crate::secret::Secret;
use crate::spool::subjects;

/// The section `[reconcile]`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The key of the Prism account; `None`: nothing is reconciled.
    pub api_key: Option<Secret>,
    /// The file that holds the key; it is reloaded when it changes.
    pub api_key_file: Option<PathBuf>,
    /// Where Prism's API is.
    pub api_url: ApiUrl,
    /// How long a scan or a prediction may take before the API is asked for it.
    pub after: Duration,
    /// How often overdue subjects and hints are looked up.
    pub interval: Duration,
    /// Requests to the API per second.
    pub rate: f64,
    /// How many subjects are remembered, and for how long.
    pub subjects: subjects::Settings,
}

impl Settings {
    /// What the spool has to remember of subjects; nothing without a key.
    pub fn followed(&self) -> Option<&subjects::Settings> {
        self.api_key.as_ref().map(|_| &self.subjects)
    }
}

/// The address of Prism's API. Without TLS it is on this machine, so that the key crosses no network in clear text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiUrl {
    base: String,
    is_tls: bool,
}

impl ApiUrl {
    /// Reads an address. The error completes the sentence "the value ...", and does not quote it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let not_an_address = || "is not an address such as https://api.hosted.prismlabs.tech".to_owned();
        let uri: Uri = text.parse().map_err(|_| not_an_address())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(not_an_address()) };
        // The address is the beginning of others. What stands behind a `#` is never sent.
        if uri.query().is_some() || text.contains('#') || authority.host().is_empty() {
            return Err(not_an_address());
        }
        if authority.as_str().contains('@') {
            return Err("contains a login; Prism's API takes the key of reconcile.api_key".to_owned());
        }
        let is_tls = match scheme {
            "https" => true,
            "http" if is_loopback(authority.host()) => false,
            "http" => {
                return Err("begins with http://, which would send the key in clear text; use https:// (http:// is \
                            allowed for a loopback address)"
                    .to_owned());
            }
            _ => return Err(not_an_address()),
        };
        Ok(Self { base: text.trim_end_matches('/').to_owned(), is_tls })
    }

    /// Whether answers come over TLS, from a server that has proved its name.
    pub(crate) fn is_tls(&self) -> bool {
        self.is_tls
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.base
    }
}

/// Stands for an address that could not be read. It is never used, because the mistake is in the list.
impl Default for ApiUrl {
    fn default() -> Self {
        Self { base: String::new(), is_tls: true }
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_never_leaves_this_machine_in_clear_text() {
        for (text, is_tls) in [
            ("https://api.hosted.prismlabs.tech", true),
            ("https://proxy.example:8443/prism/", true),
            ("http://127.0.0.1:8089", false),
            ("http://[::1]:8089/", false),
            ("http://localhost", false),
        ] {
            let url = ApiUrl::parse(text).unwrap();
            assert_eq!((url.is_tls(), url.as_str()), (is_tls, text.trim_end_matches('/')), "{text}");
        }
        for (text, what) in [
            ("http://api.hosted.prismlabs.tech", "clear text"),
            ("http://127.0.0.1.example.com", "clear text"),
            ("http://10.0.0.1:8080", "clear text"),
            ("ftp://127.0.0.1", "is not an address"),
            ("api.hosted.prismlabs.tech", "is not an address"),
            ("https://", "is not an address"),
            ("https://host/?key=1", "is not an address"),
            ("https://host/#x", "is not an address"),
            ("https://user:password-of-ours@host", "contains a login"),
        ] {
            let error = ApiUrl::parse(text).unwrap_err();
            assert!(error.contains(what) && !error.contains("password-of-ours"), "{text}: {error}");
        }
    }
}
