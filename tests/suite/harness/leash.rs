//! A process that cannot outlive the test process, not even one that is killed with SIGKILL.
//!
//! Two small shells ensure that. The *gate* becomes the program (same pid) only after it has read a line from its
//! standard input; if the test process dies first, the gate reads the end of the file and exits. The *watchdog* knows
//! the pid before the gate opens, and kills the process group when its own standard input ends. Only the test process
//! holds the two pipes, so the kernel closes them however the test process ends.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

const GATE: &str = r#"read -r go && exec "$@" </dev/null"#;

/// `released` arrives when the process has ended and was reaped: from then on another process may have its pid.
const WATCHDOG: &str = r#"read -r released || kill -s KILL -- "-$1""#;

/// A command that waits at the gate. Set arguments, environment and output as usual, then call [`Leash::start`].
pub fn command(program: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GATE, "gate"]).arg(program);
    command
}

/// A shell that waits for the end of its standard input, which is the end of the test process, and then runs `script`.
pub fn sentinel(script: &str, argument: impl AsRef<OsStr>) -> Child {
    Command::new("/bin/sh")
        .args(["-c", script, "sentinel"])
        .arg(argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C goes to the whole foreground group; a sentinel has to survive it.
        .process_group(0)
        .spawn()
        .expect("spawn a sentinel")
}

/// A process that leads its own process group. Dropping this kills the group and waits for its end.
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

    /// The process, with the pipes that [`Command::stdout`] and [`Command::stderr`] requested.
    pub fn process(&mut self) -> &mut Child {
        &mut self.process
    }

    /// Sends a signal (`TERM`, `KILL`, `STOP`, `CONT`, ...) to the process, unless it has ended.
    pub fn signal(&mut self, name: &str) {
        if self.exited().is_none() {
            // The shell's built-in `kill`: a slim image has no other. The pid stays ours until the process is reaped.
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

    fn end_watchdog(&mut self, message: &[u8]) {
        if let Some(mut pipe) = self.watchdog.stdin.take() {
            // This fails only if the watchdog was killed, and then there is nothing left to do.
            let _ = pipe.write_all(message);
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
