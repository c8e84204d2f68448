//! One connection, from its first byte to its last: TLS if it is configured, then HTTP/1.1, and the deadlines of both.
//! A client that speaks another protocol is named by its first bytes.

use std::convert::Infallible;
use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
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
    /// The deadline of a head, which hyper does not have: its own one begins with the idle time before the head.
    header_timeout: Duration,
    write_timeout: Duration,
}

impl Protocol {
    /// HTTP/1.1 with these limits.
    pub fn new(limits: &Limits) -> Self {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            // hyper's deadline includes the idle time, and stands still while an answer is sent.
            .header_read_timeout(limits.idle_timeout.max(limits.header_timeout))
            .max_headers(limits.headers_max)
            .max_buf_size(limits.header_bytes_max)
            // A sender may close its side once it has sent everything.
            .half_close(true);
        Self { builder, header_timeout: limits.header_timeout, write_timeout: limits.write_timeout }
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
        let activity = &Activity::default();
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
        // What has arrived is read before `shutdown` is checked: it may be a request.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            () = activity.head_takes(self.header_timeout) => return activity.end(End::TimedOut),
            () = shutdown.cancelled() => {}
        }
        // A request may be on its way, and closing now would lose it. Its answer carries `connection: close`.
        tokio::select! {
            biased;
            ended = connection.as_mut() => return end(ended),
            () = activity.begins_within(LAST_REQUEST) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            ended = connection => end(ended),
            () = activity.ended_for(GOODBYE) => activity.end(End::TimedOut),
        }
    }
}

/// The requests on one connection.
#[derive(Default)]
struct Activity(watch::Sender<Requests>);

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Requests {
    /// No request has arrived.
    #[default]
    None,
    InProgress,
    /// The first bytes of a further request have arrived.
    Arriving,
    /// All requests that have arrived are answered.
    Answered,
}

impl Activity {
    /// Marks a request as in progress until the guard is dropped.
    fn begin(&self) -> InProgress<'_> {
        self.0.send_replace(Requests::InProgress);
        InProgress(self)
    }

    /// Notes that bytes have arrived: those of a body, or of a request.
    fn bytes_arrived(&self) {
        if *self.0.borrow() == Requests::Answered {
            self.0.send_replace(Requests::Arriving);
        }
    }

    /// Resolves when the head of a request has not been complete for `limit` after the connection, or after its first
    /// byte.
    async fn head_takes(&self, limit: Duration) {
        let is_awaited = |requests: &Requests| matches!(requests, Requests::None | Requests::Arriving);
        let mut requests = self.0.subscribe();
        loop {
            let _ = requests.wait_for(is_awaited).await;
            if timeout(limit, requests.wait_for(|requests| !is_awaited(requests))).await.is_err() {
                return;
            }
        }
    }

    /// Resolves when a request is in progress, or after `limit`.
    async fn begins_within(&self, limit: Duration) {
        let mut requests = self.0.subscribe();
        let _ = timeout(limit, requests.wait_for(|requests| *requests == Requests::InProgress)).await;
    }

    /// Resolves when no request has been in progress for `limit`. A request whose head was still arriving may begin
    /// meanwhile: then the time starts again after its answer.
    async fn ended_for(&self, limit: Duration) {
        let mut requests = self.0.subscribe();
        loop {
            let _ = requests.wait_for(|requests| *requests != Requests::InProgress).await;
            let begun = timeout(limit, requests.wait_for(|requests| *requests == Requests::InProgress)).await;
            if begun.is_err() {
                return;
            }
        }
    }

    /// A client that was served and then sent nothing more has not been timed out.
    fn end(&self, end: End) -> End {
        match end {
            End::TimedOut if *self.0.borrow() != Requests::None => End::Closed,
            end => end,
        }
    }
}

/// A request that is not yet answered.
struct InProgress<'a>(&'a Activity);

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.0.0.send_replace(Requests::Answered);
    }
}

/// A stream that notes when bytes arrive.
struct Watched<'a, S> {
    stream: Pin<Box<TimeoutStream<S>>>,
    activity: &'a Activity,
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
        self.get_mut().stream.as_mut().poll_write(context, bytes)
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
        self.get_mut().stream.as_mut().poll_write_vectored(context, bytes)
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
