//! `check` answers whether the relay would work: each test has something wrong, and what must be said about it.

use serde_json::{Value, json};

use crate::harness::marks::PASSWORD;
use crate::harness::program::Ended;
use crate::harness::samples::scan;
use crate::harness::{Node, Setup, Vhost, Wire, eventually, ports};

/// A setup whose commands find the node's management API.
fn watched(node: &Node, vhost: &Vhost) -> Setup {
    Setup::new(&vhost.url()).set("broker.management_url", format!("http://127.0.0.1:{}", node.management().port))
}

/// Runs `check --json`, and returns its exit code and its findings.
async fn findings(setup: &Setup) -> (Option<i32>, Vec<Value>) {
    let Ended { code, stdout, stderr } = setup.run(&["check", "--json"]).await;
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
    (code, report["findings"].as_array().expect("a list of findings").clone())
}

/// The finding with this level and with this in its text.
#[track_caller]
fn find<'a>(findings: &'a [Value], level: &str, text: &str) -> &'a Value {
    let is_it = |finding: &&Value| finding["level"] == level && finding["text"].as_str().unwrap().contains(text);
    findings.iter().find(is_it).unwrap_or_else(|| panic!("no {level} with {text:?} in {findings:#?}"))
}

#[track_caller]
fn wrong(findings: &[Value]) -> Vec<&str> {
    let wrong = findings.iter().filter(|finding| finding["level"] == "WRONG");
    wrong.map(|finding| finding["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_new_broker_is_well_and_stays_as_it_is() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    let (code, found) = findings(&setup).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    find(&found, "ok", "bindings do not exist yet; the relay will create them");
    assert!(vhost.exchange("prism.events").await.is_none() && vhost.queue("prism.scan").await.is_none());
    let printed = setup.run(&["check"]).await;
    assert!(printed.code == Some(0) && printed.stdout.ends_with("all is well"), "{}", printed.stdout);
    assert_eq!(printed.stdout.matches("not exist").count(), 1, "{}", printed.stdout);
    assert!(!printed.stdout.contains("as configured"), "{}", printed.stdout);

    let relay = setup.start().await;
    relay.eventually_connected().await;
    let (code, found) = findings(relay.setup()).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    find(&found, "ok", "in use by a running relay");
    assert_eq!(find(&found, "ok", "as configured")["remedy"], Value::Null);
}

#[tokio::test]
async fn a_user_without_permissions_is_found_before_and_after_the_declaration() {
    let node = Node::shared().await;
    let (vhost, user) = (Vhost::new(node).await, "nobody");
    node.create_user(user, PASSWORD).await;
    let setup = Setup::new(&vhost.url_for(user, PASSWORD, vhost.address()));
    vhost.permit(user, "^$", "^$", "^$").await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    let denied = find(&found, "WRONG", "the broker refuses what the relay needs: ");
    assert!(denied["text"].as_str().unwrap().contains("ACCESS_REFUSED"), "{denied}");
    let remedy = format!("rabbitmqctl set_permissions -p {} nobody '^prism\\.' '^prism\\.' '^prism\\.'", vhost.name());
    assert_eq!(denied["remedy"], remedy.as_str());
    assert_eq!(wrong(&found).len(), 1, "one line for one cause: {found:#?}");

    // It may declare and bind, and not publish.
    vhost.permit(user, ".*", "^prism.(scan|future_me|unrouted|dead)$", ".*").await;
    let (code, found) = findings(&setup).await;
    let denied = find(&found, "WRONG", "exchange prism.events");
    assert!(code == Some(1) && denied["text"].as_str().unwrap().contains("ACCESS_REFUSED"), "{denied}");
    assert!(!found.iter().any(|finding| finding["text"].as_str().unwrap().contains("will create")), "{found:#?}");
    assert!(vhost.exchange("prism.events").await.is_none(), "check changed the broker");

    let pattern = r"^prism\.";
    vhost.permit(user, pattern, pattern, pattern).await;
    let (code, found) = findings(&setup).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    vhost.permit(user, "^$", "^$", "^$").await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", "the broker refuses what the relay needs: ");
    // The owner of the broker declares: the relay only has to publish, and to look. RabbitMQ 4.3 lets a user look only
    // at what the user may read, write or configure.
    let exchange = "^prism.(webhooks|events)$";
    vhost.permit(user, "^$", exchange, pattern).await;
    let (code, found) = findings(&setup.set("topology.declare", "passive")).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    assert_eq!(vhost.depth("prism.unrouted").await + vhost.depth("prism.scan").await, 0, "check published");
}

#[tokio::test]
async fn queues_that_drop_messages_are_wrong_for_a_passive_relay() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let passive = setup.set("topology.declare", "passive");
    let (code, found) = findings(&passive).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    // As if an operator had declared the queue, and the policies were gone.
    vhost.delete_queue("prism.scan").await;
    vhost.create_queue("prism.scan", json!({ "x-queue-type": "quorum" })).await;
    vhost.bind("prism.events", "prism.scan", "scan.#").await;
    let (code, found) = findings(&passive).await;
    assert_eq!(code, Some(1));
    let dropped = find(&found, "WRONG", "drops the messages that workers reject");
    assert_eq!(dropped["area"], "queue prism.scan");
}

#[tokio::test]
async fn a_policy_is_seen_although_the_queues_were_declared_just_now() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    vhost.set_policy("short", "^prism.scan$", json!({ "message-ttl": 1000 })).await;
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    let policy = find(&found, "WRONG", "the policy short sets message-ttl to 1000");
    assert!(policy["remedy"].as_str().unwrap().contains("clear_policy"), "{policy}");
}

