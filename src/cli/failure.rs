//! The errors of commands, and their exit codes.

use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::anyhow;
use jiff::Timestamp;
use serde_json::json;

use crate::config::described;
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
    /// The last line of a log whose lines are JSON.
    Logged(Box<Self>),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

impl Failure {
    /// Marks the end of a relay, whose log is JSON or not.
    pub(super) fn logged_if(self, json: bool) -> Self {
        if json { Self::Logged(Box::new(self)) } else { self }
    }

    /// Adds which configuration was read: the reason may be that it was not the one that was meant.
    pub(super) fn with_configuration(self, file: Option<&Path>) -> Self {
        let read = described(file);
        match self {
            Self::Usage(text) => Self::Usage(format!("{text} ({read})")),
            Self::Other(error) => Self::Other(anyhow!("{} ({read})", chain(error.as_ref()))),
            Self::Logged(failure) => Self::Logged(Box::new(failure.with_configuration(file))),
            // The error of a configuration says so itself.
            failure @ (Self::Config(_) | Self::Reported) => failure,
        }
    }

    /// Prints the error with its causes in one line.
    pub(super) fn report(self) -> ExitCode {
        let code = self.code();
        if let Some(line) = self.line() {
            print_within_limit(line);
        }
        ExitCode::from(code)
    }

    fn code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) => EXIT_USAGE,
            Self::Other(_) | Self::Reported => 1,
            Self::Logged(failure) => failure.code(),
        }
    }

    fn line(self) -> Option<String> {
        match self {
            Self::Logged(failure) => {
                let (timestamp, error) = (format!("{:.6}", Timestamp::now()), failure.text()?);
                let (level, message, target) = ("ERROR", "the relay ends", env!("CARGO_CRATE_NAME"));
                let line = json!({ "timestamp": timestamp, "level": level, "message": message, "error": error,
                                   "target": target });
                Some(line.to_string())
            }
            failure => Some(format!("prism-relay: {}", failure.text()?)),
        }
    }

    fn text(self) -> Option<String> {
        match self {
            Self::Usage(text) => Some(text),
            Self::Config(error) | Self::Other(error) => Some(chain(error.as_ref())),
            Self::Reported => None,
            Self::Logged(failure) => failure.text(),
        }
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
