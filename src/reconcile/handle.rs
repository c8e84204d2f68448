//! A reconciler as other parts of the relay see it: to ask, to replace the key, and to see how it goes.

use tokio::sync::{Notify, mpsc, oneshot};

use super::api::PrismApi;
use super::status::{Report, Shared, Status};
use crate::secret::Secret;
use crate::subject::Subject;

/// Maximum number of operators' questions that wait.
pub(super) const ORDERS_MAX: usize = 16;

/// A reconciler as other parts of the relay see it.
pub(crate) struct Reconcile {
    pub(super) api: PrismApi,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) new_key: Notify,
    pub(super) status: Shared,
}

/// An operator's question.
pub(super) struct Order {
    pub subject: Subject,
    pub effect: Effect,
    pub answer: oneshot::Sender<Report>,
}

/// What becomes of a missing event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It is made and published.
    Repair,
    /// It is only reported.
    Report,
}

impl Reconcile {
    /// Asks for a subject at once, and waits for the outcome; `None` if the relay stops.
    pub(crate) async fn ask(&self, subject: Subject, effect: Effect) -> Option<Report> {
        let (answer, report) = oneshot::channel();
        self.orders.send(Order { subject, effect, answer }).await.ok()?;
        report.await.ok()
    }

    /// Sets a new key. What the API refused with the old one is asked again.
    pub(crate) fn set_key(&self, key: Secret) {
        self.api.set_key(key);
        self.new_key.notify_one();
    }

    pub(crate) fn status(&self) -> Status {
        self.status.get()
    }
}
