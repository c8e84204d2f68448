//! The references: hyper without a store, hyper that hands each body to lapin, lapin with messages from memory, and
//! single writes to the disk.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use prism_relay::event::{Envelope, Event, Fingerprint, Source};
use prism_relay::publisher::message::Message;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::harness::leash;
use crate::harness::program::Program;
use crate::harness::{Vhost, eventually};
use crate::load;

/// The argument that makes this program a [`Reference`]; the URL of a broker may follow.
pub const REFERENCE: &str = "--reference";

/// The fanout that the relay publishes to by default, which hands on to `prism.events`.
pub const EXCHANGE: &str = "prism.webhooks";

/// Publishes in flight: the relay's default `broker.window`.
const WINDOW: usize = 1000;

/// The places in the window of the relay that stores nothing. Without a limit, lapin would search ever more publishes
/// for each confirm.
static IN_FLIGHT: Semaphore = Semaphore::const_new(WINDOW);

/// A server in its own process that reads each body and answers with as many bytes as the relay.
pub struct Reference {
    pub address: SocketAddr,
    program: Program,
}

impl Reference {
    /// Nothing becomes of the bodies.
    pub async fn bare_hyper() -> Self {
        Self::start(&[REFERENCE]).await
    }

    /// A relay that stores nothing: each body is published with a confirm, after the answer.
    pub async fn non_durable(vhost: &Vhost) -> Self {
        Self::start(&[REFERENCE, &vhost.url()]).await
    }

    async fn start(arguments: &[&str]) -> Self {
        let own = std::env::current_exe().expect("the path of this program");
        let mut command = leash::command(own.to_str().expect("a path in UTF-8"));
        command.args(arguments);
        let program = Program::start(command);
        let address = eventually("a reference", async || {
            let lines = program.stderr();
            lines.first().and_then(|line| line.parse().ok()).ok_or_else(|| lines.join("\n"))
        });
        Self { address: address.await, program }
    }

    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// Serves until the process is killed.
    pub async fn serve(broker_url: Option<String>) -> ! {
        let channel = match broker_url {
            Some(url) => Some(channel(&url).await),
            None => None,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        eprintln!("{}", listener.local_addr().expect("an address"));
        loop {
            let (stream, _) = listener.accept().await.expect("accept");
            stream.set_nodelay(true).expect("set TCP_NODELAY");
            let channel = channel.clone();
            let service = service_fn(move |request| answer(request, channel.clone()));
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    }
}

async fn channel(broker_url: &str) -> Channel {
    let options = ConnectionProperties::default();
    let connection = Connection::connect(broker_url, options).await.expect("connect to the broker");
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirm mode");
    // The connection lasts as long as the process.
    std::mem::forget(connection);
    channel
}

async fn answer(request: Request<Incoming>, channel: Option<Channel>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    assert!(!body.is_empty());
    if let Some(channel) = channel {
        tokio::spawn(async move {
            let _place = IN_FLIGHT.acquire().await.expect("the semaphore is never closed");
            let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
            let properties = properties.with_delivery_mode(2);
            let sent = channel.basic_publish(EXCHANGE.into(), "scan.a".into(), options, &body, properties).await;
            assert!(sent.expect("publish").await.expect("a confirm").is_ack());
        });
    }
    let answer = Bytes::from_static(br#"{"ok":true,"id":"01a2083e-b3fc-77d2-8211-db03f5a1bd45"}"#);
    let response = Response::builder().header("content-type", "application/json").body(Full::new(answer));
    Ok(response.expect("a response"))
}

/// Publishes `count` messages, as the relay would publish them and built before the clock starts, on one channel with
/// confirms. Returns the confirms per second, without the first twentieth.
pub async fn lapin_alone(vhost: &Vhost, count: usize, exchange: &str) -> f64 {
    let mut messages: VecDeque<_> = (0..count).map(message).collect();
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirm mode");
    let publish = async |Message { routing_key, properties, body }: Message| {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let confirm = channel.basic_publish(exchange.into(), routing_key, options, &body, properties).await;
        assert!(confirm.expect("publish").await.expect("a confirm").is_ack());
    };
    let (mut confirmed, mut in_flight) = (0, FuturesUnordered::new());
    let mut warm = Instant::now();
    while confirmed < count {
        while in_flight.len() < WINDOW
            && let Some(message) = messages.pop_front()
        {
            in_flight.push(publish(message));
        }
        in_flight.next().await;
        confirmed += 1;
        if confirmed == count / 20 {
            warm = Instant::now();
        }
    }
    (count - count / 20) as f64 / warm.elapsed().as_secs_f64()
}

fn message(number: usize) -> Message {
    let body = Bytes::from(load::body(&uuid::Uuid::now_v7().to_string(), number));
    let event = Event {
        id: uuid::Uuid::now_v7(),
        accepted_ms: jiff::Timestamp::now().as_millisecond(),
        source: Source::Webhook,
        authentic: true,
        trace: None,
        fingerprint: Fingerprint::of(&body),
        subject: None,
        body,
    };
    Message::new(&event, Envelope::parse(&event.body).ok().as_ref(), None)
}

/// Times of single writes of one page with an fsync in this folder, sorted.
pub fn lone_syncs(folder: &Path, count: usize) -> Vec<Duration> {
    let path = folder.join("sync");
    let mut file = File::create(&path).expect("create a file");
    let sync = |_| {
        let began = Instant::now();
        file.write_all(&[1; 4096]).expect("write");
        file.sync_data().expect("fsync");
        let took = began.elapsed();
        // The interval of the webhooks at 1,000 per second.
        std::thread::sleep(Duration::from_millis(1));
        took
    };
    let mut took: Vec<_> = (0..count).map(sync).collect();
    took.sort_unstable();
    took
}
