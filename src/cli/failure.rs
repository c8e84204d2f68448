//! The errors of commands, and their exit codes.

use std::process::ExitCode;

use crate::text::chain;

/// EX_USAGE of sysexits.h. A service manager should not restart the program.
pub(super) const EXIT_USAGE: u8 = 64;

/// Why a command failed, which decides the exit code. It does not implement `Error`, so that `?` converts every error
/// to `Other`.
#[derive(Debug)]
pub(super) enum Failure {
    /// The command line cannot be used.
    Usage(String),
    /// The configuration cannot be used.
    Config(anyhow::Error),
    Other(anyhow::Error),
    /// The command has already printed why.
    Reported,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

impl Failure {
    /// Prints the error with its causes in one line.
    pub(super) fn report(self) -> ExitCode {
        let (text, code) = match self {
            Self::Usage(text) => (text, ExitCode::from(EXIT_USAGE)),
            Self::Config(error) => (chain(error.as_ref()), ExitCode::from(EXIT_USAGE)),
            Self::Other(error) => (chain(error.as_ref()), ExitCode::FAILURE),
            Self::Reported => return ExitCode::FAILURE,
        };
        eprintln!("prism-relay: {text}");
        code
    }
}
