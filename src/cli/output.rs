//! Output of the commands: text on standard output, and progress on standard error.
//!
//! The first failed write is remembered. [`written`] returns it at the end, so that no command ends with 0 when its
//! output was lost.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};

use crate::text::span;

/// How often progress is printed where standard error is not a terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

static FAILED: OnceLock<String> = OnceLock::new();

/// Lines for standard output, printed together.
#[derive(Default)]
pub(super) struct Printed(String);

impl Printed {
    pub(super) fn line(&mut self, line: String) {
        self.0.push_str(&line);
        self.0.push('\n');
    }

    pub(super) fn out(self) -> anyhow::Result<()> {
        out(self.0.as_bytes())
    }
}

/// Writes to standard output, with an error that says so. A reader that stops early (`| head`) is not an error.
pub(super) fn out(bytes: &[u8]) -> anyhow::Result<()> {
    match write(bytes) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(lost(&error)),
        _ => Ok(()),
    }
}

/// Writes to standard output at once.
pub(super) fn write(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    note(stdout.write_all(bytes).and_then(|()| stdout.flush()))
}

/// Prints a line at once. `println!` would panic when the reader has exited (`| head`).
pub(super) fn say(line: &str) {
    let _ = write(format!("{line}\n").as_bytes());
}

/// Remembers the first error of standard output.
pub(super) fn note(written: io::Result<()>) -> io::Result<()> {
    if let Err(error) = &written
        && error.kind() != ErrorKind::BrokenPipe
    {
        let _ = FAILED.set(error.to_string());
    }
    written
}

/// An error if any output of this process was lost.
pub(super) fn written() -> anyhow::Result<()> {
    FAILED.get().map_or(Ok(()), |error| Err(lost(error)))
}

fn lost(error: &impl ToString) -> anyhow::Error {
    anyhow!("cannot print to standard output: {}", error.to_string())
}

/// How far a command is, on standard error: a bar on a terminal, elsewhere a line from time to time.
pub(super) struct Progress {
    bar: ProgressBar,
    what: &'static str,
    printed_at: Option<Instant>,
}

impl Progress {
    pub(super) fn new(count: u64, what: &'static str) -> Self {
        let template = format!("{{bar:40}} {{pos}}/{{len}} {what}, {{per_sec}}, {{eta}} left{{msg}}");
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let printed_at = (!io::stderr().is_terminal()).then(Instant::now);
        Self { bar: ProgressBar::new(count).with_style(style), what, printed_at }
    }

    pub(super) fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        if let Some(line) = self.line(done, Instant::now()) {
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// The next line, if one is due.
    fn line(&mut self, done: u64, now: Instant) -> Option<String> {
        let printed_at = self.printed_at.as_mut()?;
        if now.saturating_duration_since(*printed_at) < PROGRESS_EVERY {
            return None;
        }
        *printed_at = now;
        Some(format!("{done} of {} {}", self.bar.length().unwrap_or(done), self.what))
    }

    /// Waits, and shows why and how long still; elsewhere than on a terminal, once.
    pub(super) async fn pause(&self, why: &str, length: Duration) {
        let until = Instant::now() + length;
        if self.printed_at.is_some() {
            let _ = writeln!(io::stderr(), "{why}: going on in {}", span(length));
        }
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.bar.set_message(format!("; {why}: {}", span(left)));
            tokio::time::sleep(left.min(Duration::from_secs(1))).await;
        }
        self.bar.set_message("");
    }

    /// Prints with the bar out of the way.
    pub(super) fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_line_from_time_to_time_where_there_is_no_terminal() {
        let (mut progress, start) = (Progress::new(10, "messages"), Instant::now());
        progress.printed_at = Some(start);
        assert_eq!(progress.line(1, start + PROGRESS_EVERY / 2), None);
        assert_eq!(progress.line(5, start + PROGRESS_EVERY).as_deref(), Some("5 of 10 messages"));
        assert_eq!(progress.line(6, start + PROGRESS_EVERY), None);
        progress.printed_at = None;
        assert_eq!(progress.line(7, start + 9 * PROGRESS_EVERY), None, "a terminal has a bar");
    }
}
