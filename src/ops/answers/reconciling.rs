//! What reconciling with Prism's API says about lost webhooks: ends that do not come, a key that is refused, and how
//! many events came by the API. Pure.

use std::time::Duration;

use super::super::words::count;
use super::{Facts, Level, Loss};
use crate::reconcile::Status;
use crate::text::span;

impl Facts {
    /// Events that may be missing, as far as the API shows.
    pub(super) fn unreconciled(&self) -> Vec<Loss> {
        let Status { stuck, stuck_subjects, stuck_after_seconds, refused_since, failing, .. } = &self.reconcile;
        let mut losses = Vec::new();
        if refused_since.is_some() {
            losses.push(Loss {
                level: Level::Warning,
                word: "Perhaps",
                detail: "Prism's API refuses reconcile.api_key, so events that webhooks lose do not come back."
                    .to_owned(),
                remedy: "Set a valid key in reconcile.api_key, or in the file of reconcile.api_key_file; \
                         `prism-relay check` tries it.",
                runbook: "PrismRelayReconcileRefused",
                note: "Prism's API refuses the key.".to_owned(),
            });
        }
        if *stuck > 0 {
            let age = span(Duration::from_secs(*stuck_after_seconds));
            let shown = stuck_subjects.join(", ");
            let more = if *stuck > stuck_subjects.len() as u64 { ", ..." } else { "" };
            let number = count(*stuck, "scan or prediction has", "scans or predictions have");
            let why = match failing {
                Some(failing) => format!("The API gives no answer: {}.", failing.reason),
                None if refused_since.is_some() => "The API is not asked for their ends.".to_owned(),
                None => "Prism's API does not know their ends either.".to_owned(),
            };
            losses.push(Loss {
                level: Level::Warning,
                word: "Perhaps",
                detail: format!("{number} not ended for more than {age} ({shown}{more}). {why}"),
                remedy: match failing {
                    Some(_) => "Look why with `prism-relay check`; they are asked for again.",
                    None => "Ask Prism about them; `prism-relay reconcile --scan ID` asks its API at once.",
                },
                runbook: "PrismRelaySubjectsOverdue",
                note: format!("{number} not ended for more than {age}."),
            });
        }
        losses
    }

    /// How many events of the last day no webhook brought.
    pub(super) fn by_api(&self) -> String {
        match self.reconcile.by_api_last_day {
            0 => String::new(),
            told => format!(" {} in the last day came by Prism's API.", count(told, "event", "events")),
        }
    }
}
