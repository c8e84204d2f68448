//! Faults of the broker: restarts, replacement, alarms, refusals, nacks. Prism is answered 200 throughout.

use std::collections::HashSet;

use serde_json::json;

use crate::harness::samples::{nth, nth_of_scan};
use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually, eventually_within};

async fn eventually_blocked(relay: &Relay) {
    eventually("the relay to learn that it is blocked", async || {
        let status = relay.status().await;
        if status["broker"]["blocked"].is_string() { Ok(()) } else { Err(status) }
    })
    .await;
}

/// One node of its own, because the test kills, freezes and blocks it.
#[tokio::test]
async fn a_node_that_is_killed_restarted_frozen_and_blocked() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    let setup = Setup::new(&vhost.url()).set("broker.heartbeat", "5s").set("broker.confirm_timeout", "5s");
    let mut relay = setup.start().await;
    relay.post(nth(0)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), nth(0));

    // Killed while events flow, then restarted with its disk.
    node.kill().await;
    relay.post(nth(1)).await.expect(200);
    node.start_again().await;
    relay.post(nth(2)).await.expect(200);
    relay.eventually_nothing_pending().await;
    // The broker may have lost the acknowledgement of the first event.
    let depth = vhost.depth("prism.scan").await as usize;
    let mut texts: Vec<_> = vhost.messages("prism.scan", depth).await.iter().map(|delivery| delivery.text()).collect();
    // Each event may arrive twice, also as a repeated pair.
    let mut seen = HashSet::from([nth(0)]);
    texts.retain(|text| seen.insert(text.clone()));
    assert_eq!(texts, [nth(1), nth(2)]);

    // Frozen: the heartbeat or the confirm deadline notices, and nothing is lost.
    node.freeze();
    let id = relay.post(nth(3)).await.id();
    eventually("the relay to give up the frozen connection", async || {
        let status = relay.status().await;
        if status["broker"]["connected"] == false { Ok(()) } else { Err(status) }
    })
    .await;
    node.thaw();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_nothing_pending().await;
    // Messages in the frozen node's sockets may arrive as duplicates.
    eventually("no more duplicates", async || {
        let depth = vhost.depth("prism.scan").await as usize;
        vhost.messages("prism.scan", depth).await;
        if depth == 0 && relay.status().await["broker"]["connected"] == true { Ok(()) } else { Err(depth) }
    })
    .await;

    // Blocked by an alarm for longer than the confirm deadline: events are kept, and published once after it.
    node.memory_alarm(true).await;
    // RabbitMQ says so only when something is published: what leaves until then cannot be removed any more.
    let mut ids = vec![relay.post(nth_of_scan(4, 4)).await.id()];
    eventually_blocked(&relay).await;
    for number in 5..10 {
        ids.push(relay.post(nth_of_scan(number, number)).await.id());
    }
    assert_eq!(relay.metric("prism_relay_broker_blocked", &[]).await, 1.0);
    let connects = relay.status().await["broker"]["connects"].clone();
    // The relay has read these ahead; an operator removes them before the broker takes them.
    let removed = [ids[3].as_str(), ids[4].as_str()];
    let done = relay.run(&[["spool", "remove", "--yes", "--pending"].as_slice(), &removed].concat()).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    // The alarm has to outlast the confirm deadline of 5 s.
    let blocked_at = std::time::Instant::now();
    eventually("the confirm deadline to pass", async || {
        let elapsed = blocked_at.elapsed();
        if elapsed.as_secs() >= 6 { Ok(()) } else { Err(format!("{elapsed:?}")) }
    })
    .await;
    node.memory_alarm(false).await;
    let texts: Vec<_> = vhost.messages("prism.scan", 4).await.iter().map(|delivery| delivery.text()).collect();
    let kept = [4, 5, 6, 9];
    assert_eq!(texts, kept.map(|number| nth_of_scan(number, number)), "without those that were removed");
    relay.eventually_nothing_pending().await;
    assert_eq!(relay.status().await["broker"]["connects"], connects, "the connection survives, so nothing comes twice");
    vhost.assert_empty("prism.scan").await;

    // A disk alarm has the same effect. A relay that is stopped during the alarm does not wait for its end.
    node.disk_alarm(true).await;
    let id = relay.post(nth(10)).await.id();
    eventually_blocked(&relay).await;
    relay.restart().await;
    node.disk_alarm(false).await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_nothing_pending().await;
}

