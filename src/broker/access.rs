//! The broker's URLs with their password and certificates. Both can be replaced while the relay runs: open connections
//! stay, and the next one uses the new ones.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tokio_rustls::rustls::ClientConfig;

use super::connection::{BrokerConnection, ConnectError, Tls};
use super::management::Management;
use super::settings::Settings;
use super::url::BrokerUrl;
use crate::secret::Secret;
use crate::tls::TlsError;

/// Opens connections to the configured URLs.
pub struct BrokerAccess {
    credentials: RwLock<Credentials>,
    settings: Settings,
}

struct Credentials {
    urls: Vec<BrokerUrl>,
    /// TLS settings for `amqps` URLs; `None` if no URL uses TLS.
    tls: Option<Arc<ClientConfig>>,
}

impl BrokerAccess {
    /// Reads the certificates if a URL uses TLS.
    pub fn new(settings: &Settings) -> Result<Self, TlsError> {
        let urls = settings.urls.clone();
        let tls = if urls.iter().any(BrokerUrl::uses_tls) { Some(settings.tls.load()?) } else { None };
        Ok(Self { credentials: RwLock::new(Credentials { urls, tls }), settings: settings.clone() })
    }

    /// Replaces the password in every URL.
    pub fn set_password(&self, password: &Secret) {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        for url in &mut credentials.urls {
            url.set_password(password);
        }
    }

    /// Reloads the certificates. After an error the previous ones stay in use.
    pub fn reload_tls(&self) -> Result<(), TlsError> {
        let tls = self.settings.tls.load()?;
        self.credentials.write().unwrap_or_else(PoisonError::into_inner).tls = Some(tls);
        Ok(())
    }

    /// How many URLs there are; at least one.
    pub fn count(&self) -> usize {
        self.credentials().urls.len()
    }

    /// Maximum time for a connection attempt, and for each round trip of its set-up.
    pub fn connect_timeout(&self) -> Duration {
        self.settings.connect_timeout
    }

    /// The URL at this position in `broker.urls`. Panics if there is none.
    pub fn url(&self, index: usize) -> BrokerUrl {
        self.credentials().urls[index].clone()
    }

    /// Connects to the URL at this position and logs in. `name` is what the broker shows for the connection.
    pub async fn open(&self, index: usize, name: &str) -> Result<BrokerConnection, ConnectError> {
        let (url, tls) = {
            let credentials = self.credentials();
            (credentials.urls[index].clone(), self.tls_for(&credentials, index))
        };
        BrokerConnection::open(&url, tls, name, self.settings.connect_timeout).await
    }

    /// A client for the management API of the broker at `url`.
    pub(crate) fn management(&self, url: &BrokerUrl) -> Result<Management, TlsError> {
        Management::new(&self.settings, url)
    }

    fn tls_for(&self, credentials: &Credentials, index: usize) -> Option<Tls> {
        let config = Arc::clone(credentials.tls.as_ref()?);
        let server_name =
            self.settings.server_name.clone().unwrap_or_else(|| credentials.urls[index].host().to_owned());
        Some(Tls { config, server_name })
    }

    fn credentials(&self) -> RwLockReadGuard<'_, Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner)
    }
}
