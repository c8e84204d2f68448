//! Reconciling: what Prism gave up on comes by its API, once, in order and marked; and the API's trouble costs nothing.

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::harness::http::{now, sign};
use crate::harness::marks::{API_KEY, HEALTH, USER_TOKEN};
use crate::harness::program::Program;
use crate::harness::samples::{event, of_scan};
use crate::harness::{Delivery, Node, PrismApi, Relay, SECRET, Setup, Trouble, Vhost, Wire, eventually, ports};

const STARTED: &str = "scan.processing.started";
const SUCCEEDED: &str = "scan.processing.succeeded";
const PREDICTED: &str = "body_shape_prediction.processing.succeeded";

/// A secret that Prism does not sign with.
const WRONG_SECRET: &str = "whsec_wrong_0123456789";

/// Prism tries four times.
const TRIES: usize = 4;

async fn relay_for(vhost: &Vhost, api: &PrismApi) -> Relay {
    api.asked_by(Setup::new(&vhost.url())).start().await
}

fn started(scan: &str) -> String {
    of_scan(scan, STARTED)
}

fn succeeded(scan: &str) -> String {
    of_scan(scan, SUCCEEDED)
}

/// The path at which the API has the scan of [`of_scan`].
fn path(scan: &str) -> String {
    format!("/scans/scan-{scan}")
}

/// Prism posts a webhook until it gives up, while nothing listens.
async fn give_up(relay: &Relay, body: &str) {
    for _ in 0..TRIES {
        let tried = relay.try_post(body).await;
        assert!(tried.is_err(), "{tried:?}");
    }
}

/// Checks the next messages of `prism.scan`: the type and the source of each.
async fn expect(vhost: &Vhost, expected: &[(&str, &str)]) -> Vec<Delivery> {
    let messages = vhost.messages("prism.scan", expected.len()).await;
    let came: Vec<_> =
        messages.iter().map(|message| (message.routing_key.as_str(), message.header("prism-source"))).collect();
    assert_eq!(came, expected);
    messages
}

/// Checks that nothing else is published: a further event is the only message.
async fn expect_nothing_else(relay: &Relay, vhost: &Vhost) {
    let fence = relay.post(of_scan("fence", "scan.fence")).await.id();
    relay.eventually_nothing_pending().await;
    let messages = vhost.messages("prism.scan", 1).await;
    assert_eq!(messages[0].id(), fence, "{messages:?}");
    vhost.assert_empty("prism.scan").await;
}

async fn eventually_reconciled(relay: &Relay, outcome: &str, count: f64) {
    relay.eventually_metric("prism_relay_reconciled_total", &[("outcome", outcome)], count).await;
}

fn duplicate_of(answer: &Value) -> &str {
    assert_eq!(answer["duplicate"], true, "{answer}");
    answer["id"].as_str().expect("an id")
}

// -- what is repaired -------------------------------------------------------------------------------------------------

#[tokio::test]
async fn an_end_that_prism_gave_up_on_comes_by_the_api_and_is_marked() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let mut relay = relay_for(&vhost, &api).await;
    relay.post(started("a")).await.expect(200);
    expect(&vhost, &[(STARTED, "webhook")]).await;
    relay.kill9().await;
    give_up(&relay, &succeeded("a")).await;
    api.scan("scan-a", "READY");
    relay.start_again().await;

    let messages = expect(&vhost, &[(SUCCEEDED, "api")]).await;
    let payload = json!({ "scanId": "scan-a", "userId": "user-of-prism", "userToken": USER_TOKEN, "state": "READY" });
    assert_eq!(messages[0].json(), json!({ "eventType": SUCCEEDED, "payload": payload }));
    for (header, value) in [
        ("prism-verified", "true"),
        ("prism-subject", "scan:scan-a"),
        ("prism-scan-id", "scan-a"),
        ("prism-state", "READY"),
    ] {
        assert_eq!(messages[0].header(header), value);
    }
    eventually_reconciled(&relay, "repaired", 1.0).await;
    relay.eventually_metric("prism_relay_subjects_open", &[], 0.0).await;
    let webhooks = relay.metric("prism_relay_webhooks_total", &[("outcome", "accepted")]).await;
    assert_eq!(webhooks, 0.0, "no webhook came since the start");
    let spool = relay.spool().await;
    assert_eq!((spool.accepted, spool.confirmed), (2, 2), "the ledger counts it as accepted: {spool:?}");
    expect_nothing_else(&relay, &vhost).await;
}

