//! `redrive` and `replay`: publishing dead letters and archived events again.

use std::collections::BTreeSet;

use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;

use crate::harness::samples::{long_scan, of_scan, scan};
use crate::harness::{Delivery, Node, Relay, Setup, Traffic, Vhost, Wire, eventually, eventually_equal};

fn keys(messages: &[Delivery]) -> Vec<&str> {
    messages.iter().map(|message| message.routing_key.as_str()).collect()
}

/// A relay without retries, and `count` dead letters of the scans 0, 1, ...: `started` and `failed` in turn.
async fn with_dead_letters(vhost: &Vhost, count: u32) -> Relay {
    let relay = Relay::start(vhost).await;
    for number in 0..count {
        let kind = if number % 2 == 0 { "started" } else { "failed" };
        relay.post(of_scan(number, &format!("scan.processing.{kind}"))).await.expect(200);
        vhost.reject("prism.scan").await;
    }
    vhost.eventually_depth("prism.dead", count).await;
    relay
}

#[tokio::test]
async fn dead_letters_go_back_with_their_key_properties_and_headers() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["50ms", "50ms"] }]);
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).start().await;
    relay.post(scan(1)).await.expect(200);
    let first = vhost.messages("prism.scan", 1).await.remove(0);
    relay.post(scan(2)).await.expect(200);
    for _ in 0..3 {
        vhost.reject("prism.scan").await;
    }
    vhost.eventually_depth("prism.dead", 1).await;
    let done = relay.run(&["redrive"]).await;
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (Some(0), "1 moved from prism.dead to prism.events, 0 did not match")
    );
    let again = vhost.messages("prism.scan", 1).await.remove(0);
    // Key and properties are those of the first delivery, and no header records the dead-lettering.
    assert_eq!((again.exchange.as_str(), &again.routing_key), ("prism.events", &first.routing_key));
    assert_eq!(again.properties.kind(), first.properties.kind());
    assert_eq!(again.properties.app_id(), first.properties.app_id());
    let names = |delivery: &Delivery| {
        delivery.headers.keys().filter(|name| *name != "x-delivery-count").cloned().collect::<Vec<_>>()
    };
    assert_eq!(names(&again), names(&first));
    assert_eq!(again.text(), scan(2));
    vhost.assert_empty("prism.dead").await;
}

#[tokio::test]
async fn only_selected_dead_letters_move() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 6).await;
    let [subject, other] = ["scan:scan-3", "scan:scan-1"];
    for (arguments, moved, left) in [
        (vec!["--subject", subject], vec![3], 5),
        (vec!["--type", "*.*.failed", "--subject", other], vec![1], 4),
        (vec!["--type", "body_shape_prediction.#"], vec![], 4),
        (vec!["--older-than", "1h"], vec![], 4),
        (vec!["--newer-than", "1h", "--type", "*.*.started"], vec![0, 2, 4], 1),
    ] {
        let arguments = [vec!["redrive"], arguments].concat();
        let dry = relay.run(&[arguments.clone(), vec!["--dry-run"]].concat()).await;
        assert!(dry.stdout.contains(&format!("{} of ", moved.len())), "{dry:?}");
        assert_eq!(dry.stdout.lines().count(), moved.len() + 1, "{dry:?}");
        vhost.eventually_depth("prism.dead", u32::try_from(moved.len()).unwrap() + left).await;
        let done = relay.run(&arguments).await;
        assert!(done.code == Some(0) && done.stdout.starts_with(&format!("{} moved", moved.len())), "{done:?}");
        let came = vhost.messages("prism.scan", moved.len()).await;
        let expected: Vec<_> = moved.iter().map(|number| format!("scan:scan-{number}")).collect();
        let mut came: Vec<_> = came.iter().map(|message| message.header("prism-subject")).collect();
        // RabbitMQ changes the order of messages that were read and returned.
        came.sort_unstable();
        assert_eq!(came, expected);
        vhost.eventually_depth("prism.dead", left).await;
    }
    // A message that was read as often as this one may be a copy, whose routing key is the name of the queue.
    let left = vhost.messages("prism.dead", 1).await.remove(0);
    assert_eq!(left.properties.kind().as_ref().map(ToString::to_string), Some("scan.processing.failed".to_owned()));
}

