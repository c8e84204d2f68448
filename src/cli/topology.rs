//! `topology`: shows, declares, compares or exports the exchanges, queues and bindings that the relay needs.

use std::path::Path;

use thiserror::Error;
use tokio::time::timeout;

use super::connect::connect;
use super::failure::Failure;
use super::output::Printed;
use crate::broker::{BrokerConnection, BrokerUrl, Management};
use crate::config::Config;
use crate::text::chain;
use crate::topology::{
    self, Commands, Comparison, Declare, Difference, Kind, Live, Plan, Remedy, TopologyError, compare, definitions,
    differences, quote, show,
};

#[derive(clap::Subcommand)]
pub(super) enum Action {
    /// Print the exchanges, queues and bindings
    Show,
    /// Create what is missing on the broker, even if topology.declare is not active
    Declare,
    /// Compare the broker with the configuration; print fixes, exit with 1 if they differ
    Diff,
    /// Print definitions for `rabbitmqctl import_definitions`, with policies for arguments
    Export,
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
        Action::Diff => diff(config, file, &plan).await,
        Action::Export => {
            let definitions = definitions(&plan, config.broker.urls[0].vhost());
            let mut printed = Printed::default();
            printed.line(serde_json::to_string_pretty(&definitions)?);
            Ok(printed.out()?)
        }
    }
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

async fn diff(config: &Config, file: Option<&Path>, plan: &Plan) -> Result<(), Failure> {
    let mut printed = Printed::default();
    let broker = connect(config, "prism-relay topology").await?;
    let found = match compare_by_api(config, file, plan, &broker.url).await {
        Ok(found) => Ok(found),
        Err(reason) => {
            printed.line(format!(
                "bindings and policies are not compared, because the management API is not available: {reason}"
            ));
            let limit = config.broker.connect_timeout * (plan.steps() + 1);
            match timeout(limit, compare_over_amqp(config, &broker, plan, &commands(config, file, &broker.url))).await {
                Ok(found) => found,
                Err(_) => Err(BrokerError::Timeout.into()),
            }
        }
    };
    broker.close().await;
    let found = found?;
    print_all(&mut printed, found.iter().filter(|difference| !difference.kind.is_last()));
    if found.iter().any(|difference| difference.remedy.needs_declare()) {
        printed.line(format!("then create what is missing:\n    {} topology declare", command(file)));
    }
    print_all(&mut printed, found.iter().filter(|difference| difference.kind.is_last()));
    match found.iter().filter(|difference| difference.kind != Kind::Advice).count() {
        0 => {
            printed.line("the broker is as configured".to_owned());
            Ok(printed.out()?)
        }
        count => {
            printed.line(format!("differences: {count}"));
            printed.out()?;
            Err(Failure::Reported)
        }
    }
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

/// Compares through the management API. The error says why the API is not available.
pub(super) async fn compare_by_api(
    config: &Config,
    file: Option<&Path>,
    plan: &Plan,
    url: &BrokerUrl,
) -> Result<Vec<Difference>, String> {
    let management = Management::new(&config.broker, url).map_err(|error| chain(&error))?;
    let live = Live::read(&management).await.map_err(|error| chain(&error))?;
    Ok(differences(plan, &live, &commands(config, file, url)))
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
