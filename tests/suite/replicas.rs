//! Two relays with a spool each, behind nginx and in front of a cluster of three nodes.

use std::collections::BTreeSet;

use serde_json::json;

use crate::harness::marks::PASSWORD;
use crate::harness::program::Program;
use crate::harness::{Authority, Cluster, Relay, Setup, Vhost, Wire, eventually, leash, ports, scratch::Scratch};

const COUNT: usize = 1800;

/// nginx with the configuration of `deploy/nginx`. Dropping this kills it.
struct Nginx {
    program: Program,
    folder: Scratch,
    port: u16,
}

impl Nginx {
    async fn start(relays: [&Relay; 2]) -> Self {
        let (folder, port) = (Scratch::new(), ports::free());
        let path = |name: &str| folder.path().join(name).display().to_string();
        let authority = Authority::new();
        let own = authority.issue_server();
        for (name, pem) in [("ca.pem", authority.pem()), ("hooks.crt", own.certificate), ("hooks.key", own.private_key)]
        {
            std::fs::write(path(name), pem).unwrap();
        }
        let mut site = include_str!("../../deploy/nginx/prism-relay.conf").to_owned();
        for (theirs, ours) in [
            ("relay-1.internal:8080", relays[0].address().to_string()),
            ("relay-2.internal:8080", relays[1].address().to_string()),
            ("listen 443 ssl", format!("listen 127.0.0.1:{port} ssl")),
            ("hooks.example.com", "localhost".to_owned()),
            ("/etc/nginx/tls/hooks", path("hooks")),
        ] {
            assert!(site.contains(theirs), "{theirs} is not in the file");
            site = site.replace(theirs, &ours);
        }
        let places: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {};\n", path(kind)))
            .concat();
        let whole = format!(
            "daemon off; pid {}; error_log stderr notice; worker_processes 1;\n\
             events {{}}\nhttp {{\naccess_log off;\n{places}{site}}}\n",
            path("pid")
        );
        std::fs::write(path("nginx.conf"), whole).unwrap();
        let nginx = std::env::var("PRISM_TEST_NGINX").unwrap_or("nginx".to_owned());
        let mut command = leash::command(&nginx);
        // Its workers need no separate user here.
        command.args(["-p", &path(""), "-c", &path("nginx.conf"), "-g", "user root;"]);
        let nginx = Self { program: Program::start(command), folder, port };
        eventually("nginx (tests/run.sh brings it)", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .map_err(|error| format!("{error} {:?}", nginx.program.stderr()))
        })
        .await;
        nginx
    }

    /// Sends webhooks through nginx as Prism does, with retries.
    fn send(&self, setup: &Setup) -> Program {
        let url = format!("https://localhost:{}/webhooks/prism", self.port);
        let ca = self.folder.path().join("ca.pem").display().to_string();
        let count = COUNT.to_string();
        setup.launch(&["send", "--url", &url, "--ca", &ca, "--type", "scan.a", "--rate", "100", "--count", &count])
    }
}

/// One relay dies with a backlog, and a node of the cluster dies as well. A new process then gets the relay's volume.
#[tokio::test]
async fn a_relay_dies_with_a_backlog_and_its_volume_comes_back() {
    let cluster = Cluster::turn().await;
    let vhost = Vhost::new(cluster.node(0)).await;
    let urls: Vec<_> = [0, 1, 2].map(|index| vhost.url_for("guest", PASSWORD, cluster.node(index).address())).into();
    let setup = |urls| {
        // A port that no other relay gets while this one is dead.
        let setup = Setup::new("unused").set("http.listen", format!("127.0.0.1:{}", ports::free()));
        setup.set("broker.urls", json!(urls)).set("http.trusted_proxies", json!(["127.0.0.1"]))
    };
    let first = setup(urls.clone()).start().await;
    // The second relay reaches the cluster through a wire that can be stalled.
    let wire = Wire::new(cluster.node(0).address());
    let mut second = setup(vec![vhost.url_through(&wire)]).start().await;
    for relay in [&first, &second] {
        relay.eventually_connected().await;
    }
    let nginx = Nginx::start([&first, &second]).await;
    let mut sending = nginx.send(first.setup());

    wire.stall();
    eventually("a backlog", async || {
        let spool = second.spool().await;
        if spool.pending > 50 { Ok(()) } else { Err(format!("{spool:?}")) }
    })
    .await;
    cluster.node(1).kill().await;
    second.kill9().await;
    assert!(sending.exited().is_none(), "all webhooks were sent before the relay died");
    let sent = sending.wait().await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    assert!(sent.stdout.lines().any(|line| line.starts_with("given up") && line.ends_with(" 0")), "{}", sent.stdout);

    wire.flow();
    second.start_again().await;
    for relay in [&first, &second] {
        relay.eventually_nothing_pending().await;
    }
    // A node that missed a change of the leader reports 0 at first.
    let depth = eventually("all events in the queue", async || {
        let depth = vhost.depth("prism.scan").await as usize;
        if depth >= COUNT { Ok(depth) } else { Err(depth) }
    })
    .await;
    let messages = vhost.messages("prism.scan", depth).await;
    let subjects: BTreeSet<_> = messages.iter().map(|message| message.header("prism-subject")).collect();
    assert_eq!(subjects.len(), COUNT, "of {depth}");
    // Workers recognise an event that both relays accepted by its fingerprint.
    let fingerprints: BTreeSet<_> = messages.iter().map(|message| message.header("prism-fingerprint")).collect();
    assert_eq!(fingerprints.len(), COUNT);
    for relay in [&first, &second] {
        let verified = relay.run(&["spool", "verify"]).await;
        assert_eq!(verified.code, Some(0), "{verified:?}");
    }
    cluster.node(1).start_again().await;
}
