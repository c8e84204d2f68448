//! Whether a webhook would be answered 200 right now: for the public listener and the operators' listener alike.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, StatusCode};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::problem::{self, Code};
use crate::spool::{AppendError, Spool};

/// Readiness of the relay: the spool takes writes and the relay is not stopping. RabbitMQ has no part in it.
#[derive(Clone)]
pub(crate) struct Health {
    spool: Spool,
    draining: CancellationToken,
}

impl Health {
    /// `draining` is cancelled when the relay begins to stop.
    pub(crate) fn new(spool: Spool, draining: CancellationToken) -> Self {
        Self { spool, draining }
    }

    /// Why a new webhook would not be answered 200; `None` if it would. A stopping relay still answers the requests
    /// that are open, but is not ready for new ones.
    pub(crate) fn blocker(&self) -> Option<AppendError> {
        if self.is_draining() { Some(AppendError::Closed) } else { self.spool.blocker() }
    }

    /// The answer to `GET /healthz` and `GET /readyz`.
    pub(crate) fn answer(&self) -> Response<Full<Bytes>> {
        match self.blocker() {
            None => problem::json(StatusCode::OK, &json!({ "ready": true })),
            Some(blocker) => {
                let reason = self.spool.status().reason().filter(|_| blocker != AppendError::Closed);
                let detail = reason.map_or(blocker.to_string(), |reason| format!("{blocker}: {reason}"));
                Code::from(blocker).response(&detail)
            }
        }
    }

    /// Whether the relay is stopping.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }
}

impl From<AppendError> for Code {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Full => Self::SpoolFull,
            AppendError::Unavailable => Self::SpoolUnavailable,
            AppendError::Closed => Self::ShuttingDown,
        }
    }
}
