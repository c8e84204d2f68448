//! HTTP as Prism and operators use it, and plain TCP for bytes that no HTTP client would send.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::certificates::Issued;
use super::eventually::DEADLINE;

/// A client that reuses its connections. It belongs to the runtime of one test.
#[derive(Clone)]
pub struct Client(legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

impl Client {
    pub fn http1() -> Self {
        Self::tls(tls_config(None, None))
    }

    /// With this configuration of TLS for `https` addresses.
    pub fn tls(config: ClientConfig) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let builder = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http().enable_http1();
        let connector = builder.wrap_connector(connector);
        // The relay closes idle connections after ten seconds, and a request sent at that moment gets no answer.
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        Self(builder.pool_idle_timeout(Duration::from_secs(5)).build(connector))
    }

    /// Sends one request. The error, a text for humans, covers a refused connection, a reset and a missing answer.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer, String> {
        let request = headers
            .iter()
            .fold(Request::builder().method(method).uri(url), |request, (name, value)| request.header(*name, *value))
            .body(Full::new(body.into()))
            .map_err(|error| format!("{url}: {error}"))?;
        within(DEADLINE, url, async {
            let (head, body) = self.0.request(request).await.map_err(|error| chain(&error))?.into_parts();
            let body = body.collect().await.map_err(|error| chain(&error))?.to_bytes();
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
        })
        .await
    }

    pub async fn get(&self, url: &str) -> Result<Answer, String> {
        self.send(Method::GET, url, &[], Bytes::new()).await
    }
}

/// A client that trusts this authority (PEM) and presents this certificate.
pub fn tls_config(ca: Option<&str>, identity: Option<&Issued>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.unwrap_or_default().as_bytes()) {
        roots.add(certificate.expect("a PEM certificate")).expect("a certificate of an authority");
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.expect("versions of TLS").with_root_certificates(roots);
    match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes()).map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_slice(identity.private_key.as_bytes()).expect("a PEM key");
            builder.with_client_auth_cert(chain, key).expect("a certificate with its key")
        }
    }
}

/// The answer of a server.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// The body as text; bytes that are not UTF-8 become replacement characters.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in the answer {self}"))
    }

    /// A header, if it is present and is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns this answer if it has this status.
    ///
    /// # Panics
    /// If it has another one, with the whole answer.
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "the answer is {self}");
        self
    }

    /// The `id` of a webhook that was answered 200.
    pub fn id(self) -> String {
        let json = self.expect(200).json();
        json["id"].as_str().unwrap_or_else(|| panic!("no id in {json}")).to_owned()
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.status, self.text())
    }
}

/// Prism's signature: lower-case hex of HMAC-SHA256 over `{timestamp}.{body}`. Written here a second time on purpose,
/// so that the relay is not tested against itself.
pub fn sign(secret: &str, timestamp: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(timestamp.as_bytes());
    mac.update(b".");
    mac.update(body);
    mac.finalize().into_bytes().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// The current time, as Prism writes it.
pub fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

/// A plain TCP connection, for incomplete requests, garbage and silence.
pub struct Raw(TcpStream);

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        let connect = async { TcpStream::connect(address).await.map_err(|error| chain(&error)) };
        Self(within(DEADLINE, "a TCP connection", connect).await.unwrap_or_else(|error| panic!("{error}")))
    }

    /// Writes `bytes`; fails if the peer no longer reads.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) -> Result<(), String> {
        let write = async { self.0.write_all(bytes.as_ref()).await.map_err(|error| chain(&error)) };
        within(DEADLINE, "room to write", write).await
    }

    /// Closes the sending side; reading still works.
    pub async fn end(&mut self) {
        let _ = self.0.shutdown().await;
    }

    /// Reads until there are `count` bytes or the peer closes.
    pub async fn read(&mut self, count: usize) -> Vec<u8> {
        self.read_until(|bytes| bytes.len() >= count).await
    }

    /// Reads until the peer closes; a reset counts as that.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        self.read_until(|_| false).await
    }

    /// Reads until `enough` says so or the peer closes.
    ///
    /// # Panics
    /// At the deadline, with the bytes read so far.
    pub async fn read_until(&mut self, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let reading = async { while !enough(&bytes) && self.0.read_buf(&mut bytes).await.unwrap_or(0) > 0 {} };
        let in_time = timeout(DEADLINE, reading).await.is_ok();
        assert!(in_time, "timed out waiting for: more bytes; last seen: {:?}", String::from_utf8_lossy(&bytes));
        bytes
    }

    /// Writes `bytes` to a new connection and reads until the peer closes.
    pub async fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> String {
        let mut raw = Self::connect(address).await;
        // A server may answer and close before it has read everything: only its answer matters.
        let _ = raw.write(bytes).await;
        String::from_utf8_lossy(&raw.read_to_end().await).into_owned()
    }
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match timeout(limit, work).await {
        Ok(outcome) => outcome.map_err(|error| format!("{what}: {error}")),
        Err(_) => Err(format!("timed out waiting for: {what}")),
    }
}

/// An error with all its causes: hyper's own text is little more than "client error".
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
