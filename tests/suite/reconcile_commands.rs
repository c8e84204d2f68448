//! Reconciling as operators see and order it: `reconcile`, `check`, the console's search, the answers, and the stop.

use std::process::{Command, Stdio};

use hyper::Method;
use serde_json::{Value, json};

use crate::harness::browser::Browser;
use crate::harness::marks::API_KEY;
use crate::harness::program::{Ended, Program};
use crate::harness::samples::{event, of_scan};
use crate::harness::{Client, Node, PrismApi, Relay, Setup, Trouble, Vhost, eventually};

const STARTED: &str = "scan.processing.started";
const SUCCEEDED: &str = "scan.processing.succeeded";

/// A relay that asks the API only for what an operator names.
fn asked_only(vhost: &Vhost, api: &PrismApi) -> Setup {
    api.asked_by(Setup::new(&vhost.url())).set("reconcile.after", "1h").set("reconcile.interval", "1h")
}

fn lines(ended: &Ended) -> Vec<&str> {
    ended.stdout.lines().collect()
}

/// `prism-relay reconcile` with these arguments.
async fn reconcile(relay: &Relay, arguments: &[&str]) -> Ended {
    relay.run(&[&["reconcile", "--url", relay.ops()], arguments].concat()).await
}

/// The subject that the relay knows by this id.
async fn subject(relay: &Relay, id: &str) -> Value {
    let found = relay.ops_get(&format!("/api/subject?find={id}")).await.expect(200).json();
    assert_eq!(found["on"], true);
    found["subjects"][0].clone()
}

#[tokio::test]
async fn an_operator_names_scans_and_predictions_and_the_relay_takes_in_what_is_missing() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = asked_only(&vhost, &api).start().await;
    api.scan("scan-a", "READY");
    api.scan("scan-b", "PROCESSING");
    api.prediction("prediction-1", "scan-a", "FAILED");
    let named = ["--scan", "scan-a", "--scan", "scan-b", "--scan", "nobodys", "--prediction", "prediction-1"];
    let dry = reconcile(&relay, &[&["--dry-run"], &named[..]].concat()).await;
    let last = "4 asked: 0 in step, 3 would be repaired, 1 unknown, 0 failed";
    assert_eq!((dry.code, lines(&dry)[4]), (Some(0), last), "{dry:?}");
    assert_eq!(lines(&dry)[0], "repaired  scan:scan-a: scan.processing.succeeded is missing");
    assert_eq!(relay.spool().await.accepted, 0, "a dry run changes nothing");

    let done = reconcile(&relay, &named).await;
    let predicted = "repaired  prediction:prediction-1: body_shape_prediction.processing.failed was missing, and is \
                     published";
    assert_eq!(
        (done.code, lines(&done)),
        (
            Some(0),
            vec![
                "repaired  scan:scan-a: scan.processing.succeeded was missing, and is published",
                "repaired  scan:scan-b: scan.processing.started was missing, and is published",
                "unknown   scan:nobodys: Prism's API does not know it",
                predicted,
                "4 asked: 0 in step, 3 repaired, 1 unknown, 0 failed",
            ]
        ),
        "{done:?}"
    );
    let scans = vhost.messages("prism.scan", 2).await;
    let types: Vec<_> =
        scans.iter().map(|message| (message.routing_key.as_str(), message.header("prism-source"))).collect();
    assert_eq!(types, [(SUCCEEDED, "api"), (STARTED, "api")]);
    assert_eq!(vhost.messages("prism.future_me", 1).await[0].header("prism-verified"), "true");

    // The second time nothing is missing, and nothing is published.
    let again = reconcile(&relay, &named).await;
    assert_eq!(lines(&again).last().unwrap(), &"4 asked: 3 in step, 0 repaired, 1 unknown, 0 failed", "{again:?}");
    assert_eq!(relay.spool().await.accepted, 3);
    assert_eq!(relay.metric("prism_relay_reconciled_total", &[("outcome", "repaired")]).await, 3.0);
    assert_eq!(relay.metric("prism_relay_reconciled_by_operator_total", &[]).await, 3.0);

    api.set_trouble(Trouble::Status(500));
    let failed = reconcile(&relay, &["--scan", "scan-a"]).await;
    let expected =
        ["failed    scan:scan-a: Prism's API answered 500", "1 asked: 0 in step, 0 repaired, 0 unknown, 1 failed"];
    assert_eq!((failed.code, lines(&failed)), (Some(1), expected.to_vec()));
}

