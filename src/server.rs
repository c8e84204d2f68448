//! An HTTP server with limits: bind, accept, serve, drain. Knows nothing of what it serves.
//!
//! HTTP/1.1, and HTTP/2 with prior knowledge (RFC 9113, section 3.3), told apart by the first bytes.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// When the process has no file descriptor left, one may be free after this time.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Request heads: far more than Prism and the proxies in front need, far less than would hurt 10,000 times.
const HEADERS_MAX: usize = 64;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const STREAMS_MAX: u32 = 128;

/// The address could not be taken.
#[derive(Debug, Error)]
#[error("cannot listen on {address} ({key}): {source}")]
pub struct BindError {
    address: SocketAddr,
    key: &'static str,
    source: io::Error,
}

/// What a connection may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections_max: usize,
    /// For a request head, and for the silence between two requests.
    pub header_timeout: Duration,
    /// For a connection on which no byte moves, in either direction.
    pub silence_timeout: Duration,
}

/// A bound listener.
pub struct Server {
    listener: TcpListener,
    limits: Limits,
}

impl Server {
    /// `key` is the configuration's name of the address, for the error.
    pub async fn bind(address: SocketAddr, key: &'static str, limits: Limits) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address).await.map_err(|source| BindError { address, key, source })?;
        Ok(Self { listener, limits })
    }

    /// Where it listens: the port that was given if 0 was asked for.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then takes no new connection, finishes the requests under way, and returns. Dropping the
    /// future cuts the connections.
    pub async fn run<H, F>(self, handler: H, shutdown: CancellationToken)
    where
        H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let Self { listener, limits } = self;
        let protocol = Arc::new(protocol(&limits));
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        loop {
            // At the limit nobody is accepted: the kernel keeps the next ones waiting.
            let accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (accept(&listener).await, place)
            };
            let ((stream, peer), place) = tokio::select! {
                accepted = accepted => accepted,
                // Reaps the connections that have ended.
                Some(_) = connections.join_next() => continue,
                () = shutdown.cancelled() => break,
            };
            let handler = handler.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let head = request.method() == Method::HEAD;
                let response = handler(request, peer);
                async move {
                    let response = response.await;
                    Ok::<_, Infallible>(if head { without_body(response) } else { response })
                }
            });
            let connection =
                protocol.serve_connection(TokioIo::new(with_timeouts(stream, limits.silence_timeout)), service);
            let connection = graceful.watch(connection.into_owned());
            connections.spawn(async move {
                if let Err(error) = connection.await {
                    debug!(%peer, %error, "connection ended");
                }
                drop(place);
            });
        }
        drop(listener);
        graceful.shutdown().await;
    }
}

fn protocol(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        // A sender may close its side once it has sent everything.
        .half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .keep_alive_interval(limits.header_timeout)
        .keep_alive_timeout(limits.header_timeout);
    builder
}

/// The answer to HEAD (RFC 9110, section 9.3.2). hyper leaves the body out by itself only in HTTP/1.
fn without_body(response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    let length = response.body().size_hint().lower();
    let mut response = response.map(|_| Full::default());
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

type Stream = std::pin::Pin<Box<TimeoutStream<TcpStream>>>;

/// hyper's own deadlines begin with the first request; this one covers what comes before, and senders that do not read
/// their answers.
fn with_timeouts(stream: TcpStream, silence: Duration) -> Stream {
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_read_timeout(Some(silence));
    stream.set_write_timeout(Some(silence));
    Box::pin(stream)
}

/// Never fails: what goes wrong with one connection is no reason to stop taking others.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // The peer was gone before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
