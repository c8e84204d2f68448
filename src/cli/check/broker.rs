//! Whether the brokers let the relay log in, declare what it needs, and publish; and whether queues keep messages.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use super::super::topology::{self, Compared};
use super::findings::{Finding, Findings, Level};
use crate::broker::{BrokerAccess, BrokerConnection, BrokerUrl};
use crate::config::Config;
use crate::event::DOCUMENTED_TYPES;
use crate::text::chain;
use crate::tls::TlsError;
use crate::topology::{
    Comparison, Declare, Difference, Entity, Kind, Plan, TopologyError, compare, may_bind, may_publish, quote,
    would_create,
};

/// Maximum time for one reply of the broker.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How many refused requests are listed; the others are counted.
const LISTED_MAX: usize = 3;

/// Checks each broker's login, and the topology once: the nodes of a cluster share it.
pub(super) async fn check(config: &Config, file: Option<&Path>, findings: &mut Findings) -> Result<(), TlsError> {
    let access = BrokerAccess::new(&config.broker)?;
    let mut compared = false;
    for (index, url) in config.broker.urls.iter().enumerate() {
        let area = format!("broker {}:{}", url.host(), url.port());
        match access.open(index, "prism-relay check").await {
            Ok(broker) => {
                findings.0.push(Finding::ok(area, format!("logged in to {url}")));
                if !compared {
                    compared = true;
                    let plan = Plan::new(&config.topology, &config.publisher.exchange);
                    TopologyCheck { config, file, broker: &broker, url, plan: &plan, findings }.run().await;
                }
                broker.close().await;
            }
            Err(error) => findings.0.push(Finding::wrong(area, chain(&error))),
        }
    }
    Ok(())
}

struct TopologyCheck<'a> {
    config: &'a Config,
    file: Option<&'a Path>,
    broker: &'a BrokerConnection,
    url: &'a BrokerUrl,
    plan: &'a Plan,
    findings: &'a mut Findings,
}

/// What AMQP shows: entities that do not exist yet, and those that a finding is about already.
#[derive(Default)]
struct Seen {
    absent: BTreeSet<String>,
    reported: BTreeSet<String>,
}

/// The broker does not answer any more.
struct Silent;

