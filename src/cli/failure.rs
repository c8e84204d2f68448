//! The errors of commands, and their exit codes.

use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::text::chain;

/// EX_USAGE of sysexits.h. A service manager should not restart the program.
pub(super) const EXIT_USAGE: u8 = 64;

/// Maximum time for printing the last line on standard error.
const PRINT_TIMEOUT: Duration = Duration::from_secs(1);

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
        print_within_limit(format!("prism-relay: {text}"));
        code
    }
}

/// Prints on standard error, unless that blocks for longer than [`PRINT_TIMEOUT`]: a process that has to end must not
/// wait for a pipe that is not read.
fn print_within_limit(text: String) {
    let (done, printed) = mpsc::channel();
    thread::spawn(move || {
        eprintln!("{text}");
        // The receiver is gone after the timeout.
        let _ = done.send(());
    });
    let _ = printed.recv_timeout(PRINT_TIMEOUT);
}
