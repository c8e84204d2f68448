//! The wall clock jumps an hour, forward and back, while the relay runs: order, ids, ages and deadlines stay right.
//!
//! libfaketime (Debian: package `faketime`) makes the jump, between the relay and the C library. It does not change the
//! monotonic clock, and neither does a real jump.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::harness::http::sign;
use crate::harness::samples::nth;
use crate::harness::traffic::check_ledger;
use crate::harness::{Answer, Node, Relay, SECRET, Setup, Vhost, Wire, eventually};

const HOUR: SignedDuration = SignedDuration::from_hours(1);

/// The wall clock of one relay.
struct Clock {
    file: PathBuf,
    ahead: SignedDuration,
}

impl Clock {
    /// A clock with the real time, and a relay that will use it.
    fn new(setup: Setup) -> (Self, Setup) {
        let mut clock = Self { file: setup.folder().join("clock"), ahead: SignedDuration::ZERO };
        clock.jump(SignedDuration::ZERO);
        let file = clock.file.display().to_string();
        let setup = setup
            .env("LD_PRELOAD", &library().display().to_string())
            .env("FAKETIME_TIMESTAMP_FILE", &file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("DONT_FAKE_MONOTONIC", "1");
        (clock, setup)
    }

    fn jump(&mut self, by: SignedDuration) {
        self.ahead += by;
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{:+}", self.ahead.as_secs())).expect("write the clock's file");
        std::fs::rename(&new, &self.file).expect("rename the clock's file");
    }

    /// The time of this clock.
    fn now(&self) -> Timestamp {
        Timestamp::now() + self.ahead
    }

    /// Sends a webhook that was signed with the time of this clock, as if Prism's clock had jumped as well.
    async fn post(&self, relay: &Relay, body: &str) -> Answer {
        let timestamp = format!("{:.3}", self.now());
        let signature = sign(SECRET, &timestamp, body.as_bytes());
        relay.post_with(&[("prism-timestamp", &timestamp), ("prism-signature", &signature)], body).await
    }
}

/// The path of libfaketime on Debian and its derivatives.
fn library() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let mut candidates =
        folders.chain([PathBuf::from("/usr/lib")]).map(|folder| folder.join("faketime/libfaketime.so.1"));
    candidates
        .find(|path| Path::is_file(path))
        .unwrap_or_else(|| panic!("libfaketime is missing: install the package faketime, as tests/run.sh does"))
}

async fn check_ages(relay: &Relay) {
    check_ledger(&relay.spool().await);
    for metric in ["prism_relay_spool_oldest_age_seconds", "prism_relay_delivery_lag_seconds_sum"] {
        let age = relay.metric(metric, &[]).await;
        assert!(age >= 0.0, "{metric} is {age}");
    }
}

/// An hour ahead, back to the real time, an hour behind, back to the real time.
const JUMPS: [SignedDuration; 4] =
    [HOUR, SignedDuration::from_hours(-1), SignedDuration::from_hours(-1), SignedDuration::from_hours(1)];

#[tokio::test]
async fn events_are_accepted_and_delivered_in_order_under_unique_ids() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (mut clock, setup) = Clock::new(Setup::new(&vhost.url()));
    let relay = setup.start().await;
    let mut ids = vec![clock.post(&relay, &nth(0)).await.id()];
    for jump in JUMPS {
        clock.jump(jump);
        for _ in 0..20 {
            ids.push(clock.post(&relay, &nth(ids.len())).await.id());
            check_ages(&relay).await;
        }
        // The relay uses this clock: it refuses a signature with the real time.
        let wrong = relay.post(nth(ids.len())).await;
        assert_eq!(wrong.status == 401, !clock.ahead.is_zero(), "{wrong}");
        if wrong.status == 200 {
            ids.push(wrong.id());
        }
    }
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
    let delivered: Vec<_> =
        vhost.messages("prism.scan", ids.len()).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, ids);
    relay.eventually_nothing_pending().await;
    check_ages(&relay).await;
}