#[tokio::test]
async fn a_dry_run_shows_why_messages_died() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 1).await;
    let dry = relay.run(&["redrive", "--dry-run"]).await;
    for part in [
        "scan.processing.started",
        "rejected by prism.scan (1 times)",
        "1 of 1 in prism.dead would be moved to prism.events",
    ] {
        assert!(dry.stdout.contains(part), "{part:?} is not in {}", dry.stdout);
    }
}

#[tokio::test]
async fn a_dead_letter_of_a_worker_says_why_and_loses_that_header() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Setup::new(&vhost.url()).start().await;
    relay.eventually_connected().await;
    let mut headers = FieldTable::default();
    headers.insert("prism-gave-up".into(), AMQPValue::LongString("prism.scan: no handler".into()));
    let given_up = BasicProperties::default().with_headers(headers);
    vhost.publish_with("prism.dead", "scan.archived", "{}", given_up).await;
    let dry = relay.run(&["redrive", "--dry-run"]).await;
    assert!(dry.stdout.contains("given up by prism.scan: no handler"), "{dry:?}");
    vhost.eventually_depth("prism.dead", 1).await;
    assert!(relay.run(&["redrive"]).await.stdout.starts_with("1 moved"));
    assert!(!vhost.messages("prism.scan", 1).await[0].headers.contains_key("prism-gave-up"));
}

#[tokio::test]
async fn unrouted_messages_go_to_their_new_queue() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.post(r#"{"eventType":"capture_data.a","payload":{}}"#).await.expect(200);
    relay.post(r#"{"eventType":"measurement.b","payload":{}}"#).await.expect(200);
    vhost.eventually_depth("prism.unrouted", 2).await;
    vhost.create_queue("mine", json!({})).await;
    vhost.bind("prism.events", "mine", "capture_data.#").await;
    // The other event returns to prism.unrouted immediately. The command still ends.
    let done = relay.run(&["redrive", "--from", "prism.unrouted"]).await;
    assert!(done.code == Some(0) && done.stdout.starts_with("2 moved"), "{done:?}");
    assert_eq!(keys(&vhost.messages("mine", 1).await), ["capture_data.a"]);
    assert_eq!(keys(&vhost.messages("prism.unrouted", 1).await), ["measurement.b"]);
}

#[tokio::test]
async fn messages_go_to_one_queue_if_it_exists() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 2).await;
    let nowhere = relay.run(&["redrive", "--to", "nowhere"]).await;
    assert!(nowhere.code == Some(1) && nowhere.stderr.contains("NO_ROUTE"), "{nowhere:?}");
    vhost.eventually_depth("prism.dead", 2).await;
    vhost.create_queue("mine", json!({})).await;
    let done = relay.run(&["redrive", "--to", "mine", "--count", "1"]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    vhost.messages("mine", 1).await;
    vhost.assert_empty("prism.scan").await;
    for (arguments, expected) in [
        (vec!["redrive", "--from", "nothing"], (Some(1), "no queue 'nothing'")),
        (vec!["redrive", "--to", "prism.dead"], (Some(64), "the same queue")),
    ] {
        let ended = relay.run(&arguments).await;
        assert!(ended.code == expected.0 && ended.stderr.contains(expected.1), "{ended:?}");
        assert_eq!(ended.stdout, "", "there is nothing to sum up");
    }
}

