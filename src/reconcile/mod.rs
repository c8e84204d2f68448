//! Asks Prism's API for the scans and predictions that began and did not end, for those that refused webhooks named,
//! and for those that an operator names, and takes in the events that no webhook brought. Off without
//! `reconcile.api_key`.
//!
//! `schedule` decides what is asked next, and `meaning` which event is missing; both are pure. `api` makes the
//! requests. [`Reconciler`] carries it all out, one request at a time. [`Reconcile`] is what other parts see of it.

mod answer;
mod api;
mod handle;
mod meaning;
mod schedule;
mod settings;
mod status;
mod task;

use api::PrismApi;
pub(crate) use handle::{Effect, Reconcile};
pub(crate) use settings::{ApiUrl, Settings};
#[cfg(test)]
pub(crate) use status::Failing;
pub(crate) use status::Status;
pub(crate) use task::Reconciler;

/// Whether Prism's API takes the key: its status for a scan that does not exist; `None` without a key.
pub(crate) async fn probe(settings: &Settings) -> Option<Result<u16, String>> {
    let key = settings.api_key.clone()?;
    Some(PrismApi::new(settings.api_url.clone(), key).probe().await)
}
