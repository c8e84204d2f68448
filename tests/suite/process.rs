//! The relay's process: killed at any moment, out of file descriptors, with a backlog that does not fit in memory.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Duration;

use crate::harness::leash::Leash;
use crate::harness::relay::{Sender, sum};
use crate::harness::samples::nth_of_scan;
use crate::harness::{Client, Node, Raw, Relay, Setup, Vhost, Wire, eventually, eventually_within, ports};

#[tokio::test]
async fn kill_9_under_load_loses_no_event_that_was_answered_200() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut relay = Relay::start(&vhost).await;
    let mut acknowledged = HashSet::new();
    for round in 0..6 {
        let senders: Vec<_> = (0..8)
            .map(|subject| {
                let sender = relay.sender();
                tokio::spawn(async move {
                    let mut ids = Vec::new();
                    // Until the relay is killed in the middle of an answer.
                    while let Ok(answer) = sender.post(nth_of_scan(round * 8 + subject, ids.len())).await {
                        ids.push(answer.id());
                    }
                    ids
                })
            })
            .collect();
        eventually("more than 50 accepted webhooks", async || {
            let accepted = relay.metric("prism_relay_webhooks_total", &[("outcome", "accepted")]).await;
            if accepted > 50.0 { Ok(()) } else { Err(accepted) }
        })
        .await;
        relay.kill9().await;
        for sender in senders {
            acknowledged.extend(sender.await.unwrap());
        }
        relay.start_again().await;
        let verify = relay.run(&["spool", "verify"]).await;
        assert_eq!(verify.code, Some(0), "the ledger does not balance after a crash: {}", verify.stdout);
    }
    relay.eventually_nothing_pending().await;
    let depth = vhost.depth("prism.scan").await as usize;
    let delivered: HashSet<_> =
        vhost.messages("prism.scan", depth).await.iter().map(|delivery| delivery.id()).collect();
    let lost: Vec<_> = acknowledged.difference(&delivered).collect();
    assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), acknowledged.len());
}

#[tokio::test]
async fn kill_9_during_start_up_loses_nothing() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut wire = Wire::new(vhost.address());
    wire.refuse().await;
    let mut relay = Relay::start_through(&vhost, &wire).await;
    let mut ids = Vec::new();
    for number in 0..200 {
        ids.push(relay.post(nth_of_scan(0, number)).await.id());
    }
    relay.kill9().await;
    for lines in [0, 0, 0, 0, 1, 1, 2] {
        // Killed at once, or after this many log lines.
        let mut program = relay.setup().launch(&["serve"]);
        eventually(&format!("{lines} log lines"), async || {
            let logged = program.stderr().len();
            if logged >= lines { Ok(()) } else { Err(logged) }
        })
        .await;
        program.signal("KILL");
        program.wait().await;
    }
    wire.accept();
    relay.start_again().await;
    let delivered: Vec<_> = vhost.messages("prism.scan", 200).await.iter().map(|delivery| delivery.id()).collect();
    assert_eq!(delivered, ids);
}

#[tokio::test]
async fn a_process_without_free_file_descriptors_waits_for_one_and_goes_on() {
    let relay = Setup::without_broker().start().await;
    let limit = |count: &str| {
        let status = std::process::Command::new("prlimit")
            .args([format!("--nofile={count}:4096"), format!("--pid={}", relay.pid())])
            .status();
        assert!(status.expect("prlimit, of util-linux").success());
    };
    relay.post(nth_of_scan(0, 0)).await.expect(200);
    let open = std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count();
    limit(&(open + 3).to_string());
    let mut crowd = Vec::new();
    for _ in 0..20 {
        crowd.push(Raw::connect(relay.address()).await);
    }
    relay.eventually_logs("cannot accept connections").await;
    // Open connections still work, and so does the spool.
    relay.post(nth_of_scan(0, 1)).await.expect(200);
    drop(crowd);
    limit("4096");
    let new = Raw::exchange(relay.address(), "GET /healthz HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n").await;
    assert!(new.starts_with("HTTP/1.1 200 "), "{new}");
}