#[tokio::test]
async fn a_failed_scan_and_a_prediction_are_repaired_and_the_api_is_asked_one_request_at_a_time() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = relay_for(&vhost, &api).await;
    let prediction = json!({ "bodyShapePredictionId": "prediction-1", "scanId": "scan-of-it", "state": "PROCESSING" });
    relay.post(event("body_shape_prediction.processing.started", prediction)).await.expect(200);
    api.scan("scan-of-it", "READY");
    api.prediction("prediction-1", "scan-of-it", "READY");
    for scan in ["a", "b", "c"] {
        api.scan(&format!("scan-{scan}"), "FAILED");
        relay.post(started(scan)).await.expect(200);
    }
    let future_me = vhost.messages("prism.future_me", 2).await;
    let payload = json!({ "bodyShapePredictionId": "prediction-1", "scanId": "scan-of-it",
                          "userId": "user-of-prism", "userToken": USER_TOKEN, "state": "READY" });
    assert_eq!(future_me[1].json(), json!({ "eventType": PREDICTED, "payload": payload }));
    assert_eq!(future_me[1].header("prism-source"), "api");
    assert_eq!(future_me[1].header("prism-subject"), "prediction:prediction-1");
    let scans = vhost.messages("prism.scan", 6).await;
    let failed: Vec<_> = scans.iter().filter(|message| message.routing_key == "scan.processing.failed").collect();
    assert!(failed.len() == 3 && failed.iter().all(|message| message.header("prism-source") == "api"), "{scans:?}");
    eventually_reconciled(&relay, "repaired", 4.0).await;
    assert_eq!(api.most_at_a_time(), 1);
}

/// Also the way of `send`, which keeps Prism's schedule and knows what it gave up on.
#[tokio::test]
async fn send_serves_what_it_gave_up_on_and_the_relay_gets_it_there() {
    let vhost = Vhost::new(Node::shared().await).await;
    let url = format!("http://127.0.0.1:{}", ports::free());
    let setup = Setup::new(&vhost.url()).set("http.listen", format!("127.0.0.1:{}", ports::free()));
    let setup = setup.set("reconcile.api_url", url.as_str()).set("reconcile.api_key", API_KEY);
    let mut relay = setup.set("reconcile.after", "1s").set("reconcile.interval", "1s").start().await;
    let sent = relay.run(&["send", "--type", STARTED, "--scan", "demo"]).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    relay.kill9().await;
    let mut prism = relay.setup().launch(&["send", "--type", SUCCEEDED, "--scan", "demo", "--no-retry", "--serve-api"]);
    let serves = format!("serving 1 scans and 0 predictions at {url} until Ctrl-C");
    eventually_prints(&prism, &serves).await;
    relay.start_again().await;
    let messages = expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "api")]).await;
    assert_eq!(messages[1].header("prism-verified"), "false", "the answer came without TLS");
    assert_eq!(messages[1].json()["payload"]["scanId"], "demo");
    prism.signal("INT");
    let ended = prism.wait().await;
    assert_eq!(ended.code, Some(1), "an event was given up: {ended:?}");
    for line in ["given up                             1", "accepted                             0"] {
        assert!(ended.stdout.contains(line), "{line:?} is missing in {}", ended.stdout);
    }
}

async fn eventually_prints(program: &Program, text: &str) {
    eventually(&format!("the line {text:?}"), async || {
        let printed = program.stdout().join("\n");
        if printed.contains(text) { Ok(()) } else { Err(format!("{printed}\n{}", program.stderr().join("\n"))) }
    })
    .await;
}