#[tokio::test]
async fn the_summary_counts_the_whole_queue() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 6).await;
    for (arguments, expected) in [
        (vec!["--dry-run", "--count", "1"], "1 of 6 in prism.dead would be moved to prism.events"),
        (
            vec!["--dry-run", "--type", "#.failed", "--count", "1"],
            "1 of 6 in prism.dead would be moved to prism.events",
        ),
        (vec!["--type", "#.failed"], "3 moved from prism.dead to prism.events, 3 did not match"),
        (vec!["--count", "1"], "1 moved from prism.dead to prism.events, 0 did not match, 2 not looked at"),
    ] {
        let done = relay.run(&[vec!["redrive"], arguments].concat()).await;
        assert_eq!((done.code, done.stdout.lines().last()), (Some(0), Some(expected)), "{done:?}");
    }
}

/// At this rate the first message goes at once, and the second one after a quarter of an hour.
const SLOW: &str = "0.001";

#[tokio::test]
async fn a_redrive_with_a_rate_is_interrupted_and_run_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 4).await;
    for (signal, left) in [("INT", 3), ("TERM", 2)] {
        let mut running = relay.setup().launch(&["redrive", "--rate", SLOW]);
        vhost.eventually_depth("prism.scan", 4 - left).await;
        running.signal(signal);
        let ended = running.wait().await;
        let expected = format!("1 moved from prism.dead to prism.events, 0 did not match, {left} not looked at");
        assert_eq!((ended.code, ended.stdout), (Some(1), expected), "{}", ended.stderr);
        assert!(ended.stderr.contains("interrupted") && ended.stderr.contains("run this again"), "{}", ended.stderr);
        vhost.eventually_depth("prism.dead", left).await;
    }
    let done = relay.run(&["redrive", "--rate", "1000"]).await;
    assert!(done.code == Some(0) && done.stdout.starts_with("2 moved"), "{done:?}");
    let ids: BTreeSet<_> = vhost.messages("prism.scan", 4).await.iter().map(Delivery::id).collect();
    assert_eq!(ids.len(), 4, "none is moved twice");
    vhost.assert_empty("prism.scan").await;
}

/// Retry queues and partitions belong to one queue. Through the exchange, others would get the messages again.
#[tokio::test]
async fn messages_of_a_retry_queue_go_to_their_own_queue() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["1h"] }]);
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).start().await;
    relay.eventually_connected().await;
    vhost.create_queue("mine", json!({})).await;
    vhost.bind("prism.events", "mine", "scan.#").await;
    relay.post(scan(1)).await.expect(200);
    let first = vhost.messages("mine", 1).await.remove(0);
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.scan.retry.1", 1).await;
    let from = ["redrive", "--from", "prism.scan.retry.1"];
    let refused = relay.run(&from).await;
    assert!(refused.code == Some(64) && refused.stderr.contains("add --to prism.scan"), "{refused:?}");
    let moved = relay.run(&[&from[..], &["--to", "prism.scan"]].concat()).await;
    assert!(moved.code == Some(0) && moved.stdout.starts_with("1 moved"), "{moved:?}");
    assert_eq!(vhost.messages("prism.scan", 1).await[0].header("prism-original-key"), first.routing_key);
    vhost.assert_empty("mine").await;
}

#[tokio::test]
async fn messages_for_a_queue_with_partitions_go_to_the_partition_of_their_subject() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "partitions": 2 }]);
    let relay = Setup::new(&vhost.url()).set("topology.queues", queues).start().await;
    relay.post(scan(1)).await.expect(200);
    relay.eventually_nothing_pending().await;
    let partition = eventually("the event in a partition", async || {
        for partition in ["prism.scan.1", "prism.scan.2"] {
            if vhost.depth(partition).await == 1 {
                return Ok(partition);
            }
        }
        Err("in none")
    })
    .await;
    vhost.reject(partition).await;
    vhost.eventually_depth("prism.dead", 1).await;
    let moved = relay.run(&["redrive", "--to", "prism.scan"]).await;
    assert!(moved.code == Some(0) && moved.stdout.starts_with("1 moved"), "{moved:?}");
    assert_eq!(vhost.messages(partition, 1).await[0].routing_key, "scan.processing.started");
}

