//! The real relay, as a separate process.

use std::net::SocketAddr;
use std::path::Path;

use hyper::Method;
use serde::Deserialize;
use serde_json::Value;

use super::eventually::{eventually, eventually_equal};
use super::http::{Answer, Client, now, sign};
use super::marks::assert_discreet;
use super::program::{Ended, Program};
use super::setup::{SECRET, Setup};
use super::vhost::Vhost;
use super::wire::Wire;

/// The message that the relay logs once it has bound both listeners.
const READY: &str = "accepting webhooks";

/// A relay that runs or has ended. Dropping this kills it and removes its folder.
pub struct Relay {
    // Dropped before the folder, which is in `setup`.
    program: Program,
    url: String,
    ops: String,
    client: Client,
    setup: Setup,
}

impl Relay {
    /// A relay with the configuration of [`Setup::new`].
    pub async fn start(vhost: &Vhost) -> Self {
        Setup::new(&vhost.url()).start().await
    }

    /// As [`Self::start`], with a wire between the relay and the broker.
    pub async fn start_through(vhost: &Vhost, wire: &Wire) -> Self {
        Setup::new(&vhost.url_through(wire)).start().await
    }

    pub(super) async fn from_setup(setup: Setup) -> Self {
        let mut program = setup.launch(&["serve"]);
        let (url, ops) = ready(&mut program).await.unwrap_or_else(|ended| panic!("the relay ended: {ended:?}"));
        Self { program, url, ops, client: Client::http1(), setup }
    }

    /// Starts it again after its end, with the same folder and spool, on new ports.
    pub async fn start_again(&mut self) {
        self.try_start_again().await.unwrap_or_else(|ended| panic!("the relay ended: {ended:?}"));
    }

    /// As [`Self::start_again`], for a relay that may end because it cannot start.
    pub async fn try_start_again(&mut self) -> Result<(), Ended> {
        assert!(self.program.exited().is_some(), "the relay still runs");
        assert_discreet("the log", &self.log_text());
        self.program = self.setup.launch(&["serve"]);
        (self.url, self.ops) = ready(&mut self.program).await?;
        Ok(())
    }

    /// Drains it with SIGTERM and starts it again.
    pub async fn restart(&mut self) {
        self.sigterm();
        let ended = self.wait().await;
        assert_eq!(ended.code, Some(0), "the relay failed on SIGTERM: {ended:?}");
        self.start_again().await;
    }

    /// Changes the configuration for the next start.
    pub fn reconfigure(&mut self, key: &str, value: impl Into<Value>) {
        self.setup.change(key, value);
    }

    /// Runs another command of the binary with this relay's configuration, while this relay runs.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        self.setup.run(arguments).await
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    pub fn folder(&self) -> &Path {
        self.setup.folder()
    }

    // -- the process --------------------------------------------------------------------------------------------------

    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    pub fn sigterm(&mut self) {
        self.program.signal("TERM");
    }

    /// Any other signal, such as `INT`, `STOP` or `CONT`.
    pub fn signal(&mut self, name: &str) {
        self.program.signal(name);
    }

    /// Sends SIGKILL and waits for the end.
    pub async fn kill9(&mut self) -> Ended {
        self.program.signal("KILL");
        self.wait().await
    }

    /// Waits for the end of the process and of its output.
    pub async fn wait(&mut self) -> Ended {
        self.program.wait().await
    }

    /// Every line that it logged since its last start. A line that is not JSON, such as a panic, becomes a JSON string.
    pub fn logs(&self) -> Vec<Value> {
        self.program.stderr().into_iter().map(parse).collect()
    }

    /// The log since its last start, as one text.
    pub fn log_text(&self) -> String {
        self.program.stderr().join("\n")
    }

    /// Waits for a log line that contains `text`, and returns it.
    pub async fn eventually_logs(&self, text: &str) -> Value {
        eventually(&format!("a log line with {text:?}"), async || {
            let lines = self.program.stderr();
            let found = lines.iter().find(|line| line.contains(text)).cloned();
            found.map(parse).ok_or_else(|| lines.join("\n"))
        })
        .await
    }

    // -- the public listener ------------------------------------------------------------------------------------------

    /// The URL for webhooks, such as `http://127.0.0.1:41234/webhooks/prism`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address of the public listener, for [`super::Raw`] connections.
    pub fn address(&self) -> SocketAddr {
        let authority = self.url.split('/').nth(2).unwrap_or_default();
        authority.parse().unwrap_or_else(|_| panic!("no address in {}", self.url))
    }

    /// The base URL of the operators' listener, such as `http://127.0.0.1:41235`.
    pub fn ops(&self) -> &str {
        &self.ops
    }

    /// Sends a webhook as Prism does, signed with [`SECRET`] and the current time. Panics if there is no answer.
    pub async fn post(&self, body: impl AsRef<[u8]>) -> Answer {
        self.try_post(body).await.unwrap_or_else(|error| panic!("no answer to a webhook: {error}\n{}", self.log_text()))
    }

    /// As [`Self::post`], for a relay that may die before it answers.
    pub async fn try_post(&self, body: impl AsRef<[u8]>) -> Result<Answer, String> {
        Sender::new(&self.client, &self.url).post(body).await
    }

    /// Sends a webhook again and again until it is answered 200, and returns that answer.
    pub async fn eventually_accepts(&self, body: impl AsRef<[u8]>) -> Answer {
        eventually("a webhook to be answered 200", async || match self.post(&body).await {
            answer if answer.status == 200 => Ok(answer),
            answer => Err(answer),
        })
        .await
    }

