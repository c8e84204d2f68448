//! A stand-in for Prism's API, with the trouble that a test asks for. It is written from Prism's documents and not from
//! the relay, whose own stand-in is `send --serve-api`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::certificates::{Authority, Issued};
use super::eventually::eventually;
use super::marks::{API_KEY, HEALTH, USER_TOKEN};
use super::setup::Setup;
use super::{background, ports};

/// Far more than the relay reads of an answer, 1 MiB.
const HUGE_BYTES: usize = 3 * 1024 * 1024;

/// What is wrong with the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// No answer until the trouble is another one.
    Silence,
    /// This status, whatever is asked.
    Status(u16),
    /// 429 with `Retry-After` in seconds.
    TooMany(u32),
    /// 200, and no JSON.
    Garbage,
    /// 200, and the right answer, but too long.
    Huge,
    /// 200, and the answer for another id.
    AnotherId,
}

/// Serves until it is dropped.
pub struct PrismApi {
    port: u16,
    /// The authority of its certificate.
    authority: Authority,
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
}

struct Shared {
    trouble: watch::Sender<Trouble>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    key: String,
    /// The answers, by path.
    answers: HashMap<String, Value>,
    /// The status of each path that this key may not see.
    refused: HashMap<String, u16>,
    /// The paths that were asked for, with the status of each answer; 0 while there is none.
    asked: Vec<(String, u16)>,
    /// Requests without an answer yet, and the most that there were at a time.
    open: usize,
    open_max: usize,
}