/// RabbitMQ reports a queue as empty if its leader does not answer within 250 ms.
#[tokio::test]
async fn a_slow_queue_is_not_mistaken_for_an_empty_one() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let relay = with_dead_letters(&vhost, 1).await;
    // Suspends the leader until two requests wait for it.
    let expression = format!(
        r#"{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{}">>, queue, <<"prism.dead">>)),
        {{Leader, _}} = amqqueue:get_pid(Queue),
        Questions = fun() ->
            {{messages, Messages}} = process_info(whereis(Leader), messages),
            length([Query || {{'$gen_call', _, Query}} <- Messages, element(1, Query) == local_query])
        end,
        Hold = fun Hold(0) -> sys:resume(Leader);
                   Hold(Looks) -> timer:sleep(10), Hold(case Questions() of Few when Few < 2 -> Looks - 1; _ -> 0 end)
        end,
        ok = sys:suspend(Leader), spawn(fun() -> Hold(3000) end), held."#,
        vhost.name()
    );
    assert_eq!(node.ctl(&["eval", &expression]).await, "held");
    let done = relay.run(&["redrive"]).await;
    assert!(done.code == Some(0) && done.stdout.starts_with("1 moved"), "{done:?}");
    vhost.messages("prism.scan", 1).await;
}

/// RabbitMQ 4 drops a message of a quorum queue that is returned for the twenty-first time.
#[tokio::test]
async fn many_dry_runs_lose_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 1).await;
    for run in 0..25 {
        let dry = relay.run(&["redrive", "--dry-run"]).await;
        assert!(dry.stdout.contains("1 of 1"), "run {run}: {dry:?}");
        vhost.eventually_depth("prism.dead", 1).await;
    }
    // Nor do runs that fail, or runs on a queue that the relay did not declare.
    vhost.create_queue("mine", json!({ "x-queue-type": "quorum" })).await;
    vhost.publish("", "mine", "{}").await;
    for run in 0..25 {
        let failed = relay.run(&["redrive", "--to", "nowhere"]).await;
        assert_eq!(failed.code, Some(1), "run {run}: {failed:?}");
        let dry = relay.run(&["redrive", "--from", "mine", "--dry-run"]).await;
        assert!(dry.stdout.contains("1 of 1"), "run {run}: {dry:?}");
    }
    let done = relay.run(&["redrive"]).await;
    assert!(done.stdout.starts_with("1 moved"), "{done:?}");
    let again = vhost.messages("prism.scan", 1).await;
    assert_eq!(keys(&again), ["scan.processing.started"]);
    assert!(!again[0].headers.contains_key("prism-original-key"), "{:?}", again[0].headers);
}