#[tokio::test]
async fn send_serves_no_api_that_the_relay_does_not_ask() {
    let setup = Setup::without_broker();
    let serve = ["send", "--serve-api", "--count", "1", "--url", "http://127.0.0.1:1/"];
    let asks = setup.run(&serve).await;
    assert!(asks.code == Some(64) && asks.stderr.contains("reconcile.api_key"), "{asks:?}");
    let setup = setup.set("reconcile.api_key", API_KEY);
    for url in ["https://api.prism.example", "https://127.0.0.1:9191"] {
        let setup = Setup::without_broker().set("reconcile.api_key", API_KEY).set("reconcile.api_url", url);
        let elsewhere = setup.run(&serve).await;
        assert!(elsewhere.code == Some(64) && elsewhere.stderr.contains("reconcile.api_url"), "{elsewhere:?}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", taken.local_addr().unwrap());
    let busy = setup.set("reconcile.api_url", url).run(&serve).await;
    assert!(busy.code == Some(1) && busy.stderr.contains("cannot listen on"), "{busy:?}");
}

// -- nothing twice ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_webhook_that_comes_after_the_api_told_is_a_duplicate_also_across_a_kill() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let mut wire = Wire::new(vhost.address());
    let mut relay = api.asked_by(Setup::new(&vhost.url_through(&wire))).start().await;
    relay.post(started("a")).await.expect(200);
    expect(&vhost, &[(STARTED, "webhook")]).await;
    relay.eventually_nothing_pending().await;

    // The event is made while the broker is away, so the kill hits it between the disk and the broker.
    wire.refuse().await;
    wire.cut();
    api.scan("scan-a", "READY");
    eventually_reconciled(&relay, "repaired", 1.0).await;
    assert_eq!(relay.spool().await.pending, 1);
    relay.kill9().await;
    relay.start_again().await;
    let late = relay.post(succeeded("a")).await.expect(200).json();
    let id = duplicate_of(&late).to_owned();
    relay.kill9().await;
    relay.start_again().await;
    let again = relay.post(succeeded("a")).await.expect(200).json();
    assert_eq!(duplicate_of(&again), id, "Prism sends that webhook again");
    wire.accept();
    let made = expect(&vhost, &[(SUCCEEDED, "api")]).await;
    assert_eq!(made[0].id(), id);
    expect_nothing_else(&relay, &vhost).await;
}

#[tokio::test]
async fn what_a_webhook_told_while_the_api_was_asked_is_not_published_again_also_across_a_kill() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let mut relay = relay_for(&vhost, &api).await;
    api.scan("scan-a", "READY");
    api.set_trouble(Trouble::Silence);
    relay.post(started("a")).await.expect(200);
    api.eventually_asked(&path("a"), 1).await;
    relay.post(succeeded("a")).await.expect(200);
    api.set_trouble(Trouble::None);
    eventually_reconciled(&relay, "late", 1.0).await;
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "webhook")]).await;

    // The same with a kill in place of the answer.
    api.scan("scan-b", "READY");
    api.set_trouble(Trouble::Silence);
    relay.post(started("b")).await.expect(200);
    api.eventually_asked(&path("b"), 1).await;
    relay.post(succeeded("b")).await.expect(200);
    // Else the kill would make the broker get both again.
    relay.eventually_nothing_pending().await;
    relay.kill9().await;
    api.set_trouble(Trouble::None);
    relay.start_again().await;
    relay.eventually_metric("prism_relay_subjects_open", &[], 0.0).await;
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "webhook")]).await;
    expect_nothing_else(&relay, &vhost).await;
    assert_eq!(api.asked(&path("b")), 1, "a subject that ended is not asked for");
}

#[tokio::test]
async fn a_second_run_of_a_scan_is_published_also_after_the_api_told_the_end_of_the_first_one() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let mut relay = relay_for(&vhost, &api).await;
    api.scan("scan-a", "READY");
    relay.post(started("a")).await.expect(200);
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "api")]).await;
    // Another body: the one of the first run is a re-send within the window.
    api.scan("scan-a", "PROCESSING");
    let run = |kind, number| event(kind, json!({ "scanId": "scan-a", "state": "PROCESSING", "run": number }));
    relay.post(run(STARTED, 2)).await.expect(200);
    relay.post(run(SUCCEEDED, 2)).await.expect(200);
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "webhook")]).await;
    // The end of the third run is lost.
    relay.post(run(STARTED, 3)).await.expect(200);
    api.scan("scan-a", "READY");
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "api")]).await;
    let late = relay.post(run(SUCCEEDED, 3)).await.expect(200).json();
    duplicate_of(&late);
    relay.kill9().await;
    relay.start_again().await;
    expect_nothing_else(&relay, &vhost).await;
}

