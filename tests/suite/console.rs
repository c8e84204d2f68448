//! The console in a real browser: it loads, follows the relay, and acts on parked events.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::browser::Browser;
use crate::harness::samples::{event, scan};
use crate::harness::situations::{self, QUESTIONS, Situation};
use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually, eventually_equal};

const PHONE: (u32, u32) = (390, 844);
const DESKTOP: (u32, u32) = (1440, 1200);
const WIDE: (u32, u32) = (1920, 1080);

async fn open(browser: &Browser, relay: &Relay) {
    browser.look_like(DESKTOP, false).await;
    browser.open(&format!("{}/", relay.ops())).await;
    browser.shows("#live", "live, ").await;
}

/// On each kind of screen: takes a screenshot, and checks for errors and for content beyond the edge.
async fn looks_right(browser: &Browser, name: &str) {
    for (kind, size) in [("wide", WIDE), ("desktop", DESKTOP), ("phone", PHONE)] {
        for (scheme, dark) in [("light", false), ("dark", true)] {
            browser.look_like(size, dark).await;
            // The charts adapt to a new window size a moment later.
            eventually(&format!("{name} to fit on a {kind}"), async || {
                let beyond = browser.run("return document.documentElement.scrollWidth - window.innerWidth").await;
                if beyond.as_i64().unwrap() <= 0 { Ok(()) } else { Err(format!("{beyond} pixels are beyond the edge")) }
            })
            .await;
            browser.screenshot(&format!("{name}-{kind}-{scheme}")).await;
        }
    }
    browser.look_like(DESKTOP, false).await;
    assert_eq!(browser.errors().await, Vec::<String>::new(), "{name}");
}

/// Waits until `/api/status`, `top` and the console describe the situation with the same words, and looks at the page.
async fn shows(browser: &Browser, relay: &Relay, situation: &Situation) {
    situation.is_told(relay).await;
    browser.shows("#summary-detail", situation.detail).await;
    let words = "return [...document.querySelectorAll('#answer-list .word span')].map(word => word.innerText)";
    let questions = "return [...document.querySelectorAll('#answer-list > li')].map(card => card.dataset.question)";
    assert_eq!(browser.run(questions).await, json!(QUESTIONS));
    eventually(&format!("the console to show {situation:?}"), async || {
        let level = browser.run("return document.body.dataset.level").await;
        let headline = browser.text("#summary-text").await;
        let words: Vec<String> = serde_json::from_value(browser.run(words).await).unwrap_or_default();
        let words: Vec<String> = words.iter().map(|word| word.replace('\u{a0}', " ")).collect();
        let is_it = level == situation.level
            && headline.starts_with(situation.text)
            && situation.fits(&words.iter().map(String::as_str).collect::<Vec<_>>());
        if is_it { Ok(()) } else { Err(format!("{level} {headline:?} {words:?}")) }
    })
    .await;
    looks_right(browser, situation.name).await;
}

