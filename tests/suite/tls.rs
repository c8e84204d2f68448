//! TLS on both sides: for webhooks, and to the broker.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;

use crate::harness::certificates::Issued;
use crate::harness::http::{now, sign, tls_config};
use crate::harness::marks::PASSWORD;
use crate::harness::samples::scan;
use crate::harness::{Authority, Client, Node, Raw, Relay, SECRET, Setup, Vhost, eventually};

/// Writes a certificate and its key to the files that the relay reads.
fn install(setup: &Setup, issued: &Issued) -> serde_json::Value {
    json!({
        "certificate": setup.file("tls.crt", &issued.certificate),
        "private_key": setup.file("tls.key", &issued.private_key),
    })
}

fn with_tls(issued: &Issued) -> Setup {
    let setup = Setup::without_broker();
    let tls = install(&setup, issued);
    setup.set("http.tls", tls)
}

/// The URL for webhooks, with the host name in the certificate.
fn url(relay: &Relay) -> String {
    assert!(relay.url().starts_with("https://"), "{}", relay.url());
    relay.url().replace("127.0.0.1", "localhost")
}

async fn post(client: &Client, url: &str, body: &str) -> Result<u16, String> {
    let timestamp = now();
    let signature = sign(SECRET, &timestamp, body.as_bytes());
    let headers = [("prism-timestamp", timestamp.as_str()), ("prism-signature", signature.as_str())];
    client.send(Method::POST, url, &headers, body.to_owned()).await.map(|answer| answer.status)
}

async fn connect(address: SocketAddr, config: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), stream).await
}

/// The certificate that the relay presents on a new connection.
async fn presented(relay: &Relay, authority: &Authority) -> Vec<u8> {
    let stream = connect(relay.address(), tls_config(Some(&authority.pem()), None)).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn webhooks_are_accepted_over_tls() {
    let authority = Authority::new();
    let relay = with_tls(&authority.issue_server()).start().await;
    let client = Client::tls(tls_config(Some(&authority.pem()), None));
    assert_eq!(post(&client, &url(&relay), &scan(1)).await, Ok(200));
    let mut config = tls_config(Some(&authority.pem()), None);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = connect(relay.address(), config.clone()).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
    config.alpn_protocols = vec![b"h2".to_vec()];
    assert!(connect(relay.address(), config).await.is_err(), "HTTP/2 alone is refused");
    let send = ["send", "--url", &url(&relay), "--ca", "ca.pem", "--no-retry"];
    relay.setup().file("ca.pem", authority.pem());
    let sent = relay.run(&send).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    relay.setup().file("ca.pem", Authority::new().pem());
    let sent = relay.run(&send).await;
    assert!(sent.code == Some(1) && sent.stdout.contains("was not issued by a trusted authority"), "{sent:?}");
}

#[tokio::test]
async fn clients_need_a_certificate_if_the_relay_asks_for_one() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let setup = Setup::without_broker();
    let mut tls = install(&setup, &authority.issue_server());
    tls["client_ca"] = json!(setup.file("clients.crt", clients.pem()));
    let relay = setup.set("http.tls", tls).start().await;
    let attempt = async |identity: Option<Issued>| {
        let client = Client::tls(tls_config(Some(&authority.pem()), identity.as_ref()));
        post(&client, &url(&relay), &scan(1)).await
    };
    assert_eq!(attempt(Some(clients.issue("prism", 1))).await, Ok(200));
    assert!(attempt(None).await.is_err());
    assert!(attempt(Some(authority.issue("prism", 1))).await.is_err(), "signed by another authority");
    assert!(attempt(Some(clients.issue("prism", -1))).await.is_err(), "expired");
    let refused = [("listener", "http"), ("reason", "tls-handshake")];
    relay.eventually_metric("prism_relay_connections_refused_total", &refused, 3.0).await;
}

