//! `send`: sends webhooks as Prism does, with its retries, and reports how many events were accepted and how fast. With
//! `--serve-api` it answers as Prism's API for their scans, too.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, Uri};
use jiff::Timestamp;
use lapin::types::ShortString;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};
use uuid::Uuid;

use super::failure::Failure;
use super::http::listener_url;
use super::messages::queue_name;
use super::output::{Progress, say};
use super::pace::rate;
use super::prism_api::{EVENTS_MAX, PrismApi};
use super::vectors;
use crate::config::Config;
use crate::event::DOCUMENTED_TYPES;
use crate::http_client::{HttpClient, http_client};
use crate::secret::Secret;
use crate::signature::{SIGNATURE_HEADER, TIMESTAMP_HEADER, sign};
use crate::text::chain;
use crate::tls::{self, ClientFiles};

/// Prism's pauses before the second, third and fourth try. Prism gives up after the fourth.
const RETRIES: [Duration; 3] = [Duration::ZERO, Duration::from_secs(5), Duration::from_secs(30)];

/// How long an answer may take. Prism's own limit is not documented.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The histogram's upper limit: no answer takes longer.
const LATENCY_MAX_US: u64 = ANSWER_TIMEOUT.as_micros() as u64;
/// A quantile is at most 0.1 percent above the true value.
const SIGNIFICANT_DIGITS: u8 = 3;

#[derive(clap::Args)]
pub(super) struct Options {
    /// URL to send to [default: from http.listen and http.path]
    #[arg(long)]
    url: Option<Uri>,
    /// Event type to send, repeatable [default: the six documented types]
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Scan of all events [default: a new one for each event]
    #[arg(long, value_name = "ID", conflicts_with = "body")]
    scan: Option<String>,
    /// Prediction of all Future Me events [default: a new one for each event]
    #[arg(long, value_name = "ID", conflicts_with = "body")]
    prediction: Option<String>,
    /// Number of events to send [default: one of each type]
    #[arg(long)]
    count: Option<NonZeroU64>,
    /// Events per second [default: as fast as answers arrive]
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Maximum events in flight
    #[arg(long, value_name = "COUNT", default_value = "64")]
    concurrency: NonZeroUsize,
    /// Send the contents of this file, unchanged, as the body of every event
    #[arg(long, value_name = "FILE", conflicts_with = "types")]
    body: Option<PathBuf>,
    /// Trust only this authority (PEM) for https URLs [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Do not sign, even if the configuration has a secret
    #[arg(long)]
    unsigned: bool,
    /// Give up an event after its first failure, unlike Prism
    #[arg(long)]
    no_retry: bool,
    /// Serve Prism's API at reconcile.api_url (loopback only) for the scans of these events, also of those that are
    /// given up, until Ctrl-C
    #[arg(long)]
    serve_api: bool,
    /// Test a worker: publish the test messages to this new queue, and report what the worker did with each
    #[arg(long, value_name = "QUEUE", value_parser = queue_name, requires = "vectors")]
    to_queue: Option<ShortString>,
    /// The test messages that are built in (with --to-queue)
    #[arg(long, requires = "to_queue", conflicts_with_all = ["url", "types", "count", "rate", "body", "serve_api"])]
    vectors: bool,
    /// With --to-queue: how long to wait for the worker, and then for its answers
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Print the summary as one JSON object
    #[arg(long)]
    json: bool,
}

/// What all events share.
struct Sender {
    client: HttpClient,
    url: Uri,
    secret: Option<Secret>,
    retries: &'static [Duration],
}

/// The outcome of one event.
struct Fate {
    /// The outcome of each try: a status, or why there was none.
    tries: Vec<Result<StatusCode, String>>,
    /// Time from sending the last try to its 2xx; `None` without a 2xx.
    latency: Option<Duration>,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    if let Some(queue) = &options.to_queue {
        return vectors::run(config, queue, options.wait, options.json).await;
    }
    let secret = match (options.unsigned, config.signature.secrets.first()) {
        (true, _) => None,
        (false, Some(secret)) => Some(secret.clone()),
        (false, None) if !config.signature.required => None,
        (false, None) => {
            let hint = "there is no secret to sign with: set signature.secrets, or send with --unsigned";
            return Err(Failure::Usage(hint.to_owned()));
        }
    };
    let url = match options.url {
        Some(url) => url,
        None => own_url(config)?,
    };
    let client = client(&url, options.ca)?;
    let types = if options.types.is_empty() { DOCUMENTED_TYPES.map(str::to_owned).to_vec() } else { options.types };
    let fixed_body = options.body.as_ref().map(std::fs::read).transpose().map_err(|error| {
        Failure::Usage(format!("cannot read {}: {error}", options.body.as_deref().unwrap_or("".as_ref()).display()))
    })?;
    let fixed_body = fixed_body.map(Bytes::from);
    let count = options.count.map_or(if fixed_body.is_some() { 1 } else { types.len() as u64 }, NonZeroU64::get);

