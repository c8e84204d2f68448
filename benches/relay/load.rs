//! The senders: signed webhooks that are built before the clock starts, so that sending them costs little.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream as BlockingStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::LocalSet;

use crate::harness::SECRET;
use crate::harness::http::{now, sign};

/// Threads of the open loop. Each has its own connection and sends its share of the rate.
const STEADY_SENDERS: usize = 16;

/// Webhooks as bytes, head and body. Each has a different body and its signature.
pub struct Webhooks {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Webhooks {
    /// `count` events of as many scans. Two of three are scan events, the third is a prediction event.
    pub fn new(count: usize) -> Self {
        let mut webhooks = Self { bytes: Vec::new(), ends: Vec::with_capacity(count) };
        let (timestamp, run) = (now(), uuid::Uuid::now_v7());
        for number in 0..count {
            let body = body(&format!("{run}-{number}"), number);
            let signature = sign(SECRET, &timestamp, body.as_bytes());
            let head = format!(
                "POST /webhooks/prism HTTP/1.1\r\nhost: relay.example\r\ncontent-type: application/json\r\n\
                 prism-timestamp: {timestamp}\r\nprism-signature: {signature}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            webhooks.bytes.extend_from_slice(head.as_bytes());
            webhooks.bytes.extend_from_slice(body.as_bytes());
            webhooks.ends.push(webhooks.bytes.len());
        }
        webhooks
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[index]]
    }
}

/// An event as Prism sends it.
pub fn body(scan: &str, number: usize) -> String {
    let (user, token) = ("5304329f-bcb8-48f0-9661-5ac06b2515b1", "partner-user-42");
    let (event_type, prediction, state) = match number % 3 {
        0 => ("scan.processing.started", String::new(), "PROCESSING"),
        1 => ("scan.processing.succeeded", String::new(), "READY"),
        _ => {
            let prediction = format!(r#""bodyShapePredictionId":"{scan}","#);
            ("body_shape_prediction.processing.succeeded", prediction, "READY")
        }
    };
    let user = format!(r#""userId":"{user}","userToken":"{token}","state":"{state}""#);
    format!(r#"{{"eventType":"{event_type}","payload":{{{prediction}"scanId":"{scan}",{user}}}}}"#)
}

/// The number at the end of the scan's id, of an event made by [`Webhooks::new`].
pub fn number(body: &[u8]) -> usize {
    let event: serde_json::Value = serde_json::from_slice(body).expect("an event");
    let scan = event["payload"]["scanId"].as_str().and_then(|scan| scan.rsplit('-').next());
    scan.and_then(|number| number.parse().ok()).expect("a number at the end of the scan's id")
}

/// Throughput of the senders, and the processor time that they needed.
pub struct Sent {
    pub per_second: f64,
    /// The share of one processor that the senders used, 0 to 1. Below 1, the server was the bottleneck.
    pub busy: f64,
    /// The median time to the 200.
    pub p50: Duration,
}

/// Sends all webhooks. Each connection sends the next one when the last one is answered. Panics unless the answer is
/// 200.
pub fn closed_loop(address: SocketAddr, webhooks: &Webhooks, connections: usize) -> Sent {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime for the senders");
    let (next, took) = (Cell::new(0), RefCell::new(Vec::with_capacity(webhooks.len())));
    let (started, cpu) = (Instant::now(), own_cpu());
    let send = async || {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        let mut answer = Vec::with_capacity(4096);
        while next.get() < webhooks.len() {
            let (index, began) = (next.replace(next.get() + 1), Instant::now());
            stream.write_all(webhooks.get(index)).await.expect("send a webhook");
            answer.clear();
            while !is_complete(&answer) {
                assert!(stream.read_buf(&mut answer).await.expect("read an answer") > 0, "the connection was closed");
            }
            took.borrow_mut().push(began.elapsed());
        }
    };
    runtime.block_on(LocalSet::new().run_until(futures_util::future::join_all((0..connections).map(|_| send()))));
    let seconds = started.elapsed().as_secs_f64();
    let (per_second, busy) = (webhooks.len() as f64 / seconds, (own_cpu() - cpu).as_secs_f64() / seconds);
    let mut took = took.into_inner();
    took.sort_unstable();
    Sent { per_second, busy, p50: took[took.len() / 2] }
}

/// When a webhook was sent, and how long the answer took.
pub struct Sending {
    pub began: Instant,
    /// Time to the 200.
    pub took: Duration,
}

/// Sends all webhooks at a fixed rate, whether they are answered or not. Returns the timing of each. A webhook's clock
/// starts when it is due, even if its connection still waits for the previous answer. A late timer does not count.
pub fn open_loop(address: SocketAddr, webhooks: &Webhooks, per_second: u32) -> Vec<Sending> {
    let start = Instant::now() + Duration::from_millis(100);
    let gap = Duration::from_secs(1) / per_second;
    let send = |sender: usize| {
        let mut stream = BlockingStream::connect(address).expect("connect");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        let mut sendings = Vec::new();
        for index in (sender..webhooks.len()).step_by(STEADY_SENDERS) {
            let due = start + gap * u32::try_from(index).expect("a small number");
            let early = due.saturating_duration_since(Instant::now());
            std::thread::sleep(early);
            let began = if early.is_zero() { due } else { Instant::now() };
            stream.write_all(webhooks.get(index)).expect("send a webhook");
            let mut answer = Vec::new();
            while !is_complete(&answer) {
                let mut piece = [0; 1024];
                let length = stream.read(&mut piece).expect("read an answer");
                assert!(length > 0, "the connection was closed");
                answer.extend_from_slice(&piece[..length]);
            }
            sendings.push((index, Sending { began, took: began.elapsed() }));
        }
        sendings
    };
    let mut sendings = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..STEADY_SENDERS).map(|sender| scope.spawn(move || send(sender))).collect();
        senders.into_iter().flat_map(|sender| sender.join().expect("a sender")).collect::<Vec<_>>()
    });
    sendings.sort_unstable_by_key(|(index, _)| *index);
    sendings.into_iter().map(|(_, sending)| sending).collect()
}

/// Connections that the flood keeps half-open.
pub const HALF_OPEN: usize = 2000;

/// A slow flood, on its own thread: each connection begins a request and sends one byte of it per second. A connection
/// that the relay closes is opened again at once. Eight source addresses keep each below the limit for a source.
pub struct HalfOpen {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<usize>,
}

impl HalfOpen {
    pub fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let cut = Cell::new(0);
            let all = (0..HALF_OPEN).map(|number| slowly(address, number, &stopped, &cut));
            runtime.block_on(futures_util::future::join_all(all));
            cut.get()
        });
        Self { stop, thread }
    }

    /// Ends the flood. Returns how many connections the relay closed.
    pub fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the flood")
    }
}