impl TopologyCheck<'_> {
    async fn run(mut self) {
        let Ok(seen) = self.over_amqp().await else { return };
        if self.declare() != Declare::Off {
            self.over_api(&seen).await;
        }
    }

    fn declare(&self) -> Declare {
        self.config.topology.declare
    }

    async fn over_amqp(&mut self) -> Result<Seen, Silent> {
        let mut seen = Seen::default();
        let mut refused = Vec::new();
        if self.declare() == Declare::Off {
            self.findings.0.push(Finding::note("topology", "not checked: topology.declare is off"));
        } else {
            self.compare_all(&mut seen, &mut refused).await?;
        }
        if self.declare() == Declare::Active {
            self.probe_declarations(&mut seen, &mut refused).await?;
        }
        self.probe_publishing(&mut refused).await?;
        seen.reported.extend(refused.iter().map(|(entity, _)| entity.clone()));
        self.findings.0.extend(self.permissions(&refused));
        Ok(seen)
    }

    async fn compare_all(&mut self, seen: &mut Seen, refused: &mut Vec<(String, String)>) -> Result<(), Silent> {
        for entity in self.plan.entities() {
            let area = entity.to_string();
            let comparison = self.answer(&area, compare(&self.broker.connection, entity, self.declare())).await?;
            match comparison {
                Comparison::Same => self.findings.0.push(Finding::ok(area, "as configured")),
                Comparison::Present => self.findings.0.push(Finding::ok(area, "exists")),
                Comparison::Absent if self.declare() == Declare::Active => drop(seen.absent.insert(area)),
                Comparison::Absent => {
                    seen.reported.insert(area.clone());
                    let finding = Finding::wrong(area, "does not exist, and topology.declare is passive");
                    self.findings.0.push(finding.remedy("create it, or set topology.declare to \"active\""));
                }
                Comparison::Differs(error) => self.report(error, seen, refused),
            }
        }
        Ok(())
    }

    /// Asks whether the broker would create what is missing, and make the bindings.
    async fn probe_declarations(&mut self, seen: &mut Seen, refused: &mut Vec<(String, String)>) -> Result<(), Silent> {
        let connection = &self.broker.connection;
        let is_absent = |entity: &&Entity| seen.absent.contains(&entity.to_string());
        let absent: Vec<_> = self.plan.entities().iter().filter(is_absent).collect();
        for entity in absent {
            let area = entity.to_string();
            if let Err(error) = self.probed(&area, would_create(connection, entity)).await? {
                let is_limit = matches!(error, TopologyError::Limit { .. });
                self.report(error, seen, refused);
                if is_limit {
                    // It concerns the others as well.
                    return Ok(());
                }
            }
        }
        for binding in &self.plan.bindings {
            let area = binding.to_string();
            if let Err(error) = self.probed(&area, may_bind(connection, binding)).await? {
                self.report(error, seen, refused);
            }
        }
        Ok(())
    }

    /// Asks whether the relay may publish. Comes last, because a broker with an alarm answers nothing afterwards.
    async fn probe_publishing(&mut self, refused: &mut Vec<(String, String)>) -> Result<(), Silent> {
        let exchange = self.config.publisher.exchange.as_str();
        // The alternate exchange and the dead-letter exchanges need the same permission, when they are declared.
        let exchanges = self.plan.entities().iter().filter(|entity| entity.kind() == "exchange").map(Entity::name);
        let exchanges: BTreeSet<&str> = match self.declare() {
            Declare::Active => exchanges.chain([exchange]).collect(),
            Declare::Passive | Declare::Off => [exchange].into(),
        };
        for exchange in exchanges {
            let probe = may_publish(&self.broker.connection, exchange, DOCUMENTED_TYPES[0]);
            match timeout(ANSWER_TIMEOUT, probe).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.report(error, &mut Seen::default(), refused),
                Err(_) => {
                    let text = format!(
                        "takes no messages: no answer to a publish within {} s. A memory or disk alarm blocks \
                         publishers",
                        ANSWER_TIMEOUT.as_secs()
                    );
                    let remedy = "run rabbitmq-diagnostics alarms on the node, and free memory or disk; until then \
                                  webhooks are accepted and kept on disk";
                    self.findings.0.push(Finding::wrong(self.url.to_string(), text).remedy(remedy));
                    return Err(Silent);
                }
            }
        }
        Ok(())
    }

    /// Notes a refusal for lack of a permission, and reports every other one.
    fn report(&mut self, error: TopologyError, seen: &mut Seen, refused: &mut Vec<(String, String)>) {
        match error {
            TopologyError::Refused { entity, reply } => refused.push((entity, reply)),
            TopologyError::Clash { ref entity, .. }
            | TopologyError::Missing { ref entity }
            | TopologyError::NoPlugin { ref entity, .. }
            | TopologyError::Limit { ref entity, .. } => {
                let text = chain(&error);
                let text = text.strip_prefix(&format!("{entity}: ")).unwrap_or(&text);
                self.findings.0.push(Finding::wrong(entity, text));
                seen.reported.insert(entity.clone());
            }
            TopologyError::Name(_) | TopologyError::Connection(_) => {
                self.findings.0.push(Finding::wrong("topology", chain(&error)));
            }
        }
    }

    /// One finding for all requests that the broker refuses, which usually have one cause.
    fn permissions(&self, refused: &[(String, String)]) -> Option<Finding> {
        let (_, reply) = refused.first()?;
        let user = &self.url.expose().authority.userinfo.username;
        let entities: BTreeSet<&str> = refused.iter().map(|(entity, _)| entity.as_str()).collect();
        let listed: Vec<_> = entities.iter().take(LISTED_MAX).copied().collect();
        let more = match entities.len().saturating_sub(LISTED_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let text = format!("the broker refuses what the relay needs: {}{more}: {reply}", listed.join(", "));
        let exchange = self.config.publisher.exchange.as_str();
        let all = pattern_of(self.plan.entities().iter().map(Entity::name).chain([exchange]));
        let (configure, write) = match self.declare() {
            Declare::Active => (all.to_owned(), all.to_owned()),
            Declare::Passive | Declare::Off => (String::new(), format!("^{}$", exchange.replace('.', "\\."))),
        };
        let [vhost, user, configure, write, read] = [self.url.vhost(), user, &configure, &write, all].map(quote);
        let remedy = format!("rabbitmqctl set_permissions -p {vhost} {user} {configure} {write} {read}");
        Some(Finding::wrong("permissions", text).remedy(remedy))
    }

    /// The broker's answer in time; otherwise reports that there is none.
    async fn answer<T>(
        &mut self,
        area: &str,
        asked: impl Future<Output = Result<T, lapin::Error>>,
    ) -> Result<T, Silent> {
        let text = match timeout(ANSWER_TIMEOUT, asked).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => format!("lost the connection to {}: {error}", self.url),
            Err(_) => format!("no answer from {} within {} s", self.url, ANSWER_TIMEOUT.as_secs()),
        };
        self.findings.0.push(Finding::wrong(area, text));
        Err(Silent)
    }

    async fn probed(
        &mut self,
        area: &str,
        probe: impl Future<Output = Result<(), TopologyError>>,
    ) -> Result<Result<(), TopologyError>, Silent> {
        let asked = async {
            match probe.await {
                Err(TopologyError::Connection(error)) => Err(error),
                outcome => Ok(outcome),
            }
        };
        self.answer(area, asked).await
    }

    /// Checks bindings, policies and limits, which only the management API can list.
    async fn over_api(&mut self, seen: &Seen) {
        let area = "bindings and policies";
        let compared = match topology::compare_by_api(self.config, self.file, self.plan, self.url).await {
            Ok(compared) => compared,
            Err(reason) => {
                self.findings.0.extend(will_create(self.plan, seen, None));
                let remedy = "enable RabbitMQ's management plugin, or set broker.management_url";
                return self.findings.0.push(Finding::note(area, format!("not checked: {reason}")).remedy(remedy));
            }
        };
        let found = judged(self.config, self.file, self.plan, seen, &compared);
        let is_complete = found.is_empty() && seen.absent.is_empty();
        self.findings.0.extend(found);
        if is_complete {
            self.findings.0.push(Finding::ok(area, "as configured"));
        }
    }
}