// -- hints ------------------------------------------------------------------------------------------------------------

/// The answer to a webhook that is signed with another secret.
async fn post_with_wrong_secret(relay: &Relay, body: &str) -> u16 {
    let timestamp = now();
    let signature = sign(WRONG_SECRET, &timestamp, body.as_bytes());
    relay.post_with(&[("prism-timestamp", &timestamp), ("prism-signature", &signature)], body).await.status
}

#[tokio::test]
async fn a_strangers_hint_brings_no_old_end_back() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = relay_for(&vhost, &api).await;
    api.old_scan("scan-old", "READY", SignedDuration::from_hours(1));
    api.scan("scan-undated", "READY");
    api.change(&path("undated"), "updatedAt", json!("yesterday"));
    for scan in ["old", "undated", "unheard-of"] {
        assert_eq!(post_with_wrong_secret(&relay, &succeeded(scan)).await, 401);
        api.eventually_asked(&path(scan), 1).await;
    }
    // A fourth hint is asked for after the others were settled.
    api.scan("scan-new", "READY");
    assert_eq!(post_with_wrong_secret(&relay, &succeeded("new")).await, 401);
    expect(&vhost, &[(SUCCEEDED, "api")]).await;
    eventually_reconciled(&relay, "repaired", 1.0).await;
    expect_nothing_else(&relay, &vhost).await;
    for scan in ["old", "undated", "unheard-of", "new"] {
        assert_eq!(api.asked(&path(scan)), 1, "{scan}: a hint is asked for once");
    }
}

#[tokio::test]
async fn a_hint_that_the_key_may_not_see_stops_nothing_else() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = relay_for(&vhost, &api).await;
    api.refuse(&path("foreign"), 403);
    assert_eq!(post_with_wrong_secret(&relay, &succeeded("foreign")).await, 401);
    api.eventually_asked(&path("foreign"), 1).await;
    api.scan("scan-a", "READY");
    relay.post(started("a")).await.expect(200);
    expect(&vhost, &[(STARTED, "webhook"), (SUCCEEDED, "api")]).await;
    assert_eq!(api.asked(&path("foreign")), 1);
}

#[tokio::test]
async fn what_a_wrong_secret_at_go_live_refuses_comes_by_the_api() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let setup = api.asked_by(Setup::new(&vhost.url())).unset("signature.secrets");
    let secrets = setup.file("secrets", format!("{WRONG_SECRET}\n"));
    let mut relay = setup.set("signature.secrets_file", secrets.to_str().unwrap()).start().await;
    // Prism gives up on the beginning of one scan and the end of another one.
    api.scan("scan-a", "PROCESSING");
    api.scan("scan-b", "READY");
    for _ in 0..TRIES {
        relay.post(started("a")).await.expect(401);
        relay.post(succeeded("b")).await.expect(401);
    }
    let messages = vhost.messages("prism.scan", 2).await;
    let mut came: Vec<_> =
        messages.iter().map(|message| (message.routing_key.as_str(), message.header("prism-source"))).collect();
    came.sort_unstable();
    assert_eq!(came, [(STARTED, "api"), (SUCCEEDED, "api")]);

    relay.setup().file("secrets", format!("{SECRET}\n"));
    relay.signal("HUP");
    relay.eventually_metric("prism_relay_reloads_total", &[("outcome", "done")], 1.0).await;
    // The last tries of Prism come after the correction, and one of them is the first that the relay hears of its scan.
    duplicate_of(&relay.post(started("a")).await.expect(200).json());
    duplicate_of(&relay.post(succeeded("b")).await.expect(200).json());
    api.scan("scan-a", "FAILED");
    expect(&vhost, &[("scan.processing.failed", "api")]).await;
    eventually_reconciled(&relay, "repaired", 3.0).await;
    expect_nothing_else(&relay, &vhost).await;
}

