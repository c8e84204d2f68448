//! `check`: answers whether the relay would work. It changes nothing on disk or on the broker.

mod broker;
mod findings;
mod listeners;
mod spool;

use std::path::Path;

use super::failure::Failure;
use super::output::Printed;
use crate::config::Config;
use crate::reconcile;
use crate::spool::SpoolState;
use findings::{Finding, Findings, Level};

#[derive(clap::Args)]
pub(super) struct Options {
    /// Skip the broker: check only what the relay needs to start
    #[arg(long)]
    offline: bool,
    /// Print JSON: the findings, each with its area, level (ok, note or WRONG), text and remedy
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, file: Option<&Path>, options: Options) -> Result<(), Failure> {
    let mut findings = Findings(vec![Finding::ok("configuration", "every key is valid"), signature(config)]);
    findings.0.extend(config.notes.iter().map(|note| Finding::note(&note.key, &note.text)));
    let state = SpoolState::of(&config.spool.path);
    findings.0.extend(spool::findings(config, &state));
    findings.0.extend(listeners::findings(config, &state).await);
    if !options.offline {
        broker::check(config, file, &mut findings).await?;
        findings.0.extend(notices(config).await);
        findings.0.extend(prism_api(config).await);
    }
    let mut printed = Printed::default();
    printed.line(if options.json { serde_json::to_string_pretty(&findings.json())? } else { findings.table() });
    printed.out()?;
    if findings.count(Level::Wrong) == 0 { Ok(()) } else { Err(Failure::Reported) }
}

/// Whether the receiver of the notices answers. It gets no notice.
async fn notices(config: &Config) -> Option<Finding> {
    let target = config.notify.target.as_ref()?;
    let origin = target.origin();
    Some(match target.probe().await {
        // Any status but these is well: many receivers know POST only.
        Ok(status) => {
            let text = format!("{origin} answers {status} to HEAD; no notice was sent");
            match status {
                401 | 403 | 404 => Finding::note("notify", text)
                    .remedy("if notices do not arrive, correct the path and the login in notify.url"),
                _ => Finding::ok("notify", text),
            }
        }
        Err(error) => Finding::wrong("notify", format!("no answer from {origin}: {error}"))
            .remedy("correct notify.url, or start its receiver; until then notices do not arrive"),
    })
}

/// Whether Prism's API takes the key.
async fn prism_api(config: &Config) -> Option<Finding> {
    let url = config.reconcile.api_url.as_str();
    Some(match reconcile::probe(&config.reconcile).await? {
        // The scan that is asked for does not exist.
        Ok(404) => Finding::ok("reconcile", format!("{url} takes reconcile.api_key")),
        Ok(status @ (401 | 403)) => {
            Finding::wrong("reconcile", format!("{url} refuses reconcile.api_key: it answers {status}"))
                .remedy("set the key of this Prism account, for this address: the sandbox has keys of its own")
        }
        Ok(status) => {
            let text = format!("{url} answers {status} for a scan that does not exist, so the key is not checked");
            Finding::note("reconcile", text).remedy("correct reconcile.api_url, or try again later")
        }
        Err(error) => Finding::wrong("reconcile", format!("no answer from {url}: {error}"))
            .remedy("correct reconcile.api_url, or open the way to it; until then lost webhooks do not come back"),
    })
}

/// How many secrets there are, and how long each is: enough to see a line too many, and nothing of the secret.
fn signature(config: &Config) -> Finding {
    let signature = &config.signature;
    let lengths: Vec<_> = signature.secrets.iter().map(|secret| secret.expose().chars().count().to_string()).collect();
    let secrets = match lengths.len() {
        1 => format!("1 secret of {} characters", lengths[0]),
        count => format!("{count} secrets of {} characters", lengths.join(", ")),
    };
    match (lengths.len(), signature.required) {
        (0, _) => Finding::note("signature", "not checked: signature.required is false and there is no secret"),
        (_, true) => Finding::ok("signature", format!("required; {secrets}")),
        (_, false) => Finding::note("signature", format!("checked where present, but not required; {secrets}")),
    }
}