/// The pattern of a permission on these names.
fn pattern_of<'a>(mut names: impl Iterator<Item = &'a str>) -> &'static str {
    if names.all(|name| name.starts_with("prism.")) { r"^prism\." } else { ".*" }
}

/// What the management API adds to what AMQP shows. Pure.
fn judged(config: &Config, file: Option<&Path>, plan: &Plan, seen: &Seen, compared: &Compared) -> Vec<Finding> {
    let declare = config.topology.declare;
    let command = format!("{} topology declare", topology::command(file));
    let mut found: Vec<_> = will_create(plan, seen, Some(&compared.differences)).into_iter().collect();
    found.extend(queue_limit(seen, compared));
    let is_new = |difference: &&Difference| {
        let created_later = declare == Declare::Active && difference.kind == Kind::Missing;
        !created_later && !seen.reported.contains(&difference.entity) && !seen.absent.contains(&difference.entity)
    };
    for difference in compared.differences.iter().filter(is_new) {
        let level = match difference.kind {
            Kind::Advice => Level::Note,
            Kind::Changed | Kind::Surplus if declare == Declare::Passive => Level::Note,
            Kind::Missing | Kind::Changed | Kind::Surplus | Kind::Unavailable => Level::Wrong,
        };
        let finding = Finding::new(level, &difference.entity, &difference.what);
        found.push(finding.remedy(difference.remedy.text(&command)));
    }
    // A relay that declares its topology reports the same settings as differences.
    let losses = compared.losses.iter().filter(|_| declare == Declare::Passive);
    found.extend(losses.map(|loss| {
        let level = if loss.keeps_messages { Level::Note } else { Level::Wrong };
        Finding::new(level, &loss.entity, &loss.what)
    }));
    if !compared.unsettled.is_empty() {
        let text = format!(
            "not known yet: policies of {}. RabbitMQ's management API shows them up to 10 s after a declaration",
            compared.unsettled.join(", ")
        );
        found.push(Finding::note("policies", text).remedy("run check again in 10 s"));
    }
    found
}

/// One line for everything that the relay creates when it connects. `differences`: from the management API, which knows
/// bindings; without it only those are counted that cannot exist. `None` also where a problem keeps it from creating.
fn will_create(plan: &Plan, seen: &Seen, differences: Option<&[Difference]>) -> Option<Finding> {
    if !seen.reported.is_empty() {
        return None;
    }
    let is_missing = |binding: &String| match differences {
        Some(differences) => differences.iter().any(|found| found.kind == Kind::Missing && found.entity == *binding),
        None => seen.absent.iter().any(|entity| binding.contains(&format!(" {entity} "))),
    };
    let bindings = plan.bindings.iter().map(ToString::to_string).filter(is_missing).count();
    let what = match (seen.absent.len(), bindings) {
        (0, 0) => return None,
        (entities, 0) => format!("{entities} exchanges and queues"),
        (0, bindings) => format!("{bindings} bindings"),
        (entities, bindings) => format!("{entities} exchanges and queues and {bindings} bindings"),
    };
    Some(Finding::ok("topology", format!("{what} do not exist yet; the relay will create them")))
}

/// Whether the queues that are still to be created fit into the limit of the virtual host.
fn queue_limit(seen: &Seen, compared: &Compared) -> Option<Finding> {
    let max = compared.queues_max?;
    let needed = seen.absent.iter().filter(|entity| entity.starts_with("queue ")).count();
    let exceeds = needed > 0 && compared.queues + needed > max;
    let text = format!(
        "it has {} queues, the relay needs {needed} more, and its limit of queues is {max} (max-queues)",
        compared.queues
    );
    exceeds.then(|| {
        Finding::wrong("virtual host", text)
            .remedy("raise the limit with rabbitmqctl set_vhost_limits, or delete queues that are not needed")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_is_no_wider_than_the_names_allow() {
        assert_eq!(pattern_of(["prism.events", "prism.dead"].into_iter()), r"^prism\.");
        assert_eq!(pattern_of(["prism.events", "webhooks"].into_iter()), ".*");
        assert_eq!(pattern_of(["prismatic"].into_iter()), ".*");
    }
}
