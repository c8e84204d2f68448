//! `top`: shows the console's headline, answers and numbers in a terminal, for use over ssh. It judges nothing itself.
//!
//! Lines of words need no terminal library: ratatui would bring 37 crates, and rustix, which the relay has, sets the
//! mode of a terminal.

mod page;
mod screen;
mod text;

use std::io::{self, IsTerminal};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream;
use hyper::Uri;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use super::failure::Failure;
use super::http::{OpsResource, ops_url};
use super::output::Printed;
use crate::config::Config;
use crate::text::chain;
use page::{Seen, failure, page};
use screen::{Screen, size};
use text::{Colours, Line};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the charts get a new point. Parked events are not read more often, because the relay reads them from disk.
const READ_EVERY: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(super) struct Options {
    /// Address of the relay's operators' listener [default: ops.listen]
    #[arg(long, value_parser = ops_url)]
    url: Option<Uri>,
    /// Time between updates
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Print once and exit (the default unless the output is a terminal)
    #[arg(long)]
    once: bool,
}

pub(super) async fn run(config: &Config, options: Options) -> Result<(), Failure> {
    let mut relay = Relay::new(config, &options)?;
    if options.once || !io::stdout().is_terminal() {
        let seen = relay.look().await?;
        let mut printed = Printed::default();
        page(&seen, None).iter().for_each(|line| printed.line(line.plain()));
        return Ok(printed.out()?);
    }
    Ok(watch(relay).await.context("cannot use the terminal")?)
}

/// What a look at the relay brought.
type Look = anyhow::Result<Seen>;

/// Runs until `q`, Ctrl-C, SIGTERM, or an error of the terminal. If the relay does not answer, it shows the error and
/// tries again.
async fn watch(relay: Relay) -> io::Result<()> {
    let colours = if are_colours_unwanted() { Colours::None } else { Colours::Shown };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (mut hangup, mut resized) = (signal(SignalKind::hangup())?, signal(SignalKind::window_change())?);
    let screen = Screen::enter(colours)?;
    let mut quit = screen.quit();
    let mut looks = pin!(stream::unfold(relay, |mut relay| async {
        relay.ticks.tick().await;
        Some((relay.look().await, relay))
    }));
    let mut last: Option<Look> = None;
    loop {
        tokio::select! {
            look = looks.next() => last = look,
            _ = resized.recv() => {}
            _ = quit.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
        }
        if let Some(look) = &last {
            screen.show(&lines(look, size().columns))?;
        }
    }
}

/// Whether the environment has NO_COLOR (<https://no-color.org>).
#[expect(clippy::disallowed_methods, reason = "a setting of the terminal, not of the relay")]
fn are_colours_unwanted() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

fn lines(look: &Look, width: usize) -> Vec<Line> {
    match look {
        Ok(seen) => page(seen, Some(width)),
        Err(error) => failure(&chain(error.as_ref()), Some(width)),
    }
}

/// The resources of the relay that the page shows.
struct Relay {
    status: OpsResource,
    history: OpsResource,
    parked: OpsResource,
    ticks: Interval,
    /// When the history and the parked events were last read, and both.
    last: Option<(Instant, Value, Value)>,
}

impl Relay {
    fn new(config: &Config, options: &Options) -> Result<Self, Failure> {
        let resource = |path| {
            let resource = OpsResource::new(config, options.url.clone(), path, ANSWER_TIMEOUT)?;
            Ok::<_, Failure>(resource.with_token(config.ops.token.as_ref()))
        };
        let mut ticks = interval(options.interval.max(Duration::from_millis(100)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            status: resource("/api/status")?,
            history: resource("/api/history")?,
            parked: resource("/api/parked")?,
            ticks,
            last: None,
        })
    }

    async fn look(&mut self) -> Look {
        let status = self.status.get().await?;
        let (at, history, parked) = match self.last.take() {
            Some(last) if last.0.elapsed() < READ_EVERY => last,
            // The page is useful without.
            _ => (Instant::now(), self.history.get().await.unwrap_or_default(), self.parked(&status).await),
        };
        self.last = Some((at, history.clone(), parked.clone()));
        Ok(Seen { status, history, parked })
    }

    async fn parked(&self, status: &Value) -> Value {
        match status["spool"]["parked"].as_u64() {
            Some(0) => Value::Null,
            _ => self.parked.get().await.unwrap_or_default(),
        }
    }
}
