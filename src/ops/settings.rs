//! How the operators' listener is configured.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::secret::Secret;

/// The section `[ops]`.
#[derive(Debug)]
pub struct Settings {
    pub listen: SocketAddr,
    /// The token for the console and `/api`; `None`: they are open on loopback only.
    pub token: Option<Secret>,
    /// The file that holds the token; it is reloaded when it changes.
    pub token_file: Option<PathBuf>,
}