#[tokio::test]
async fn a_list_of_an_operator_goes_on_after_the_pause_that_the_api_asks_for_and_can_be_interrupted_in_it() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = asked_only(&vhost, &api).start().await;
    let named = ["reconcile", "--url", relay.ops(), "--scan", "scan-a", "--scan", "scan-b"];
    api.scan("scan-a", "READY");
    api.scan("scan-b", "READY");
    api.set_trouble(Trouble::TooMany(1));
    let mut command = relay.setup().launch(&named);
    eventually_pauses(&command).await;
    api.set_trouble(Trouble::None);
    let done = command.wait().await;
    let last = "2 asked: 0 in step, 2 repaired, 0 unknown, 0 failed";
    assert_eq!((done.code, lines(&done).pop()), (Some(0), Some(last)), "{done:?}");

    api.set_trouble(Trouble::TooMany(600));
    let mut command = relay.setup().launch(&named);
    eventually_pauses(&command).await;
    command.signal("INT");
    let stopped = command.wait().await;
    let last = "0 asked: 0 in step, 0 repaired, 0 unknown, 0 failed; 2 not asked";
    assert_eq!((stopped.code, lines(&stopped).pop()), (Some(1), Some(last)), "{stopped:?}");
    assert!(stopped.stderr.contains("interrupted; run this again for the rest"), "{stopped:?}");
}

async fn eventually_pauses(command: &Program) {
    eventually("a pause", async || {
        let said = command.stderr().join("\n");
        if said.contains("Prism's API asks for a pause: going on in ") { Ok(()) } else { Err(said) }
    })
    .await;
}

/// The status of an order that proves nothing of its sender.
async fn order_without_credential(relay: &Relay) -> u16 {
    let url = format!("{}/api/reconcile?subject=scan:scan-a", relay.ops());
    Client::http1().send(Method::POST, &url, &[], "").await.expect("an answer").status
}

/// Runs the command with this text on standard input.
async fn with_input(relay: &Relay, input: &'static str) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism-relay"));
    command.arg("--config").arg(relay.folder().join("relay.toml")).args(["reconcile", "--url", relay.ops()]);
    command.current_dir(relay.folder());
    let run = move || {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut process.stdin.take().unwrap(), input.as_bytes()).unwrap();
        process.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[tokio::test]
async fn ids_come_on_standard_input_and_a_mistake_in_them_asks_for_nothing() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = asked_only(&vhost, &api).set("ops.token", "an-operators-token").start().await;
    api.scan("scan-a", "READY");
    api.scan("scan-b", "FAILED");
    let done = with_input(&relay, "# since Monday\nscan:scan-a\n\nscan-b\nprediction:nobodys\n").await;
    let last = "3 asked: 0 in step, 2 repaired, 1 unknown, 0 failed";
    assert_eq!((done.code, lines(&done).pop()), (Some(0), Some(last)), "{done:?}");
    let asked = api.requests();
    for (input, says) in [("scan-a\nuser:1\ntwo words\n", "in line 2, 3"), ("\n", "has no IDs")] {
        let wrong = with_input(&relay, input).await;
        assert!(wrong.code == Some(64) && wrong.stderr.contains(says), "{wrong:?}");
    }
    assert_eq!(api.requests(), asked);
    assert_eq!(order_without_credential(&relay).await, 401);
}

#[tokio::test]
async fn without_a_key_nothing_is_followed_and_the_command_says_what_to_set() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.post(of_scan("a", STARTED)).await.expect(200);
    let refused = reconcile(&relay, &["--scan", "scan-a"]).await;
    assert!(refused.code == Some(1) && refused.stderr.contains("reconcile.api_key is not set"), "{refused:?}");
    let found = relay.ops_get("/api/subject?find=scan-a").await.expect(200).json();
    assert_eq!(found, json!({ "on": false, "subjects": [] }));
    assert_eq!(relay.metric("prism_relay_subjects_open", &[]).await, 0.0);
    assert_eq!(relay.status().await["reconcile"], Value::Null);
    assert_eq!(order_without_credential(&relay).await, 403, "as a page of another site could");
    let none = relay.run(&["reconcile", "--scan", "scan-a", "--url", "http://127.0.0.1:1"]).await;
    assert!(none.code == Some(1) && none.stderr.contains("no answer from"), "{none:?}");
}