async fn slowly(address: SocketAddr, number: usize, stop: &AtomicBool, cut: &Cell<usize>) {
    // Spread over a second, as clients on many machines are.
    tokio::time::sleep(Duration::from_secs(1) * number as u32 / HALF_OPEN as u32).await;
    let from = SocketAddr::from(([127, 0, 0, 2 + (number % 8) as u8], 0));
    while !stop.load(Ordering::Relaxed) {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(from).expect("bind to a loopback address");
        let mut stream = socket.connect(address).await.expect("connect");
        let bytes = b"POST /webhooks/prism HTTP/1.1\r\nx-slow: ".iter().chain(std::iter::repeat(&b'x'));
        for byte in bytes {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if stream.write_all(&[*byte]).await.is_err() {
                cut.set(cut.get() + 1);
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Whether the answer is complete. Panics unless it is a 200 with a content-length.
fn is_complete(answer: &[u8]) -> bool {
    let Some(head) = answer.windows(4).position(|end| end == b"\r\n\r\n") else { return false };
    let text = std::str::from_utf8(&answer[..head]).expect("a head in ASCII");
    assert!(text.starts_with("HTTP/1.1 200"), "refused: {}", String::from_utf8_lossy(answer));
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    answer.len() == head + 4 + length.parse::<usize>().expect("a number")
}

/// The processor time of this thread (see proc(5), `schedstat`).
fn own_cpu() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("read the thread's schedstat");
    let nanoseconds = text.split_whitespace().next().expect("a number");
    Duration::from_nanos(nanoseconds.parse().expect("a number"))
}
