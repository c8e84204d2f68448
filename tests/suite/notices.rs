//! Notices to the receiver of `notify.url`, and `top` on a terminal.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::harness::http::sign;
use crate::harness::marks::PASSWORD;
use crate::harness::program::Program;
use crate::harness::{SECRET, Setup, leash, ports};

/// A state is reported after a minute.
const NOTICE_WAIT: Duration = Duration::from_secs(180);

/// Takes one request, answers 204, and returns its head and its body.
async fn receive(listener: &TcpListener) -> (String, String) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut text = Vec::new();
    loop {
        stream.read_buf(&mut text).await.unwrap();
        let request = String::from_utf8_lossy(&text);
        let Some((head, body)) = request.split_once("\r\n\r\n") else { continue };
        let length = header(head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        if body.len() >= length {
            stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await.unwrap();
            return (head.to_owned(), body.to_owned());
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().filter_map(|line| line.split_once(": ")).find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// The harness searches the log, the status and all output for the marks in address and secret.
#[tokio::test]
async fn a_problem_that_stays_for_a_minute_is_posted_and_its_address_is_shown_nowhere() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap());
    let url = origin.replace("://", &format!("://relay:{PASSWORD}@"));
    let setup = Setup::without_broker().set("notify.url", format!("{url}/{SECRET}?key={SECRET}"));
    let setup = setup.set("notify.secret", SECRET).set("log.filter", "trace,lapin=trace");
    let ops = ports::free();
    let relay = setup.set("ops.listen", format!("127.0.0.1:{ops}")).start().await;
    assert_eq!(relay.status().await["notify"], json!({ "to": origin, "last": null }));

    // `check` asks whether the receiver is there; `config show` shows where it is.
    let (check, (asked, _)) = tokio::join!(relay.run(&["check"]), receive(&listener));
    assert!(asked.starts_with("HEAD "), "{asked}");
    assert!(check.stdout.contains(&format!("{origin} answers 204 to HEAD; no notice was sent")), "{}", check.stdout);
    let shown = relay.run(&["config", "show"]).await;
    assert!(shown.stdout.contains(&format!("url = \"{origin}/***\"")), "{}", shown.stdout);

    let (head, body) = timeout(NOTICE_WAIT, receive(&listener)).await.expect("a notice comes");
    assert!(head.starts_with(&format!("POST /{SECRET}?key={SECRET} HTTP/1.1\r\n")), "{head}");
    assert!(header(&head, "authorization").is_some_and(|login| login.starts_with("Basic ")), "{head}");
    let timestamp = header(&head, "prism-timestamp").unwrap();
    assert_eq!(header(&head, "prism-signature"), Some(sign(SECRET, timestamp, body.as_bytes()).as_str()));
    let notice: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&notice["level"], &notice["answer"]), (&json!("problem"), &json!("broker")), "{notice}");
    assert!(notice["text"].as_str().is_some_and(|text| text.contains("RabbitMQ")), "{notice}");
    assert!(notice["host"].is_string() && notice["since"].is_string() && notice["remedy"].is_string(), "{notice}");
    relay.eventually_logs("notice sent").await;
    let last = &relay.status().await["notify"]["last"];
    assert_eq!((&last["state"], &last["text"]), (&json!("sent"), &notice["text"]));
    drop(listener);
    let check = relay.run(&["check"]).await;
    assert!(check.code == Some(1) && check.stdout.contains(&format!("no answer from {origin}: ")), "{}", check.stdout);
}

/// Runs `top` on a pseudo-terminal of 40 columns and 10 rows, makes it larger, presses the key, and prints what the
/// terminal got. The exit code is 0 if top ended with 0 and left the terminal in the mode that it found.
const ON_A_TERMINAL: &str = r#"
import fcntl, os, pty, select, struct, sys, termios
key, command = sys.argv[1].encode(), sys.argv[2:]
leader, follower = pty.openpty()
def resize(rows, columns):
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
resize(10, 40)
before = termios.tcgetattr(follower)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(follower, number)
    os.execv(command[0], command)
shown = b""
def read_until(text):
    global shown
    while text not in shown:
        if not select.select([leader], [], [], 60)[0]:
            sys.exit("timed out waiting for %r after %r" % (text, shown))
        shown += os.read(leader, 65536)
read_until(b"q ends")
resize(50, 120)
read_until(b"up for")
os.write(leader, key)
read_until(b"\x1b[?1049l")
_, status = os.waitpid(child, 0)
sys.stdout.buffer.write(shown)
sys.exit(0 if status == 0 and termios.tcgetattr(follower) == before else "status %d" % status)
"#;

#[tokio::test]
async fn q_and_ctrl_c_end_top_and_the_terminal_is_as_before() {
    let setup = Setup::without_broker().set("ops.listen", format!("127.0.0.1:{}", ports::free()));
    let relay = setup.start().await;
    for (key, colours) in [("q", ""), ("\u{3}", "1"), ("\u{1c}q", "")] {
        let mut terminal = leash::command("/usr/bin/python3");
        terminal.args(["-c", ON_A_TERMINAL, key, env!("CARGO_BIN_EXE_prism-relay"), "--config"]);
        terminal.arg(relay.folder().join("relay.toml")).args(["top", "--interval", "100ms"]);
        let ended = Program::start({
            terminal.env("NO_COLOR", colours);
            terminal
        })
        .wait()
        .await;
        let shown = ended.stdout;
        assert_eq!(ended.code, Some(0), "{key:?}: {}", ended.stderr);
        assert!(shown.starts_with("\u{1b}[?1049h"), "the alternate screen: {shown:?}");
        assert!(shown.ends_with("\u{1b}[?25h\u{1b}[?1049l"), "the screen and the cursor are restored: {shown:?}");
        assert_eq!(shown.contains("\u{1b}[1;3"), colours.is_empty(), "NO_COLOR={colours:?}: {shown:?}");
        assert!(shown.contains("RabbitMQ has been unreachable"), "{shown:?}");
    }
}
