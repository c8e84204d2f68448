//! A process that cannot outlive the test process, not even if that is killed with SIGKILL.
//!
//! Two small shells see to it. The *gate* becomes the wanted program (same pid) only after a line has come down its
//! standard input; if the test process dies before, it reads the end of the file and gives up. The *watchdog* learns
//! the pid before the gate opens, and kills the process group when its own standard input ends. Both pipes are held
//! by the test process alone, so the kernel closes them whichever way that ends.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

const GATE: &str = r#"read -r go && exec "$@" </dev/null"#;

/// `released` arrives when the process has ended and was reaped: from then on its pid may belong to somebody else.
const WATCHDOG: &str = r#"read -r released || kill -s KILL -- "-$1""#;

/// A command that will wait at the gate. Give it arguments, environment and output as usual, then [`Leash::start`] it.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GATE, "gate"]).arg(program);
    command
}

/// A shell that waits on its standard input for the end of the test process, and then does what `script` says.
pub fn sentinel(script: &str, argument: impl AsRef<OsStr>) -> Child {
    Command::new("/bin/sh")
        .args(["-c", script, "sentinel"])
        .arg(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C goes to the whole group in the foreground: a sentinel has to survive it.
        .process_group(0)
        .spawn()
        .expect("spawn a sentinel")
}

/// Holds a process, the leader of its own process group. Dropping it kills the group and waits for the end.
pub struct Leash {
    process: Child,
    watchdog: Child,
    exit: Option<ExitStatus>,
}

impl Leash {
    /// Starts a command made by [`command`].
    pub fn start(mut command: Command) -> Self {
        let mut process = command.stdin(Stdio::piped()).process_group(0).spawn().expect("spawn the gate");
        let watchdog = sentinel(WATCHDOG, process.id().to_string());
        let mut gate = process.stdin.take().expect("the gate's standard input is piped");
        gate.write_all(b"go\n").expect("open the gate");
        Self { process, watchdog, exit: None }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The pipes that were asked for with [`Command::stdout`] and [`Command::stderr`].
    pub fn process(&mut self) -> &mut Child {
        &mut self.process
    }

    /// Sends a signal (`TERM`, `KILL`, `STOP`, `CONT`, ...) to the process, unless it has ended.
    pub fn signal(&mut self, name: &str) {
        if self.exited().is_none() {
            // The shell's own `kill`: there is no other in a slim image. The pid is ours until it has been reaped.
            let status = Command::new("/bin/sh")
                .args(["-c", r#"kill -s "$1" "$2""#, "signal", name, &self.pid().to_string()])
                .status()
                .expect("run kill");
            assert!(status.success(), "cannot send {name} to {}", self.pid());
        }
    }

    /// The exit status, once the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.exit.is_none() {
            self.exit = self.process.try_wait().expect("ask for the exit status");
            if self.exit.is_some() {
                self.end_watchdog(b"released\n");
            }
        }
        self.exit
    }

    fn end_watchdog(&mut self, last_words: &[u8]) {
        if let Some(mut pipe) = self.watchdog.stdin.take() {
            // It fails only if somebody killed the watchdog, and then there is nothing left to tell.
            let _ = pipe.write_all(last_words);
        }
        let _ = self.watchdog.wait();
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if self.exited().is_none() {
            self.end_watchdog(b"");
            let _ = self.process.wait();
        }
    }
}
