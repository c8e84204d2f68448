//! `topology`: shows, declares, compares or exports the exchanges, queues and bindings that the relay needs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use tokio::time::{sleep, timeout};

use super::connect::connect;
use super::failure::Failure;
use super::output::Printed;
use crate::broker::{BrokerConnection, BrokerUrl, Management};
use crate::config::Config;
use crate::text::chain;
use crate::topology::{
    self, Commands, Comparison, Declare, Difference, Kind, Live, Loss, Plan, Remedy, TopologyError, asyncapi, compare,
    definitions, differences, losses, quote, show,
};

#[derive(clap::Subcommand)]
pub(super) enum Action {
    /// Print the exchanges, queues and bindings
    Show,
    /// Create what is missing on the broker, even if topology.declare is not active
    Declare,
    /// Compare the broker with the configuration; print fixes, exit with 1 if they differ
    Diff {
        /// Print JSON: for each difference the entity, the kind, what differs, and what fixes it
        #[arg(long)]
        json: bool,
    },
    /// Print definitions for `rabbitmqctl import_definitions`, with policies for arguments
    Export,
    /// Print an AsyncAPI 3 document of the messages and queues, for people who write workers
    Asyncapi,
}

#[derive(Debug, Error)]
enum BrokerError {
    #[error(transparent)]
    Refused(#[from] TopologyError),
    #[error("timed out waiting for the broker's answers")]
    Timeout,
}

pub(super) async fn run(config: &Config, file: Option<&Path>, action: Action) -> Result<(), Failure> {
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    match action {
        Action::Show => {
            let mut printed = Printed::default();
            printed.line(show(&plan).trim_end().to_owned());
            Ok(printed.out()?)
        }
        Action::Declare => declare(config, &plan).await,
        Action::Diff { json } => diff(config, file, &plan, json).await,
        Action::Export => print_json(&definitions(&plan, config.broker.urls[0].vhost())),
        Action::Asyncapi => {
            let urls = &config.broker.urls;
            if urls.iter().any(|url| url.vhost() != urls[0].vhost()) {
                let hint = "the URLs in broker.urls have different virtual hosts: set those of one, because the \
                            document describes one";
                return Err(Failure::Usage(hint.to_owned()));
            }
            print_json(&asyncapi(&plan, urls, &config.publisher.exchange))
        }
    }
}

fn print_json(document: &Value) -> Result<(), Failure> {
    let mut printed = Printed::default();
    printed.line(serde_json::to_string_pretty(document)?);
    Ok(printed.out()?)
}

async fn declare(config: &Config, plan: &Plan) -> Result<(), Failure> {
    let broker = connect(config, "prism-relay topology").await?;
    // Each declaration is a round trip.
    let limit = config.broker.connect_timeout * (plan.steps() + 1);
    let declared = timeout(limit, topology::establish(&broker.connection, plan, Declare::Active)).await;
    broker.close().await;
    declared.map_err(|_| BrokerError::Timeout)?.map_err(BrokerError::from)?;
    let (entities, bindings) = (plan.entities().len(), plan.bindings.len());
    let mut printed = Printed::default();
    printed.line(format!("{entities} exchanges and queues and {bindings} bindings exist as configured"));
    Ok(printed.out()?)
}

async fn diff(config: &Config, file: Option<&Path>, plan: &Plan, json: bool) -> Result<(), Failure> {
    let broker = connect(config, "prism-relay topology").await?;
    let (found, not_compared) = match compare_by_api(config, file, plan, &broker.url).await {
        Ok(compared) => {
            let reason = (!compared.unsettled.is_empty())
                .then(|| format!("policies of {} are not known yet; try again in 10 s", compared.unsettled.join(", ")));
            (Ok(compared.differences), reason)
        }
        Err(reason) => {
            let limit = config.broker.connect_timeout * (plan.steps() + 1);
            let commands = commands(config, file, &broker.url);
            let found = match timeout(limit, compare_over_amqp(config, &broker, plan, &commands)).await {
                Ok(found) => found,
                Err(_) => Err(BrokerError::Timeout.into()),
            };
            let reason = format!(
                "bindings and policies are not compared, because the management API is not available: {reason}"
            );
            (found, Some(reason))
        }
    };
    broker.close().await;
    let found = found?;
    let mut printed = Printed::default();
    if json {
        printed.line(serde_json::to_string_pretty(&diff_json(&found, not_compared.as_deref(), file))?);
    } else {
        print_diff(&mut printed, &found, not_compared, file);
    }
    printed.out()?;
    if found.iter().all(|difference| difference.kind == Kind::Advice) { Ok(()) } else { Err(Failure::Reported) }
}

fn diff_json(found: &[Difference], not_compared: Option<&str>, file: Option<&Path>) -> Value {
    let declare = format!("{} topology declare", command(file));
    let difference = |found: &Difference| {
        let kind = match found.kind {
            Kind::Missing => "missing",
            Kind::Changed => "changed",
            Kind::Surplus => "surplus",
            Kind::Unavailable => "unavailable",
            Kind::Advice => "advice",
        };
        let (entity, what, remedy) = (&found.entity, &found.what, found.remedy.text(&declare));
        json!({ "entity": entity, "kind": kind, "what": what, "remedy": remedy })
    };
    let differences: Vec<_> = found.iter().map(difference).collect();
    json!({ "differences": differences, "not_compared": not_compared })
}

fn print_diff(printed: &mut Printed, found: &[Difference], not_compared: Option<String>, file: Option<&Path>) {
    not_compared.into_iter().for_each(|reason| printed.line(reason));
    print_all(printed, found.iter().filter(|difference| !difference.kind.is_last()));
    if found.iter().any(|difference| difference.remedy.needs_declare()) {
        printed.line(format!("then create what is missing:\n    {} topology declare", command(file)));
    }
    print_all(printed, found.iter().filter(|difference| difference.kind.is_last()));
    printed.line(match found.iter().filter(|difference| difference.kind != Kind::Advice).count() {
        0 => "the broker is as configured".to_owned(),
        count => format!("differences: {count}"),
    });
}

/// Prints each difference with its remedy below it. A remedy that consecutive differences share is printed once, below
/// the last one.
fn print_all<'a>(printed: &mut Printed, found: impl Iterator<Item = &'a Difference>) {
    let mut found = found.peekable();
    while let Some(Difference { entity, what, kind, remedy }) = found.next() {
        printed.line(format!("{}{entity}: {what}", if *kind == Kind::Advice { "advice: " } else { "" }));
        if found.peek().is_some_and(|next| next.remedy == *remedy) {
            continue;
        }
        // `topology declare` is printed once, after all of them.
        if *remedy != Remedy::Declare {
            printed.line(format!("    {}", remedy.text("").replace('\n', "\n    ")));
        }
    }
}

