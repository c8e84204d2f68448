//! Secrets and passwords that change while the relay runs.

use crate::harness::http::{now, sign};
use crate::harness::samples::scan;
use crate::harness::{Node, Relay, Setup, Vhost, eventually};

/// The status of the answer to a webhook signed with `secret`.
async fn status(relay: &Relay, secret: &str) -> u16 {
    let (body, timestamp) = (scan(0), now());
    let signature = sign(secret, &timestamp, body.as_bytes());
    relay.post_with(&[("prism-timestamp", &timestamp), ("prism-signature", &signature)], body).await.status
}

async fn eventually_status(relay: &Relay, secret: &str, expected: u16) {
    eventually(&format!("{secret} to be answered {expected}"), async || match status(relay, secret).await {
        status if status == expected => Ok(()),
        status => Err(status),
    })
    .await;
}

fn verified(position: &str) -> [(&str, &str); 1] {
    [("secret", position)]
}

#[tokio::test]
async fn the_signature_secret_is_rotated_without_a_restart() {
    let setup = Setup::without_broker().unset("signature.secrets");
    let file = setup.file("secrets", "whsec_one_0123456789\n");
    let mut relay = setup.set("signature.secrets_file", file.to_str().unwrap()).start().await;
    let metric = "prism_relay_signature_verified_total";
    assert_eq!(
        (status(&relay, "whsec_one_0123456789").await, status(&relay, "whsec_two_0123456789").await),
        (200, 401)
    );
    assert_eq!(relay.metric(metric, &verified("1")).await, 1.0);

    // Both secrets, then only the new one; the relay notices each change by itself.
    relay.setup().file("secrets", "whsec_two_0123456789\nwhsec_one_0123456789\n");
    eventually_status(&relay, "whsec_two_0123456789", 200).await;
    assert_eq!(status(&relay, "whsec_one_0123456789").await, 200);
    assert_eq!(relay.metric(metric, &verified("2")).await, 1.0, "the old secret still works");
    relay.setup().file("secrets", "whsec_two_0123456789\n");
    eventually_status(&relay, "whsec_one_0123456789", 401).await;

    // An unusable file changes nothing.
    for (bad, expected) in [(b"\n".as_slice(), "holds no secret"), (b"whsec_\xff", "is not UTF-8")] {
        relay.setup().file("secrets", bad);
        let line = relay.eventually_logs(expected).await;
        assert_eq!(line["key"], "signature.secrets_file", "{line}");
        assert_eq!(status(&relay, "whsec_two_0123456789").await, 200);
    }
    std::fs::remove_file(&file).unwrap();
    relay.eventually_logs("cannot be read: No such file").await;
    assert_eq!(status(&relay, "whsec_two_0123456789").await, 200);

    // SIGHUP reloads at once.
    relay.setup().file("secrets", "whsec_three_0123456789\n");
    relay.signal("HUP");
    eventually_status(&relay, "whsec_three_0123456789", 200).await;
    assert_eq!(relay.metric("prism_relay_reloads_total", &[("outcome", "failed")]).await, 3.0);
    for secret in ["whsec_one_0123456789", "whsec_two_0123456789", "whsec_three_0123456789", "whsec_X\u{fffd}"] {
        assert!(!relay.log_text().contains(secret), "{secret} in the log");
    }
}

#[tokio::test]
async fn sighup_without_secret_files_does_not_end_the_relay() {
    let mut relay = Setup::without_broker().start().await;
    relay.signal("HUP");
    relay.eventually_logs("so there is nothing to reload").await;
    relay.post(scan(1)).await.expect(200);
}

#[tokio::test]
async fn the_broker_password_is_rotated_without_a_restart() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = format!("relay-{}", uuid::Uuid::now_v7());
    node.create_user(&user, "first").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    let url = format!("amqp://{user}@{}/{}", vhost.address(), vhost.name());
    let setup = Setup::new(&url);
    let file = setup.file("password", "first\n");
    let mut relay = setup.set("broker.password_file", file.to_str().unwrap()).start().await;
    let mut sent = 0;
    let mut arrives = async |relay: &Relay| {
        sent += 1;
        let id = relay.post(scan(sent)).await.id();
        assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    };
    let taken_up = async |relay: &Relay, times: f64| {
        relay.eventually_metric("prism_relay_reloads_total", &[("outcome", "done")], times).await;
    };
    arrives(&relay).await;

    // The broker changes first: the open connection stays, and a new one fails until the file changes too.
    node.create_user(&user, "second").await;
    vhost.eventually_close_connections().await;
    relay.eventually_logs("check user, password and virtual host").await;
    relay.setup().file("password", "second\n");
    arrives(&relay).await;

    // The file first: the open connection stays; a new one is refused until the broker knows the new password.
    relay.setup().file("password", "third\n");
    taken_up(&relay, 2.0).await;
    node.create_user(&user, "third").await;
    vhost.eventually_close_connections().await;
    arrives(&relay).await;

    relay.setup().file("password", "");
    relay.eventually_logs("is empty").await;
    vhost.eventually_close_connections().await;
    arrives(&relay).await;

    // A wrong password, corrected before the next connection.
    for (password, times) in [("wrong\n", 3.0), ("third\n", 4.0)] {
        relay.setup().file("password", password);
        taken_up(&relay, times).await;
    }
    relay.signal("HUP");
    taken_up(&relay, 5.0).await;
    vhost.eventually_close_connections().await;
    arrives(&relay).await;
    for password in ["first", "second", "third"] {
        assert!(!relay.log_text().contains(&format!("\"{password}")), "{password} in the log");
    }
}
