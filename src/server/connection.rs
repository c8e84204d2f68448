//! One connection, from its first byte to its last: TLS if it is configured, then HTTP/1.1, and the deadlines of both.
//! A client that speaks another protocol is named by its first bytes.

use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::limits::{BodyError, Limits};
use crate::first_bytes::{self, Recorded};
use crate::tls;

/// How long a client may take to read the end of its last answer once the relay stops.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long a connection without a request may still send one once the relay stops.
const LAST_REQUEST: Duration = Duration::from_millis(500);

/// How a connection ended.
pub enum End {
    /// One side closed it in order.
    Closed,
    /// The peer or the network broke it off.
    Broken(String),
    /// The TLS handshake failed.
    TlsHandshake(String),
    /// The client did not speak HTTP/1.1, or sent a head over the limits.
    Malformed(String),
    /// A proxy sent the PROXY protocol, which the relay does not speak.
    ProxyProtocol,
    /// The client spoke TLS to a listener without it.
    TlsOnPlainPort,
    /// The client sent no request in time.
    TimedOut,
    /// Another connection needed its place.
    Evicted,
    /// All places of its source were taken.
    SourceFull,
}

impl End {
    fn of(error: &hyper::Error) -> Self {
        let text = crate::text::chain(error);
        if error.is_timeout() || is_write_timeout(error) {
            Self::TimedOut
        } else if error.is_parse_version_h2() {
            Self::Malformed("the client speaks HTTP/2; this listener speaks HTTP/1.1 only".to_owned())
        } else if error.is_parse() {
            Self::Malformed(text)
        } else {
            Self::Broken(text)
        }
    }
}

/// Names what the client speaks, if its connection failed for that reason.
fn named(end: End, spoken: Option<first_bytes::Spoken>) -> End {
    match (end, spoken) {
        (End::Malformed(_) | End::TlsHandshake(_), Some(first_bytes::Spoken::Proxy)) => End::ProxyProtocol,
        (End::Malformed(_), Some(first_bytes::Spoken::Tls)) => End::TlsOnPlainPort,
        (End::TlsHandshake(_), Some(first_bytes::Spoken::Http)) => {
            End::TlsHandshake("the client speaks HTTP without TLS; this listener needs TLS".to_owned())
        }
        (end, _) => end,
    }
}

fn is_write_timeout(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

/// Speaks HTTP/1.1 within the limits of a listener.
pub struct Protocol {
    builder: http1::Builder,
    /// The deadlines of a head and of the pause before it. Hyper has one for both, and sets it again for each request.
    header_timeout: Duration,
    idle_timeout: Duration,
    write_timeout: Duration,
}

impl Protocol {
    /// HTTP/1.1 with these limits.
    pub fn new(limits: &Limits) -> Self {
        let mut builder = http1::Builder::new();
        builder
            .header_read_timeout(None)
            .max_headers(limits.headers_max)
            .max_buf_size(limits.header_bytes_max)
            // A sender may close its side once it has sent everything.
            .half_close(true);
        let Limits { header_timeout, idle_timeout, write_timeout, .. } = *limits;
        Self { builder, header_timeout, idle_timeout, write_timeout }
    }

    /// Serves a TCP connection to its end.
    pub(super) async fn serve<H, F, B>(
        &self,
        stream: TcpStream,
        tls: Option<Arc<ServerConfig>>,
        handler: H,
        shutdown: &CancellationToken,
    ) -> End
    where
        H: Fn(Request<Incoming>) -> F,
        F: Future<Output = Response<B>>,
        B: Body<Data = Bytes, Error: Into<BodyError>> + 'static,
    {
        // Without it small answers wait for the client's acknowledgement. A socket that refuses it is only slower.
        let _ = stream.set_nodelay(true);
        let stream = Recorded::new(stream);
        let first = stream.first();
        let end = match tls {
            None => self.speak(stream, handler, shutdown).await,
            Some(tls) => self.speak_tls(stream, tls, handler, shutdown).await,
        };
        named(end, first.spoken())
    }

    async fn speak_tls<H, F, B>(
        &self,
        stream: Recorded<TcpStream>,
        tls: Arc<ServerConfig>,
        handler: H,
        shutdown: &CancellationToken,
    ) -> End
    where
        H: Fn(Request<Incoming>) -> F,
        F: Future<Output = Response<B>>,
        B: Body<Data = Bytes, Error: Into<BodyError>> + 'static,
    {
        let mut handshake = pin!(timeout(self.header_timeout, TlsAcceptor::from(tls).accept(stream)));
        let outcome = tokio::select! {
            outcome = handshake.as_mut() => outcome,
            // A request may follow the handshake.
            () = shutdown.cancelled() => match timeout(LAST_REQUEST, handshake).await {
                Ok(outcome) => outcome,
                Err(_) => return End::Closed,
            },
        };
        match outcome {
            Ok(Ok(stream)) => self.speak(stream, handler, shutdown).await,
            Ok(Err(error)) => End::TlsHandshake(tls::explain(&error, tls::Peer::Client)),
            Err(_) => End::TlsHandshake("took longer than http.header_timeout".to_owned()),
        }
    }

    /// Serves HTTP over any stream until the client, an error or a deadline ends it. After `shutdown` it ends with the
    /// request in progress, or with one that follows within `LAST_REQUEST`.
    pub async fn speak<H, F, B>(
        &self,
        stream: impl AsyncRead + AsyncWrite,
        handler: H,
        shutdown: &CancellationToken,
    ) -> End
    where
        H: Fn(Request<Incoming>) -> F,
        F: Future<Output = Response<B>>,
        B: Body<Data = Bytes, Error: Into<BodyError>> + 'static,
    {
        let activity = &Activity::new();
        let service = service_fn(move |request| {
            let in_progress = activity.begin();
            let answer = handler(request);
            async move {
                let answer = answer.await;
                drop(in_progress);
                Ok::<_, Infallible>(answer)
            }
        });
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.write_timeout));
        let stream = Watched { stream: Box::pin(stream), activity };
        let mut connection = pin!(self.builder.serve_connection(TokioIo::new(stream), service));
        let end = |ended: hyper::Result<()>| activity.end(ended.map_or_else(|error| End::of(&error), |()| End::Closed));
        let interrupted = when_woken(async {
            tokio::select! {
                () = activity.is_overdue(self.header_timeout, self.idle_timeout) => true,
                () = shutdown.cancelled() => false,
            }
        });
        // What has arrived is read before `shutdown` is checked: it may be a request.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            is_overdue = interrupted => if is_overdue {
                return activity.end(End::TimedOut);
            },
        }
        // A request may be on its way, and closing now would lose it. Its answer carries `connection: close`.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            () = activity.begins_within(LAST_REQUEST) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            biased;
            ended = connection => end(ended),
            () = activity.ended_for(GOODBYE) => activity.end(End::TimedOut),
        }
    }
}

