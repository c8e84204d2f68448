//! Whether the relay can listen, and what a relay that runs already says about itself.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::super::http::OpsResource;
use super::findings::{Finding, Level};
use crate::config::Config;
use crate::spool::SpoolState;
use crate::text::{clean, clean_lines};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Tries to bind both addresses, and asks the operators' listener.
pub(super) async fn findings(config: &Config, spool: &SpoolState) -> Vec<Finding> {
    // A relay that runs answers on the sockets that systemd holds for it.
    let by_systemd = |address: SocketAddr| *spool != SpoolState::InUse && systemd_may_hold(address.port());
    let status = match OpsResource::new(config, None, "/api/status", ANSWER_TIMEOUT) {
        // A question would start the service, or wait for the start that this check is a part of.
        _ if by_systemd(config.ops.listen) => None,
        Ok(status) => status.with_token(config.ops.token.as_ref()).get().await.ok(),
        // Without a fixed port there is no address to ask.
        Err(_) => None,
    };
    let user = match (spool, status.as_ref().is_some_and(is_status)) {
        (SpoolState::InUse, _) => User::ThisRelay,
        (_, true) => User::OtherRelay,
        (_, false) => User::Unknown,
    };
    let mut found: Vec<_> = [("http.listen", config.http.listen), ("ops.listen", config.ops.listen)]
        .map(|(key, address)| {
            let user = if by_systemd(address) { User::Systemd } else { user };
            listener(key, address, TcpListener::bind(address).map(drop), user)
        })
        .into();
    if let (User::ThisRelay, Some(status)) = (user, status) {
        found.extend(running_relay(&status));
    }
    found
}

/// The process that has a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// The relay on the configured spool.
    ThisRelay,
    /// A relay that answers at `ops.listen`, and has another spool.
    OtherRelay,
    /// systemd, which listens before the service starts.
    Systemd,
    Unknown,
}

/// Whether systemd holds the port for a service. Seen by root, and assumed where systemd itself runs this check: before
/// the start of the service, whose account cannot see systemd's files.
fn systemd_may_hold(port: u16) -> bool {
    // As sd_booted(3) does.
    let is_booted = Path::new("/run/systemd/system").is_dir();
    is_booted && (std::os::unix::process::parent_id() == 1 || first_process_holds(port))
}

fn first_process_holds(port: u16) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let sockets: Vec<_> = tables.iter().flat_map(|table| listening(table, port)).collect();
    let files = std::fs::read_dir("/proc/1/fd").into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|link| sockets.iter().any(|one| link == *one))
}

/// The sockets that listen on a port, as links in `/proc/PID/fd` name them. `table`: see proc_pid_net(5).
fn listening(table: &str, port: u16) -> impl Iterator<Item = String> {
    let (port, listen) = (format!(":{port:04X}"), "0A");
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_meant = fields.get(1)?.ends_with(&port) && *fields.get(3)? == listen;
        is_meant.then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))?
    })
}

fn listener(key: &str, address: SocketAddr, bound: io::Result<()>, user: User) -> Finding {
    let error = match bound {
        Ok(()) if address.port() == 0 => return Finding::ok(key, "any free port"),
        Ok(()) if user == User::ThisRelay => {
            let text = format!("{address} is free, although a relay runs on the spool: it listens elsewhere");
            return Finding::note(key, text).remedy("restart the relay if the address was changed");
        }
        Ok(()) => return Finding::ok(key, format!("{address} is free")),
        Err(error) => error,
    };
    match (error.kind(), user) {
        (io::ErrorKind::AddrInUse, User::ThisRelay) => {
            Finding::ok(key, format!("{address} is in use by the running relay"))
        }
        (io::ErrorKind::AddrInUse, User::OtherRelay) => {
            let text = format!("{address} is in use by another relay, which has another spool");
            Finding::wrong(key, text).remedy(format!("stop that relay, or change {key}"))
        }
        (io::ErrorKind::AddrInUse, User::Systemd) => {
            let text = format!("{address} is in use, as it must be if systemd holds it for the relay's service");
            let remedy = format!("if systemctl list-sockets shows another service there, change {key}");
            Finding::note(key, text).remedy(remedy)
        }
        (io::ErrorKind::AddrInUse, User::Unknown) => {
            let remedy = format!(
                "find the process with: ss -ltnp 'sport = :{}'. Stop it, or change {key}. If it is systemd, \
                 start the relay's service",
                address.port()
            );
            Finding::wrong(key, format!("{address} is in use by another process")).remedy(remedy)
        }
        (io::ErrorKind::PermissionDenied, _) => Finding::wrong(key, format!("cannot listen on {address}: {error}"))
            .remedy("use a port above 1023, or give the service the capability CAP_NET_BIND_SERVICE"),
        (io::ErrorKind::AddrNotAvailable, _) => Finding::wrong(key, format!("cannot listen on {address}: {error}"))
            .remedy("this machine does not have the address; use one of its own, or 0.0.0.0 for all"),
        _ => Finding::wrong(key, format!("cannot listen on {address}: {error}")),
    }
}

