//! Why the relay could not start, or had to stop.

use thiserror::Error;

use crate::publisher::PublisherError;
use crate::server::BindError;
use crate::service_manager::SocketActivationError;
use crate::spool::OpenError;
use crate::tls::TlsError;
use crate::traces::TracesError;

/// Why the relay could not start, or had to stop.
#[derive(Debug, Error)]
pub(crate) enum RelayError {
    #[error("cannot install signal handlers")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Spool(#[from] OpenError),
    #[error(transparent)]
    SocketActivation(#[from] SocketActivationError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot read the address of {key}")]
    Address { key: &'static str, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Traces(#[from] TracesError),
    #[error("the publisher stopped unexpectedly")]
    Publisher(#[source] PublisherError),
    #[error("the task that {} stopped unexpectedly", .0.purpose())]
    Task(Task),
}

impl RelayError {
    /// Whether something outside of the relay has to change before another start can succeed: the service manager's
    /// units, or a mount.
    pub(crate) fn is_misconfiguration(&self) -> bool {
        matches!(self, Self::SocketActivation(_)) || matches!(self, Self::Spool(error) if error.is_misconfiguration())
    }
}

/// A task that must run as long as the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Ingress,
    Reconciler,
    SpoolWriter,
    Publisher,
    Ops,
    Reload,
    Upkeep,
}

impl Task {
    /// Completes the sentence "the task that ...".
    fn purpose(self) -> &'static str {
        match self {
            Self::Ingress => "accepts webhooks",
            Self::Reconciler => "reconciles with Prism's API",
            Self::SpoolWriter => "writes the spool",
            Self::Publisher => "publishes events",
            Self::Ops => "serves the operators' listener",
            Self::Reload => "reloads secrets",
            Self::Upkeep => "maintains metrics",
        }
    }
}