/// Polls a future only when that future itself was woken, and not each time the connection is: for what happens seldom.
pub(super) async fn when_woken<T>(future: impl Future<Output = T>) -> T {
    FuturesUnordered::from_iter([future]).next().await.expect("there is one future")
}

/// The requests on one connection. They change only while the connection is polled, which is always before what is
/// awaited here, and in the same task: so nobody has to be woken by a change.
struct Activity {
    begun: Instant,
    /// The number of a [`Requests`].
    requests: AtomicU8,
    /// When a head or the pause before it began, in milliseconds since `begun`.
    since: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Requests {
    /// No request has arrived.
    None,
    InProgress,
    /// The first bytes of a further request have arrived.
    Arriving,
    /// All requests that have arrived are answered.
    Answered,
}

impl Activity {
    fn new() -> Self {
        let requests = AtomicU8::new(Requests::None as u8);
        Self { begun: Instant::now(), requests, since: AtomicU64::new(0) }
    }

    fn are(&self, requests: Requests) -> bool {
        self.requests.load(Ordering::Relaxed) == requests as u8
    }

    fn set(&self, requests: Requests) {
        self.requests.store(requests as u8, Ordering::Relaxed);
    }

    fn restart_clock(&self) {
        let since = self.begun.elapsed().as_millis();
        self.since.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Marks a request as in progress until the guard is dropped.
    fn begin(&self) -> InProgress<'_> {
        self.set(Requests::InProgress);
        InProgress(self)
    }

    /// Notes that bytes have arrived: those of a body, or of a request.
    fn bytes_arrived(&self) {
        if self.are(Requests::Answered) {
            self.set(Requests::Arriving);
            self.restart_clock();
        }
    }

    /// Notes that a piece of an answer was taken: the pause begins after the last one.
    fn bytes_left(&self) {
        if self.are(Requests::Answered) {
            self.restart_clock();
        }
    }

    /// Resolves when the head of a request has not been complete for `header` after the connection, or after its first
    /// byte, or when it has not begun for `idle` after the last answer. Looks at the clock now and then: a timer for
    /// each request would cost more.
    async fn is_overdue(&self, header: Duration, idle: Duration) {
        let mut timer = pin!(sleep_until(self.begun + header));
        loop {
            timer.as_mut().await;
            let now = Instant::now();
            let since = self.begun + Duration::from_millis(self.since.load(Ordering::Relaxed));
            let due = if self.are(Requests::InProgress) {
                now + header
            } else if self.are(Requests::Answered) {
                since + idle
            } else {
                since + header
            };
            if due <= now {
                return;
            }
            // A head that begins from now on is not due before.
            timer.as_mut().reset(due.min(now + header));
        }
    }