#[tokio::test]
async fn a_confirmed_event_that_was_not_yet_deleted_comes_again_under_its_id() {
    let vhost = Vhost::new(Node::shared().await).await;
    let mut relay = Relay::start(&vhost).await;
    relay.post(nth_of_scan(0, 0)).await.expect(200);
    vhost.messages("prism.scan", 1).await;
    relay.eventually_nothing_pending().await;
    // The broker confirms the event, and the relay cannot delete it from the file before it is killed.
    let file = rusqlite::Connection::open(relay.setup().spool()).unwrap();
    file.execute_batch("CREATE TRIGGER keep BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'no'); END").unwrap();
    let id = relay.post(nth_of_scan(0, 1)).await.id();
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_metric("prism_relay_publish_total", &[("outcome", "confirmed")], 2.0).await;
    relay.kill9().await;
    file.execute_batch("DROP TRIGGER keep").unwrap();
    relay.start_again().await;
    assert_eq!(vhost.messages("prism.scan", 1).await[0].id(), id);
    relay.eventually_nothing_pending().await;
    assert_eq!(relay.run(&["spool", "verify"]).await.code, Some(0));
}

#[tokio::test]
async fn a_backlog_costs_disk_and_not_memory() {
    // In several runs, because each has to end before the deadline of the harness on a busy machine as well.
    const RUNS: usize = 5;
    const EVENTS: usize = 10_000;
    let relay = Setup::without_broker().set("spool.max_bytes", "1GiB").set("log.filter", "info").start().await;
    let rss = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    relay.post(nth_of_scan(0, 0)).await.expect(200);
    let before = rss();
    let count = EVENTS.to_string();
    for _ in 0..RUNS {
        let sent = relay.run(&["send", "--url", relay.url(), "--count", &count]).await;
        assert_eq!(sent.code, Some(0), "{}", sent.stdout);
    }
    assert_eq!(relay.spool().await.pending, (RUNS * EVENTS) as u64 + 1);
    // The bodies have 5 MB, and so has the dedupe window. A queue in memory would need several times that.
    let grown = rss().saturating_sub(before);
    assert!(grown < 32 * 1024, "{before} kB grew to {} kB", before + grown);
}

#[tokio::test]
async fn a_blocked_standard_error_stops_nothing() {
    let (port, ops) = (ports::free(), ports::free());
    let setup = Setup::without_broker()
        .set("http.listen", format!("127.0.0.1:{port}"))
        .set("ops.listen", format!("127.0.0.1:{ops}"))
        .set("log.filter", "trace");
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // Full from the start: Linux buffers 64 KiB.
    writer.write_all(&[b'\n'; 65_536]).expect("fill the pipe");
    let mut command = setup.command(&["serve"]);
    command.stdout(Stdio::null()).stderr(writer);
    let mut relay = Leash::start(command);
    let client = Client::http1();
    let ready = format!("http://127.0.0.1:{ops}/readyz");
    eventually("the relay to be ready", async || client.get(&ready).await.map(|answer| answer.expect(200))).await;
    let sender = Sender::new(&client, &format!("http://127.0.0.1:{port}/webhooks/prism"));
    let metrics = format!("http://127.0.0.1:{ops}/metrics");
    let mut sent = 0;
    // It takes as many lines as the queue of the log holds.
    eventually_within(Duration::from_secs(240), "dropped log lines", async || {
        for number in sent..sent + 200 {
            sender.post(nth_of_scan(0, number)).await.expect("an answer").expect(200);
        }
        sent += 200;
        let text = client.get(&metrics).await.expect("metrics").text();
        let dropped = sum(&text, "prism_relay_log_lines_dropped_total", &[]);
        if dropped > 0.0 { Ok(()) } else { Err(dropped) }
    })
    .await;
    // Once it is read again, a line says how many are missing.
    let lines = BufReader::new(reader).lines().map_while(Result::ok);
    let found = tokio::task::spawn_blocking(move || {
        let mut lines = lines;
        let found = lines.any(|line| line.contains("dropped log lines because standard error was not read"));
        // Not read any more from here on: the next lines block again.
        (found, lines)
    });
    let (found, _unread) = found.await.expect("a reader that does not panic");
    assert!(found, "no line reports dropped lines");
    for number in 0..400 {
        sender.post(nth_of_scan(1, number)).await.expect("an answer").expect(200);
    }
    relay.signal("TERM");
    let status = eventually("the end of the relay", async || relay.exited().ok_or("still running")).await;
    assert_eq!(status.code(), Some(0), "the relay drains although nothing reads its log");
}
