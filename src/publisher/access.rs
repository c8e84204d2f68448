//! How to get in: the urls with their password, and TLS. Both may be replaced while the relay runs; an open connection
//! stays, the next one uses what is new.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tokio_rustls::rustls::ClientConfig;
use tracing::warn;

use super::connection::{ConnectError, Link, Tls};
use crate::config::{self, BrokerUrl};
use crate::secret::Secret;
use crate::tls::{ClientFiles, TlsError};

pub struct Access {
    credentials: RwLock<Credentials>,
    files: ClientFiles,
    server_name: Option<String>,
    deadline: Duration,
}

struct Credentials {
    urls: Vec<BrokerUrl>,
    /// With the password from before, until the new one has worked.
    before: Option<Vec<BrokerUrl>>,
    /// If any of the urls wants it.
    tls: Option<Arc<ClientConfig>>,
}

impl Access {
    pub fn new(broker: &config::Broker) -> Result<Self, TlsError> {
        let urls = broker.urls.clone();
        let tls = if urls.iter().any(BrokerUrl::wants_tls) { Some(broker.tls.load()?) } else { None };
        Ok(Self {
            credentials: RwLock::new(Credentials { urls, before: None, tls }),
            files: broker.tls.clone(),
            server_name: broker.server_name.clone(),
            deadline: broker.connect_timeout,
        })
    }

    pub fn set_password(&self, password: &Secret) {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        let mut urls = credentials.urls.clone();
        for url in &mut urls {
            url.set_password(password);
        }
        let same = |(old, new): (&BrokerUrl, &BrokerUrl)| old.expose() == new.expose();
        if credentials.urls.iter().zip(&urls).all(same) {
            return;
        }
        let old = std::mem::replace(&mut credentials.urls, urls);
        // The one that has worked, and not one that nobody has tried.
        credentials.before.get_or_insert(old);
    }

    /// Reads the certificates anew. What cannot be used changes nothing.
    pub fn reload_tls(&self) -> Result<(), TlsError> {
        let tls = self.files.load()?;
        self.credentials.write().unwrap_or_else(PoisonError::into_inner).tls = Some(tls);
        Ok(())
    }

    /// One of the urls, by its number.
    pub fn url(&self, index: usize) -> BrokerUrl {
        self.credentials().urls[index].clone()
    }

    /// Connects to the url with this number. The nodes of a cluster share their users, so what one has taken counts for all. Where a new password is refused, the one before is tried, too: the file and
    /// the broker are seldom changed in the same instant.
    pub async fn open(&self, index: usize, name: &str) -> Result<Link, ConnectError> {
        let (url, before, tls) = {
            let credentials = self.credentials();
            let before = credentials.before.as_ref().map(|urls| urls[index].clone());
            (credentials.urls[index].clone(), before, self.tls_for(&credentials, index))
        };
        match (Link::open(&url, tls.clone(), name, self.deadline).await, before) {
            (Ok(link), Some(_)) => {
                let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
                // Unless there is yet another one by now.
                if credentials.urls[index].expose() == url.expose() {
                    credentials.before = None;
                }
                Ok(link)
            }
            (Err(error @ ConnectError::Refused { .. }), Some(before)) => {
                let link = Link::open(&before, tls, name, self.deadline).await.map_err(|_| error)?;
                warn!(%url, "the broker refuses the new password and takes the one before");
                Ok(link)
            }
            (opened, _) => opened,
        }
    }

    fn tls_for(&self, credentials: &Credentials, index: usize) -> Option<Tls> {
        let url = &credentials.urls[index];
        let config = credentials.tls.as_ref()?;
        let server_name = self.server_name.clone().unwrap_or_else(|| url.host().to_owned());
        Some(Tls { config: Arc::clone(config), server_name })
    }

    fn credentials(&self) -> RwLockReadGuard<'_, Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner)
    }
}
