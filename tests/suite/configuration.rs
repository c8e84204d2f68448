//! Where the configuration comes from, what it says about itself, and what is logged about slips in it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use hyper::Method;
use serde_json::json;

use crate::harness::http::Raw;
use crate::harness::samples::scan;
use crate::harness::{Client, Node, SECRET, Setup, Vhost};

const TOKEN: &str = "a-token-that-is-long-enough";

/// Runs the relay without `--config`, and with only these variables.
fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let folder = tempfile::TempDir::new().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism-relay"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).current_dir(folder.path());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn the_file_comes_from_the_argument_or_the_variable_and_errors_name_it() {
    let setup = Setup::without_broker();
    let file = setup.file("named.toml", setup.toml());
    let file = file.to_str().unwrap();
    let named = run(&["check", "--offline"], &[("PRISM_RELAY_CONFIG", file)]);
    assert_eq!(named.status.code(), Some(0), "{named:?}");
    for (arguments, variables) in [
        (["tail", "--count", "1"].as_slice(), [("PRISM_RELAY_CONFIG", file)].as_slice()),
        (&["--config", file, "tail"], &[("PRISM_RELAY_CONFIG", "/nowhere.toml")]),
    ] {
        let failed = run(arguments, variables);
        let error = text(&failed.stderr);
        assert!(failed.status.code() == Some(1) && error.contains(&format!("(configuration file: {file})")), "{error}");
    }
    let missing = run(&["serve"], &[("PRISM_RELAY_CONFIG", "/nowhere.toml")]);
    let error = text(&missing.stderr);
    assert!(missing.status.code() == Some(64) && error.contains("cannot read /nowhere.toml: No such file"), "{error}");
    // Without a file, unless this machine has the usual one.
    if !Path::new("/etc/prism-relay/relay.toml").exists() {
        for name in ["PRISM_RELAY_CONFIG", "UNRELATED"] {
            let none = run(&["spool", "list"], &[(name, "")]);
            let error = text(&none.stderr);
            assert!(error.contains("(no configuration file, only defaults and environment)"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_starter_is_checked_and_the_configuration_is_shown_without_secrets() {
    let setup = Setup::without_broker();
    let unsigned = setup.run(&["init", "--unsigned"]).await;
    let file = setup.file("starter.toml", &unsigned.stdout);
    let checked = run(&["--config", file.to_str().unwrap(), "check", "--offline"], &[]);
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    let file = setup.file("starter.toml", setup.run(&["init"]).await.stdout);
    let checked = run(&["--config", file.to_str().unwrap(), "check", "--offline"], &[]);
    let error = text(&checked.stderr);
    assert!(checked.status.code() == Some(64) && error.contains("has a mistake"), "{error}");
    assert!(error.contains("signature.secrets: is empty"), "{error}");

    let defaults = setup.run(&["config", "show", "--defaults"]).await;
    assert_eq!(defaults.stdout, include_str!("../../config/default.toml").trim_end());
    let setup = Setup::new("amqp://me:hunter2@rabbit:5672/%2fprod").env("PRISM_RELAY__HTTP__PATH", "/hook");
    let shown = setup.set("ops.token", TOKEN).run(&["config", "show"]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let file = shown.stdout.lines().next().unwrap().strip_prefix("# configuration file: ").unwrap();
    for (line, origin) in [
        (r#"path = "/hook""#, "the environment"),
        (r#"secrets = ["***"]"#, file),
        (r#"token = "***""#, file),
        (r#"urls = ["amqp://me:***@rabbit:5672/%2fprod"]"#, file),
        (r#"tolerance = "5m""#, "default"),
        ("sample_ratio = 1.0", "default"),
    ] {
        let expected = format!("{line:<60} # {origin}");
        assert!(shown.stdout.lines().any(|line| line == expected), "{expected:?} is not in\n{}", shown.stdout);
    }
    for secret in [SECRET, TOKEN, "hunter2"] {
        assert!(!shown.stdout.contains(secret), "{}", shown.stdout);
    }
    // What is shown is a configuration.
    let again = setup_of(&shown.stdout.replace("***", SECRET));
    assert_eq!(again.status.code(), Some(0), "{again:?}");
}

/// Runs the check of a configuration.
fn setup_of(toml: &str) -> Output {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("relay.toml");
    std::fs::write(&file, toml).unwrap();
    run(&["--config", file.to_str().unwrap(), "check", "--offline"], &[])
}

#[tokio::test]
async fn an_unreadable_secret_file_is_one_mistake_that_names_the_user() {
    let setup = Setup::without_broker().unset("signature.secrets");
    let file = setup.file("secrets", "whsec_0123456789\n");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
    std::fs::set_permissions(setup.folder(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let setup = setup.set("signature.secrets_file", file.to_str().unwrap());
    let toml = setup.file("relay.toml", setup.toml());
    std::fs::set_permissions(&toml, std::fs::Permissions::from_mode(0o644)).unwrap();
    // Root may read any file, so the check runs as nobody.
    let is_root = text(&Command::new("id").arg("-u").output().unwrap().stdout).trim() == "0";
    let mut command = Command::new(if is_root { "setpriv" } else { env!("CARGO_BIN_EXE_prism-relay") });
    if is_root {
        let binary = setup.folder().join("prism-relay");
        std::fs::copy(env!("CARGO_BIN_EXE_prism-relay"), &binary).unwrap();
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(binary);
    }
    let checked = command.arg("--config").arg(&toml).args(["check", "--offline"]).output().unwrap();
    let error = text(&checked.stderr);
    assert!(checked.status.code() == Some(64) && error.contains("has a mistake"), "{error}");
    let user = if is_root { "65534" } else { "" };
    assert!(error.contains(&format!("cannot be read by user id {user}")) && !error.contains("is empty"), "{error}");
}

#[tokio::test]
async fn slips_in_a_valid_configuration_are_logged_at_the_start() {
    let queues = json!([{ "name": "q", "bindings": ["scan.*"] }]);
    let setup = Setup::without_broker().set("topology.queues", queues).env("PRISM_RELAY_HTTP_LISTEN", "0.0.0.0:1");
    let relay = setup.start().await;
    let line = relay.eventually_logs("did you mean scan.#?").await;
    assert_eq!((&line["level"], &line["key"]), (&json!("WARN"), &json!("topology.queues[0].bindings")), "{line}");
    let line = relay.eventually_logs("write PRISM_RELAY__HTTP__LISTEN").await;
    assert_eq!(line["key"], "PRISM_RELAY_HTTP_LISTEN", "{line}");
    let tail = relay.run(&["tail", "scan.*"]).await;
    assert!(tail.stderr.contains("note: the pattern \"scan.*\" matches none of Prism's event types"), "{tail:?}");
    let redrive = relay.run(&["redrive", "--type", "#.a.#.b.#"]).await;
    assert!(redrive.code == Some(64) && redrive.stderr.contains("has 3 words `#`; 2 are allowed"), "{redrive:?}");
}

#[tokio::test]
async fn the_filter_of_the_log_is_changed_at_run_time_and_sighup_takes_it_back() {
    let mut relay = Setup::without_broker().set("log.filter", "info").set("ops.token", TOKEN).start().await;
    let bearer = format!("Bearer {TOKEN}");
    let url = format!("{}/api/log-filter", relay.ops());
    let put = async |headers: &[(&str, &str)], body: &str| {
        Client::http1().send(Method::PUT, &url, headers, body.to_owned()).await.unwrap()
    };
    let operator = [("authorization", bearer.as_str())];
    put(&[], "debug").await.expect(401);
    let wrong = put(&operator, "warning").await.expect(400);
    assert!(wrong.text().contains("did you mean warn?"), "{wrong}");
    for (body, expected) in [
        ("warn", "warn"),
        ("\"error,lapin=off\"", "error,lapin=off"),
        ("{\"filter\": \"info,prism_relay=debug\"}\n", "info,prism_relay=debug"),
    ] {
        assert_eq!(put(&operator, body).await.expect(200).json(), json!({ "filter": expected }));
        let status = Client::http1().send(Method::GET, &format!("{}/api/status", relay.ops()), &operator, "").await;
        assert_eq!(status.unwrap().json()["log_filter"], expected);
    }
    let changed = relay.eventually_logs("log filter changed by an operator").await;
    assert_eq!(changed["previous"], "info", "{changed}");
    relay.post(scan(1)).await.expect(200);
    relay.eventually_logs("\"message\":\"accepted\"").await;
    relay.signal("HUP");
    let back = relay.eventually_logs("log filter reset to log.filter").await;
    assert_eq!((&back["previous"], &back["filter"]), (&json!("info,prism_relay=debug"), &json!("info")), "{back}");
    let before = relay.log_text().matches("\"message\":\"accepted\"").count();
    relay.post(scan(2)).await.expect(200);
    assert_eq!(relay.log_text().matches("\"message\":\"accepted\"").count(), before);
}

#[tokio::test]
async fn a_proxy_with_the_wrong_protocol_is_named_and_probes_are_logged_once() {
    const REFUSED: &str = "prism_relay_connections_refused_total";
    let relay = Setup::without_broker().set("log.filter", "info").start().await;
    let post = "POST /webhooks/prism HTTP/1.1\r\nhost: r\r\ncontent-length: 0\r\n\r\n";
    for header in [b"PROXY TCP4 203.0.113.9 192.0.2.1 40000 80\r\n".as_slice(), b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"] {
        Raw::exchange(relay.address(), [header, post.as_bytes()].concat()).await;
    }
    let hello = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 and the rest of it\r\n\r\n";
    Raw::exchange(relay.address(), hello).await;
    for (reason, count, words) in [
        ("proxy-protocol", 2.0, "a proxy in front sends the PROXY protocol"),
        ("tls-on-plain-port", 1.0, "a client speaks TLS, but this listener has none"),
    ] {
        relay.eventually_metric(REFUSED, &[("listener", "http"), ("reason", reason)], count).await;
        let line = relay.eventually_logs(words).await;
        assert_eq!((&line["level"], &line["reason"]), (&json!("WARN"), &json!(reason)), "{line}");
    }
    let (client, root) = (Client::http1(), relay.url().strip_suffix("/webhooks/prism").unwrap());
    for _ in 0..3 {
        client.get(&format!("{root}/")).await.unwrap().expect(404);
        client.send(Method::OPTIONS, relay.url(), &[], "").await.unwrap().expect(405);
    }
    client.send(Method::POST, &format!("{root}/"), &[], "").await.unwrap().expect(404);
    relay.eventually_logs("\"webhook refused").await;
    let logs = relay.logs();
    let count = |text: &str| logs.iter().filter(|line| line["message"].as_str().unwrap().contains(text)).count();
    assert_eq!((count("such probes are only counted"), count("webhook refused")), (1, 1), "{}", relay.log_text());
}

#[tokio::test]
async fn a_byte_order_mark_is_read_over_and_kept() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).set("signature.required", false).start().await;
    let body = |number| format!("\u{feff}{}", scan(number));
    relay.post(body(1)).await.expect(200);
    relay.post_with(&[], body(2)).await.expect(200);
    let mut bodies: Vec<_> = vhost.messages("prism.scan", 2).await.iter().map(|message| message.text()).collect();
    bodies.sort();
    assert_eq!(bodies, [body(1), body(2)]);
}
