//! How the broker is configured.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;

use super::url::BrokerUrl;
use crate::tls::ClientFiles;

/// Where the broker is and how to log in.
#[derive(Clone, Debug)]
pub struct Settings {
    /// URLs of the broker's nodes, tried in turn; at least one.
    pub urls: Vec<BrokerUrl>,
    /// The file that holds the password of the URLs; it is reloaded when it changes.
    pub password_file: Option<PathBuf>,
    /// Certificates for `amqps` URLs.
    pub tls: ClientFiles,
    /// The name that the broker's certificate must show; `None`: the host of the URL.
    pub server_name: Option<String>,
    /// Maximum time for name look-up, TCP, TLS and login together.
    pub connect_timeout: Duration,
    /// URL of the management API; `None`: the host of the broker's URL, at RabbitMQ's default port.
    pub management_url: Option<Uri>,
}
