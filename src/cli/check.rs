//! `check`: would the relay run? Looks at everything and changes nothing.

use std::path::Path;
use std::time::Duration;

use super::{Failure, say, topology};
use crate::broker::{BrokerAccess, BrokerConnection, BrokerUrl};
use crate::config::Config;
use crate::spool::{Inspector, SpoolState};
use crate::text::chain;
use crate::topology::{Comparison, Declare, Kind, Plan, compare};

/// For one answer of the broker.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Options {
    /// Skip the broker: check only what the relay needs to start
    #[arg(long)]
    offline: bool,
}

/// The findings, printed as they come.
struct Table {
    problems: usize,
}

impl Table {
    fn good(&self, what: &str, finding: &str) {
        say(&format!("  ok    {what:<34} {finding}"));
    }

    fn bad(&mut self, what: &str, finding: &str) {
        self.problems += 1;
        say(&format!("  WRONG {what:<34} {finding}"));
    }
}

pub async fn run(config: &Config, file: Option<&Path>, options: Options) -> Result<(), Failure> {
    let mut table = Table { problems: 0 };
    table.good("configuration", "every key is valid");
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
            say(&format!("{count} of these need your attention"));
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
            Ok(link) => {
                table.good(&what, &format!("logged in to {url}"));
                // The nodes of a cluster share their topology, so it is compared once.
                if !compared {
                    compared = true;
                    check_topology(config, file, &link, url, table).await;
                }
                link.close().await;
            }
            Err(error) => table.bad(&what, &chain(&error)),
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
    table.good("signature", &finding);
}

fn check_spool(config: &Config, table: &mut Table) {
    let path = config.spool.path.display();
    let state = SpoolState::of(&config.spool.path);
    if state == SpoolState::Damaged {
        return table.good("spool", &format!("{path} is damaged: the relay recovers it when it starts"));
    }
    if let SpoolState::Absent(folder) = state {
        return match tempfile_in(&folder) {
            Ok(()) => table.good("spool", &format!("{path} will be created")),
            Err(error) => table.bad("spool", &format!("{path} cannot be created: {}: {error}", folder.display())),
        };
    }
    let user = if state == SpoolState::InUse { ", in use by a running relay" } else { "" };
    match Inspector::open(&config.spool.path)
        .map_err(|error| chain(&error))
        .and_then(|spool| spool.ledger().map_err(|error| error.to_string()))
    {
        Ok(ledger) if !ledger.balances() => {
            table.bad("spool", &format!("{path}: its totals do not add up: {ledger:?}{user}"));
        }
        Ok(ledger) => {
            table.good("spool", &format!("{path}: {} pending, {} parked{user}", ledger.pending, ledger.parked));
        }
        Err(error) => table.bad("spool", &format!("{error}{user}")),
    }
}

/// Creates a file in this folder, and removes it at once.
fn tempfile_in(folder: &std::path::Path) -> std::io::Result<()> {
    let path = folder.join(format!(".prism-relay-check-{}", std::process::id()));
    std::fs::File::create_new(&path)?;
    std::fs::remove_file(&path)
}

async fn check_topology(
    config: &Config,
    file: Option<&Path>,
    link: &BrokerConnection,
    url: &BrokerUrl,
    table: &mut Table,
) {
    if config.topology.declare == Declare::Off {
        table.good("topology", "not looked at: topology.declare is off");
        return;
    }
    let plan = Plan::new(&config.topology, &config.publisher.exchange);
    let mut said = Vec::new();
    for entity in plan.entities() {
        let what = entity.to_string();
        let before = table.problems;
        match tokio::time::timeout(ANSWER_TIMEOUT, compare(&link.connection, entity, config.topology.declare)).await {
            Ok(Ok(Comparison::Same)) => table.good(&what, "as configured"),
            Ok(Ok(Comparison::Present)) => table.good(&what, "exists"),
            Ok(Ok(Comparison::Absent)) if config.topology.declare == Declare::Active => {
                table.good(&what, "does not exist yet; the relay will create it");
                said.push(what.clone());
            }
            Ok(Ok(Comparison::Absent)) => table.bad(&what, "does not exist, and topology.declare is passive"),
            Ok(Ok(Comparison::Differs(error))) => table.bad(&what, &chain(&error)),
            Ok(Err(error)) => return table.bad(&what, &format!("the connection to {url} broke: {error}")),
            Err(_) => return table.bad(&what, &format!("no answer from {url} within {ANSWER_TIMEOUT:?}")),
        }
        if table.problems > before {
            said.push(what);
        }
    }
    check_the_rest(config, file, &plan, url, table, &said).await;
}

/// Bindings and policies, of which only the management API tells. `said`: the entities of which enough has been said.
async fn check_the_rest(
    config: &Config,
    file: Option<&Path>,
    plan: &Plan,
    url: &BrokerUrl,
    table: &mut Table,
    said: &[String],
) {
    let what = "bindings and policies";
    let found = match topology::look(config, file, plan, url).await {
        Ok(found) => found,
        Err(reason) => return table.good(what, &format!("not looked at: {reason}")),
    };
    let before = table.problems;
    for difference in found.iter().filter(|difference| !said.contains(&difference.entity)) {
        let declare = format!("{} topology declare", topology::command(file));
        let finding =
            format!("{}\n        {}", difference.what, difference.remedy.text(&declare).replace('\n', "\n        "));
        // With what it binds, the relay will create a binding, too.
        let later = said.iter().any(|entity| difference.entity.contains(&format!(" {entity} ")));
        let as_it_is = config.topology.declare == Declare::Passive && difference.kind != Kind::Missing;
        if difference.kind == Kind::Advice || later || as_it_is {
            table.good(&difference.entity, &finding);
        } else {
            table.bad(&difference.entity, &finding);
        }
    }
    if table.problems == before {
        table.good(what, "as configured");
    }
}