#[tokio::test]
async fn a_broker_that_is_replaced_gets_the_topology_again() {
    let old = Vhost::new(Node::shared().await).await;
    let new = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(old.address());
    // The first URL stops working; the second leads to an empty broker.
    let setup = Setup::new("unused").set("broker.urls", json!([old.url_through(&wire), new.url()]));
    let mut wire = wire;
    let relay = setup.start().await;
    relay.post(nth(0)).await.expect(200);
    assert_eq!(old.messages("prism.scan", 1).await[0].text(), nth(0));
    relay.eventually_nothing_pending().await;
    wire.refuse().await;
    wire.cut();
    let id = relay.post(nth(1)).await.id();
    assert_eq!(new.messages("prism.scan", 1).await[0].id(), id);
}

#[tokio::test]
async fn an_exchange_that_is_deleted_is_declared_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.post(nth(0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    vhost.delete_exchange("prism.webhooks").await;
    for number in 1..5 {
        relay.post(nth(number)).await.expect(200);
    }
    let texts: Vec<_> = vhost.messages("prism.scan", 4).await.iter().map(|delivery| delivery.text()).collect();
    assert_eq!(texts, (1..5).map(nth).collect::<Vec<_>>());
    relay.eventually_parked(0).await;
}

#[tokio::test]
async fn without_its_queue_an_event_goes_to_unrouted_until_the_queue_is_declared_again() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut relay = Relay::start(&vhost).await;
    relay.post(nth(0)).await.expect(200);
    vhost.eventually_depth("prism.scan", 1).await;
    // The relay does not publish confirmed events again after an operator's purge.
    vhost.purge_queue("prism.scan").await;
    relay.post(nth(1)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), nth(1));
    vhost.delete_queue("prism.scan").await;
    relay.post(nth(2)).await.expect(200);
    assert_eq!(vhost.messages("prism.unrouted", 1).await[0].text(), nth(2));
    relay.restart().await;
    relay.post(nth(3)).await.expect(200);
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), nth(3));
}