// -- the API's trouble ------------------------------------------------------------------------------------------------

#[tokio::test]
async fn answers_that_cannot_be_used_publish_nothing_and_the_next_good_one_repairs() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = relay_for(&vhost, &api).await;
    let troubles = [
        ("a", Trouble::Status(500)),
        ("b", Trouble::TooMany(1)),
        ("c", Trouble::Garbage),
        ("d", Trouble::Huge),
        ("e", Trouble::AnotherId),
        // Until the relay's own deadline.
        ("f", Trouble::Silence),
    ];
    for (number, (scan, trouble)) in (1..).zip(troubles) {
        api.scan(&format!("scan-{scan}"), "READY");
        api.set_trouble(trouble);
        let failed = relay.metric("prism_relay_reconciled_total", &[("outcome", "failed")]).await;
        relay.post(started(scan)).await.expect(200);
        eventually(&format!("{trouble:?} to be counted"), async || {
            let now = relay.metric("prism_relay_reconciled_total", &[("outcome", "failed")]).await;
            if now > failed { Ok(()) } else { Err(now) }
        })
        .await;
        expect(&vhost, &[(STARTED, "webhook")]).await;
        api.set_trouble(Trouble::None);
        expect(&vhost, &[(SUCCEEDED, "api")]).await;
        eventually_reconciled(&relay, "repaired", f64::from(number)).await;
    }
    expect_nothing_else(&relay, &vhost).await;
}

#[tokio::test]
async fn states_without_an_end_publish_nothing_and_a_scan_that_prism_does_not_know_is_closed() {
    let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
    let relay = relay_for(&vhost, &api).await;
    for (scan, status) in [("a", "PROCESSING"), ("b", "CREATED"), ("c", "ARCHIVED_SINCE_2027")] {
        api.scan(&format!("scan-{scan}"), status);
        relay.post(started(scan)).await.expect(200);
        api.eventually_asked(&path(scan), 2).await;
    }
    relay.post(started("unknown")).await.expect(200);
    eventually_reconciled(&relay, "unknown", 1.0).await;
    relay.eventually_metric("prism_relay_subjects_open", &[], 3.0).await;
    assert_eq!(vhost.messages("prism.scan", 4).await.len(), 4);
    expect_nothing_else(&relay, &vhost).await;
}

#[tokio::test]
async fn a_key_that_is_refused_is_reported_once_and_asked_with_no_more_until_it_changes() {
    for refused in [401, 403] {
        let (vhost, api) = (Vhost::new(Node::shared().await).await, PrismApi::start());
        let setup = api.asked_by(Setup::new(&vhost.url())).unset("reconcile.api_key");
        let key = setup.file("api-key", "an-old-key-of-prism\n");
        let mut relay = setup.set("reconcile.api_key_file", key.to_str().unwrap()).start().await;
        if refused == 403 {
            api.set_key("an-old-key-of-prism");
            api.refuse(&path("a"), 403);
        }
        api.scan("scan-a", "READY");
        relay.post(started("a")).await.expect(200);
        api.eventually_answered(refused).await;
        for scan in ["b", "c"] {
            api.scan(&format!("scan-{scan}"), "READY");
            relay.post(started(scan)).await.expect(200);
        }
        relay.eventually_metric("prism_relay_subjects_overdue", &[], 3.0).await;
        assert_eq!(api.requests(), 1, "{refused}");
        let said = relay.logs().into_iter().filter(|line| line["level"] == "WARN" || line["level"] == "ERROR");
        let said: Vec<_> = said.filter(|line| line.to_string().contains("reconcile.api_key")).collect();
        assert_eq!(said.len(), 1, "{said:?}");

        api.set_key(API_KEY);
        api.allow(&path("a"));
        relay.setup().file("api-key", format!("{API_KEY}\n"));
        relay.signal("HUP");
        eventually_reconciled(&relay, "repaired", 3.0).await;
        assert_eq!(vhost.messages("prism.scan", 6).await.len(), 6);
    }
}

