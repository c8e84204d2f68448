//! `check`: checks whether the relay can run. It changes nothing on disk or on the broker.

use std::path::Path;
use std::time::Duration;

use super::failure::Failure;
use super::output::say;
use super::topology;
use crate::broker::{BrokerAccess, BrokerConnection, BrokerUrl};
use crate::config::Config;
use crate::spool::{FileSystem, Inspector, Shortage, SpoolState, check_mount};
use crate::text::chain;
use crate::topology::{Comparison, Declare, Kind, Plan, compare};

/// Maximum time for one reply of the broker.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(super) struct Options {
    /// Skip the broker: check only what the relay needs to start
    #[arg(long)]
    offline: bool,
}

/// Prints each finding at once, and counts the problems.
struct Table {
    problems: usize,
}

impl Table {
    fn ok(&self, what: &str, finding: &str) {
        say(&format!("  ok    {what:<34} {finding}"));
    }

    fn wrong(&mut self, what: &str, finding: &str) {
        self.problems += 1;
        say(&format!("  WRONG {what:<34} {finding}"));
    }
}

pub(super) async fn run(config: &Config, file: Option<&Path>, options: Options) -> Result<(), Failure> {
    let mut table = Table { problems: 0 };
    table.ok("configuration", "every key is valid");
    check_signature(config, &table);
    check_spool(config, &mut table);
    if !options.offline {
        check_brokers(config, file, &mut table).await?;
    }
    match table.problems {
        0 => {
            say("all is well");
            Ok(())
        }
        count => {
            say(&format!("problems: {count}"));
            Err(Failure::Reported)
        }
    }
}

async fn check_brokers(config: &Config, file: Option<&Path>, table: &mut Table) -> Result<(), Failure> {
    let mut compared = false;
    let access = BrokerAccess::new(&config.broker)?;
    for (index, url) in config.broker.urls.iter().enumerate() {
        let what = format!("broker {}:{}", url.host(), url.port());
        match access.open(index, "prism-relay check").await {
            Ok(broker) => {
                table.ok(&what, &format!("logged in to {url}"));
                // The nodes of a cluster share their topology, so it is compared once.
                if !compared {
                    compared = true;
                    check_topology(config, file, &broker, url, table).await;
                }
                broker.close().await;
            }
            Err(error) => table.wrong(&what, &chain(&error)),
        }
    }
    Ok(())
}

fn check_signature(config: &Config, table: &Table) {
    let signature = &config.signature;
    let finding = match (signature.secrets.len(), signature.required) {
        (0, _) => "not checked: signature.required is false and there is no secret".to_owned(),
        (count, true) => format!("required; secrets: {count}"),
        (count, false) => format!("checked where present, but not required; secrets: {count}"),
    };
    table.ok("signature", &finding);
}

fn check_spool(config: &Config, table: &mut Table) {
    let path = config.spool.path.display();
    if let Err(error) = check_mount(&config.spool.path) {
        return table.wrong("spool", &chain(&error));
    }
    if let Some(warning) = FileSystem::of(&config.spool.path).warning() {
        table.ok("spool", warning);
    }
    if let Ok(Some(Shortage { needed, free })) = Shortage::of(&config.spool) {
        let (needed, free) = (bytesize::ByteSize(needed), bytesize::ByteSize(free));
        table.wrong("spool", &format!("the disk of {path} has {free} free and needs {needed}: webhooks would get 503"));
    }
    let state = SpoolState::of(&config.spool.path);
    if state == SpoolState::Damaged {
        return table.ok("spool", &format!("{path} is damaged: the relay recovers it when it starts"));
    }
    if let SpoolState::Absent(folder) = state {
        return match try_to_create_in(&folder) {
            Ok(()) => table.ok("spool", &format!("{path} will be created")),
            Err(error) => table.wrong("spool", &format!("{path} cannot be created: {}: {error}", folder.display())),
        };
    }
    let user = if state == SpoolState::InUse { ", in use by a running relay" } else { "" };
    match Inspector::open(&config.spool.path)
        .map_err(|error| chain(&error))
        .and_then(|spool| spool.ledger().map_err(|error| chain(&error)))
    {
        Ok(ledger) if !ledger.balances() => {
            table.wrong("spool", &format!("{path}: its totals do not add up: {ledger:?}{user}"));
        }
        Ok(ledger) => {
            table.ok("spool", &format!("{path}: {} pending, {} parked{user}", ledger.pending, ledger.parked));
        }
        Err(error) => table.wrong("spool", &format!("{error}{user}")),
    }
}

/// Creates a file in this folder, and deletes it.
fn try_to_create_in(folder: &Path) -> std::io::Result<()> {
    let path = folder.join(format!(".prism-relay-check-{}", std::process::id()));
    std::fs::File::create_new(&path)?;
    std::fs::remove_file(&path)
}

async fn check_topology(
    config: &Config,
    file: Option<&Path>,
    broker: &BrokerConnection,
    url: &BrokerUrl,
    table: &mut Table,
) {
    if config.topology.declare == Declare::Off {
        table.ok("topology", "not checked: topology.declare is off");
        return;
    }
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    let mut reported = Vec::new();
    for entity in plan.entities() {
        let what = entity.to_string();
        let before = table.problems;
        match tokio::time::timeout(ANSWER_TIMEOUT, compare(&broker.connection, entity, config.topology.declare)).await {
            Ok(Ok(Comparison::Same)) => table.ok(&what, "as configured"),
            Ok(Ok(Comparison::Present)) => table.ok(&what, "exists"),
            Ok(Ok(Comparison::Absent)) if config.topology.declare == Declare::Active => {
                table.ok(&what, "does not exist yet; the relay will create it");
                reported.push(what.clone());
            }
            Ok(Ok(Comparison::Absent)) => table.wrong(&what, "does not exist, and topology.declare is passive"),
            Ok(Ok(Comparison::Differs(error))) => table.wrong(&what, &chain(&error)),
            Ok(Err(error)) => return table.wrong(&what, &format!("lost the connection to {url}: {error}")),
            Err(_) => return table.wrong(&what, &format!("no answer from {url} within {ANSWER_TIMEOUT:?}")),
        }
        if table.problems > before {
            reported.push(what);
        }
    }
    check_bindings_and_policies(config, file, &plan, url, table, &reported).await;
}

/// Checks bindings and policies, which only the management API can list. `reported`: entities that need no second line.
async fn check_bindings_and_policies(
    config: &Config,
    file: Option<&Path>,
    plan: &Plan,
    url: &BrokerUrl,
    table: &mut Table,
    reported: &[String],
) {
    let what = "bindings and policies";
    let found = match topology::compare_by_api(config, file, plan, url).await {
        Ok(found) => found,
        Err(reason) => return table.ok(what, &format!("not checked: {reason}")),
    };
    let before = table.problems;
    for difference in found.iter().filter(|difference| !reported.contains(&difference.entity)) {
        let declare = format!("{} topology declare", topology::command(file));
        let finding =
            format!("{}\n        {}", difference.what, difference.remedy.text(&declare).replace('\n', "\n        "));
        // The relay creates a missing binding together with its queue or exchange.
        let later = reported.iter().any(|entity| difference.entity.contains(&format!(" {entity} ")));
        let is_accepted = config.topology.declare == Declare::Passive
            && !matches!(difference.kind, Kind::Missing | Kind::Unavailable);
        if difference.kind == Kind::Advice || later || is_accepted {
            table.ok(&difference.entity, &finding);
        } else {
            table.wrong(&difference.entity, &finding);
        }
    }
    if table.problems == before {
        table.ok(what, "as configured");
    }
}