/// A message without a confirm stays in the queue when the command is killed or its connection is cut.
#[tokio::test]
async fn an_interrupted_redrive_loses_nothing() {
    const COUNT: u32 = 3000;
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    let relay = Relay::start(&vhost).await;
    relay.eventually_connected().await;
    let connection = vhost.connect().await;
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(Default::default()).await.unwrap();
    for number in 0..COUNT {
        let properties = BasicProperties::default().with_message_id(number.to_string().into()).with_delivery_mode(2);
        let sent =
            channel.basic_publish("prism.dead".into(), "scan.a".into(), Default::default(), b"{}", properties).await;
        drop(sent.unwrap());
    }
    vhost.eventually_depth("prism.dead", COUNT).await;
    let setup = Setup::new(&vhost.url_through(&wire));
    // Slow enough to interrupt the run before its end.
    wire.set_latency(std::time::Duration::from_millis(200));
    for kill in [true, false] {
        // Bytes of the earlier run may still be in transit.
        eventually_equal("the earlier run to have no connection", 0, async || wire.connections()).await;
        let mut running = setup.launch(&["redrive"]);
        eventually_equal("this run to have a connection", 1, async || wire.connections()).await;
        let before = vhost.depth("prism.scan").await;
        eventually("more than 100 messages to be moved", async || {
            let moved = vhost.depth("prism.scan").await.saturating_sub(before);
            if moved > 100 { Ok(()) } else { Err(moved) }
        })
        .await;
        if kill {
            running.signal("KILL");
        } else {
            wire.cut();
        }
        let ended = running.wait().await;
        assert_ne!(ended.code, Some(0), "{ended:?}");
    }
    // RabbitMQ returns the unacknowledged messages of the interrupted runs a moment after their end.
    let mut moved = BTreeSet::new();
    eventually("all messages to be moved", async || {
        let done = relay.run(&["redrive"]).await;
        assert_eq!(done.code, Some(0), "{done:?}");
        let there = vhost.depth("prism.scan").await as usize;
        moved.extend(vhost.messages("prism.scan", there).await.iter().map(Delivery::id));
        if moved.len() == COUNT as usize { Ok(()) } else { Err(moved.len()) }
    })
    .await;
    vhost.assert_empty("prism.dead").await;
    connection.close(200, "done".into()).await.unwrap();
}

/// RabbitMQ 4.3 can hold back what was put back. Earlier versions know no such policy.
#[tokio::test]
async fn messages_that_the_broker_holds_back_after_a_dry_run_are_mentioned_and_moved_later() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let api = format!("http://127.0.0.1:{}", node.management().port);
    let relay = Setup::new(&vhost.url()).set("broker.management_url", api).start().await;
    relay.post(scan(1)).await.expect(200);
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.dead", 1).await;
    let delays = node.version().await >= vec![4, 3];
    if delays {
        let policy = json!({ "delayed-retry-type": "all", "delayed-retry-min": 4000, "delayed-retry-max": 4000 });
        vhost.set_policy("delay", "^prism.dead$", policy).await;
        eventually("the policy to reach the queue", async || {
            let queue = vhost.queue("prism.dead").await.unwrap();
            if queue["policy"] == "delay" { Ok(()) } else { Err(queue) }
        })
        .await;
    }
    let dry = relay.run(&["redrive", "--dry-run"]).await;
    assert!(dry.stdout.contains("1 of 1 in prism.dead would be moved"), "{dry:?}");
    assert_eq!(dry.stderr.contains("are invisible for 4 s"), delays, "{dry:?}");
    let next = relay.run(&["redrive"]).await;
    assert_eq!(next.stdout.starts_with("0 moved"), delays, "{next:?}");
    assert_eq!(next.stderr.contains("are invisible for 4 s"), delays, "{next:?}");
    eventually("the message to be moved", async || {
        relay.run(&["redrive"]).await;
        if vhost.depth("prism.scan").await == 1 { Ok(()) } else { Err("not yet") }
    })
    .await;
    vhost.assert_empty("prism.dead").await;
}