#[tokio::test]
async fn the_page_and_its_summary_follow_an_outage_of_the_broker() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let relay = Relay::start_through(&vhost, &wire).await;
    relay.eventually_connected().await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    browser.shows("#summary-detail", "No event has come in").await;
    assert_eq!(browser.run("return document.body.dataset.level").await, "ok");
    // Replicas can be told apart.
    let status = relay.status().await;
    let [host, listen] = ["host", "listen"].map(|key| status[key].as_str().unwrap().to_owned());
    assert_eq!(
        (browser.text("#where").await, listen.clone()),
        (format!("{host}, {listen}"), relay.address().to_string())
    );
    assert_eq!(browser.run("return document.title").await, format!("OK - {host}, {listen} - prism-relay"));

    // Charts, counts and the list of events follow the traffic without a reload.
    for number in 0..20 {
        relay.post(scan(number)).await.expect(200);
    }
    browser.shows(".summary", "All accepted events are in RabbitMQ").await;
    browser.shows("#types-rows", "scan.processing.started").await;
    browser.shows("#events-rows", "delivered in").await;
    // The highest of all points, because the newest may already be without a webhook.
    let accepted = "return document.querySelector('#chart-list .plot').getAttribute('aria-label')\
         .match(/Accepted:.*?highest ([\\d.,]+)/)?.[1] ?? 'none'";
    eventually("a webhook in the chart", async || match browser.run(accepted).await {
        some if !["0", "none"].contains(&some.as_str().unwrap()) => Ok(()),
        none => Err(none),
    })
    .await;
    browser.write("#find", "scan-7").await;
    eventually_equal("one event", Value::from(1), async || {
        browser.run("return document.querySelectorAll('#events-rows tr').length").await
    })
    .await;
    let new = event("scan.processing.started", json!({ "scanId": "scan-1", "quality": "partner-user-42" }));
    relay.post(new).await.expect(200);
    browser.shows("#unexpected-rows", "field payload.quality").await;
    let page = browser.run("return document.documentElement.outerHTML").await;
    assert!(!page.as_str().unwrap().contains("partner-user-42"));
    browser.run("document.querySelector('[data-range=\"24h\"]').click()").await;
    eventually("a day in the charts", async || match browser.run(LABEL).await {
        label if label.as_str().unwrap().contains("the last 24h") => Ok(()),
        label => Err(label),
    })
    .await;
    browser.run("document.querySelector('[data-range=\"15min\"]').click()").await;

    wire.refuse().await;
    wire.cut();
    relay.post(scan(100)).await.expect(200);
    browser.shows("#summary-text", "RabbitMQ has been unreachable for").await;
    browser.shows("#summary-detail", "1 event is safe on disk. Prism is being answered.").await;
    browser.shows("#timeline", "Connection lost").await;
    browser.shows("#marks", "connection lost").await;
    wire.accept();
    browser.shows(".summary", "All accepted events are in RabbitMQ").await;
}

/// The first chart as text.
const LABEL: &str = "return document.querySelector('#chart-list .plot').getAttribute('aria-label')";

#[tokio::test]
async fn buttons_retry_one_parked_event_and_remove_another() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1h");
    let relay = setup.start().await;
    let (one, two) = (relay.post(scan(1)).await.id(), relay.post(scan(2)).await.id());
    relay.eventually_parked(2).await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    browser.shows("#parked-rows", &one).await;
    browser.shows("#parked-rows", "No queue is bound for scan.processing.started.").await;
    browser.shows("#parked-rows .command", "prism-relay topology diff").await;
    shows(&browser, &relay, &situations::PARKED).await;

    vhost.create_queue("rest", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.webhooks", "rest", "#").await;
    let button = |action: &str, id: &str| format!("#parked-rows [data-action={action}][aria-label*=\"{id}\"]");
    browser.click(&button("retry", &one)).await;
    browser.shows("#ask-text", "sent to RabbitMQ again").await;
    browser.screenshot("parked-retry").await;
    browser.click("#ask-go").await;
    // Without the click the next retry would come after an hour.
    assert_eq!(vhost.messages("rest", 1).await[0].id(), one);
    relay.eventually_parked(1).await;

    browser.click(&button("remove", &two)).await;
    // Ids of the same minute begin with the same characters.
    assert_eq!(one[..8], two[..8]);
    browser.write("#ask-typed", &two[..8]).await;
    browser.click("#ask-go").await;
    browser.shows("#ask-mistake", "Nothing was removed").await;
    assert_eq!(relay.spool().await.parked, 1);
    browser.run("document.querySelector('#ask-typed').value = ''").await;
    browser.write("#ask-typed", &two[28..]).await;
    browser.click("#ask-go").await;
    relay.eventually_parked(0).await;
    browser.shows("#summary-text", "Nothing is waiting.").await;
    browser.shows("#events-rows", "removed by an operator").await;
    let spool = relay.spool().await;
    assert_eq!((spool.removed, spool.confirmed), (1, 1), "{spool:?}");
    assert_eq!(browser.errors().await, Vec::<String>::new());
}