    /// Resolves when a request is in progress, or after `limit`.
    async fn begins_within(&self, limit: Duration) {
        let _ = timeout(limit, self.become_busy(true)).await;
    }

    /// Resolves when no request has been in progress for `limit`. A request whose head was still arriving may begin
    /// meanwhile: then the time starts again after its answer.
    async fn ended_for(&self, limit: Duration) {
        loop {
            self.become_busy(false).await;
            if timeout(limit, self.become_busy(true)).await.is_err() {
                return;
            }
        }
    }

    /// Resolves when a request is in progress, or none.
    async fn become_busy(&self, busy: bool) {
        poll_fn(|_| if self.are(Requests::InProgress) == busy { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// A client that was served and then sent nothing more has not been timed out.
    fn end(&self, end: End) -> End {
        match end {
            End::TimedOut if !self.are(Requests::None) => End::Closed,
            end => end,
        }
    }
}

/// A request that is not yet answered.
struct InProgress<'a>(&'a Activity);

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.0.set(Requests::Answered);
        self.0.restart_clock();
    }
}

/// A stream that notes when bytes come and go.
struct Watched<'a, S> {
    stream: Pin<Box<TimeoutStream<S>>>,
    activity: &'a Activity,
}

impl<S> Watched<'_, S> {
    fn left(
        &mut self,
        write: impl FnOnce(Pin<&mut TimeoutStream<S>>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let written = write(self.stream.as_mut());
        if written.is_ready() {
            self.activity.bytes_left();
        }
        written
    }
}

impl<S: AsyncRead + AsyncWrite> AsyncRead for Watched<'_, S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let outcome = this.stream.as_mut().poll_read(context, buffer);
        if buffer.filled().len() > before {
            this.activity.bytes_arrived();
        }
        outcome
    }
}

impl<S: AsyncRead + AsyncWrite> AsyncWrite for Watched<'_, S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.left(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream.as_mut().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream.as_mut().poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.left(|stream| stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> Limits {
        Limits {
            connections_max: 1,
            connections_per_source_max: 1,
            unlimited_sources: Vec::new(),
            header_timeout: 10 * SECOND,
            idle_timeout: 75 * SECOND,
            write_timeout: 10 * SECOND,
            headers_max: 16,
            header_bytes_max: 8192,
        }
    }

    /// Sends each part after its pause, and returns what came back and when the connection ended.
    async fn converse(parts: &[(u64, &str)]) -> (String, Duration) {
        let protocol = Protocol::new(&limits());
        let (mut client, server) = duplex(4096);
        let handler = |_request| async { Response::new(Full::new(Bytes::from_static(b"done"))) };
        let begun = tokio::time::Instant::now();
        let stop = CancellationToken::new();
        let serving = async {
            protocol.speak(server, handler, &stop).await;
            begun.elapsed()
        };
        let talking = async {
            for (pause, part) in parts {
                sleep(Duration::from_secs(*pause)).await;
                client.write_all(part.as_bytes()).await.unwrap();
            }
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let (ended, answer) = tokio::join!(serving, talking);
        (answer, ended)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_may_be_idle_for_longer_than_a_head_may_take() {
        let request = "GET / HTTP/1.1\r\nhost: relay\r\n\r\n";
        let (answers, ended) = converse(&[(0, request), (60, request), (70, request)]).await;
        assert_eq!(answers.matches("done").count(), 3, "{answers}");
        assert_eq!(ended.as_secs(), 60 + 70 + 75, "idle");
        // The first bytes of a further request, and no more.
        let (answers, ended) = converse(&[(0, request), (60, "GET / HT")]).await;
        assert_eq!((answers.matches("done").count(), ended.as_secs()), (1, 60 + 10), "{answers}");
        let (answers, ended) = converse(&[(0, request), (60, "GET / HT"), (9, &request[8..])]).await;
        assert_eq!((answers.matches("done").count(), ended.as_secs()), (2, 60 + 9 + 75), "{answers}");
        // A new connection sends nothing, or not all of its first head.
        assert_eq!(converse(&[]).await, (String::new(), 10 * SECOND));
        assert_eq!(converse(&[(5, "GET / HT")]).await, (String::new(), 10 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_whose_head_was_arriving_at_the_stop_is_answered_however_long_that_takes() {
        let (protocol, stop) = (Protocol::new(&limits()), CancellationToken::new());
        stop.cancel();
        let (mut client, server) = duplex(4096);
        let handler = |_request| async move {
            sleep(8 * SECOND).await;
            Response::new(Full::new(Bytes::from_static(b"done")))
        };
        let serving = protocol.speak(server, handler, &stop);
        let talking = async {
            client.write_all(b"GET / HTTP/1.1\r\nhost: ").await.unwrap();
            sleep(SECOND).await;
            client.write_all(b"relay\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let (_, answer) = tokio::join!(serving, talking);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer:?}");
    }
}
