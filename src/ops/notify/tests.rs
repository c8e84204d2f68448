//! Addresses, and a notifier in front of a receiver that this test plays.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
/// How long a receiver waits for a notice that must come.
const WAIT: Duration = Duration::from_secs(30);

/// A request as the receiver got it.
struct Received {
    head: String,
    body: Value,
    raw: Vec<u8>,
}

impl Received {
    fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}: ")))?;
        Some(line.split_once(": ")?.1)
    }
}

/// Takes one request and answers it with this status line.
async fn receive(listener: &TcpListener, status: &str) -> Received {
    let receive = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = Vec::new();
        loop {
            stream.read_buf(&mut bytes).await.unwrap();
            let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let raw = bytes[end + 4..].to_vec();
            let mut received = Received { head, body: Value::Null, raw };
            let length: usize = received.header("content-length").unwrap().parse().unwrap();
            if received.raw.len() < length {
                continue;
            }
            received.body = serde_json::from_slice(&received.raw).unwrap();
            let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            return received;
        }
    };
    timeout(WAIT, receive).await.expect("a notice comes")
}

fn headline(level: Level, answer: Option<&'static str>) -> Headline {
    let (text, advice) = match level {
        Level::Ok => ("All is well.", "Nothing to do."),
        _ => ("RabbitMQ is away.", "Start it."),
    };
    let (text, advice) = (text.to_owned(), advice.to_owned());
    Headline { level, answer, text, detail: String::new(), advice, runbook: None }
}

/// A running notifier that posts to `address`, with its spool in `folder`.
fn notifier(address: &str, secret: Option<&str>, folder: &Path) -> Arc<Notifier> {
    let target = Some(Target::parse(address).unwrap());
    let settings = Settings { target, secret: secret.map(Secret::new), secret_file: None };
    let notifier = Arc::new(Notifier::new(settings, "relay-1".to_owned(), &folder.join("spool.db")));
    let running = Arc::clone(&notifier);
    tokio::spawn(async move { running.run().await });
    notifier
}

/// The notifier sees this headline now and a minute later.
fn see_for_a_minute(notifier: &Notifier, headline: &Headline, now: &mut Instant) {
    for _ in 0..2 {
        notifier.observe(headline, *now);
        *now += MINUTE;
    }
}

async fn eventually_last(notifier: &Notifier, expected: State) -> LastNotice {
    let poll = async {
        loop {
            let last = notifier.last().clone();
            match last {
                Some(last) if last.state == expected => return last,
                _ => sleep(Duration::from_millis(5)).await,
            }
        }
    };
    timeout(WAIT, poll).await.expect("the notice reaches this state")
}

#[test]
fn an_address_shows_its_origin_only() {
    for (text, origin, url, login) in [
        (
            "https://hooks.example.com/T0/secret?k=1",
            "https://hooks.example.com",
            "https://hooks.example.com/T0/secret?k=1",
            None,
        ),
        ("http://user:p%40ss@127.0.0.1:9/x", "http://127.0.0.1:9", "http://127.0.0.1:9/x", Some("Basic dXNlcjpwQHNz")),
        ("https://example.com", "https://example.com", "https://example.com/", None),
    ] {
        let target = Target::parse(text).unwrap();
        assert_eq!((target.origin(), target.url.expose()), (origin, url));
        assert_eq!(target.authorization.as_ref().map(Secret::expose), login);
        let shown = format!("{target:?}");
        assert!(!shown.contains("secret?") && !shown.contains("p%40ss") && !shown.contains("dXNl"), "{shown}");
    }
    for text in ["", "hooks.example.com", "/hook", "ftp://example.com", "https://", "amqp://a:b@c/"] {
        assert_eq!(Target::parse(text).unwrap_err(), NOT_AN_ADDRESS, "{text:?}");
    }
}

#[tokio::test]
async fn a_notice_is_signed_tried_again_and_kept_for_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://user:login@{}/key", listener.local_addr().unwrap());
    let (mut now, problem) = (Instant::now(), headline(Level::Problem, Some("broker")));
    let first = notifier(&address, Some("0123456789abcdef"), folder.path());
    assert!(first.report().unwrap().last.is_none());
    see_for_a_minute(&first, &problem, &mut now);
    let refused = receive(&listener, "302 Found\r\nlocation: http://127.0.0.1:1/").await;
    let error = eventually_last(&first, State::Trying).await.error.unwrap();
    assert_eq!(error, "answers 302, a redirect, which is not followed");
    let received = receive(&listener, "204 No Content").await;
    assert_eq!(received.body, refused.body);
    assert!(received.head.starts_with("POST /key HTTP/1.1\r\n"), "{}", received.head);
    let since: Timestamp = received.body["since"].as_str().unwrap().parse().unwrap();
    assert!(since.duration_until(Timestamp::now()).as_secs() < 600, "{since}");
    let expected = json!({
        "level": "problem", "answer": "broker", "text": "RabbitMQ is away.", "remedy": "Start it.", "host": "relay-1",
        "since": received.body["since"],
    });
    assert_eq!(received.body, expected);
    let timestamp = received.header(TIMESTAMP_HEADER).unwrap();
    let signature = sign(&Secret::new("0123456789abcdef"), timestamp, &received.raw);
    assert_eq!(received.header(SIGNATURE_HEADER), Some(signature.as_str()));
    assert_eq!(received.header("authorization"), Some("Basic dXNlcjpsb2dpbg=="));
    eventually_last(&first, State::Sent).await;
    let kept = async {
        while prepare(&first.file).unwrap().is_none() {
            sleep(Duration::from_millis(5)).await
        }
    };
    timeout(WAIT, kept).await.expect("the notice is kept");

    // The next process does not repeat it, and reports its end. Its secret was taken away.
    let second = notifier(&address, None, folder.path());
    let shown = serde_json::to_value(second.report()).unwrap();
    assert_eq!((&shown["last"]["state"], &shown["last"]["level"]), (&json!("sent"), &json!("problem")), "{shown}");
    assert!(!shown.to_string().contains("login") && !shown.to_string().contains("key"), "{shown}");
    see_for_a_minute(&second, &problem, &mut now);
    see_for_a_minute(&second, &headline(Level::Ok, None), &mut now);
    let received = receive(&listener, "200 OK").await;
    assert_eq!((&received.body["level"], &received.body["answer"]), (&json!("ok"), &json!("broker")));
    assert_eq!(received.header(SIGNATURE_HEADER), None);
}