/// Every way to die and to come back leaves headers in a message: rejections, a worker that dies, reads for a dry run,
/// an expiry, and the offset of a stream. None of them may reach a worker as a part of the new message.
#[tokio::test]
async fn no_header_of_a_broker_is_left_after_redrive_and_replay() {
    let vhost = Vhost::new(Node::shared().await).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "retry_delays": ["50ms"] }]);
    let relay = with_archive(&vhost).set("topology.queues", queues).start().await;
    relay.post(scan(1)).await.expect(200);
    vhost.eventually_depth("prism.scan", 1).await;
    vhost.take_and_drop("prism.scan").await;
    for _ in 0..2 {
        vhost.reject("prism.scan").await;
    }
    vhost.eventually_depth("prism.dead", 1).await;
    for _ in 0..2 {
        assert!(relay.run(&["redrive", "--dry-run"]).await.stdout.contains("1 of 1"));
        vhost.eventually_depth("prism.dead", 1).await;
    }
    // A classic queue adds no header to what it delivers.
    for name in ["redriven", "replayed"] {
        vhost.create_queue(name, json!({ "x-queue-type": "classic" })).await;
    }
    let redrive = ["redrive", "--to", "redriven"];
    let replay = ["replay", "--since", "1h", "--to", "replayed"];
    for (command, queue, added) in
        [(&redrive[..], "redriven", vec![]), (&replay[..], "replayed", vec!["prism-replayed-at"])]
    {
        let done = relay.run(command).await;
        assert_eq!(done.code, Some(0), "{done:?}");
        let message = vhost.messages(queue, 1).await.remove(0);
        let names: BTreeSet<_> = message.headers.keys().map(String::as_str).collect();
        let own = [
            "prism-fingerprint",
            "prism-received-at",
            "prism-scan-id",
            "prism-source",
            "prism-state",
            "prism-subject",
            "prism-verified",
            "prism-original-key",
        ];
        assert_eq!(names, own.into_iter().chain(added).collect(), "{command:?}");
    }
}

fn with_archive(vhost: &Vhost) -> Setup {
    Setup::new(&vhost.url()).set("topology.archive", json!({ "max_age": "1d" }))
}

#[tokio::test]
async fn the_archive_has_every_event_and_unrouted_events_stay_unrouted() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_archive(&vhost).start().await;
    // The event's time is cut to milliseconds, so it could be before the time of its request.
    let started = jiff::Timestamp::now() - jiff::SignedDuration::from_secs(1);
    for body in
        [scan(1).as_str(), r#"{"eventType":"unknown.a","payload":{}}"#, of_scan(2, "scan.processing.failed").as_str()]
    {
        relay.post(body).await.expect(200);
    }
    vhost.messages("prism.scan", 2).await;
    vhost.eventually_depth("prism.unrouted", 1).await;
    let since = started.to_string();
    let dry = relay.run(&["replay", "--since", &since, "--dry-run"]).await;
    assert!(
        dry.code == Some(0) && dry.stdout.ends_with("3 events of prism.archive would be published to prism.events"),
        "{dry:?}"
    );
    assert_eq!(dry.stdout.lines().count(), 4);

    let done = relay.run(&["replay", "--since", &since, "--key", "scan.#"]).await;
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (Some(0), "2 events of prism.archive published to prism.events"),
        "{}",
        done.stderr
    );
    let again = vhost.messages("prism.scan", 2).await;
    assert_eq!(keys(&again), ["scan.processing.started", "scan.processing.failed"]);
    assert!(again.iter().all(|message| message.header("prism-replayed-at") >= since.as_str()));
    // The archive has each event once: replayed events do not come by the fanout.
    vhost.create_queue("mine", json!({})).await;
    let to = relay.run(&["replay", "--since", "1h", "--to", "mine"]).await;
    assert!(to.stdout.starts_with("3 events"), "{to:?}");
    vhost.messages("mine", 3).await;
    vhost.assert_empty("prism.scan").await;
}

/// A slow connection can be silent for seconds, which is not the end of the queue. Deadlines are per message.
#[tokio::test]
async fn a_slow_connection_loses_no_message() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_archive(&vhost).start().await;
    let large = |number: u32| long_scan(number, 200_000);
    for number in 0..2 {
        relay.post(large(number)).await.expect(200);
        vhost.reject("prism.scan").await;
    }
    vhost.eventually_depth("prism.dead", 2).await;
    let wire = Wire::new(vhost.address());
    let setup = Setup::new(&vhost.url_through(&wire)).set("topology.archive", json!({ "max_age": "1d" }));
    let setup = setup.set("broker.confirm_timeout", "11s").set("broker.heartbeat", "5s");
    // Each message takes six seconds.
    wire.set_bandwidth(Some(35_000));
    let replayed = setup.run(&["replay", "--since", "1h", "--dry-run"]).await;
    assert!(
        replayed.code == Some(0) && replayed.stdout.contains("\n2 events of prism.archive would be"),
        "{replayed:?}"
    );
    let moved = setup.run(&["redrive"]).await;
    assert!(moved.code == Some(0) && moved.stdout.starts_with("2 moved from prism.dead"), "{moved:?}");
    for (number, message) in (0..).zip(vhost.messages("prism.scan", 2).await) {
        assert_eq!(message.text(), large(number));
    }
}