#[tokio::test]
async fn a_new_certificate_is_reloaded_and_open_connections_stay() {
    let authority = Authority::new();
    // The open connection is idle for some seconds.
    let mut relay = with_tls(&authority.issue("old", 10)).set("http.header_timeout", "60s").start().await;
    let days = relay.metric("prism_relay_tls_certificate_days_left", &[]).await;
    assert!((9.9..=10.0).contains(&days), "{days}");
    relay.eventually_logs("expires soon or has expired").await;
    let old = presented(&relay, &authority).await;
    let mut open = connect(relay.address(), tls_config(Some(&authority.pem()), None)).await.unwrap();
    let ask = "GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n";
    let mut answer = async || {
        open.write_all(ask.as_bytes()).await.unwrap();
        let mut bytes = vec![0; 1000];
        let count = open.read(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    assert!(answer().await.starts_with("HTTP/1.1 200 "));

    install(relay.setup(), &authority.issue("new", 300));
    eventually("the new certificate", async || {
        if presented(&relay, &authority).await == old { Err("the old one") } else { Ok(()) }
    })
    .await;
    assert!(answer().await.starts_with("HTTP/1.1 200 "), "the old connection is no longer served");
    assert!(relay.metric("prism_relay_tls_certificate_days_left", &[]).await > 299.0);

    // An unusable file changes nothing; the log warns.
    let new = presented(&relay, &authority).await;
    let keyless = Issued { private_key: String::new(), ..authority.issue("x", 1) };
    for (bad, expected) in [(authority.issue("expired", -1), "expired on"), (keyless, "contains no private key")] {
        install(relay.setup(), &bad);
        relay.signal("HUP");
        let warning = relay.eventually_logs(expected).await;
        assert_eq!((&warning["level"], &warning["key"]), (&json!("WARN"), &json!("http.tls")), "{warning}");
    }
    // The relay may have tried to reload by itself as well.
    assert!(relay.metric("prism_relay_reloads_total", &[("outcome", "failed")]).await >= 2.0);
    assert_eq!(presented(&relay, &authority).await, new);
}

#[tokio::test]
async fn unusable_certificates_are_reported_at_the_start() {
    let (authority, other) = (Authority::new(), Authority::new());
    let good = authority.issue_server();
    // A key without its line ends, as from an environment variable. The parser's own error would quote all of it.
    let one_line = good.private_key.trim().replace('\n', " ");
    let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n".to_owned();
    for (issued, expected) in [
        (authority.issue("expired", -1), "http.tls: tls.crt expired on "),
        (Issued { certificate: "nothing".to_owned(), ..good.clone() }, "tls.crt contains no certificate in PEM format"),
        (Issued { certificate: broken, ..good.clone() }, "tls.crt is broken: "),
        (authority.issue_from("not yet", 7, 30), "http.tls: tls.crt is not valid before "),
        (Issued { private_key: "nothing".to_owned(), ..good.clone() }, "tls.key contains no private key in PEM format"),
        (Issued { private_key: one_line.clone(), ..good.clone() }, "tls.key is broken: a section has no end"),
        (
            Issued { private_key: other.issue_server().private_key, ..good },
            "certificate tls.crt and private key tls.key do not match",
        ),
    ] {
        let setup = Setup::without_broker();
        install(&setup, &issued);
        let setup = setup.set("http.tls", json!({"certificate": "tls.crt", "private_key": "tls.key"}));
        for command in ["serve", "check"] {
            let ended = setup.run(&[command]).await;
            assert_eq!(ended.code, Some(64), "{ended:?}");
            assert!(ended.stderr.contains(expected), "{expected:?} is not in {}", ended.stderr);
            let key = &one_line[40..80];
            let bytes = format!("{:?}", key.as_bytes());
            let quoted = [key, bytes.trim_matches(['[', ']'])].into_iter().any(|key| ended.stderr.contains(key));
            assert!(!quoted, "the key is quoted: {}", ended.stderr);
        }
    }
}

#[tokio::test]
async fn handshakes_have_a_deadline_and_other_protocols_are_closed() {
    let relay = with_tls(&Authority::new().issue_server()).set("http.header_timeout", "300ms").start().await;
    // Nothing at all, and the first part of a ClientHello.
    for start in [b"".as_slice(), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"] {
        let mut raw = Raw::connect(relay.address()).await;
        raw.write(start).await.unwrap();
        raw.read_to_end().await;
    }
    let plain = Raw::exchange(relay.address(), "GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n").await;
    assert!(!plain.contains("HTTP"), "{plain}");
    let refused = [("listener", "http"), ("reason", "tls-handshake")];
    relay.eventually_metric("prism_relay_connections_refused_total", &refused, 3.0).await;
}

// -- to the broker ----------------------------------------------------------------------------------------------------

/// A relay that reaches this vhost with TLS, and believes the node's authority.
fn to_broker(node: &Node, url: &str) -> Setup {
    let setup = Setup::new(url);
    let ca = setup.file("rabbitmq-ca.crt", node.authority().pem());
    // The node's certificate is for localhost, not for the address in the URL.
    setup.set("broker.tls", json!({ "ca": ca, "server_name": "localhost" }))
}

#[tokio::test]
async fn the_broker_is_reached_with_tls() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let url = vhost.tls_url(&format!("guest:{PASSWORD}@"), node.tls_address());
    let relay = to_broker(node, &url).start().await;
    let id = relay.post(scan(1)).await.id();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    let status = relay.status().await;
    assert!(status["broker"]["url"].as_str().unwrap().starts_with("amqps://guest@127.0.0.1:"), "{status}");
    eventually("a connection with TLS", async || {
        let connections = vhost.connections().await;
        if connections.iter().any(|connection| connection["ssl"] == true) {
            Ok(())
        } else {
            Err(format!("{connections:?}"))
        }
    })
    .await;
    let check = relay.run(&["check"]).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
}

#[tokio::test]
async fn a_broker_with_the_wrong_certificate_gets_nothing() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let url = vhost.tls_url(&format!("guest:{PASSWORD}@"), node.tls_address());
    let relay = to_broker(node, &url).start().await;
    relay.post(scan(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;

    let stranger = Setup::new(&url);
    let ca = stranger.file("rabbitmq-ca.crt", Authority::new().pem());
    let stranger = stranger.set("broker.tls", json!({ "ca": ca, "server_name": "localhost" })).start().await;
    stranger.post(scan(2)).await.expect(200);
    let line = stranger.eventually_logs("not delivering").await;
    assert!(line["error"].as_str().unwrap().contains("was not issued by a trusted authority"), "{line}");
    // The next attempt reads the right authority from the same file, and succeeds.
    stranger.setup().file("rabbitmq-ca.crt", node.authority().pem());
    assert_eq!(vhost.messages("prism.scan", 1).await[0].text(), scan(2));

    for (name, tls) in [("127.0.0.1", json!({})), ("rabbit.example", json!({ "server_name": "rabbit.example" }))] {
        let misnamed = to_broker(node, &url);
        let mut tls = tls;
        tls["ca"] = json!(misnamed.folder().join("rabbitmq-ca.crt"));
        let misnamed = misnamed.set("broker.tls", tls).start().await;
        let line = misnamed.eventually_logs("not delivering").await;
        assert!(
            line["error"]
                .as_str()
                .unwrap()
                .contains(&format!("as {name} failed: the server's certificate is for another name: it has")),
            "{line}"
        );
    }

    // A listener without TLS.
    let url = vhost.tls_url(&format!("guest:{PASSWORD}@"), vhost.address());
    let plain = to_broker(node, &url).start().await;
    let line = plain.eventually_logs("not delivering").await;
    assert!(line["error"].as_str().unwrap().contains("the server does not speak TLS on this port"), "{line}");
}

#[tokio::test]
async fn a_port_with_another_protocol_is_named() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    // RabbitMQ may answer in its protocol, or just close the connection. The error names the right port in either case.
    for address in [node.tls_address(), ([127, 0, 0, 1], node.management().port).into()] {
        let relay = Setup::new(&format!("amqp://guest:{PASSWORD}@{address}/{}", vhost.name())).start().await;
        let line = relay.eventually_logs("not delivering").await;
        let error = line["error"].as_str().unwrap();
        let is_named =
            error.contains("does not speak AMQP on this port but") || error.contains("without an answer; the port");
        assert!(is_named && error.contains("5671"), "{line}");
    }
}

#[tokio::test]
async fn a_certificate_is_a_login() {
    let node = Node::shared().await;
    let vhost = Vhost::new(node).await;
    let user = format!("relay-{}", uuid::Uuid::now_v7());
    node.create_user(&user, "never used").await;
    vhost.permit(&user, ".*", ".*", ".*").await;
    let url = format!("{}?auth_mechanism=external", vhost.tls_url("", node.tls_address()));
    let setup = to_broker(node, &url);
    let own = node.authority().issue(&user, 1);
    let tls = json!({
        "ca": setup.folder().join("rabbitmq-ca.crt"),
        "server_name": "localhost",
        "certificate": setup.file("client.crt", &own.certificate),
        "private_key": setup.file("client.key", &own.private_key),
    });
    let relay = setup.set("broker.tls", tls).start().await;
    relay.post(scan(1)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    eventually("a connection of this user", async || {
        let connections = vhost.connections().await;
        if connections.iter().any(|connection| connection["user"] == user) {
            Ok(())
        } else {
            Err(format!("{connections:?}"))
        }
    })
    .await;
    // Another certificate takes effect with the next connection.
    let unknown = node.authority().issue("an unknown user", 1);
    relay.setup().file("client.crt", &unknown.certificate);
    relay.setup().file("client.key", &unknown.private_key);
    relay.eventually_logs("reloaded").await;
    vhost.eventually_close_connections().await;
    let line = relay.eventually_logs("refused the login").await;
    assert!(line["error"].as_str().unwrap().contains("amqps://127.0.0.1"), "{line}");
}
