//! HTTP requests that the relay itself makes: a client for plain and for TLS addresses, a request with a deadline and a
//! limit on the size of the answer, and one of which only the status counts. Redirects are not followed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::HeaderName;
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use thiserror::Error;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

use crate::text::chain;
use crate::tls::{ClientFiles, Peer, client_without_authorities, explain};

pub(crate) type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Maximum time for reading the authorities that the system trusts.
const AUTHORITIES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an answer may take, and how large its body may be.
pub(crate) struct Limits {
    pub deadline: Duration,
    pub bytes_max: usize,
}

#[derive(Debug, Error)]
#[error("no answer from {url}: {reason}")]
pub(crate) struct NoAnswer {
    url: String,
    reason: String,
}

/// A client for `http://` and `https://` addresses.
pub(crate) fn http_client(tls: Arc<ClientConfig>) -> HttpClient {
    let tls = Arc::unwrap_or_clone(tls);
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
    Client::builder(TokioExecutor::new()).build(connector)
}

/// A client for `https://` addresses whose certificates the system's authorities signed, or for `http://` addresses
/// only.
pub(crate) async fn public_client(needs_tls: bool) -> Result<HttpClient, String> {
    let load = move || if needs_tls { ClientFiles::default().load() } else { client_without_authorities() };
    Ok(http_client(off_the_runtime(load).await?.map_err(|error| chain(&error))?))
}

/// Runs `work`, which reads files, on a thread that may wait for the disk: the listener of the operators is served by
/// the caller's task.
async fn off_the_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let done = timeout(AUTHORITIES_TIMEOUT, tokio::task::spawn_blocking(work)).await;
    let done = done.map_err(|_| format!("reading the system's authorities took more than {AUTHORITIES_TIMEOUT:?}"))?;
    done.map_err(|error| error.to_string())
}

/// The status that a request is answered with. The body of the answer is not read. The error does not quote the URL.
pub(crate) async fn status_of(
    client: &HttpClient,
    request: Request<Full<Bytes>>,
    deadline: Duration,
) -> Result<StatusCode, String> {
    match timeout(deadline, client.request(request)).await {
        Ok(Ok(response)) => Ok(response.status()),
        Ok(Err(error)) => Err(explain(&error, Peer::WebServer)),
        Err(_) => Err(format!("no answer within {deadline:?}")),
    }
}

/// The whole answer to a request. The error does not quote the URL.
pub(crate) async fn answer_of(
    client: &HttpClient,
    request: Request<Full<Bytes>>,
    limits: &Limits,
    peer: Peer,
) -> Result<Response<Bytes>, String> {
    let answer = async {
        let (head, body) = client.request(request).await.map_err(|error| explain(&error, peer))?.into_parts();
        let body = Limited::new(body, limits.bytes_max).collect().await;
        Ok(Response::from_parts(head, body.map_err(|error| chain(error.as_ref()))?.to_bytes()))
    };
    timeout(limits.deadline, answer).await.unwrap_or_else(|_| Err(format!("timed out after {:?}", limits.deadline)))
}

/// One request without a body. `credential`: the header that proves who asks.
pub(crate) async fn ask(
    client: &HttpClient,
    method: Method,
    url: &str,
    credential: Option<&(HeaderName, String)>,
    limits: &Limits,
) -> Result<Response<Bytes>, NoAnswer> {
    let failed = |reason: String| NoAnswer { url: url.to_owned(), reason };
    let mut request = Request::builder().method(method).uri(url);
    if let Some((name, value)) = credential {
        request = request.header(name, value);
    }
    let request = request.body(Full::default()).map_err(|error| failed(error.to_string()))?;
    answer_of(client, request, limits, Peer::Server).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reading_the_authorities_does_not_hold_up_the_listener() {
        let (answered, answer) = std::sync::mpsc::channel();
        let slow = off_the_runtime(move || answer.recv_timeout(Duration::from_secs(30)));
        let (read, ()) = tokio::join!(slow, async move { answered.send(()).unwrap() });
        assert_eq!(read, Ok(Ok(())));
    }
}