#[tokio::test]
async fn a_connection_that_an_operator_closes_comes_back() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    // Closed before it is ready, the connection would not count as one, and the next would be no reconnect.
    relay.eventually_connected().await;
    eventually("the connection to be listed and closed", async || match vhost.close_connections().await {
        0 => Err("none listed yet"),
        _ => Ok(()),
    })
    .await;
    relay.eventually_metric("prism_relay_broker_reconnects_total", &[], 1.0).await;
    relay.eventually_logs("CONNECTION_FORCED").await;
    relay.post(nth(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
}

#[tokio::test]
async fn nacks_keep_the_event_until_the_queue_has_room() {
    let vhost = Vhost::new(Node::shared().await).await;
    // A connection that ends sooner than this does not repeat its warning.
    let relay = Setup::new(&vhost.url()).set("broker.reconnect_max", "100ms").start().await;
    let warnings = || relay.log_text().lines().filter(|line| line.contains("(nack)") && line.contains("WARN")).count();
    let policy_is = async |expected: serde_json::Value| {
        eventually("the policy", async || {
            let queue = vhost.queue("prism.scan").await.unwrap_or_default();
            if queue["policy"] == expected { Ok(()) } else { Err(queue) }
        })
        .await;
    };
    // A queue that fills up a second time is logged a second time.
    for first in [0, 100_000] {
        let logged = warnings();
        relay.post(nth(first)).await.expect(200);
        vhost.eventually_depth("prism.scan", 1).await;
        vhost.set_policy("limit", "^prism.scan$", json!({"max-length": 1})).await;
        policy_is(json!("limit")).await;
        let mut next = first + 1;
        let nacks = relay.metric("prism_relay_publish_total", &[("outcome", "nacked")]).await;
        eventually("a nack", async || {
            relay.post(nth(next)).await.expect(200);
            next += 1;
            let nacked = relay.metric("prism_relay_publish_total", &[("outcome", "nacked")]).await;
            if nacked > nacks { Ok(()) } else { Err(nacked) }
        })
        .await;
        eventually("a warning", async || if warnings() > logged { Ok(()) } else { Err(relay.log_text()) }).await;
        vhost.delete_policy("limit").await;
        let texts: Vec<_> =
            vhost.messages("prism.scan", next - first).await.iter().map(|delivery| delivery.text()).collect();
        assert_eq!(texts, (first..next).map(nth).collect::<Vec<_>>(), "each one once and in order");
        relay.eventually_nothing_pending().await;
        policy_is(json!(null)).await;
    }
}

#[tokio::test]
async fn wrong_credentials_and_vhosts_are_logged_and_do_not_stop_the_relay() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wrong = [
        (vhost.url_for("guest", "hunter2", vhost.address()), "check user, password and virtual host"),
        (vhost.url().replace(vhost.name(), "nowhere"), "check user, password and virtual host"),
        ("amqp://guest:guest@no-such-host.invalid/%2f".to_owned(), "cannot reach no-such-host.invalid:5672"),
    ];
    for (url, expected) in wrong {
        let relay = Setup::new(&url).start().await;
        relay.post(nth(1)).await.expect(200);
        let line = relay.eventually_logs("not delivering").await;
        assert!(line["error"].as_str().unwrap().contains(expected), "{line}");
        let delay = line["delay"].as_str().unwrap().strip_suffix(" ms").unwrap_or_else(|| panic!("{line}"));
        assert!(delay.parse::<u32>().is_ok_and(|delay| delay <= 500), "{line}");
        assert!(!relay.log_text().contains("hunter2"));
        let error = relay.status().await["broker"]["error"].clone();
        assert!(error.as_str().unwrap().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_given_up_in_time() {
    let vhost = Vhost::new(Node::shared().await).await;
    let wire = Wire::new(vhost.address());
    wire.stall();
    let setup = Setup::new(&vhost.url_through(&wire)).set("broker.connect_timeout", "200ms");
    let relay = setup.start().await;
    relay.post(nth(1)).await.expect(200);
    relay.eventually_logs("no answer from").await;
    // Each try ends its thread and closes its socket.
    eventually("several tries", async || {
        let text = relay.log_text();
        let tries = text.matches("no answer from").count();
        if tries >= 5 { Ok(()) } else { Err(tries) }
    })
    .await;
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", relay.pid())).unwrap();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        tasks.filter_map(Result::ok).map(name).filter(|name| name.starts_with("lapin")).count()
    };
    eventually("at most the threads of one try", async || {
        let threads = threads();
        if threads <= 2 { Ok(()) } else { Err(threads) }
    })
    .await;
    wire.flow();
    vhost.messages("prism.scan", 1).await;
}

/// A setup whose relay and commands find the node's management API, and that looks as often as it may.
fn watching(node: &Node, vhost: &Vhost) -> Setup {
    Setup::new(&vhost.url())
        .set("broker.management_url", format!("http://127.0.0.1:{}", node.management().port))
        .set("broker.watch_interval", "1s")
}

/// Two of two nodes that were killed right after their queues were declared came back with queues that are down.
#[tokio::test]
async fn a_queue_without_a_leader_is_named_and_the_printed_steps_repair_it() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    let setup = watching(&node, &vhost).set("broker.heartbeat", "1s").set("broker.confirm_timeout", "1s");
    let relay = setup.start().await;
    relay.post(nth(0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    let leader = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"prism.scan\">>))",
        vhost.name()
    );
    node.ctl(&["eval", &format!("{leader}, ra:stop_server(quorum_queues, amqqueue:get_pid(Q)).")]).await;
    let id = relay.post(nth(1)).await.id();
    let line = relay.eventually_logs("a queue cannot take messages").await;
    assert_eq!(line["queue"], "prism.scan", "{line}");
    // RabbitMQ 4 shows the old state of a queue that was stopped this way, so there only AMQP says something.
    let is_shown = node.version().await[0] == 3;
    let watch = eventually("what the management API says about the queue", async || {
        let watch = relay.status().await["watch"].clone();
        if !is_shown || watch.to_string().contains("\"kind\":\"down\"") { Ok(watch) } else { Err(watch) }
    })
    .await;
    let queue = watch["queues"].as_array().unwrap().iter().find(|queue| queue["name"] == "prism.scan").unwrap();
    assert_eq!(queue["messages"], json!(null), "not zero: {watch}");
    assert!(relay.metric("prism_relay_queues_unavailable", &[]).await >= 1.0);
    assert!(relay.metric("prism_relay_queue_messages", &[("queue", "prism.scan")]).await.is_nan());
    if is_shown {
        assert_eq!(queue["trouble"]["kind"], "down", "{watch}");
        for command in [&["topology", "diff"][..], &["check"]] {
            let printed = relay.run(command).await;
            assert!(printed.code == Some(1) && printed.stdout.contains("is down: it has no leader"), "{printed:?}");
            assert!(printed.stdout.contains("known to be empty"), "{printed:?}");
        }
    }
    // The first step looks at the state; the deletion is the second one of a queue that is down.
    let remedy = queue["trouble"]["remedy"].as_str().unwrap();
    let list = remedy.split("rabbitmqctl ").nth(1).unwrap().split(['\n', '`']).next().unwrap();
    let state = node.ctl(&list.split(' ').collect::<Vec<_>>()).await;
    assert!(state.contains("prism.scan\tdown"), "{state}");
    let delete = format!("delete_queue -p {} prism.scan", vhost.name());
    assert!(queue["trouble"]["kind"] != "down" || remedy.contains(&format!("`rabbitmqctl {delete}`\n")), "{remedy}");
    node.ctl(&delete.split(' ').collect::<Vec<_>>()).await;
    relay.eventually_nothing_pending().await;
    // While the queue did not exist, the event was unrouted.
    if vhost.depth("prism.unrouted").await > 0 {
        assert_eq!(relay.run(&["redrive", "--from", "prism.unrouted"]).await.code, Some(0));
    }
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_logs("the queue takes messages again").await;
    relay.eventually_metric("prism_relay_queues_unavailable", &[], 0.0).await;
}

#[tokio::test]
async fn an_outage_is_logged_again_after_a_minute_and_once_when_its_backlog_is_delivered() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let relay = Setup::new(&vhost.url_through(&wire)).start().await;
    for number in 0..5 {
        relay.post(nth(number)).await.expect(200);
    }
    let line = eventually_within(std::time::Duration::from_secs(100), "the second line", async || {
        let lines = relay.logs();
        let found = lines.iter().find(|line| line["message"] == "still not delivering; events are kept on disk");
        found.cloned().ok_or("not yet")
    })
    .await;
    assert!(line["reason"].as_str().unwrap().starts_with("cannot reach 127.0.0.1"), "{line}");
    assert_eq!((&line["pending"], &line["stalled"]), (&json!(5), &json!("1 min")), "{line}");
    assert!(["oldest", "size", "of_max_bytes"].iter().all(|field| line[field].is_string()), "{line}");
    wire.accept();
    vhost.messages("prism.scan", 5).await;
    let line = relay.eventually_logs("the backlog is delivered").await;
    assert_eq!(line["events"], 5, "{line}");
}
