//! A private RabbitMQ node with its own ports, folder and epmd. It leaves nothing behind.
//!
//! Two variables say which RabbitMQ runs:
//! - `PRISM_TEST_RABBITMQ_BIN`: the folder of `rabbitmq-server`; `/usr/lib/rabbitmq/bin` by default. The wrappers in
//!   `/usr/sbin` do not work here, because they require the users `root` or `rabbitmq`.
//! - `PRISM_TEST_RABBITMQ_ROOT`: a root tree to run it in, such as a debootstrap of another Debian; none by default.
//!   The node then gets its own mount namespace with its own `/proc`, which ends with the node. Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::certificates::Authority;
use super::eventually::{eventually_within, poll};
use super::leash::{self, Leash};
use super::management::{Management, encode};
use super::marks::PASSWORD;
use super::ports;
use super::scratch::Scratch;

/// A boot takes 4 to 20 s, and longer while a compiler runs.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// A clean stop takes 6 s on RabbitMQ 3.10.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

const EPMD_DEADLINE: Duration = Duration::from_secs(60);

/// The file in the node's folder with the output of epmd and of the node's start-up. RabbitMQ's own log is below
/// `log/`.
const OUTPUT: &str = "output.log";

/// A shell script that executes `$2...` inside the root tree `$1`.
const ENTER: &str = r#"mount -t proc proc "$1/proc" && exec chroot "$@""#;

static SHARED: OnceCell<Result<Node, String>> = OnceCell::const_new();

/// A RabbitMQ node. Dropping it kills it and removes its folder.
pub struct Node {
    root: Option<PathBuf>,
    bin: PathBuf,
    name: String,
    amqp: u16,
    amqps: u16,
    dist: u16,
    authority: Authority,
    management: Management,
    // Dropped in this order: the node, then epmd and the folder, which it needs.
    broker: Mutex<Option<Leash>>,
    epmd: Arc<Epmd>,
    folder: Scratch,
}

/// Erlang's port mapper: tells the nodes of one cluster each other's ports, and knows no other nodes.
pub(super) struct Epmd {
    port: u16,
    _process: Leash,
}

