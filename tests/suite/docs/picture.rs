//! The pictures of the console in the README, light and dark. To make them again:
//!
//! ```text
//! PRISM_TEST_SCREENSHOTS=deploy/pictures ./tests/run.sh --test suite docs::picture
//! ```

use super::page::root;
use crate::harness::browser::Browser;
use crate::harness::{Node, Relay, Vhost, samples};

const SIZE: (u32, u32) = (1280, 535);

#[tokio::test]
async fn the_console_of_the_readme_shows_a_relay_that_works() {
    let vhost = Vhost::new(Node::shared().await).await;
    let relay = Relay::start(&vhost).await;
    relay.eventually_connected().await;
    let browser = Browser::start().await;
    browser.look_like(SIZE, false).await;
    browser.open(&format!("{}/", relay.ops())).await;
    browser.shows("#live", "live, ").await;
    for line in samples::EVENTS.lines() {
        relay.post(line).await.expect(200);
    }
    relay.eventually_nothing_pending().await;
    browser.shows("body", "measurements.creation.succeeded").await;
    browser.shows("body", "body_shape_prediction.processing.failed").await;
    browser.shows(".summary", "All accepted events are in RabbitMQ").await;
    for (name, dark) in [("console", false), ("console-dark", true)] {
        browser.look_like(SIZE, dark).await;
        browser.screenshot(name).await;
        let path = root().join("deploy/pictures").join(name).with_extension("png");
        let picture = std::fs::read(path).expect("the picture of the README");
        let number = |at: usize| u32::from_be_bytes(picture[at..at + 4].try_into().expect("four bytes"));
        // The size stands in the first chunk of a PNG.
        assert_eq!((number(16), number(20)), SIZE, "make {name} again: see the head of tests/suite/docs/picture.rs");
    }
    assert_eq!(browser.errors().await, Vec::<String>::new());
}
