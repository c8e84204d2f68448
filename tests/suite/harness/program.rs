//! A program on a leash whose output is collected line by line.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::eventually::eventually;
use super::leash::Leash;

/// A running program.
pub struct Program {
    leash: Leash,
    stdout: Lines,
    stderr: Lines,
}

/// The exit code and the output of a program that has ended.
#[derive(Debug)]
pub struct Ended {
    /// `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Program {
    /// Starts a command made by [`super::leash::command`].
    pub fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut leash = Leash::start(command);
        let stdout = Lines::of(leash.process().stdout.take().expect("standard output is piped"));
        let stderr = Lines::of(leash.process().stderr.take().expect("standard error is piped"));
        Self { leash, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.leash.pid()
    }

    /// Sends a signal, unless the program has ended.
    pub fn signal(&mut self, name: &str) {
        self.leash.signal(name);
    }

    /// The exit status, once it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.leash.exited()
    }

    /// The lines on standard output so far.
    pub fn stdout(&self) -> Vec<String> {
        self.stdout.so_far()
    }

    /// The lines on standard error so far.
    pub fn stderr(&self) -> Vec<String> {
        self.stderr.so_far()
    }

    /// Waits for the end of the program and of its output.
    pub async fn wait(&mut self) -> Ended {
        let pid = self.pid();
        let status = eventually(&format!("the end of process {pid}"), async || {
            self.leash.exited().ok_or_else(|| format!("it still runs; its log:\n{}", self.stderr.so_far().join("\n")))
        })
        .await;
        Ended { code: status.code(), stdout: self.stdout.all(), stderr: self.stderr.all() }
    }
}

/// Lines that a thread collects from a pipe.
struct Lines {
    collected: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Lines {
    fn of(pipe: impl Read + Send + 'static) -> Self {
        let collected = Arc::new(Mutex::new(Vec::new()));
        let target = Arc::clone(&collected);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                target.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Self { collected, reader: Some(reader) }
    }

    fn so_far(&self) -> Vec<String> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the end of the pipe and returns everything.
    fn all(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the thread that reads a pipe");
        }
        self.so_far().join("\n")
    }
}
