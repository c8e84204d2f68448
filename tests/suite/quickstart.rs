//! `deploy/quickstart.sh`, in a copy of the repository's outline, with a cargo that hands out the binary of the suite.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::harness::program::{Ended, Program};
use crate::harness::scratch::Scratch;
use crate::harness::{Node, Vhost, leash};

struct Checkout {
    folder: Scratch,
}

impl Checkout {
    /// A clone on a machine that has this version of Rust.
    fn new(rust: &str) -> Self {
        let folder = Scratch::new();
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        fs::create_dir_all(folder.path().join("deploy")).expect("create a folder");
        for file in ["deploy/quickstart.sh", "Cargo.toml"] {
            fs::copy(repository.join(file), folder.path().join(file)).expect("copy a file of the repository");
        }
        let checkout = Self { folder };
        let relay = env!("CARGO_BIN_EXE_prism-relay");
        checkout.program("rustc", &format!("echo 'rustc {rust} (abc 2026-01-01)'"));
        checkout.program("cargo", &format!("[[ $1 == build ]] && mkdir -p target/debug && cp {relay} target/debug/"));
        for engine in ["docker", "podman", "sudo", "apt-get"] {
            checkout.program(engine, &format!("touch {}; exit 1", checkout.path(&format!("used-{engine}")).display()));
        }
        checkout
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let file = self.path("bin").join(name);
        fs::create_dir_all(self.path("bin")).expect("create a folder");
        fs::write(&file, format!("#!/bin/bash\n{script}\n")).expect("write a script");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("make it executable");
    }

    async fn quickstart(&self, arguments: &[&str]) -> Ended {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = leash::command("/bin/bash");
        command.arg(self.path("deploy/quickstart.sh")).args(arguments).env("PATH", path);
        Program::start(command).wait().await
    }
}

#[tokio::test]
async fn the_quickstart_consumes_nothing_and_keeps_a_file_that_people_edit() {
    let vhost = Vhost::new(Node::shared().await).await;
    let checkout = Checkout::new("1.95.0");
    let first = checkout.quickstart(&["--once", "--broker", &vhost.url()]).await;
    assert_eq!(first.code, Some(0), "{first:?}");
    let plan = first.stdout.split("Built").next().unwrap();
    for part in ["build ", "prism.* exchanges", "write     .quickstart/", "--clean"] {
        assert!(plan.contains(part), "the plan does not have {part:?}: {plan}");
    }
    for family in ["scan", "body_shape_prediction"] {
        for phase in ["started", "succeeded", "failed"] {
            assert!(first.stdout.contains(&format!("  {family}.processing.{phase} ")), "{}", first.stdout);
        }
    }

    let config = checkout.path(".quickstart/relay.toml");
    let edits = "# edited\n[http]\npath = \"/hooks\"\n[ops]\ntoken = \"0123456789abcdef\"\n";
    let edited = fs::read_to_string(&config).unwrap() + edits;
    fs::write(&config, &edited).unwrap();
    let second = checkout.quickstart(&["--once", "--unsigned", "--broker", &vhost.url()]).await;
    assert_eq!(second.code, Some(0), "{second:?}");
    assert!(second.stdout.contains("/hooks, connected to RabbitMQ"), "{}", second.stdout);
    assert_eq!(fs::read_to_string(&config).unwrap(), edited);
    // Both runs sent three events of each family, and took none from the queues.
    for queue in ["prism.scan", "prism.future_me"] {
        let messages = vhost.messages(queue, 6).await;
        let signed = messages.iter().filter(|message| message.header("prism-verified") == "true").count();
        assert_eq!(signed, 3, "the second run is unsigned");
    }

    let clean = checkout.quickstart(&["--clean"]).await;
    assert_eq!(clean.code, Some(0), "{clean:?}");
    assert!(!checkout.path(".quickstart").exists() && !checkout.path("target/debug").exists());
    assert!(!checkout.path("used-apt-get").exists(), "nothing was missing");
}

#[tokio::test]
async fn an_old_rust_is_refused_before_anything_is_installed() {
    let checkout = Checkout::new("1.88.0");
    let ended = checkout.quickstart(&["--once"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("Rust 1.88.0 is too old. The relay needs 1.89 or later."), "{ended:?}");
    assert!(ended.stderr.contains("rustup update stable"), "{ended:?}");
    for program in ["apt-get", "sudo", "docker"] {
        assert!(!checkout.path(&format!("used-{program}")).exists(), "{program} was used");
    }
}

#[tokio::test]
async fn a_wrong_option_is_named_and_changes_nothing() {
    let checkout = Checkout::new("1.95.0");
    for (arguments, complaint) in
        [(&["--unsinged"][..], "unknown option: --unsinged"), (&["--broker"], "--broker needs a URL")]
    {
        let ended = checkout.quickstart(arguments).await;
        assert_eq!(ended.code, Some(64), "{ended:?}");
        assert!(ended.stderr.starts_with(complaint) && ended.stderr.contains("Usage: "), "{ended:?}");
    }
    assert!(!checkout.path(".quickstart").exists());
}
