//! `topology`: what the relay wants on the broker: shown, declared, compared, or exported for whoever owns the broker.

use std::path::Path;

use thiserror::Error;
use tokio::time::timeout;

use super::{Failure, Printed, say};
use crate::broker::{BrokerConnection, BrokerUrl, Management};
use crate::config::Config;
use crate::text::chain;
use crate::topology::{
    self, Comparison, Declare, Difference, Entity, Kind, Live, Mending, Plan, Remedy, TopologyError, compare,
    definitions, differences, kind, plain, quote,
};

#[derive(clap::Subcommand)]
pub enum Action {
    /// Print the exchanges, queues and bindings
    Show,
    /// Create on the broker what is missing, whatever topology.declare says
    Declare,
    /// Compare the broker with the configuration, and print how to fix each difference; exit code 1 if there are any
    Diff,
    /// Print RabbitMQ definitions, with policies in place of arguments, for `rabbitmqctl import_definitions`
    Export,
}

#[derive(Debug, Error)]
enum BrokerError {
    #[error(transparent)]
    Refused(#[from] TopologyError),
    #[error("the broker did not answer in time")]
    Timeout,
}

pub async fn run(config: &Config, file: Option<&Path>, action: Action) -> Result<(), Failure> {
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    match action {
        Action::Show => show(&plan),
        Action::Declare => declare(config, &plan).await,
        Action::Diff => diff(config, file, &plan).await,
        Action::Export => {
            let definitions = definitions(&plan, config.broker.urls[0].vhost());
            say(&serde_json::to_string_pretty(&definitions)?);
            Ok(())
        }
    }
}

fn show(plan: &Plan) -> Result<(), Failure> {
    let mut printed = Printed::default();
    for entity in plan.entities() {
        let what = match entity {
            Entity::Exchange(exchange) => kind(&exchange.kind),
            Entity::Queue(_) => "durable".to_owned(),
        };
        printed.line(format!("{entity}  ({what})"));
        for (name, value) in entity.arguments().inner() {
            printed.line(format!("    {name} = {}", plain(value)));
        }
    }
    for binding in &plan.bindings {
        printed.line(format!("{binding}"));
        for (name, value) in binding.arguments.inner() {
            printed.line(format!("    {name} = {}", plain(value)));
        }
    }
    Ok(printed.out()?)
}

async fn declare(config: &Config, plan: &Plan) -> Result<(), Failure> {
    let link = super::connect(config, "prism-relay topology").await?;
    // Each declaration is a round trip.
    let limit = config.broker.connect_timeout * (plan.steps() + 1);
    let declared = timeout(limit, topology::establish(&link.connection, plan, Declare::Active)).await;
    link.close().await;
    declared.map_err(|_| BrokerError::Timeout)?.map_err(BrokerError::from)?;
    say(&format!("{} exchanges and queues and {} bindings are there", plan.entities().len(), plan.bindings.len()));
    Ok(())
}

async fn diff(config: &Config, file: Option<&Path>, plan: &Plan) -> Result<(), Failure> {
    let link = super::connect(config, "prism-relay topology").await?;
    let found = match look(config, file, plan, &link.url).await {
        Ok(found) => Ok(found),
        Err(reason) => {
            say(&format!("bindings and policies are not compared, because AMQP cannot tell: {reason}"));
            let limit = config.broker.connect_timeout * (plan.steps() + 1);
            match timeout(limit, compare_over_amqp(config, &link, plan, &mending(config, file, &link.url))).await {
                Ok(found) => found.map_err(Failure::from),
                Err(_) => Err(BrokerError::Timeout.into()),
            }
        }
    };
    link.close().await;
    let found = found?;
    print_all(found.iter().filter(|difference| !difference.kind.is_last()));
    let needs_declare = |remedy: &Remedy| matches!(remedy, Remedy::Declare | Remedy::CommandThenDeclare(_));
    if found.iter().any(|difference| needs_declare(&difference.remedy)) {
        say(&format!("and then\n    {} topology declare", command(file)));
    }
    print_all(found.iter().filter(|difference| difference.kind.is_last()));
    match found.iter().filter(|difference| difference.kind != Kind::Advice).count() {
        0 => {
            say("the broker is as configured");
            Ok(())
        }
        count => {
            say(&format!("differences: {count}"));
            Err(Failure::Reported)
        }
    }
}

/// A remedy that several differences share is printed once, below the last of them.
fn print_all<'a>(found: impl Iterator<Item = &'a Difference>) {
    let mut found = found.peekable();
    while let Some(Difference { entity, what, kind, remedy }) = found.next() {
        say(&format!("{}{entity}: {what}", if *kind == Kind::Advice { "advice: " } else { "" }));
        if found.peek().is_some_and(|next| next.remedy == *remedy) {
            continue;
        }
        match remedy {
            Remedy::Declare => {}
            Remedy::Command(text) | Remedy::CommandThenDeclare(text) | Remedy::Steps(text) => {
                say(&format!("    {}", text.replace('\n', "\n    ")));
            }
        }
    }
}

/// What the management API says, or why it says nothing.
pub(super) async fn look(
    config: &Config,
    file: Option<&Path>,
    plan: &Plan,
    url: &BrokerUrl,
) -> Result<Vec<Difference>, String> {
    let management = Management::new(&config.broker, url).map_err(|error| chain(&error))?;
    let live = Live::read(&management).await.map_err(|error| chain(&error))?;
    Ok(differences(plan, &live, &mending(config, file, url)))
}

async fn compare_over_amqp(
    config: &Config,
    link: &BrokerConnection,
    plan: &Plan,
    mending: &Mending,
) -> Result<Vec<Difference>, lapin::Error> {
    // For a passive relay policies may stand in for arguments, and of those AMQP says nothing.
    let declare = if config.topology.declare == Declare::Active { Declare::Active } else { Declare::Passive };
    let mut found = Vec::new();
    for entity in plan.entities() {
        found.extend(match compare(&link.connection, entity, declare).await? {
            Comparison::Same | Comparison::Present => None,
            Comparison::Absent => Some(Difference::missing(entity)),
            Comparison::Differs(error) => Some(Difference::wrong(plan, entity, chain(&error), mending)),
        });
    }
    Ok(found)
}

/// Our own command with its configuration.
pub(super) fn command(file: Option<&Path>) -> String {
    let option = file.map(|file| format!(" --config {}", quote(&file.display().to_string()))).unwrap_or_default();
    format!("prism-relay{option}")
}

fn mending(config: &Config, file: Option<&Path>, url: &BrokerUrl) -> Mending {
    Mending {
        relay: command(file),
        vhost: url.vhost().to_owned(),
        api: Management::place(&config.broker, url),
        user: url.expose().authority.userinfo.username.clone(),
        active: config.topology.declare == Declare::Active,
    }
}