#[tokio::test]
async fn all_parked_events_are_retried_or_removed_at_once() {
    let vhost = Vhost::new(Node::shared().await).await;
    vhost.create_exchange("prism.webhooks", "topic", json!({})).await;
    let setup = Setup::new(&vhost.url()).set("topology.declare", "off").set("broker.parked_retry", "1h");
    let relay = setup.start().await;
    for number in 0..3 {
        relay.post(scan(number)).await.expect(200);
    }
    relay.eventually_parked(3).await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    let press = "[data-all=removeAll]";
    browser.shows("#parked-all", "Remove all").await;
    browser.click(press).await;
    browser.write("#ask-typed", "2").await;
    browser.click("#ask-go").await;
    browser.shows("#ask-mistake", "Nothing was removed").await;
    // Another one is parked while the dialog is open.
    relay.post(scan(3)).await.expect(200);
    relay.eventually_parked(4).await;
    browser.run("document.querySelector('#ask-typed').value = ''").await;
    browser.write("#ask-typed", "3").await;
    browser.click("#ask-go").await;
    browser.shows("#ask-mistake", "4 events are parked now, not 3; nothing was removed").await;
    browser.click("#ask-cancel").await;
    assert_eq!(relay.spool().await.parked, 4);

    vhost.create_queue("rest", json!({"x-queue-type": "quorum"})).await;
    vhost.bind("prism.webhooks", "rest", "#").await;
    browser.click("[data-all=retryAll]").await;
    browser.click("#ask-go").await;
    relay.eventually_parked(0).await;
    vhost.eventually_depth("rest", 4).await;
    vhost.unbind("prism.webhooks", "rest", "#").await;
    for number in 4..6 {
        relay.post(scan(number)).await.expect(200);
    }
    relay.eventually_parked(2).await;
    browser.shows("#parked-lead", "RabbitMQ could not route").await;
    eventually("both events on the page", async || {
        match browser.run("return document.querySelector('#parked-all').dataset.total").await {
            two if two == "2" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    browser.click(press).await;
    browser.write("#ask-typed", "2").await;
    browser.click("#ask-go").await;
    relay.eventually_parked(0).await;
    let spool = relay.spool().await;
    assert_eq!((spool.confirmed, spool.removed), (4, 2), "{spool:?}");
}

#[tokio::test]
async fn each_situation_has_the_same_words_everywhere_and_looks_right() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    let mut wire = Wire::new(vhost.address());
    let browser = Browser::start().await;
    let setup = Setup::new(&vhost.url_through(&wire)).set("broker.watch_interval", "1s");
    let relay = setup.start().await;
    relay.post(scan(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    open(&browser, &relay).await;
    shows(&browser, &relay, &situations::WELL).await;
    for number in 2..7 {
        relay.post(scan(number)).await.expect(200);
    }
    shows(&browser, &relay, &situations::NO_WORKERS).await;
    vhost.messages("prism.scan", 4).await;
    vhost.reject("prism.scan").await;
    shows(&browser, &relay, &situations::DEAD_LETTERS).await;
    vhost.purge_queue("prism.dead").await;

    node.memory_alarm(true).await;
    relay.post(scan(7)).await.expect(200);
    shows(&browser, &relay, &situations::BLOCKED).await;
    node.memory_alarm(false).await;
    relay.eventually_nothing_pending().await;
    wire.refuse().await;
    wire.cut();
    relay.post(scan(8)).await.expect(200);
    shows(&browser, &relay, &situations::DOWN).await;
    wire.accept();
    relay.eventually_nothing_pending().await;
    vhost.messages("prism.scan", 2).await;
    let queue = format!("rabbit_misc:r(<<\"{}\">>, queue, <<\"prism.scan\">>)", vhost.name());
    let stop =
        format!("{{ok, Q}} = rabbit_amqqueue:lookup({queue}), ra:stop_server(quorum_queues, amqqueue:get_pid(Q)).");
    node.ctl(&["eval", &stop]).await;
    relay.post(scan(9)).await.expect(200);
    shows(&browser, &relay, &situations::QUEUE_DOWN).await;
    browser.open("about:blank").await;
    drop(relay);

    let relay = Setup::without_broker().set("spool.max_bytes", "8KiB").start().await;
    for number in 0..18 {
        relay.post(scan(number)).await.expect(200);
    }
    open(&browser, &relay).await;
    // Before the first connection the page shows where the relay looks for RabbitMQ.
    browser.shows("#broker-facts", "amqp://").await;
    shows(&browser, &relay, &situations::NEARLY_FULL).await;
    let mut number = 18;
    while relay.post(scan(number)).await.status == 200 {
        number += 1;
    }
    shows(&browser, &relay, &situations::FULL).await;
    browser.open("about:blank").await;
    drop(relay);

    let relay = Setup::new(&vhost.url()).set("signature.secrets", json!(["whsec_another_0123456789"])).start().await;
    relay.eventually_connected().await;
    open(&browser, &relay).await;
    for number in 0..20 {
        relay.post(scan(number)).await.expect(401);
    }
    browser.shows("#refusals-rows", "invalid-signature").await;
    shows(&browser, &relay, &situations::WRONG_SECRET).await;
    // The entry of the runbook is a page of the relay itself.
    browser.run("location.assign(document.querySelector('#summary-runbook').href)").await;
    browser.shows("#prismrelayeverysignaturefails", "PrismRelayEverySignatureFails").await;
    browser.screenshot("runbook").await;
    assert_eq!(browser.errors().await, Vec::<String>::new());
}

/// A proxy that passes everything below `/relay-0/` on, without that path.
async fn below_a_path(target: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let relay = TcpStream::connect(target).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_relay, mut to_relay)) =
                (client.into_split(), relay.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_relay, &mut to_client).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 16 * 1024];
                while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
                    // A browser sends the head of a request at once.
                    let head = String::from_utf8_lossy(&buffer[..length]).replacen(" /relay-0/", " /", 1);
                    if to_relay.write_all(head.as_bytes()).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn with_a_token_the_console_asks_for_it_below_any_path() {
    let relay = Setup::without_broker().set("ops.token", "a-token-that-is-long-enough").start();
    let relay = relay.await;
    let browser = Browser::start().await;
    let proxy = below_a_path(relay.ops().trim_start_matches("http://").parse().unwrap()).await;
    browser.open(&format!("http://{proxy}/relay-0/")).await;
    browser.shows("label", "token").await;
    browser.screenshot("login").await;
    browser.write("#token", "a-token-that-is-wrong").await;
    browser.click("button").await;
    browser.shows("#wrong", "Wrong token").await;
    browser.write("#token", "a-token-that-is-long-enough").await;
    browser.click("button").await;
    browser.shows("#live", "live, ").await;
    browser.shows("#summary-text", "RabbitMQ").await;
    assert_eq!(browser.run("return location.pathname").await, "/relay-0/");
    assert_eq!(browser.errors().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_console_says_that_it_lost_the_relay_and_reconnects() {
    let setup = Setup::without_broker().set("notify.url", "http://127.0.0.1:9/key");
    let port = crate::harness::ports::free();
    let mut relay = setup.set("ops.listen", format!("127.0.0.1:{port}")).start().await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    browser.shows("#about", "Notices go to http://127.0.0.1:9; none was sent yet.").await;
    relay.kill9().await;
    browser.shows("#lost", "what you see is old").await;
    relay.start_again().await;
    browser.shows("#live", "live, ").await;
}
