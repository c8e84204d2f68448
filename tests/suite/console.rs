//! The console in a real browser: it loads, follows the relay, and acts on parked events.

use serde_json::{Value, json};

use crate::harness::browser::Browser;
use crate::harness::samples::{event, scan};
use crate::harness::{Node, Relay, Setup, Vhost, Wire, eventually, eventually_equal};

const PHONE: (u32, u32) = (390, 844);
const DESKTOP: (u32, u32) = (1440, 1200);

async fn open(browser: &Browser, relay: &Relay) {
    browser.look_like(DESKTOP, false).await;
    browser.open(&format!("{}/", relay.ops())).await;
    browser.shows("#live", "live, ").await;
}

/// On each kind of screen: takes a screenshot, and checks for errors and for content beyond the edge.
async fn looks_right(browser: &Browser, name: &str) {
    for (kind, size) in [("desktop", DESKTOP), ("phone", PHONE)] {
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

/// Waits until the words of the seven answers begin as expected.
async fn answers(browser: &Browser, expected: [&str; 7]) {
    let words =
        "return [...document.querySelectorAll('#answer-list [data-question] .word span')].map(word => word.innerText)";
    let questions =
        "return [...document.querySelectorAll('#answer-list [data-question]')].map(card => card.dataset.question)";
    let asked = ["sending", "accepting", "broker", "lag", "parked", "lost", "workers"];
    assert_eq!(browser.run(questions).await, json!(asked));
    eventually(&format!("the answers {expected:?}"), async || {
        let words = browser.run(words).await;
        let fits = |(word, expected): (&Value, &&str)| word.as_str().is_some_and(|word| word.starts_with(*expected));
        let words = words.as_array().cloned().unwrap_or_default();
        if words.iter().zip(&expected).all(fits) { Ok(()) } else { Err(json!(words)) }
    })
    .await;
}

#[tokio::test]
async fn the_page_and_its_summary_follow_an_outage_of_the_broker() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    let relay = Relay::start_through(&vhost, &wire).await;
    relay.eventually_connected().await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    browser.shows("#summary-text", "no event has come in").await;
    assert_eq!(browser.run("return document.body.dataset.level").await, "ok");

    // Charts, counts and the list of events follow the traffic without a reload.
    for number in 0..20 {
        relay.post(scan(number)).await.expect(200);
    }
    browser.shows("#summary-text", "All accepted events are in RabbitMQ; the last one").await;
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
    answers(&browser, ["Yes", "Yes", "Yes", "Not at all", "No", "No", ""]).await;
    looks_right(&browser, "well").await;

    wire.refuse().await;
    wire.cut();
    relay.post(scan(100)).await.expect(200);
    browser.shows("#summary-text", "RabbitMQ has been unreachable for").await;
    browser.shows("#summary-text", "1 event is safe on disk").await;
    browser.shows("#timeline", "Connection lost").await;
    answers(&browser, ["Yes", "Yes", "No", "", "No", "No", ""]).await;
    looks_right(&browser, "down").await;
    wire.accept();
    browser.shows("#summary-text", "All accepted events are in RabbitMQ").await;
}

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
    browser.shows("#summary-text", "2 events are parked").await;
    browser.shows("#parked-rows", &one).await;
    answers(&browser, ["Yes", "Yes", "Yes", "Not at all", "2 events", "No", ""]).await;
    looks_right(&browser, "parked").await;

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
    browser.shows("#summary-text", "Nothing is waiting; the last event reached RabbitMQ").await;
    browser.shows("#events-rows", "removed by an operator").await;
    let spool = relay.spool().await;
    assert_eq!((spool.removed, spool.confirmed), (1, 1), "{spool:?}");
    assert_eq!(browser.errors().await, Vec::<String>::new());
}

#[tokio::test]
async fn each_situation_shows_in_summary_and_answers() {
    let node = Node::start().await;
    let vhost = Vhost::new(&node).await;
    let browser = Browser::start().await;

    let relay = Relay::start(&vhost).await;
    relay.post(scan(1)).await.expect(200);
    relay.eventually_nothing_pending().await;
    open(&browser, &relay).await;
    node.memory_alarm(true).await;
    relay.post(scan(2)).await.expect(200);
    browser.shows("#summary-text", "RabbitMQ has been refusing messages for").await;
    browser.shows("#timeline", "Blocked by RabbitMQ").await;
    answers(&browser, ["Yes", "Yes", "No, it is blocked", "", "No", "No", ""]).await;
    looks_right(&browser, "blocked").await;
    node.memory_alarm(false).await;
    browser.shows("#summary-text", "All accepted events are in RabbitMQ").await;
    browser.open("about:blank").await;
    drop(relay);

    let setup = Setup::without_broker().set("spool.max_bytes", "8KiB");
    let relay = setup.start().await;
    for number in 0..18 {
        relay.post(scan(number)).await.expect(200);
    }
    open(&browser, &relay).await;
    browser.shows("#summary-text", "RabbitMQ has been unreachable").await;
    browser.shows("#summary-text", "The spool is 8").await;
    answers(&browser, ["Yes", "", "No", "", "No", "No", ""]).await;
    looks_right(&browser, "nearly-full").await;
    browser.open("about:blank").await;
    drop(relay);

    let relay = Setup::new(&vhost.url()).set("signature.secrets", json!(["whsec_another_0123456789"])).start().await;
    relay.eventually_connected().await;
    open(&browser, &relay).await;
    for number in 0..20 {
        relay.post(scan(number)).await.expect(401);
    }
    browser.shows("#summary-text", "Every webhook is being refused").await;
    browser.shows("#summary-text", "another secret").await;
    browser.shows("#refusals-rows", "invalid-signature").await;
    answers(&browser, ["Yes", "No", "Yes", "Not at all", "No", "", ""]).await;
    looks_right(&browser, "wrong-secret").await;
}

#[tokio::test]
async fn with_a_token_the_console_asks_for_it() {
    let relay = Setup::without_broker().set("ops.token", "a-token-that-is-long-enough").start();
    let relay = relay.await;
    let browser = Browser::start().await;
    browser.open(&format!("{}/", relay.ops())).await;
    browser.shows("label", "token").await;
    browser.screenshot("login").await;
    browser.write("#token", "a-token-that-is-wrong").await;
    browser.click("button").await;
    browser.shows("#wrong", "Wrong token").await;
    browser.write("#token", "a-token-that-is-long-enough").await;
    browser.click("button").await;
    browser.shows("#live", "live, ").await;
    browser.shows("#summary-text", "RabbitMQ").await;
    assert_eq!(browser.errors().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_console_says_that_it_lost_the_relay_and_reconnects() {
    let setup = Setup::without_broker();
    let port = crate::harness::ports::free();
    let mut relay = setup.set("ops.listen", format!("127.0.0.1:{port}")).start().await;
    let browser = Browser::start().await;
    open(&browser, &relay).await;
    relay.kill9().await;
    browser.shows("#lost", "what you see is old").await;
    relay.start_again().await;
    browser.shows("#live", "live, ").await;
}