#[tokio::test]
async fn limits_of_the_virtual_host_have_their_own_words() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let setup = watched(node, &vhost);
    let limit = async |limits: Value| {
        let limits = limits.to_string();
        node.ctl(&["set_vhost_limits", "-p", vhost.name(), &limits]).await
    };
    limit(json!({ "max-queues": 3 })).await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", "it has 0 queues, the relay needs 4 more, and its limit of queues is 3");
    limit(json!({ "max-queues": 0 })).await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", "it has 0 queues, the relay needs 4 more, and its limit of queues is 0");
    // RabbitMQ 4 looks at the arguments of a queue before it looks at the limit, so that asking over AMQP shows none.
    let over_amqp = usize::from(node.version().await < vec![4]);
    if over_amqp > 0 {
        let reached = find(&found, "WRONG", "the broker refuses it, because a limit is reached: PRECONDITION_FAILED");
        assert!(!reached["text"].as_str().unwrap().contains("other properties"), "{reached}");
    }
    assert_eq!(wrong(&found).len(), 1 + over_amqp, "{found:#?}");
    limit(json!({ "max-connections": 0 })).await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    let refused = find(&found, "WRONG", "refused the connection, because a limit of the broker is reached");
    assert!(!refused["text"].as_str().unwrap().contains("password"), "{refused}");
}

#[tokio::test]
async fn a_busy_port_is_wrong_unless_the_running_relay_has_it() {
    let (http, ops) = (ports::free(), ports::free());
    let listen = |setup: Setup| {
        let setup = setup.set("http.listen", format!("127.0.0.1:{http}"));
        setup.set("ops.listen", format!("127.0.0.1:{ops}")).set("ops.token", "a-token-that-is-long-enough")
    };
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let setup = listen(Setup::new(&vhost.url_through(&wire)));
    let taken = std::net::TcpListener::bind(("127.0.0.1", http)).unwrap();
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    let busy = find(&found, "WRONG", "is in use by another process");
    assert_eq!((&busy["area"], wrong(&found).len()), (&json!("http.listen"), 1), "{found:#?}");
    drop(taken);

    let relay = setup.start().await;
    relay.eventually_connected().await;
    let (code, found) = findings(relay.setup()).await;
    assert_eq!((code, wrong(&found)), (Some(0), vec![]));
    find(&found, "ok", &format!("127.0.0.1:{http} is in use by the running relay"));
    find(&found, "ok", &format!("127.0.0.1:{ops} is in use by the running relay"));

    // The running relay's reason for not delivering is repeated.
    wire.refuse().await;
    wire.cut();
    relay.post(scan(1)).await.expect(200);
    eventually("the running relay to say that it does not deliver", async || {
        let (_, found) = findings(relay.setup()).await;
        let said = |finding: &&Value| finding["area"] == "running relay" && finding["level"] == "WRONG";
        match found.iter().find(said).and_then(|finding| finding["text"].as_str()) {
            Some(text) if text.starts_with("Is RabbitMQ accepting events? No.") => Ok(()),
            _ => Err(json!(found)),
        }
    })
    .await;

    // A relay with another spool cannot have the same ports.
    let (code, found) = findings(&listen(Setup::without_broker())).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", &format!("127.0.0.1:{http} is in use by another relay, which has another spool"));
}

#[tokio::test]
async fn an_alarm_and_a_missing_plugin_are_wrong() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    // As if the plugin were not enabled.
    node.ctl(&["eval", "rabbit_registry:unregister(exchange, <<\"x-consistent-hash\">>)."]).await;
    let queues = json!([{ "name": "prism.scan", "bindings": ["scan.#"], "partitions": 2 }]);
    let (code, found) = findings(&watched(&node, &vhost).set("topology.queues", queues)).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange");

    let setup = watched(&node, &vhost);
    assert_eq!(setup.run(&["topology", "declare"]).await.code, Some(0));
    node.memory_alarm(true).await;
    let (code, found) = findings(&setup).await;
    assert_eq!(code, Some(1));
    find(&found, "WRONG", "A memory or disk alarm blocks publishers");
}

#[tokio::test]
async fn a_damaged_spool_is_wrong_and_stays_as_it_is() {
    let setup = Setup::without_broker();
    let mut relay = setup.start().await;
    relay.post(scan(1)).await.expect(200);
    relay.sigterm();
    relay.wait().await;
    let spool = relay.setup().spool();
    let length = std::fs::metadata(&spool).unwrap().len() as usize;
    std::fs::write(&spool, vec![b'x'; length]).unwrap();
    let checked = relay.run(&["check", "--offline"]).await;
    assert!(checked.code == Some(1) && checked.stdout.contains("  WRONG spool "), "{}", checked.stdout);
    assert_eq!(std::fs::read(&spool).unwrap(), vec![b'x'; length]);
}