#[tokio::test]
async fn a_backlog_has_no_negative_age_and_leaves_in_order_after_a_restart() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let (mut clock, setup) = Clock::new(Setup::new(&vhost.url_through(&wire)));
    let mut relay = setup.start().await;
    let mut ids = Vec::new();
    for jump in JUMPS {
        ids.push(clock.post(&relay, &nth(ids.len())).await.id());
        clock.jump(jump);
        check_ages(&relay).await;
        relay.kill9().await;
        relay.start_again().await;
        check_ages(&relay).await;
    }
    wire.accept();
    let delivered: Vec<_> =
        vhost.messages("prism.scan", ids.len()).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, ids);
}

#[tokio::test]
async fn a_resend_is_recognised_just_after_a_jump() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (mut clock, setup) = Clock::new(Setup::new(&vhost.url()));
    let relay = setup.start().await;
    let id = clock.post(&relay, &nth(0)).await.id();
    for jump in JUMPS {
        clock.jump(jump);
        let again = clock.post(&relay, &nth(0)).await.expect(200).json();
        assert_eq!(again, json!({"ok": true, "id": id, "duplicate": true}));
    }
    vhost.messages("prism.scan", 1).await;
    relay.eventually_nothing_pending().await;
    vhost.assert_empty("prism.scan").await;
}

/// An event that was accepted while the clock was an hour ahead seems to come from the future once the clock is right.
#[tokio::test]
async fn a_restart_after_a_jump_back_does_not_make_the_dedupe_window_endless() {
    let vhost = Vhost::new(Node::shared().await).await;
    let (mut clock, setup) = Clock::new(Setup::new(&vhost.url()).set("dedupe.window", "10s"));
    clock.jump(HOUR);
    let mut relay = setup.start().await;
    let id = clock.post(&relay, &nth(0)).await.id();
    clock.jump(-HOUR);
    relay.kill9().await;
    relay.start_again().await;
    let again = clock.post(&relay, &nth(0)).await.expect(200).json();
    assert_eq!(again["id"], json!(id), "the re-send is not recognised after the restart");
    eventually("the end of the window", async || {
        let again = clock.post(&relay, &nth(0)).await.expect(200).json();
        if again["duplicate"].is_null() { Ok(()) } else { Err(again) }
    })
    .await;
}

#[tokio::test]
async fn a_confirm_deadline_and_reconnects_hold_through_a_jump_back() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let setup = Setup::new(&vhost.url_through(&wire)).set("broker.heartbeat", "5s").set("broker.confirm_timeout", "5s");
    let (mut clock, setup) = Clock::new(setup);
    let relay = setup.start().await;
    let mut sent = 0;
    for jump in JUMPS {
        clock.post(&relay, &nth(sent)).await.expect(200);
        vhost.messages("prism.scan", 1).await;
        relay.eventually_nothing_pending().await;
        let connects = relay.status().await["broker"]["connects"].as_u64();
        // The clock jumps while the wire is silent and a deadline runs.
        wire.stall();
        let id = clock.post(&relay, &nth(sent + 1)).await.id();
        clock.jump(jump);
        sent += 2;
        eventually("the relay to close the connection", async || {
            let broker = relay.status().await["broker"].clone();
            if broker["connected"] == false { Ok(()) } else { Err(broker) }
        })
        .await;
        wire.refuse().await;
        wire.cut();
        wire.flow();
        wire.accept();
        assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
        relay.eventually_nothing_pending().await;
        assert!(relay.status().await["broker"]["connects"].as_u64() > connects);
        vhost.assert_empty("prism.scan").await;
    }
}

#[tokio::test]
async fn parked_events_are_tried_again_after_a_jump_back() {
    let vhost = Vhost::new(Node::shared().await).await;
    // An operator's own topology, without a queue for the event.
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "300ms");
    let (mut clock, setup) = Clock::new(setup);
    let relay = setup.start().await;
    let id = clock.post(&relay, &nth(0)).await.id();
    relay.eventually_parked(1).await;
    clock.jump(-HOUR);
    vhost.create_queue("rest", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.webhooks", "rest", "#").await;
    assert_eq!(vhost.messages("rest", 1).await[0].id(), id);
    relay.eventually_parked(0).await;
}