    if options.serve_api && count > EVENTS_MAX {
        return Err(Failure::Usage(format!("--serve-api remembers at most {EVENTS_MAX} events: lower --count")));
    }
    let api = if options.serve_api { Some(PrismApi::serve(config).await?) } else { None };

    let secrets = config.signature.secrets.len();
    let signed = if secret.is_some() { format!("signed with secret 1 of {secrets}") } else { "unsigned".to_owned() };
    if !options.json {
        say(&format!("posting {count} event{} to {url}, {signed}", if count == 1 { "" } else { "s" }));
    }
    let retries: &[Duration] = if options.no_retry { &[] } else { &RETRIES };
    let sender = Arc::new(Sender { client, url, secret, retries });
    let ids = Ids { scan: options.scan, prediction: options.prediction };
    let body = |index: u64| {
        let kind = &types[(index % types.len() as u64) as usize];
        let body = fixed_body.clone().unwrap_or_else(|| payload(kind, index, &ids));
        if let Some(api) = &api {
            api.note(&body);
        }
        body
    };
    let started = Instant::now();
    let fates = send_all(&sender, count, options.rate, options.concurrency.get(), body).await;
    let summary = Summary::new(&fates, started.elapsed());
    say(&if options.json { summary.json(&sender).to_string() } else { summary.text() });
    if let Some(api) = api {
        if !options.json {
            say(&api.description());
        }
        api.until_interrupted().await?;
    }
    if fates.iter().any(|fate| fate.latency.is_none()) { Err(Failure::Reported) } else { Ok(()) }
}

fn client(url: &Uri, ca: Option<PathBuf>) -> Result<HttpClient, Failure> {
    let tls = match url.scheme_str() {
        Some("https") => {
            ClientFiles { ca, identity: None }.load().map_err(|error| Failure::Usage(error.to_string()))?
        }
        Some("http") if ca.is_none() => tls::client_without_authorities()?,
        Some("http") => return Err(Failure::Usage("--ca needs a URL that begins with https://".to_owned())),
        _ => return Err(Failure::Usage(format!("{url}: the URL must begin with http:// or https://"))),
    };
    Ok(http_client(tls))
}

/// The address on which a relay with this configuration accepts webhooks.
fn own_url(config: &Config) -> Result<Uri, Failure> {
    if config.http.tls.is_some() {
        let hint = "the relay uses TLS: give --url with a host name of its certificate";
        return Err(Failure::Usage(hint.to_owned()));
    }
    Ok(listener_url(config.http.listen, "http.listen", &config.http.path)?.parse()?)
}

async fn send_all(
    sender: &Arc<Sender>,
    count: u64,
    rate: Option<f64>,
    concurrency: usize,
    body: impl Fn(u64) -> Bytes,
) -> Vec<Fate> {
    let mut progress = Progress::new(count, "events");
    let places = Arc::new(Semaphore::new(concurrency));
    let mut pace = rate.map(|rate| tokio::time::interval(Duration::from_secs_f64(1.0 / rate)));
    if let Some(pace) = &mut pace {
        // Late ticks are made up for, so that the average rate is right.
        pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    }
    let (mut in_flight, mut fates) = (JoinSet::new(), Vec::new());
    for index in 0..count {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        let place = Arc::clone(&places).acquire_owned().await;
        let (sender, body) = (Arc::clone(sender), body(index));
        in_flight.spawn(async move {
            let fate = sender.send(body).await;
            drop(place);
            fate
        });
        while let Some(Ok(fate)) = in_flight.try_join_next() {
            fates.push(fate);
            progress.set(fates.len() as u64);
        }
    }
    while let Some(Ok(fate)) = in_flight.join_next().await {
        fates.push(fate);
        progress.set(fates.len() as u64);
    }
    progress.finish();
    fates
}

impl Sender {
    async fn send(&self, body: Bytes) -> Fate {
        let mut tries = Vec::new();
        for pause in std::iter::once(&Duration::ZERO).chain(self.retries) {
            tokio::time::sleep(*pause).await;
            let started = Instant::now();
            let outcome = self.attempt(body.clone()).await;
            let success = outcome.as_ref().is_ok_and(StatusCode::is_success);
            tries.push(outcome);
            if success {
                return Fate { tries, latency: Some(started.elapsed()) };
            }
        }
        Fate { tries, latency: None }
    }

