//! A TCP wire between the relay and the broker that a test can cut, refuse, stall and slow down.

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::{background, ports};

/// Which bytes pass. Held bytes are not lost: they arrive once the wire flows again, as after a short partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Both,
    /// Bytes of the client pass; bytes of the server are held.
    HoldAnswers,
    Neither,
}

/// The condition of the line.
#[derive(Debug, Clone, Copy)]
struct Line {
    flow: Flow,
    /// In each direction.
    latency: Duration,
    /// In each direction; `None` for no limit.
    bytes_per_second: Option<usize>,
}

/// The most chunks in transit at a time, so that a slow line slows its sender down.
const CHUNKS: usize = 64;

/// How many times a second a slow line passes bytes.
const SLICES_PER_SECOND: usize = 20;

/// A TCP proxy on a fixed port. It works in the background, also while the test blocks its thread.
pub struct Wire {
    port: u16,
    target: SocketAddr,
    line: watch::Sender<Line>,
    broker_side_gone: watch::Sender<()>,
    connections: Arc<Mutex<JoinSet<()>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Wire {
    /// A wire to `target` that passes all bytes. `target` need not listen yet.
    pub fn new(target: SocketAddr) -> Self {
        let (line, _) = watch::channel(Line { flow: Flow::Both, latency: Duration::ZERO, bytes_per_second: None });
        let (broker_side_gone, _) = watch::channel(());
        let (port, connections) = (ports::free(), Arc::default());
        let mut wire = Self { port, target, line, broker_side_gone, connections, acceptor: None };
        wire.accept();
        wire
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The number of open connections.
    pub fn connections(&self) -> usize {
        reap(&self.connections).len()
    }

    /// Closes all connections on both sides; accepts new ones.
    pub fn cut(&self) {
        reap(&self.connections).abort_all();
    }

    /// Stops listening: new connections are refused. Open connections stay.
    pub async fn refuse(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
            // The port is closed only when the task has ended.
            let _ = acceptor.await;
        }
    }

    /// Listens again.
    pub fn accept(&mut self) {
        let listener = StdListener::bind(self.address()).expect("listen on the wire's port");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let (target, connections) = (self.target, Arc::clone(&self.connections));
        let (line, gone) = (self.line.subscribe(), self.broker_side_gone.clone());
        self.acceptor = Some(background::spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener of the harness's runtime");
            while let Ok((client, _)) = listener.accept().await {
                reap(&connections).spawn(carry(client, target, line.clone(), gone.subscribe()));
            }
        }));
    }

    /// A black hole: connections are accepted and stay open, and no byte passes.
    pub fn stall(&self) {
        self.line.send_modify(|line| line.flow = Flow::Neither);
    }

    /// Half a black hole: the broker receives everything, and its answers, such as confirms, are held.
    pub fn stall_answers(&self) {
        self.line.send_modify(|line| line.flow = Flow::HoldAnswers);
    }

    /// Lets everything pass again, held bytes first.
    pub fn flow(&self) {
        self.line.send_modify(|line| line.flow = Flow::Both);
    }

    /// Sets the latency in each direction.
    pub fn set_latency(&self, latency: Duration) {
        self.line.send_modify(|line| line.latency = latency);
    }

    /// Sets the bandwidth of each connection in each direction; `None` for no limit.
    pub fn set_bandwidth(&self, bytes_per_second: Option<usize>) {
        self.line.send_modify(|line| line.bytes_per_second = bytes_per_second);
    }

    /// Half-open connections: the broker's side of all connections is closed, and the relay's side stays open and
    /// silent, as when a firewall forgets them. New connections work.
    pub fn lose_the_broker_side(&self) {
        self.broker_side_gone.send_replace(());
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut();
        if let Some(acceptor) = &self.acceptor {
            acceptor.abort();
        }
    }
}

/// Removes the connections that have ended from the set.
fn reap(connections: &Mutex<JoinSet<()>>) -> MutexGuard<'_, JoinSet<()>> {
    let mut connections = connections.lock().unwrap_or_else(PoisonError::into_inner);
    while connections.try_join_next().is_some() {}
    connections
}

/// One connection, until either side closes it.
async fn carry(client: TcpStream, target: SocketAddr, line: watch::Receiver<Line>, mut gone: watch::Receiver<()>) {
    // A target that refuses closes the connection, as a load balancer does whose broker died.
    let Ok(server) = TcpStream::connect(target).await else { return };
    for stream in [&client, &server] {
        // Without this the wire itself would add 40 ms to small frames.
        let _ = stream.set_nodelay(true);
    }
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::select! {
        () = pump(&mut from_client, &mut to_server, line.clone(), |flow| flow != Flow::Neither) => return,
        () = pump(&mut from_server, &mut to_client, line, |flow| flow == Flow::Both) => return,
        Ok(()) = gone.changed() => {}
    }
    drop((from_server, to_server));
    let mut nowhere = tokio::io::sink();
    let _ = tokio::io::copy(&mut from_client, &mut nowhere).await;
}

/// Moves bytes while `passes` allows it. The end of the stream is held and delayed like bytes.
async fn pump(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    mut line: watch::Receiver<Line>,
    passes: impl Fn(Flow) -> bool,
) {
    let latency = line.clone();
    let (sender, mut in_transit) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let read = async move {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = from.read(&mut buffer).await.unwrap_or(0);
            let due = Instant::now() + latency.borrow().latency;
            if sender.send((due, buffer[..count].to_vec())).await.is_err() || count == 0 {
                return std::future::pending().await;
            }
        }
    };
    let write = async move {
        while let Some((due, chunk)) = in_transit.recv().await {
            sleep_until(due).await;
            let mut rest = chunk.as_slice();
            loop {
                if line.wait_for(|line| passes(line.flow)).await.is_err() || chunk.is_empty() {
                    return;
                }
                let bandwidth = line.borrow().bytes_per_second;
                let slice = bandwidth.map_or(rest.len(), |bytes| (bytes / SLICES_PER_SECOND).clamp(1, rest.len()));
                if to.write_all(&rest[..slice]).await.is_err() {
                    return;
                }
                if let Some(bytes) = bandwidth {
                    sleep(Duration::from_secs_f64(slice as f64 / bytes as f64)).await;
                }
                rest = &rest[slice..];
                if rest.is_empty() {
                    break;
                }
            }
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}
