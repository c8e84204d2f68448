//! Output of the commands: text on standard output, and progress bars.

use std::io::{self, Write};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};

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

/// Writes to standard output. A reader that stops early (`| head`) is not an error.
pub(super) fn out(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot print"),
    }
}

/// Prints a line immediately. `println!` would panic when the reader has exited (`| head`).
pub(super) fn say(line: &str) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// A progress bar on standard error, drawn only if that is a terminal.
pub(super) fn progress_bar(count: u64, what: &str) -> ProgressBar {
    let template = format!("{{bar:40}} {{pos}}/{{len}} {what}, {{per_sec}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(count).with_style(style)
}
