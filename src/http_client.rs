//! HTTP requests that the relay itself makes: a client for plain and for TLS addresses, one GET with a deadline and a
//! limit on the size of the answer, and any request of which only the status counts. Redirects are not followed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::AUTHORIZATION;
use hyper::{Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use thiserror::Error;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

use crate::text::chain;
use crate::tls::{Peer, explain};

pub(crate) type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// How long an answer may take, and how large its body may be.
pub(crate) struct Limits {
    pub deadline: Duration,
    pub bytes_max: usize,
}

pub(crate) struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
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

/// One GET. `authorization` is the value of that header.
pub(crate) async fn get(
    client: &HttpClient,
    url: &str,
    authorization: Option<&str>,
    limits: &Limits,
) -> Result<Answer, NoAnswer> {
    let failed = |reason: String| NoAnswer { url: url.to_owned(), reason };
    let mut request = Request::get(url);
    if let Some(authorization) = authorization {
        request = request.header(AUTHORIZATION, authorization);
    }
    let request = request.body(Full::default()).map_err(|error| failed(error.to_string()))?;
    let answer = async {
        let response = client.request(request).await.map_err(|error| failed(explain(&error, Peer::Server)))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limits.bytes_max).collect().await;
        let body = body.map_err(|error| failed(chain(error.as_ref())))?.to_bytes();
        Ok(Answer { status, body })
    };
    let timed_out = |_| Err(failed(format!("timed out after {:?}", limits.deadline)));
    timeout(limits.deadline, answer).await.unwrap_or_else(timed_out)
}