/// Messages that fit are moved once. The others stay in their queue for the next run.
#[tokio::test]
async fn a_full_queue_gets_as_many_messages_as_fit() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_dead_letters(&vhost, 12).await;
    vhost.create_queue("mine", json!({ "x-max-length": 5, "x-overflow": "reject-publish" })).await;
    for (moved, left) in [(5, 7), (5, 2)] {
        let full = relay.run(&["redrive", "--to", "mine"]).await;
        assert!(
            full.code == Some(1) && full.stderr.contains("mine did not accept a message (a queue is full"),
            "{full:?}"
        );
        assert!(full.stdout.starts_with(&format!("{moved} moved")), "{full:?}");
        vhost.eventually_depth("prism.dead", left).await;
        vhost.messages("mine", moved).await;
        vhost.assert_empty("mine").await;
    }
    assert_eq!(relay.run(&["redrive", "--to", "mine"]).await.code, Some(0));
    vhost.messages("mine", 2).await;
}

#[tokio::test]
async fn replay_ends_while_events_come_in() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_archive(&vhost).start().await;
    let traffic = Traffic::start(&relay);
    traffic.more(20).await;
    // The archive exists and has events.
    eventually("more than 20 confirms", async || {
        let confirmed = relay.metric("prism_relay_publish_total", &[("outcome", "confirmed")]).await;
        if confirmed > 20.0 { Ok(()) } else { Err(confirmed) }
    })
    .await;
    let ended = relay.run(&["replay", "--since", "1h", "--dry-run"]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.lines().count() > 20, "{ended:?}");
    traffic.arrives(&relay, &vhost).await;
}