#[tokio::test]
async fn the_newest_notice_replaces_one_that_no_receiver_takes() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let (mut now, notifier) = (Instant::now(), notifier(&address, None, folder.path()));
    see_for_a_minute(&notifier, &headline(Level::Problem, Some("broker")), &mut now);
    // The receiver hangs: it takes the connection and does not answer. Observing does not wait for it.
    let (hanging, _) = timeout(WAIT, listener.accept()).await.unwrap().unwrap();
    for _ in 0..100 {
        see_for_a_minute(&notifier, &headline(Level::Warning, Some("lag")), &mut now);
        see_for_a_minute(&notifier, &headline(Level::Problem, Some("broker")), &mut now);
    }
    see_for_a_minute(&notifier, &headline(Level::Ok, None), &mut now);
    drop(hanging);
    assert_eq!(receive(&listener, "200 OK").await.body["level"], "ok");
    let last = eventually_last(&notifier, State::Sent).await;
    assert_eq!(last.notice.text, "All is well.");
}

#[test]
fn a_kept_notice_that_cannot_be_read_counts_as_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spool.db.notice");
    assert!(prepare(&file).unwrap().is_none());
    for damaged in ["", "   ", "{\"to\":\"0011"] {
        std::fs::write(&file, damaged).unwrap();
        assert!(prepare(&file).unwrap().is_none(), "{damaged:?}");
        keep(&file, &kept_notice("Late.")).unwrap();
        assert_eq!(prepare(&file).unwrap().unwrap().last.notice, kept_notice("Late.").last.notice, "{damaged:?}");
    }
    let long = "late ".repeat(BLOCK);
    for text in [long.as_str(), "Late."] {
        keep(&file, &kept_notice(text)).unwrap();
        assert_eq!(prepare(&file).unwrap().unwrap().last.notice.text, text);
    }
}

#[test]
fn files_of_others_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spool.db.notice");
    std::fs::write(&file, "notes of another program").unwrap();
    assert!(prepare(&file).is_err() && keep(&file, &kept_notice("Late.")).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "notes of another program");
    std::fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/dev/null", &file).unwrap();
    assert!(keep(&file, &kept_notice("Late.")).is_err(), "a link is not followed");
    std::fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(keep(&file, &kept_notice("Late.")).is_err(), "a pipe");
}

#[test]
fn a_notice_is_kept_in_the_room_that_the_start_made() {
    let folder = tempfile::tempdir().unwrap();
    let notifier = |address: &str| {
        let settings = Settings { target: Some(Target::parse(address).unwrap()), ..Settings::default() };
        Notifier::new(settings, String::new(), &folder.path().join("spool.db"))
    };
    let first = notifier("http://127.0.0.1:1/key");
    let size = || std::fs::metadata(&first.file).unwrap().len();
    assert_eq!(size(), BLOCK as u64);
    let to = Target::parse("http://127.0.0.1:1/key").unwrap().fingerprint();
    keep(&first.file, &Kept { to, ..kept_notice("Late.") }).unwrap();
    assert_eq!(size(), BLOCK as u64, "no more room is needed");
    // A receiver at another address has not heard of it.
    for (address, is_known) in [("http://127.0.0.1:1/key", true), ("http://127.0.0.1:1/other", false)] {
        assert_eq!(notifier(address).last().is_some(), is_known, "{address}");
    }
}

fn kept_notice(text: &str) -> Kept {
    let notice = Notice {
        level: Level::Warning,
        answer: Some("lag".to_owned()),
        text: text.to_owned(),
        remedy: None,
        host: "relay-1".to_owned(),
        since: Timestamp::UNIX_EPOCH,
    };
    let last = LastNotice { notice, state: State::Sent, at: Timestamp::UNIX_EPOCH, error: None };
    Kept { to: "00".to_owned(), last }
}
