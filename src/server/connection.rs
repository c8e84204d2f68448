//! One connection, from the first byte to the last: TLS if it is asked for, HTTP, and the deadlines for both.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::Limits;

/// What an HTTP/2 client may send ahead of being read, for all of its streams: the least that RFC 9113, section 6.9.2
/// allows for a connection. Ten thousand connections can take no more than 640 MB this way.
const H2_WINDOW_BYTES: u32 = 65_535;
/// Answers are small.
const H2_SEND_BYTES_MAX: usize = 64 * 1024;
/// Streams that were reset before we got to look at them; more end the connection (CVE-2023-44487, "rapid reset").
const H2_RESETS_MAX: usize = 20;

/// How long a client may take to read the end of its last answer, and to say goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long a connection without a request may still bring one when the relay stops.
const LAST_REQUEST: Duration = Duration::from_millis(500);

/// How a connection ended.
pub enum End {
    /// As either side wished.
    Closed,
    /// The peer is gone, or the network.
    Broken(String),
    TlsHandshake(String),
    /// Neither HTTP/1.1 nor HTTP/2, or too much of it.
    Malformed(String),
    /// No request in time.
    TimedOut,
    /// Its place was needed.
    Evicted,
    /// There was no place for its source.
    SourceFull,
}

/// Every reason there is, for counters that should be there before they count.
pub const REASONS: [&str; 5] = ["tls-handshake", "malformed", "timeout", "evicted", "source-limit"];

impl End {
    /// For the metric, if the end was forced by the peer's doing.
    pub fn reason(&self) -> Option<&'static str> {
        match self {
            Self::Closed | Self::Broken(_) => None,
            Self::TlsHandshake(_) => Some("tls-handshake"),
            Self::Malformed(_) => Some("malformed"),
            Self::TimedOut => Some("timeout"),
            Self::Evicted => Some("evicted"),
            Self::SourceFull => Some("source-limit"),
        }
    }

    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Broken(error) | Self::TlsHandshake(error) | Self::Malformed(error) => Some(error),
            Self::Closed | Self::TimedOut | Self::Evicted | Self::SourceFull => None,
        }
    }

    /// hyper tells some causes by methods, others only by what lies beneath.
    fn of(error: &(dyn Error + Send + Sync + 'static)) -> Self {
        let text = crate::text::chain(error);
        let mut next: Option<&(dyn Error + 'static)> = Some(error);
        while let Some(cause) = next {
            next = cause.source();
            if let Some(error) = cause.downcast_ref::<hyper::Error>() {
                if error.is_timeout() {
                    return Self::TimedOut;
                }
                if error.is_parse() {
                    return Self::Malformed(text);
                }
                if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
                    return Self::Broken(text);
                }
            }
            if let Some(error) = cause.downcast_ref::<io::Error>() {
                let silent = error.kind() == io::ErrorKind::TimedOut;
                return if silent { Self::TimedOut } else { Self::Broken(text) };
            }
        }
        // What is left are breaches of HTTP/2.
        Self::Malformed(text)
    }
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

    /// Resolves when nothing has been under way for `limit`, counted from `start` at the earliest.
    async fn idle_for(&self, limit: Duration, start: Instant) {
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
    fn end(&self, ended: Result<(), Box<dyn Error + Send + Sync>>) -> End {
        let end = ended.map_or_else(|error| End::of(&*error), |()| End::Closed);
        match (self.since().established, end) {
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
    builder: auto::Builder<TokioExecutor>,
    header_timeout: Duration,
    idle_timeout: Duration,
    silence_timeout: Duration,
}

impl Protocol {
    pub fn new(limits: &Limits) -> Self {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_headers(limits.headers_max)
            .max_buf_size(limits.header_bytes_max)
            // A sender may close its side once it has sent everything.
            .half_close(true);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_max)
            .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
            .initial_stream_window_size(H2_WINDOW_BYTES)
            .initial_connection_window_size(H2_WINDOW_BYTES)
            .max_send_buf_size(H2_SEND_BYTES_MAX)
            .max_pending_accept_reset_streams(H2_RESETS_MAX)
            .keep_alive_interval(limits.header_timeout)
            .keep_alive_timeout(limits.header_timeout);
        let Limits { header_timeout, idle_timeout, silence_timeout, .. } = *limits;
        Self { builder, header_timeout, idle_timeout, silence_timeout }
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

    /// HTTP over any stream, until it ends, is idle for too long, or `shutdown` lets it end with the request under way.
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
        let stream = with_timeouts(stream, self.silence_timeout);
        let mut connection = pin!(self.builder.serve_connection(TokioIo::new(stream), service));
        let begun = Instant::now();
        // What has come by now is looked at first: it is a request, and the connection not idle.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return activity.end(ended),
            () = shutdown.cancelled() => {
                // A request may be on its way just now, and a close would cost it: it is answered, and the answer says that it
                // was the last one.
                tokio::select! {
                    biased;
                    ended = connection.as_mut() => return activity.end(ended),
                    () = activity.busy_or_after(LAST_REQUEST) => {}
                }
            }
            // hyper looks after HTTP/1 by itself; an HTTP/2 client that answers pings could stay for ever.
            () = activity.idle_for(self.idle_timeout, begun) => {}
        }
        connection.as_mut().graceful_shutdown();
        // What is under way is finished; a goodbye is for those who listen.
        tokio::select! {
            ended = connection => activity.end(ended),
            () = activity.idle_for(GOODBYE, Instant::now()) => {
                activity.end(Err(Box::new(io::Error::from(io::ErrorKind::TimedOut))))
            }
        }
    }
}

type Timed<T> = std::pin::Pin<Box<TimeoutStream<T>>>;

/// hyper's own deadlines begin with the first request; this one covers what comes before, and senders that do not read
/// their answers.
fn with_timeouts<T: AsyncRead + AsyncWrite>(stream: T, silence: Duration) -> Timed<T> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_read_timeout(Some(silence));
    stream.set_write_timeout(Some(silence));
    Box::pin(stream)
}