impl Node {
    /// The node that all tests share; the first test waits for its boot. If the boot fails, every test fails at once.
    /// A test that stops, freezes or alarms a node must use [`Node::start`].
    pub async fn shared() -> &'static Self {
        let node = SHARED.get_or_init(Self::try_start).await;
        node.as_ref().unwrap_or_else(|error| panic!("{error}"))
    }

    /// A new node for one test, ready for use.
    pub async fn start() -> Self {
        Self::try_start().await.unwrap_or_else(|error| panic!("{error}"))
    }

    async fn try_start() -> Result<Self, String> {
        let node = Self::prepare("n1@localhost", &[], None)?;
        node.boot().await?;
        Ok(node)
    }

    /// A node that does not run yet. `cluster` has the names of all nodes of its cluster, including this one; all nodes
    /// but the first need the first one's `epmd`.
    pub(super) fn prepare(name: &str, cluster: &[&str], epmd: Option<Arc<Epmd>>) -> Result<Self, String> {
        let root = std::env::var_os("PRISM_TEST_RABBITMQ_ROOT").filter(|root| !root.is_empty()).map(PathBuf::from);
        let folder = match &root {
            Some(root) => Scratch::below(&root.join("tmp")),
            None => Scratch::new(),
        };
        let node = Self {
            bin: std::env::var_os("PRISM_TEST_RABBITMQ_BIN")
                .map_or_else(|| PathBuf::from("/usr/lib/rabbitmq/bin"), PathBuf::from),
            name: name.to_owned(),
            amqp: ports::free(),
            amqps: ports::free(),
            dist: ports::free(),
            authority: Authority::new(),
            management: Management { port: ports::free() },
            broker: Mutex::new(None),
            epmd: epmd.unwrap_or_else(|| Arc::new(start_epmd(root.as_deref(), folder.path()))),
            root,
            folder,
        };
        node.write_files(cluster).map_err(|error| format!("cannot prepare the folder of a node: {error}"))?;
        Ok(node)
    }

    pub(super) fn epmd(&self) -> Arc<Epmd> {
        Arc::clone(&self.epmd)
    }

    /// Its Erlang node name, such as `n1@localhost`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it was started, and neither killed nor stopped since then.
    pub fn runs(&self) -> bool {
        self.broker().is_some()
    }

    /// The address of the AMQP listener.
    pub fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.amqp).into()
    }

    /// The URL of a vhost for `guest`, who has all permissions.
    pub fn amqp_url(&self, vhost: &str) -> String {
        format!("amqp://guest:{PASSWORD}@{}/{}", self.address(), encode(vhost))
    }

    /// The address of the AMQP listener with TLS. A client with a certificate of [`Self::authority`] may log in as its
    /// common name.
    pub fn tls_address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.amqps).into()
    }

    /// The authority that signed the node's certificate.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn management(&self) -> Management {
        self.management
    }

    /// RabbitMQ's version, such as `[4, 3, 6]`.
    pub async fn version(&self) -> Vec<u32> {
        let overview = self.management.find("overview").await.expect("an overview");
        let version = overview["rabbitmq_version"].as_str().expect("a version");
        version.split('.').map(|part| part.parse().expect("a number")).collect()
    }

    /// The folder with its data and logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The path of a file in [`Self::folder`] as the node sees it.
    pub fn inside(&self, path: &Path) -> String {
        inside(self.root.as_deref(), path).display().to_string()
    }

    /// SIGKILL: the node may lose data that it had not fsynced, and its connections are reset.
    pub async fn kill(&self) {
        self.end("KILL").await;
    }

    /// A clean stop.
    pub async fn stop(&self) {
        self.end("TERM").await;
    }

    /// Boots a killed or stopped node again, with the same ports and data.
    pub async fn start_again(&self) {
        assert!(self.broker().is_none(), "the node runs");
        self.boot().await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// SIGSTOP: its connections stay open, and it answers nothing.
    pub fn freeze(&self) {
        self.broker().as_mut().expect("a node that runs").signal("STOP");
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.broker().as_mut().expect("a node that runs").signal("CONT");
    }

    /// Runs `rabbitmqctl` and returns its output. Takes about a second; the management API is faster.
    pub async fn ctl(&self, arguments: &[&str]) -> String {
        let mut command =
            into_tree(self.root.as_deref(), &self.bin.join("rabbitmqctl"), |program| Command::new(program));
        command.args(["--quiet", "--timeout", "30"]).args(arguments);
        command.env_clear().envs(self.environment()).stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output());
        let output = output.await.expect("a thread for rabbitmqctl").expect("run rabbitmqctl");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {} {}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Raises the memory alarm (`true`) or clears it. RabbitMQ blocks publishers during an alarm.
    pub async fn memory_alarm(&self, on: bool) {
        self.ctl(&["set_vm_memory_high_watermark", if on { "0.0001" } else { "0.4" }]).await;
    }

    /// Raises the disk alarm (`true`) or clears it. RabbitMQ blocks publishers during an alarm.
    pub async fn disk_alarm(&self, on: bool) {
        self.ctl(&["set_disk_free_limit", if on { "9000GB" } else { "50MB" }]).await;
    }

    /// Creates a vhost that `guest` may use.
    pub async fn create_vhost(&self, name: &str) {
        self.management.put(&format!("vhosts/{}", encode(name)), json!({})).await;
        self.permit("guest", name, ".*", ".*", ".*").await;
    }

    /// Deletes a vhost with everything in it. Returns whether it existed.
    pub async fn delete_vhost(&self, name: &str) -> bool {
        self.management.delete(&format!("vhosts/{}", encode(name))).await
    }

    /// Creates a user without any permission.
    pub async fn create_user(&self, name: &str, password: &str) {
        self.create_user_with_tag(name, password, "").await;
    }

    /// The tag decides what the user may ask the management API.
    pub async fn create_user_with_tag(&self, name: &str, password: &str, tag: &str) {
        let body = json!({"password": password, "tags": tag});
        self.management.put(&format!("users/{}", encode(name)), body).await;
    }

    /// Sets the permissions of a user: regular expressions for configure, write and read.
    pub async fn permit(&self, user: &str, vhost: &str, configure: &str, write: &str, read: &str) {
        let path = format!("permissions/{}/{}", encode(vhost), encode(user));
        self.management.put(&path, json!({"configure": configure, "write": write, "read": read})).await;
    }

    fn broker(&self) -> MutexGuard<'_, Option<Leash>> {
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the Erlang VM and waits until AMQP and the management API answer.
    pub(super) async fn boot(&self) -> Result<(), String> {
        let epmd = poll(EPMD_DEADLINE, async || TcpStream::connect(("127.0.0.1", self.epmd.port)).await);
        epmd.await.map_err(|error| self.explain(&format!("epmd does not listen: {error}")))?;
        let mut command = into_tree(self.root.as_deref(), &self.bin.join("rabbitmq-server"), leash::command);
        command.env_clear().envs(self.environment());
        log_to(&mut command, self.folder());
        *self.broker() = Some(Leash::start(command));

        let booted = poll(BOOT_DEADLINE, async || match self.ready().await {
            Ok(()) => Ok(Ok(())),
            Err(missing) => match self.broker().as_mut().and_then(Leash::exited) {
                Some(status) => Ok(Err(format!("it ended with {status}"))),
                None => Err(missing),
            },
        });
        booted.await.flatten().map_err(|reason| self.explain(&format!("it did not boot: {reason}")))
    }

    async fn ready(&self) -> Result<(), String> {
        let ready = async {
            // The API is the last to start, and a request to it is cheap.
            let answer = self.management.call(hyper::Method::GET, "overview", &Value::Null).await?;
            if answer.status != 200 {
                return Err(answer.to_string());
            }
            let properties = lapin::ConnectionProperties::default();
            let connection = lapin::Connection::connect(&self.amqp_url("/"), properties).await;
            let connection = connection.map_err(|error| error.to_string())?;
            connection.close(200, "ready".into()).await.map_err(|error| error.to_string())
        };
        timeout(Duration::from_secs(5), ready).await.map_err(|_| "no answer within 5 s".to_owned())?
    }

    /// An error with the node's output.
    fn explain(&self, error: &str) -> String {
        let log = fs::read_to_string(self.folder().join(OUTPUT)).unwrap_or_default();
        format!("a RabbitMQ node (see the module doc of node.rs): {error}; its output:\n{log}")
    }

    async fn end(&self, signal: &str) {
        let mut leash = self.broker().take().expect("a node that runs");
        leash.signal(signal);
        eventually_within(STOP_DEADLINE, "the end of the node", async || leash.exited().ok_or("it still runs")).await;
    }

    fn write_files(&self, cluster: &[&str]) -> std::io::Result<()> {
        let file = |name: &str| self.folder().join(name);
        fs::write(file(".erlang.cookie"), "prism")?;
        fs::set_permissions(file(".erlang.cookie"), fs::Permissions::from_mode(0o400))?;
        fs::write(
            file("plugins"),
            "[rabbitmq_management,rabbitmq_auth_mechanism_ssl,rabbitmq_consistent_hash_exchange].\n",
        )?;
        let own = self.authority.issue_server();
        for (name, pem) in
            [("ca.pem", self.authority.pem()), ("tls.pem", own.certificate), ("tls.key", own.private_key)]
        {
            fs::write(file(name), pem)?;
        }
        let tls = inside(self.root.as_deref(), self.folder());
        let tls = tls.display();
        let mut discovery = String::new();
        for (number, name) in cluster.iter().enumerate() {
            discovery += "cluster_formation.peer_discovery_backend = classic_config\n";
            discovery += &format!("cluster_formation.classic_config.nodes.{} = {name}\n", number + 1);
        }
        fs::write(
            file("rabbitmq.conf"),
            format!(
                "loopback_users = none\n\
                 default_pass = {PASSWORD}\n\
                 listeners.tcp.default = 127.0.0.1:{}\n\
                 management.tcp.ip = 127.0.0.1\n\
                 management.tcp.port = {}\n\
                 # Rates of the API are at most half a second old; its connections and policies some seconds.\n\
                 collect_statistics_interval = 500\n\
                 listeners.ssl.default = 127.0.0.1:{}\n\
                 ssl_options.cacertfile = {tls}/ca.pem\n\
                 ssl_options.certfile = {tls}/tls.pem\n\
                 ssl_options.keyfile = {tls}/tls.key\n\
                 ssl_options.verify = verify_peer\n\
                 ssl_options.fail_if_no_peer_cert = false\n\
                 ssl_cert_login_from = common_name\n\
                 auth_mechanisms.1 = PLAIN\n\
                 auth_mechanisms.2 = AMQPLAIN\n\
                 auth_mechanisms.3 = EXTERNAL\n\
                 {discovery}",
                self.amqp, self.management.port, self.amqps
            ),
        )
    }

    /// The whole environment of the node and of `rabbitmqctl`.
    fn environment(&self) -> Vec<(&'static str, String)> {
        let folder = inside(self.root.as_deref(), self.folder());
        let below = |name: &str| folder.join(name).display().to_string();
        vec![
            ("PATH", search_path()),
            ("LANG", "C.UTF-8".to_owned()),
            ("HOME", folder.display().to_string()),
            ("ERL_EPMD_PORT", self.epmd.port.to_string()),
            ("RABBITMQ_CONF_ENV_FILE", "/dev/null".to_owned()),
            ("RABBITMQ_NODENAME", self.name.clone()),
            ("RABBITMQ_DIST_PORT", self.dist.to_string()),
            ("RABBITMQ_CONFIG_FILE", below("rabbitmq.conf")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", below("plugins")),
            ("RABBITMQ_MNESIA_BASE", below("data")),
            ("RABBITMQ_LOG_BASE", below("log")),
            ("RABBITMQ_PID_FILE", below("pid")),
            // The script then executes the Erlang VM in place of starting a child: the pid on the leash is the VM's.
            ("RUNNING_UNDER_SYSTEMD", "true".to_owned()),
            // Two schedulers that never busy-wait, because the tests need the processor.
            ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none".to_owned()),
        ]
    }
}

/// Starts epmd on a leash. Erlang would otherwise start one as a daemon, which outlives the tests.
fn start_epmd(root: Option<&Path>, folder: &Path) -> Epmd {
    let port = ports::free();
    let mut command = into_tree(root, Path::new("epmd"), leash::command);
    command.args(["-address", "127.0.0.1", "-port", &port.to_string()]);
    command.env_clear().env("PATH", search_path()).env("HOME", inside(root, folder));
    log_to(&mut command, folder);
    Epmd { port, _process: Leash::start(command) }
}

fn log_to(command: &mut Command, folder: &Path) {
    let log = fs::File::options().create(true).append(true).open(folder.join(OUTPUT)).expect("open a node's log");
    command.stderr(log.try_clone().expect("duplicate the handle of a node's log")).stdout(log);
}

/// A command for `program`, in the root tree if there is one.
fn into_tree(root: Option<&Path>, program: &Path, new: impl Fn(&str) -> Command) -> Command {
    match root {
        None => new(program.to_str().expect("a path in UTF-8")),
        Some(root) => {
            let mut command = new("unshare");
            command.args(["--mount", "/bin/sh", "-c", ENTER, "enter"]).arg(root).arg(program);
            command
        }
    }
}

/// A path as the root tree sees it.
fn inside(root: Option<&Path>, path: &Path) -> PathBuf {
    match root {
        None => path.to_owned(),
        Some(root) => Path::new("/").join(path.strip_prefix(root).expect("a path below the root tree")),
    }
}

/// Erlang may be anywhere; `chroot` and `unshare` may be in `sbin`, which is not on every PATH.
fn search_path() -> String {
    let inherited = std::env::var("PATH").unwrap_or_default();
    format!("{inherited}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}