#[tokio::test]
async fn replay_obeys_since_and_until_and_ends_on_an_empty_archive() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_archive(&vhost).start().await;
    relay.eventually_connected().await;
    let nothing = relay.run(&["replay", "--since", "1h"]).await;
    assert!(nothing.code == Some(0) && nothing.stdout.starts_with("0 events"), "{nothing:?}");
    relay.post(scan(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    relay.post(scan(2)).await.expect(200);
    let second = vhost.messages("prism.scan", 1).await.remove(0);
    let between = second.header("prism-received-at").to_owned();
    for (arguments, expected) in [(["--since", &between], 1), (["--until", &between], 1), (["--since", "1h"], 2)] {
        let mut all = vec!["replay", "--dry-run"];
        all.extend(arguments);
        if arguments[0] == "--until" {
            all.extend(["--since", "1h"]);
        }
        let dry = relay.run(&all).await;
        assert!(dry.stdout.contains(&format!("{expected} events of")), "{arguments:?}: {dry:?}");
    }
    let dry = relay.run(&["replay", "--dry-run", "--since", &between]).await;
    assert!(dry.stdout.contains(&second.id()), "{dry:?}");
    for (arguments, expected) in [
        (vec!["replay", "--since", "yesterday"], (Some(64), "must be a time such as")),
        (vec!["replay", "--since", "1h", "--from", "nothing"], (Some(1), "no queue 'nothing'")),
    ] {
        let ended = relay.run(&arguments).await;
        assert!(ended.code == expected.0 && ended.stderr.contains(expected.1), "{ended:?}");
        assert_eq!(ended.stdout, "", "there is nothing to sum up");
    }
    let none = Setup::new(&vhost.url()).run(&["replay", "--since", "1h"]).await;
    assert!(none.code == Some(64) && none.stderr.contains("the configuration has no topology.archive"), "{none:?}");
}

#[tokio::test]
async fn a_replay_with_a_rate_is_interrupted_and_goes_on_where_it_stopped() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = with_archive(&vhost).start().await;
    for number in 0..3 {
        relay.post(scan(number)).await.expect(200);
    }
    let archived: Vec<_> = vhost.messages("prism.scan", 3).await.iter().map(Delivery::id).collect();
    let replay = ["replay", "--since", "1h"];
    let mut running = relay.setup().launch(&[&replay[..], &["--rate", SLOW]].concat());
    let first = vhost.messages("prism.scan", 1).await.remove(0);
    running.signal("INT");
    let ended = running.wait().await;
    assert_eq!((ended.code, &*ended.stdout), (Some(1), "1 events of prism.archive published to prism.events"));
    let offset = ended
        .stderr
        .split("--offset ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap_or_else(|| panic!("{ended:?}"));
    assert_eq!(first.id(), archived[0]);
    let rest = relay.run(&[&replay[..], &["--offset", offset]].concat()).await;
    assert!(rest.code == Some(0) && rest.stdout.starts_with("2 events"), "{rest:?}");
    let rest: Vec<_> = vhost.messages("prism.scan", 2).await.iter().map(Delivery::id).collect();
    assert_eq!(rest, archived[1..]);
    let nothing = relay.run(&[&replay[..], &["--offset", "1000000"]].concat()).await;
    assert!(nothing.code == Some(0) && nothing.stdout.starts_with("0 events"), "{nothing:?}");
}

/// A worker that publishes what it gives up, and does not know the header, puts messages of `send --to-queue` there.
#[tokio::test]
async fn test_messages_among_dead_letters_never_get_into_a_queue_of_events() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.eventually_connected().await;
    // More than a consumer may leave unacknowledged.
    let channel = vhost.connect().await.create_channel().await.unwrap();
    let mut headers = FieldTable::default();
    headers.insert("prism-test".into(), AMQPValue::LongString("unknown-state".into()));
    let properties = BasicProperties::default().with_type("scan.test".into()).with_headers(headers);
    for _ in 0..510 {
        let options = BasicPublishOptions::default();
        let (exchange, key) = ("prism.dead".into(), "scan.test".into());
        drop(channel.basic_publish(exchange, key, options, b"{}", properties.clone()).await.unwrap());
    }
    vhost.eventually_depth("prism.dead", 510).await;
    relay.post(scan(1)).await.expect(200);
    vhost.reject("prism.scan").await;
    vhost.eventually_depth("prism.dead", 511).await;
    let note = "510 test messages left (--tests --to QUEUE moves them)";
    let redrive = async |arguments: &[&str], code: i32, expected: &str| {
        let ended = relay.run(&[&["redrive"], arguments].concat()).await;
        assert!(ended.code == Some(code), "{ended:?}");
        assert!([ended.stdout.as_str(), &ended.stderr].concat().contains(expected), "{ended:?}");
    };
    let dry = format!("1 of 511 in prism.dead would be moved to prism.events, {note}");
    redrive(&["--dry-run"], 0, &dry).await;
    redrive(&[], 0, &format!("1 moved from prism.dead to prism.events, 0 did not match, {note}")).await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), scan(1));
    redrive(&["--type", "scan.#"], 0, &format!("0 moved from prism.dead to prism.events, 0 did not match, {note}"))
        .await;
    vhost.assert_empty("prism.scan").await;

    redrive(&["--tests"], 64, "--to").await;
    redrive(&["--tests", "--to", "prism.scan"], 64, "`test` in its name").await;
    vhost.create_queue("worker.test", json!({})).await;
    redrive(&["--tests", "--to", "worker.test"], 0, "510 moved from prism.dead to worker.test").await;
    vhost.assert_empty("prism.dead").await;
    vhost.assert_empty("prism.scan").await;
}
