//! One connection, from its first byte to its last: TLS if it is configured, then HTTP/1.1, and the deadlines of both.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::Limits;

/// How long a client may take to read the end of its last answer once the relay stops.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long a connection without a request may still send one once the relay stops.
const LAST_REQUEST: Duration = Duration::from_millis(500);

/// How a connection ended.
pub enum End {
    /// As either side wished.
    Closed,
    /// The peer is gone, or the network.
    Broken(String),
    TlsHandshake(String),
    /// Not HTTP/1.1, or a head over the limits.
    Malformed(String),
    /// No request in time.
    TimedOut,
    /// Its place was needed.
    Evicted,
    /// There was no place for its source.
    SourceFull,
}

impl End {
    fn of(error: &hyper::Error) -> Self {
        let text = crate::text::chain(error);
        if error.is_timeout() || is_io_timeout(error) {
            Self::TimedOut
        } else if error.is_parse_version_h2() {
            Self::Malformed("the client speaks HTTP/2, and this listener HTTP/1.1 only".to_owned())
        } else if error.is_parse() {
            Self::Malformed(text)
        } else {
            Self::Broken(text)
        }
    }
}

/// Whether the deadline for writing has passed.
fn is_io_timeout(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

/// What is going on on a connection.
pub struct Activity {
    since: Mutex<Since>,
    /// A request has come in.
    begun: Notify,
}

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

struct Since {
    under_way: usize,
    established: bool,
    trusted: bool,
    /// When it began, or its last request ended.
    idle: Instant,
}

impl Activity {
    pub fn new() -> Self {
        let since = Since { under_way: 0, established: false, trusted: false, idle: Instant::now() };
        Self { since: Mutex::new(since), begun: Notify::new() }
    }

    /// A request has come in; it is under way until the guard is dropped. The flag tells whether it is the first one.
    pub fn begin(self: &Arc<Self>) -> (UnderWay, bool) {
        let mut since = self.since();
        since.under_way += 1;
        let first = !std::mem::replace(&mut since.established, true);
        drop(since);
        self.begun.notify_waiters();
        (UnderWay(Arc::clone(self)), first)
    }

    /// Returns whether it was not trusted before.
    pub fn trust(&self) -> bool {
        !std::mem::replace(&mut self.since().trusted, true)
    }

    /// Resolves when no request has been in progress for `limit`, counted from now at the earliest.
    async fn idle_for(&self, limit: Duration) {
        let start = Instant::now();
        loop {
            let due = {
                let since = self.since();
                let from = if since.under_way > 0 { Instant::now() } else { since.idle };
                from.max(start) + limit
            };
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    }

    /// Resolves when a request is under way, or after `limit`.
    async fn busy_or_after(&self, limit: Duration) {
        let begun = self.begun.notified();
        if self.since().under_way == 0 {
            let _ = timeout(limit, begun).await;
        }
    }

    /// Who has never sent a request has been timed out; who was served, and then asked for nothing more, has not.
    fn end(&self, ended: End) -> End {
        match (self.since().established, ended) {
            (true, End::TimedOut) => End::Closed,
            (_, end) => end,
        }
    }

    fn since(&self) -> MutexGuard<'_, Since> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is not yet answered.
pub struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut since = self.0.since();
        since.under_way -= 1;
        since.idle = Instant::now();
    }
}

/// HTTP within limits.
pub struct Protocol {
    builder: http1::Builder,
    header_timeout: Duration,
    write_timeout: Duration,
}

impl Protocol {
    pub fn new(limits: &Limits) -> Self {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            // hyper's deadline also ends a connection that sends no request, or no further one.
            .header_read_timeout(limits.header_timeout)
            .max_headers(limits.headers_max)
            .max_buf_size(limits.header_bytes_max)
            // A sender may close its side once it has sent everything.
            .half_close(true);
        Self { builder, header_timeout: limits.header_timeout, write_timeout: limits.write_timeout }
    }

    /// Serves a TCP connection to its end.
    pub(super) async fn serve<S, B>(
        &self,
        stream: TcpStream,
        tls: Option<Arc<ServerConfig>>,
        service: S,
        activity: &Activity,
        shutdown: &CancellationToken,
    ) -> End
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
    {
        let _ = stream.set_nodelay(true);
        let Some(tls) = tls else { return self.speak(stream, service, activity, shutdown).await };
        let mut shaking = pin!(timeout(self.header_timeout, TlsAcceptor::from(tls).accept(stream)));
        let handshake = tokio::select! {
            handshake = shaking.as_mut() => handshake,
            // It may still become a request.
            () = shutdown.cancelled() => match timeout(LAST_REQUEST, shaking).await {
                Ok(handshake) => handshake,
                Err(_) => return End::Closed,
            },
        };
        match handshake {
            Ok(Ok(stream)) => self.speak(stream, service, activity, shutdown).await,
            Ok(Err(error)) => End::TlsHandshake(error.to_string()),
            Err(_) => End::TlsHandshake("took longer than http.header_timeout".to_owned()),
        }
    }

    /// Serves HTTP over any stream, until the client or an error ends it, or until `shutdown`, after the request in progress.
    pub async fn speak<S, B>(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        service: S,
        activity: &Activity,
        shutdown: &CancellationToken,
    ) -> End
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
    {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.write_timeout));
        let mut connection = pin!(self.builder.serve_connection(TokioIo::new(Box::pin(stream)), service));
        let end = |ended: hyper::Result<()>| activity.end(ended.map_or_else(|error| End::of(&error), |()| End::Closed));
        // What has arrived is read before `shutdown` is checked: it may be a request.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            () = shutdown.cancelled() => {}
        }
        // A request may be on its way, and closing the connection would lose it. Its answer says `connection: close`.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            () = activity.busy_or_after(LAST_REQUEST) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            ended = connection => end(ended),
            () = activity.idle_for(GOODBYE) => activity.end(End::TimedOut),
        }
    }
}