    /// Sends a webhook with exactly these headers, which may contain a signature. Panics if there is no answer.
    pub async fn post_with(&self, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Answer {
        let answer = self.client.send(Method::POST, &self.url, headers, body.as_ref().to_vec()).await;
        let answer = answer.unwrap_or_else(|error| panic!("no answer to a webhook: {error}\n{}", self.log_text()));
        assert_discreet("an answer", &format!("{answer:?}"));
        answer
    }

    /// A sender that can be moved into another task. Once the relay is gone, it returns errors.
    pub fn sender(&self) -> Sender {
        Sender::new(&self.client, &self.url)
    }

    // -- the operators' listener --------------------------------------------------------------------------------------

    pub async fn ops_get(&self, path: &str) -> Answer {
        let url = format!("{}{path}", self.ops);
        let answer = self.client.get(&url).await.unwrap_or_else(|error| panic!("{error}\n{}", self.log_text()));
        assert_discreet(path, &format!("{answer:?}"));
        answer
    }

    /// `GET /api/status`.
    pub async fn status(&self) -> Value {
        self.ops_get("/api/status").await.expect(200).json()
    }

    /// The ledger and the state of the spool, from `GET /api/status`.
    pub async fn spool(&self) -> SpoolReport {
        SpoolReport::of(&self.status().await)
    }

    /// Waits until the relay is connected to its broker.
    pub async fn eventually_connected(&self) {
        self.eventually_metric("prism_relay_broker_connected", &[], 1.0).await;
    }

    /// Until the first look at the queues and exchanges is over.
    pub async fn eventually_watching(&self) {
        eventually("a look at the queues", async || {
            let watch = self.status().await["watch"].clone();
            if watch["looked_at"].is_string() { Ok(()) } else { Err(watch) }
        })
        .await;
    }

    /// Waits until every accepted event is confirmed, parked or removed.
    pub async fn eventually_nothing_pending(&self) {
        eventually("no pending events", async || match self.spool().await {
            spool if spool.pending == 0 => Ok(()),
            spool => Err(format!("{spool:?}")),
        })
        .await;
    }

    /// Waits until this many events are parked.
    pub async fn eventually_parked(&self, count: u64) {
        eventually(&format!("{count} parked events"), async || match self.spool().await {
            spool if spool.parked == count => Ok(()),
            spool => Err(format!("{spool:?}")),
        })
        .await;
    }

    /// `GET /metrics`.
    pub async fn metrics(&self) -> String {
        self.ops_get("/metrics").await.expect(200).text()
    }

    /// The sum of all series of a metric that carry these labels; 0 if there are none.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        sum(&self.metrics().await, name, labels)
    }

    /// Waits until [`Self::metric`] is `expected`.
    pub async fn eventually_metric(&self, name: &str, labels: &[(&str, &str)], expected: f64) {
        let what = format!("{name} {labels:?} = {expected}");
        eventually_equal(&what, expected, async || self.metric(name, labels).await).await;
    }
}

/// Searches the log for secrets and user tokens.
impl Drop for Relay {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_discreet("the log", &self.log_text());
        }
    }
}

/// The `spool` part of `/api/status`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct SpoolReport {
    pub accepted: u64,
    pub confirmed: u64,
    pub pending: u64,
    pub parked: u64,
    pub removed: u64,
    /// Removed because a damaged file no longer held them.
    pub lost: u64,
    pub duplicates: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    pub writable: bool,
    /// The age of the oldest pending event.
    pub oldest_age_seconds: Option<f64>,
}

impl SpoolReport {
    pub fn of(status: &Value) -> Self {
        Self::deserialize(&status["spool"]).unwrap_or_else(|error| panic!("{error} in the spool of {status}"))
    }
}

/// Sends webhooks to one URL, as Prism does.
#[derive(Clone)]
pub struct Sender {
    client: Client,
    url: String,
}

impl Sender {
    pub fn new(client: &Client, url: &str) -> Self {
        Self { client: client.clone(), url: url.to_owned() }
    }

    /// Sends a webhook, signed with [`SECRET`] and the current time.
    pub async fn post(&self, body: impl AsRef<[u8]>) -> Result<Answer, String> {
        let (body, timestamp) = (body.as_ref(), now());
        let signature = sign(SECRET, &timestamp, body);
        let headers = [
            ("content-type", "application/json"),
            ("prism-timestamp", timestamp.as_str()),
            ("prism-signature", signature.as_str()),
        ];
        let answer = self.client.send(Method::POST, &self.url, &headers, body.to_vec()).await?;
        assert_discreet("an answer", &format!("{answer:?}"));
        Ok(answer)
    }
}

/// Waits for the line with the addresses, `(url, ops)`.
async fn ready(program: &mut Program) -> Result<(String, String), Ended> {
    let line = eventually("the relay to accept webhooks", async || {
        let has_ended = program.exited().is_some();
        let lines = program.stderr();
        match lines.iter().cloned().map(parse).find(|line| line["message"] == READY) {
            None if !has_ended => Err(lines.join("\n")),
            ready => Ok(ready),
        }
    })
    .await;
    let Some(line) = line else { return Err(program.wait().await) };
    let field = |name: &str| line[name].as_str().unwrap_or_else(|| panic!("no {name} in {line}")).to_owned();
    Ok((field("url"), field("ops")))
}

fn parse(line: String) -> Value {
    serde_json::from_str(&line).unwrap_or(Value::String(line))
}

/// Sums the series of `name` in Prometheus' text format that carry all `labels`.
pub fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let series = text.lines().filter_map(|line| line.rsplit_once(' '));
    let wanted = series.filter(|(series, _)| {
        let (found, rest) = series.split_once('{').unwrap_or((series, ""));
        found == name && labels.iter().all(|(label, value)| rest.contains(&format!("{label}=\"{value}\"")))
    });
    wanted.map(|(_, value)| value.parse::<f64>().unwrap_or_else(|_| panic!("{name} is {value:?}"))).sum()
}