/// What the management API shows.
pub(super) struct Compared {
    pub differences: Vec<Difference>,
    pub losses: Vec<Loss>,
    /// Queues whose policies the API does not know yet.
    pub unsettled: Vec<String>,
    /// How many queues the virtual host has, and may have.
    pub queues: usize,
    pub queues_max: Option<usize>,
}

/// How long to wait for the policies of queues that were declared just now, and how often to ask.
const POLICIES_PATIENCE: Duration = Duration::from_secs(10);
const POLICIES_EVERY: Duration = Duration::from_millis(500);

/// Compares through the management API. The error says why the API is not available.
pub(super) async fn compare_by_api(
    config: &Config,
    file: Option<&Path>,
    plan: &Plan,
    url: &BrokerUrl,
) -> Result<Compared, String> {
    let management = Management::new(&config.broker, url).map_err(|error| chain(&error))?;
    let begun = Instant::now();
    loop {
        let live = Live::read(&management).await.map_err(|error| chain(&error))?;
        let unsettled = live.unsettled(plan);
        if unsettled.is_empty() || begun.elapsed() > POLICIES_PATIENCE {
            return Ok(Compared {
                differences: differences(plan, &live, &commands(config, file, url)),
                losses: losses(plan, &live),
                unsettled,
                queues: live.queue_count(),
                queues_max: live.queues_max,
            });
        }
        sleep(POLICIES_EVERY).await;
    }
}

async fn compare_over_amqp(
    config: &Config,
    broker: &BrokerConnection,
    plan: &Plan,
    commands: &Commands,
) -> Result<Vec<Difference>, Failure> {
    // A passive relay accepts policies in place of arguments, and AMQP does not show policies.
    let declare = if config.topology.declare == Declare::Active { Declare::Active } else { Declare::Passive };
    let mut found = Vec::new();
    for entity in plan.entities() {
        found.extend(match compare(&broker.connection, entity, declare).await? {
            Comparison::Same | Comparison::Present => None,
            Comparison::Absent => Some(Difference::missing(entity)),
            Comparison::Differs(TopologyError::Clash { reply, .. }) => {
                Some(Difference::replace(plan, entity, reply, commands))
            }
            // The broker refuses to compare, so nothing is known about this entity and those after it.
            Comparison::Differs(error) => return Err(error.into()),
        });
    }
    Ok(found)
}

/// The command that runs this program with the same configuration.
pub(super) fn command(file: Option<&Path>) -> String {
    let option = file.map(|file| format!(" --config {}", quote(&file.display().to_string()))).unwrap_or_default();
    format!("prism-relay{option}")
}

fn commands(config: &Config, file: Option<&Path>, url: &BrokerUrl) -> Commands {
    Commands {
        relay: command(file),
        vhost: url.vhost().to_owned(),
        api: Management::place(&config.broker, url),
        user: url.expose().authority.userinfo.username.clone(),
        active: config.topology.declare == Declare::Active,
    }
}