impl PrismApi {
    /// With TLS, as Prism's API, and [`API_KEY`].
    pub fn start() -> Self {
        let authority = Authority::new();
        let tls = acceptor(&authority.issue_server());
        let known = Mutex::new(Known { key: API_KEY.to_owned(), ..Known::default() });
        let shared = Arc::new(Shared { trouble: watch::channel(Trouble::None).0, known });
        let port = ports::free();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = std::net::TcpListener::bind(address).expect("listen as Prism's API");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let serving = Arc::clone(&shared);
        let acceptor = background::spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener of the harness's runtime");
            // The connections end with this task.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, tls) = (Arc::clone(&serving), tls.clone());
                connections.spawn(async move {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer_all(stream, shared).await;
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { port, authority, shared, acceptor }
    }

    /// A relay that asks this API, soon and fast.
    pub fn asked_by(&self, setup: Setup) -> Setup {
        let ca = setup.file("prism-ca.pem", self.authority.pem());
        setup
            .env("SSL_CERT_FILE", ca.to_str().expect("a path in UTF-8"))
            .set("reconcile.api_url", self.url())
            .set("reconcile.api_key", API_KEY)
            .set("reconcile.after", "1s")
            .set("reconcile.interval", "1s")
            .set("reconcile.rate", 50)
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// The authority of its certificate, PEM.
    pub fn authority(&self) -> String {
        self.authority.pem()
    }

    // -- what it knows ------------------------------------------------------------------------------------------------

    /// A scan whose state is of now.
    pub fn scan(&self, id: &str, status: &str) {
        self.scan_of(id, status, Timestamp::now());
    }

    /// A scan that came into its state some time ago.
    pub fn old_scan(&self, id: &str, status: &str, age: SignedDuration) {
        self.scan_of(id, status, Timestamp::now() - age);
    }

    fn scan_of(&self, id: &str, status: &str, updated: Timestamp) {
        let created = updated - SignedDuration::from_mins(2);
        let scan = json!({
            "id": id, "status": status, "userId": "user-of-prism", "userToken": USER_TOKEN, "weight": HEALTH,
            "height": HEALTH, "bodyfat": { "method": "adam", "bodyfatPercentage": HEALTH },
            "measurements": { "waistFit": HEALTH }, "assetUrls": null,
            "createdAt": created.to_string(), "updatedAt": updated.to_string(),
        });
        self.shared.known().answers.insert(format!("/scans/{id}"), scan);
    }

    /// A prediction whose state is of now. Its scan has to be told of as well.
    pub fn prediction(&self, id: &str, scan: &str, status: &str) {
        let now = Timestamp::now().to_string();
        let prediction = json!({
            "id": id, "status": status, "scanId": scan, "predictionType": "fat", "targetWeight": HEALTH,
            "targetBodyfat": HEALTH, "createdAt": now, "updatedAt": now,
        });
        self.shared.known().answers.insert(format!("/body-shape-prediction/{id}"), prediction);
    }

    /// Changes a field of an answer.
    pub fn change(&self, path: &str, field: &str, value: Value) {
        let mut known = self.shared.known();
        let answer = known.answers.get_mut(path).unwrap_or_else(|| panic!("nothing at {path}"));
        answer[field] = value;
    }

    /// Answers this path with a status only.
    pub fn refuse(&self, path: &str, status: u16) {
        self.shared.known().refused.insert(path.to_owned(), status);
    }

    /// Answers this path as usual again.
    pub fn allow(&self, path: &str) {
        self.shared.known().refused.remove(path);
    }

    /// Takes only this key from now on.
    pub fn set_key(&self, key: &str) {
        key.clone_into(&mut self.shared.known().key);
    }

    pub fn set_trouble(&self, trouble: Trouble) {
        self.shared.trouble.send_replace(trouble);
    }

    // -- what it was asked --------------------------------------------------------------------------------------------

    /// The number of requests for a path.
    pub fn asked(&self, path: &str) -> usize {
        self.shared.known().asked.iter().filter(|(asked, _)| asked == path).count()
    }

    /// The number of requests.
    pub fn requests(&self) -> usize {
        self.shared.known().asked.len()
    }

    /// The most requests that were open at a time.
    pub fn most_at_a_time(&self) -> usize {
        self.shared.known().open_max
    }

    /// Waits until this path was asked for `count` times.
    pub async fn eventually_asked(&self, path: &str, count: usize) {
        eventually(&format!("{count} requests for {path}"), async || {
            let known = self.shared.known();
            let came = known.asked.iter().filter(|(asked, _)| asked == path).count();
            if came >= count { Ok(()) } else { Err(format!("{:?}", known.asked)) }
        })
        .await;
    }

    /// Waits until a request was answered with this status.
    pub async fn eventually_answered(&self, status: u16) {
        eventually(&format!("an answer with {status}"), async || {
            let known = self.shared.known();
            let came = known.asked.iter().any(|(_, answered)| *answered == status);
            if came { Ok(()) } else { Err(format!("{:?}", known.asked)) }
        })
        .await;
    }
}

impl Drop for PrismApi {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let index = {
            let mut known = self.known();
            known.open += 1;
            known.open_max = known.open_max.max(known.open);
            known.asked.push((path.clone(), 0));
            known.asked.len() - 1
        };
        // A request that its sender gives up ends here.
        let open = Open(self);
        let mut trouble = self.trouble.subscribe();
        let trouble = *trouble.wait_for(|trouble| *trouble != Trouble::Silence).await.expect("its sender is here");
        drop(open);
        let response = self.respond(request, &path, trouble);
        self.known().asked[index].1 = response.status().as_u16();
        response
    }

    fn respond(&self, request: &Request<Incoming>, path: &str, trouble: Trouble) -> Response<Full<Bytes>> {
        let known = self.known();
        let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        if header("authorization") != Some(&format!("Bearer {}", known.key)) {
            return error(401);
        }
        if header("accept") != Some("application/json;v=1") {
            return error(406);
        }
        if let Some(status) = known.refused.get(path) {
            return error(*status);
        }
        let found = known.answers.get(path);
        match (trouble, found) {
            (Trouble::Status(status), _) => error(status),
            (Trouble::TooMany(seconds), _) => {
                let mut response = error(429);
                response.headers_mut().insert("retry-after", seconds.into());
                response
            }
            (Trouble::Garbage, _) => Response::new(Full::new(Bytes::from_static(b"{\"id\": \xff<html>"))),
            (_, None) => error(404),
            (Trouble::Huge, Some(found)) => json_of(&with(found, "padding", "x".repeat(HUGE_BYTES))),
            (Trouble::AnotherId, Some(found)) => json_of(&with(found, "id", "another-id".to_owned())),
            (Trouble::None | Trouble::Silence, Some(found)) => json_of(found),
        }
    }
}

/// Counts a request as open until it is dropped.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.known().open -= 1;
    }
}

fn with(answer: &Value, field: &str, text: String) -> Value {
    let mut answer = answer.clone();
    answer[field] = text.into();
    answer
}

fn json_of(value: &Value) -> Response<Full<Bytes>> {
    Response::new(Full::new(Bytes::from(value.to_string())))
}

/// An error quotes what a careless relay could log.
fn error(status: u16) -> Response<Full<Bytes>> {
    let mut response = json_of(&json!({ "statusCode": status, "message": format!("{USER_TOKEN} {HEALTH}") }));
    *response.status_mut() = status.try_into().expect("a status");
    response
}

async fn answer_all(stream: impl AsyncRead + AsyncWrite + Unpin, shared: Arc<Shared>) {
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(&request).await) }
    });
    // The client may leave at any time.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

fn acceptor(issued: &Issued) -> TlsAcceptor {
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let chain = CertificateDer::pem_slice_iter(issued.certificate.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(issued.private_key.as_bytes()).expect("a PEM key");
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.expect("versions of TLS").with_no_client_auth().with_single_cert(chain, key);
    TlsAcceptor::from(Arc::new(config.expect("a certificate with its key")))
}
