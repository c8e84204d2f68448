//! The configuration file of a relay under test, and its folder.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::leash;
use super::marks::assert_discreet;
use super::program::{Ended, Program};
use super::relay::Relay;
use super::scratch::Scratch;

/// The secret that the relay knows and [`Relay::post`] signs with.
pub const SECRET: &str = "whsec_test_0123456789";

/// The URL of a broker that does not exist: nothing listens on this port.
pub const NO_BROKER: &str = "amqp://guest:guest@127.0.0.1:1/%2f";

/// The configuration of a relay. Keys are dotted (`spool.max_bytes`); values are JSON and are written as TOML.
pub struct Setup {
    folder: Scratch,
    settings: BTreeMap<String, Value>,
    environment: BTreeMap<String, String>,
    sockets: Vec<(&'static str, RawFd)>,
}

/// Passes sockets on as a service manager does: moves the descriptors `$2...` to 3 and up, sets the variables of
/// sd_listen_fds(3) with the names `$1`, and executes the program after `--`.
const HAND_OVER: &str = r#"
names=$1 number=3 && shift
while [[ $1 != -- ]]; do eval "exec $((number++))<&$1" && shift; done && shift
export LISTEN_PID=$$ LISTEN_FDS=$((number - 3)) LISTEN_FDNAMES=$names
exec "$@""#;

impl Setup {
    /// Free ports, a spool in a new folder, [`SECRET`], quick reconnects, and this broker.
    pub fn new(broker_url: &str) -> Self {
        let folder = Scratch::new();
        let spool = folder.path().join("spool.db").display().to_string();
        Self { folder, settings: BTreeMap::new(), environment: BTreeMap::new(), sockets: Vec::new() }
            .set("http.listen", "127.0.0.1:0")
            .set("ops.listen", "127.0.0.1:0")
            .set("spool.path", spool)
            .set("signature.secrets", json!([SECRET]))
            .set("broker.urls", json!([broker_url]))
            // Tests that read a connection to its end wait for this.
            .set("http.idle_timeout", "10s")
            .set("broker.reconnect_min", "50ms")
            .set("broker.reconnect_max", "500ms")
            .set("log.format", "json")
            .set("log.filter", "trace")
    }

    /// [`Setup::new`] with [`NO_BROKER`], for tests of what must not depend on the broker.
    pub fn without_broker() -> Self {
        Self::new(NO_BROKER)
    }

    /// Sets a key of the configuration file.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.change(key, value);
        self
    }

    /// As [`Self::set`], by reference.
    pub fn change(&mut self, key: &str, value: impl Into<Value>) {
        self.settings.insert(key.to_owned(), value.into());
    }

    /// Removes a key, so that the relay's own default applies.
    pub fn unset(mut self, key: &str) -> Self {
        self.settings.remove(key);
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Passes listening sockets to `serve`, by name, as systemd does (sd_listen_fds(3)). They must be inheritable.
    pub fn handed_over(mut self, sockets: &[(&'static str, RawFd)]) -> Self {
        self.sockets = sockets.to_vec();
        self
    }

    /// The folder with the configuration and the spool; the relay's working directory.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file in the folder, such as a secret or a certificate. A reader sees the old content or the new one.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let (path, new) = (self.folder().join(name), self.folder().join(format!("{name}.new")));
        let written = std::fs::write(&new, content).and_then(|()| std::fs::rename(&new, &path));
        written.unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        path
    }

    /// The path of the spool file that [`Setup::new`] configures.
    pub fn spool(&self) -> PathBuf {
        self.folder().join("spool.db")
    }

    /// The configuration file's text.
    pub fn toml(&self) -> String {
        let line = |(key, value): (&String, &Value)| format!("{key} = {}\n", toml(value));
        self.settings.iter().map(line).collect::<Vec<_>>().concat()
    }

    /// Starts `prism-relay serve` and waits until it accepts webhooks.
    pub async fn start(self) -> Relay {
        Relay::from_setup(self).await
    }

    /// Starts `prism-relay --config <file> <arguments>`.
    pub fn launch(&self, arguments: &[&str]) -> Program {
        Program::start(self.command(arguments))
    }

    /// The command of [`Self::launch`], for a test that connects its output itself.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let file = self.file("relay.toml", self.toml());
        let relay = env!("CARGO_BIN_EXE_prism-relay");
        let mut command: Command = match self.sockets[..] {
            [] => leash::command(relay),
            [..] => {
                let names: Vec<_> = self.sockets.iter().map(|(name, _)| *name).collect();
                let mut command = leash::command("/bin/bash");
                command.args(["-c", HAND_OVER, "hand-over", &names.join(":")]);
                command.args(self.sockets.iter().map(|(_, number)| number.to_string())).args(["--", relay]);
                command
            }
        };
        command.arg("--config").arg(file).args(arguments).current_dir(self.folder());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PRISM_RELAY") {
                command.env_remove(name);
            }
        }
        command.envs(&self.environment);
        command
    }

    /// Runs `prism-relay --config <file> <arguments>` and waits for its end.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        let ended = self.launch(arguments).wait().await;
        assert_discreet("the output of a command", &format!("{}\n{}", ended.stdout, ended.stderr));
        ended
    }
}

/// A JSON value as TOML. TOML knows all string escapes of JSON.
fn toml(value: &Value) -> String {
    let joined = |parts: Vec<String>| parts.join(", ");
    match value {
        Value::Array(items) => format!("[{}]", joined(items.iter().map(toml).collect())),
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| format!("{} = {}", Value::from(name.as_str()), toml(value));
            format!("{{ {} }}", joined(fields.iter().map(field).collect()))
        }
        Value::Null => panic!("TOML has no null: use `unset`"),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}