#[tokio::test]
async fn a_refused_key_is_in_the_headline_until_an_operators_question_is_answered() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let setup = api.asked_by(Setup::new(&vhost.url()));
    let relay = setup.start().await;
    api.set_key("a-key-of-another-account");
    api.scan("scan-a", "READY");
    relay.post(of_scan("a", STARTED)).await.expect(200);
    relay.eventually_metric("prism_relay_reconcile_stopped", &[], 1.0).await;
    let headline = relay.status().await["headline"].clone();
    assert_eq!((&headline["level"], &headline["answer"]), (&json!("warning"), &json!("lost")), "{headline}");
    assert_eq!(headline["text"], "Prism's API refuses the key.");
    let refused = reconcile(&relay, &["--scan", "scan-a"]).await;
    assert!(refused.code == Some(1) && refused.stdout.contains("refused   scan:scan-a: "), "{refused:?}");
    let checked = relay.run(&["check"]).await;
    assert!(
        checked.code == Some(1) && checked.stdout.contains("refuses reconcile.api_key: it answers 401"),
        "{checked:?}"
    );

    api.set_key(API_KEY);
    let asked = reconcile(&relay, &["--scan", "nobodys"]).await;
    assert_eq!(lines(&asked)[1], "1 asked: 0 in step, 0 repaired, 1 unknown, 0 failed");
    relay.eventually_metric("prism_relay_reconciled_total", &[("outcome", "repaired")], 1.0).await;
    relay.eventually_metric("prism_relay_reconcile_stopped", &[], 0.0).await;
    assert_ne!(relay.status().await["headline"]["answer"], "lost", "only the workers are missing");
    let checked = relay.run(&["check"]).await;
    assert!(checked.stdout.contains("takes reconcile.api_key"), "{checked:?}");
}

#[tokio::test]
async fn check_says_when_the_api_cannot_be_reached() {
    let setup =
        Setup::without_broker().set("reconcile.api_key", API_KEY).set("reconcile.api_url", "http://127.0.0.1:1");
    let checked = setup.run(&["check"]).await;
    assert!(checked.code == Some(1) && checked.stdout.contains("no answer from http://127.0.0.1:1: "), "{checked:?}");
    assert!(checked.stdout.contains("are published with prism-verified false"), "{checked:?}");
}

#[tokio::test]
async fn the_console_shows_the_steps_of_a_scan_with_their_sources_and_impossible_orders() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    // The number of events by the API is counted in each interval.
    let relay = asked_only(&vhost, &api).set("reconcile.interval", "1s").start().await;
    relay.post(of_scan("a", STARTED)).await.expect(200);
    let open = subject(&relay, "scan-a").await;
    assert_eq!((&open["open"], &open["order"], &open["tries"]), (&json!(true), &Value::Null, &json!(0)));
    api.scan("scan-a", "READY");
    reconcile(&relay, &["--scan", "scan-a"]).await;
    let ended = subject(&relay, "scan:scan-a").await;
    let steps: Vec<_> = ended["steps"].as_array().unwrap().iter().collect();
    let step = |step: &Value| (step["step"].clone(), step["source"].clone(), step["verified"].clone());
    assert_eq!(step(steps[0]), (json!("began"), json!("webhook"), json!(true)), "{ended}");
    assert_eq!(step(steps[1]), (json!("succeeded"), json!("api"), json!(true)), "{ended}");
    assert_eq!((&ended["open"], &ended["order"]), (&json!(false), &Value::Null));

    let failed = json!({ "bodyShapePredictionId": "prediction-p", "scanId": "scan-a", "state": "FAILED" });
    relay.post(event("body_shape_prediction.processing.failed", failed)).await.expect(200);
    let predicted = subject(&relay, "prediction-p").await;
    assert_eq!(predicted["order"], "it ended, and nothing said that it began", "{predicted}");

    let browser = Browser::start().await;
    browser.open(&format!("{}/", relay.ops())).await;
    browser.shows("#answer-list", "1 event in the last day came by Prism's API.").await;
    browser.shows("#events-rows", "by Prism's API").await;
    browser.write("#find", "scan-a").await;
    browser.shows("#subjects", "by a webhook").await;
    browser.shows("#subjects", "by Prism's API").await;
    // In an empty field: what is written is appended.
    browser.open(&format!("{}/", relay.ops())).await;
    browser.write("#find", "prediction-p").await;
    browser.shows("#subjects", "The order is impossible: it ended, and nothing said that it began.").await;
}

#[tokio::test]
async fn a_stop_does_not_wait_for_the_api_and_what_was_asked_is_asked_again() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let mut relay = api.asked_by(Setup::new(&vhost.url())).start().await;
    api.scan("scan-a", "READY");
    api.set_trouble(Trouble::Silence);
    relay.post(of_scan("a", STARTED)).await.expect(200);
    api.eventually_asked("/scans/scan-a", 1).await;
    relay.sigterm();
    let ended = relay.wait().await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("\"stopped\"") && !ended.stderr.contains("timed out"), "{}", ended.stderr);
    api.set_trouble(Trouble::None);
    relay.start_again().await;
    relay.eventually_metric("prism_relay_reconciled_total", &[("outcome", "repaired")], 1.0).await;
    vhost.eventually_depth("prism.scan", 2).await;
}
