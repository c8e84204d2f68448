//! A stream that remembers its first bytes. They name the protocol of a peer that speaks another one than is expected.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Maximum number of bytes that are kept: the signature of the PROXY protocol, version 2, has 12.
const KEPT_MAX: usize = 16;

const PROXY_V1: &[u8] = b"PROXY ";
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A stream that keeps the beginning of the first read.
pub(crate) struct Recorded<S> {
    stream: S,
    first: FirstBytes,
}

/// The first bytes that came from a peer; empty if none came.
#[derive(Clone, Default)]
pub(crate) struct FirstBytes(Arc<OnceLock<Vec<u8>>>);

/// A protocol that can be told by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spoken {
    /// A record of TLS: a handshake or an alert.
    Tls,
    /// The header that proxies put in front of a connection
    /// (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).
    Proxy,
    /// A request or an answer of HTTP/1.
    Http,
}

impl<S> Recorded<S> {
    /// Wraps a stream that was not read yet.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, first: FirstBytes::default() }
    }

    /// The stream, for a protocol that finds such faults itself.
    pub(crate) fn into_inner(self) -> S {
        self.stream
    }

    /// The first bytes, also after the stream is gone.
    pub(crate) fn first(&self) -> FirstBytes {
        self.first.clone()
    }
}

impl FirstBytes {
    /// Whether nothing has come.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.get().is_none()
    }

    /// The protocol that begins so.
    pub(crate) fn spoken(&self) -> Option<Spoken> {
        spoken(self.0.get()?)
    }
}

fn spoken(first: &[u8]) -> Option<Spoken> {
    let is_method = |word: &[u8]| word.len() >= 3 && word.iter().all(u8::is_ascii_uppercase);
    match first {
        // Handshake or alert, of version 3.x.
        [0x15 | 0x16, 3, ..] => Some(Spoken::Tls),
        _ if first.starts_with(PROXY_V1) || first.starts_with(PROXY_V2) => Some(Spoken::Proxy),
        _ if first.starts_with(b"HTTP/") => Some(Spoken::Http),
        _ if first.contains(&b' ') && first.split(|byte| *byte == b' ').next().is_some_and(is_method) => {
            Some(Spoken::Http)
        }
        _ => None,
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Recorded<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut this.stream).poll_read(context, buffer);
        let new = &buffer.filled()[before..];
        if !new.is_empty() && this.first.0.get().is_none() {
            let _ = this.first.0.set(new[..new.len().min(KEPT_MAX)].to_vec());
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Recorded<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn protocols_are_told_by_their_first_bytes() {
        for (first, expected) in [
            (b"PROXY TCP4 203.0.113.9".as_slice(), Some(Spoken::Proxy)),
            (b"PROXY UNKNOWN\r\n", Some(Spoken::Proxy)),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", Some(Spoken::Proxy)),
            (b"\x16\x03\x01\x02\0\x01", Some(Spoken::Tls)),
            (b"\x15\x03\x03\0\x02\x02\x28", Some(Spoken::Tls)),
            (b"GET / HTTP/1.1\r\n", Some(Spoken::Http)),
            (b"POST /webhooks/p", Some(Spoken::Http)),
            (b"HTTP/1.1 400 Bad", Some(Spoken::Http)),
            (b"AMQP\0\0\x09\x01", None),
            (b"\r\n\r\nGET / HTTP", None),
            (b"neither of them ", None),
            (b"", None),
        ] {
            assert_eq!(spoken(first), expected, "{:?}", String::from_utf8_lossy(first));
        }
    }

    #[tokio::test]
    async fn the_first_read_is_remembered_and_passed_on() {
        let mut stream = Recorded::new(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nPOST / HTTP/1.1".as_slice());
        let first = stream.first();
        assert_eq!(first.spoken(), None);
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        assert_eq!((first.spoken(), all.len()), (Some(Spoken::Proxy), 51));
    }
}