    async fn attempt(&self, body: Bytes) -> Result<StatusCode, String> {
        let mut request = Request::post(&self.url).header("content-type", "application/json");
        if let Some(secret) = &self.secret {
            let timestamp = format!("{:.0}", Timestamp::now());
            request =
                request.header(SIGNATURE_HEADER, sign(secret, &timestamp, &body)).header(TIMESTAMP_HEADER, timestamp);
        }
        let request = request.body(Full::new(body)).map_err(|error| format!("no request: {error}"))?;
        let answer = async {
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| format!("no answer: {}", tls::explain(&error, tls::Peer::Server)))?;
            let status = response.status();
            // Read to the end, so that the connection can be reused.
            response
                .into_body()
                .collect()
                .await
                .map_err(|error| format!("the answer was cut off: {}", chain(&error)))?;
            Ok(status)
        };
        timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }
}

/// The ids that all events share.
#[derive(Default)]
struct Ids {
    scan: Option<String>,
    prediction: Option<String>,
}

/// An event as Prism sends it, with new ids unless they are given.
fn payload(event_type: &str, index: u64, ids: &Ids) -> Bytes {
    let state = match event_type.rsplit('.').next() {
        Some("started") => "PROCESSING",
        Some("failed") => "FAILED",
        _ => "READY",
    };
    let id = |given: &Option<String>| given.clone().unwrap_or_else(|| Uuid::now_v7().to_string());
    let mut payload = json!({
        "scanId": id(&ids.scan),
        "userId": Uuid::now_v7(),
        "userToken": format!("sample-user-{index}"),
        "state": state,
    });
    if event_type.starts_with("body_shape_prediction.") {
        payload["bodyShapePredictionId"] = json!(id(&ids.prediction));
    }
    Bytes::from(json!({ "eventType": event_type, "payload": payload }).to_string())
}

/// What became of all events.
struct Summary {
    events: u64,
    accepted: u64,
    /// Requests by their outcome.
    outcomes: BTreeMap<String, u64>,
    elapsed: Duration,
    /// Times to the 2xx, in microseconds.
    latencies: Histogram<u64>,
}

impl Summary {
    fn new(fates: &[Fate], elapsed: Duration) -> Self {
        let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
        for outcome in fates.iter().flat_map(|fate| &fate.tries) {
            let name = match outcome {
                Ok(status) => format!("answered {}", status.as_u16()),
                Err(reason) => reason.clone(),
            };
            *outcomes.entry(name).or_default() += 1;
        }
        let mut latencies = Histogram::<u64>::new_with_max(LATENCY_MAX_US, SIGNIFICANT_DIGITS)
            .expect("both constants are within the histogram's limits");
        for latency in fates.iter().filter_map(|fate| fate.latency) {
            latencies.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        }
        Self { events: fates.len() as u64, accepted: latencies.len(), outcomes, elapsed, latencies }
    }

    fn requests(&self) -> u64 {
        self.outcomes.values().sum()
    }

    fn rate(&self) -> f64 {
        self.events as f64 / self.elapsed.as_secs_f64().max(0.001)
    }

    /// Times to the 2xx in milliseconds; none without a 2xx.
    fn quantiles(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let known = if self.accepted > 0 { [("p50", 0.5), ("p99", 0.99), ("max", 1.0)].as_slice() } else { &[] };
        known.iter().map(|(name, share)| (*name, self.latencies.value_at_quantile(*share) as f64 / 1000.0))
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<28} {value:>9}");
        };
        line("events", self.events.to_string());
        line("accepted", self.accepted.to_string());
        line("given up", (self.events - self.accepted).to_string());
        line("requests", self.requests().to_string());
        for (name, count) in &self.outcomes {
            line(&format!("  {name}"), count.to_string());
        }
        line("seconds", format!("{:.1}", self.elapsed.as_secs_f64()));
        if self.accepted > 0 {
            line("events per second", format!("{:.0}", self.rate()));
        }
        for (name, milliseconds) in self.quantiles() {
            line(&format!("time to the 2xx, {name} (ms)"), format!("{milliseconds:.1}"));
        }
        text.trim_end().to_owned()
    }

    fn json(&self, sender: &Sender) -> Value {
        let latencies: BTreeMap<_, _> = self.quantiles().collect();
        json!({
            "url": sender.url.to_string(),
            "signed": sender.secret.is_some(),
            "events": self.events,
            "accepted": self.accepted,
            "given_up": self.events - self.accepted,
            "requests": self.requests(),
            "outcomes": self.outcomes,
            "seconds": self.elapsed.as_secs_f64(),
            "latency_ms": latencies,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Envelope;

    #[test]
    fn every_payload_is_an_envelope_of_its_type() {
        for event_type in DOCUMENTED_TYPES.iter().copied().chain(["capture_data.validation.failed"]) {
            let body = payload(event_type, 1, &Ids::default());
            let envelope = Envelope::parse(&body).unwrap();
            assert_eq!(envelope.event_type, event_type);
            assert_eq!(envelope.prediction_id.is_some(), event_type.starts_with("body_shape_prediction."));
        }
    }
}