fn is_status(status: &Value) -> bool {
    status["headline"].is_object() && status["version"].is_string()
}

/// What the running relay says: its headline, and each answer that is not well.
fn running_relay(status: &Value) -> Vec<Finding> {
    let area = "running relay";
    let text = |value: &Value| clean(value.as_str().unwrap_or_default());
    let bad = |answer: &&Value| matches!(answer["level"].as_str(), Some("warning" | "problem"));
    let answers = status["answers"].as_array().into_iter().flatten().filter(bad);
    let finding = |answer: &Value| {
        let level = if answer["level"] == "problem" { Level::Wrong } else { Level::Note };
        let said = format!("{} {}. {}", text(&answer["question"]), text(&answer["word"]), text(&answer["detail"]));
        let finding = Finding::new(level, area, said);
        match answer["remedy"].as_str().map(clean_lines) {
            Some(remedy) if !remedy.is_empty() => finding.remedy(remedy),
            _ => finding,
        }
    };
    let found: Vec<_> = answers.map(finding).collect();
    if found.is_empty() { vec![Finding::ok(area, text(&status["headline"]["text"]))] } else { found }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_busy_port_is_wrong_unless_the_running_relay_has_it() {
        let address: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        let judged = |bound: Result<(), io::ErrorKind>, user| {
            let finding = listener("http.listen", address, bound.map_err(io::Error::from), user);
            (finding.level, finding.text)
        };
        let busy = Err(io::ErrorKind::AddrInUse);
        for (bound, user, level, text) in [
            (Ok(()), User::Unknown, Level::Ok, "127.0.0.1:8080 is free"),
            (busy, User::ThisRelay, Level::Ok, "127.0.0.1:8080 is in use by the running relay"),
            (Ok(()), User::Systemd, Level::Ok, "127.0.0.1:8080 is free"),
            (
                busy,
                User::Systemd,
                Level::Note,
                "127.0.0.1:8080 is in use, as it must be if systemd holds it for the relay's service",
            ),
            (busy, User::Unknown, Level::Wrong, "127.0.0.1:8080 is in use by another process"),
            (
                busy,
                User::OtherRelay,
                Level::Wrong,
                "127.0.0.1:8080 is in use by another relay, which has another spool",
            ),
            (
                Ok(()),
                User::ThisRelay,
                Level::Note,
                "127.0.0.1:8080 is free, although a relay runs on the spool: it listens elsewhere",
            ),
            (
                Err(io::ErrorKind::PermissionDenied),
                User::Unknown,
                Level::Wrong,
                "cannot listen on 127.0.0.1:8080: permission denied",
            ),
        ] {
            assert_eq!(judged(bound, user), (level, text.to_owned()), "{bound:?} {user:?}");
        }
    }

    #[test]
    fn sockets_that_listen_on_a_port_are_found_by_their_number() {
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let found: Vec<_> = listening(&table, own.local_addr().unwrap().port()).collect();
        let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links: Vec<_> = files.filter_map(|file| std::fs::read_link(file.path()).ok()).collect();
        assert_eq!(found.len(), 1, "{table}");
        assert!(links.iter().any(|link| link == Path::new(&found[0])), "{found:?} is none of {links:?}");
        let connected =
            "  sl  local_address rem_address   st\n   0: 0100007F:1F90 0100007F:1F91 01 0:0 0:0 0 0 0 7 1\n";
        assert_eq!(listening(connected, 8080).count(), 0, "a connection does not listen");
    }

    #[test]
    fn a_running_relay_repeats_why_it_does_not_deliver() {
        let answer = |id: &str, level: &str, word: &str| {
            json!({
                "id": id, "question": "Q?", "level": level, "word": word, "detail": "D.", "remedy": "R:\n1. \u{1b}S",
            })
        };
        let mut status = json!({
            "headline": { "level": "ok", "text": "All is \u{1b}well." },
            "answers": [answer("sending", "ok", "Yes"), answer("lag", "note", "Perhaps")],
        });
        assert_eq!(running_relay(&status), [Finding::ok("running relay", "All is ?well.")]);
        status["answers"] = json!([answer("broker", "problem", "No"), answer("parked", "warning", "2 events")]);
        let expected = [
            Finding::wrong("running relay", "Q? No. D.").remedy("R:\n1. ?S"),
            Finding::note("running relay", "Q? 2 events. D.").remedy("R:\n1. ?S"),
        ];
        assert_eq!(running_relay(&status), expected);
    }
}