#[tokio::test]
async fn scans_that_have_not_ended_and_are_too_many_are_counted_and_reported() {
    let api = PrismApi::start();
    let setup = api.asked_by(Setup::without_broker()).set("reconcile.after", "1h").set("reconcile.subjects_max", 1000);
    let relay = setup.start().await;
    for number in 0..1010 {
        relay.post(started(&number.to_string())).await.expect(200);
    }
    relay.eventually_metric("prism_relay_subjects_evicted_total", &[], 10.0).await;
    relay.eventually_metric("prism_relay_subjects_open", &[], 1000.0).await;
    let line = relay.eventually_logs("forgot scans and predictions that have not ended").await;
    assert_eq!((&line["level"], &line["evicted"]), (&json!("WARN"), &json!(1)));
    let lines = relay.logs().into_iter().filter(|line| line["evicted"].is_number()).count();
    assert_eq!(lines, 1, "at most one a minute");
}

// -- discretion -------------------------------------------------------------------------------------------------------

/// The harness searches log, status, metrics and all output for the key, the user's token and the health values.
#[tokio::test]
async fn the_spool_keeps_of_the_apis_answers_only_the_body_of_the_event() {
    let api = PrismApi::start();
    let setup = api.asked_by(Setup::without_broker()).set("log.filter", "trace,lapin=trace,hyper=trace");
    let mut relay = setup.start().await;
    api.scan("scan-a", "READY");
    relay.post(started("a")).await.expect(200);
    post_with_wrong_secret(&relay, &succeeded("hint")).await;
    eventually_reconciled(&relay, "repaired", 1.0).await;
    let ops = relay.ops().to_owned();
    let reconcile = ["reconcile", "--scan", "scan-a", "--url", ops.as_str()];
    for trouble in [Trouble::Garbage, Trouble::Status(500), Trouble::AnotherId] {
        api.set_trouble(trouble);
        let before = api.requests();
        relay.run(&reconcile).await;
        assert!(api.requests() > before, "{trouble:?}");
    }
    api.set_trouble(Trouble::None);
    for command in [&reconcile[..], &["check"], &["config", "show"], &["spool", "list"]] {
        relay.run(command).await;
    }
    relay.status().await;
    relay.metrics().await;
    for page in ["/", "/api/events?subject=scan:scan-a"] {
        relay.ops_get(page).await;
    }
    relay.kill9().await;
    for name in ["spool.db", "spool.db-wal"] {
        let file = std::fs::read(relay.folder().join(name)).unwrap();
        for mark in [API_KEY, &json!(HEALTH).to_string()] {
            assert!(!file.windows(mark.len()).any(|window| window == mark.as_bytes()), "{mark} in {name}");
        }
    }
    let mut bodies = 0;
    for (place, text) in texts(&relay.setup().spool()) {
        let is_body = place == "event.body";
        bodies += usize::from(is_body);
        for mark in [USER_TOKEN, "user-of-prism"] {
            assert!(is_body || !text.contains(mark), "{mark} in {place}");
        }
    }
    assert_eq!(bodies, 2, "the webhook and the event of the API");
}

/// Every value in a file of the spool, with its table and column.
fn texts(path: &std::path::Path) -> Vec<(String, String)> {
    let file = rusqlite::Connection::open(path).unwrap();
    let mut tables = file.prepare("SELECT name FROM sqlite_master WHERE type = 'table'").unwrap();
    let tables: Vec<String> = tables.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let mut texts = Vec::new();
    for table in tables {
        let mut select = file.prepare(&format!("SELECT * FROM \"{table}\"")).unwrap();
        let columns: Vec<_> = select.column_names().map(|name| format!("{table}.{name}")).collect();
        let mut rows = select.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            for (index, column) in columns.iter().enumerate() {
                let bytes = row.get_ref(index).unwrap().as_bytes_or_null().unwrap_or_default().unwrap_or_default();
                texts.push((column.clone(), String::from_utf8_lossy(bytes).into_owned()));
            }
        }
    }
    assert!(texts.iter().any(|(place, _)| place == "subject.id"), "the table of subjects is there");
    texts
}
