//! Changes of many parked events while a relay uses the spool.

use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;

use super::super::inspect::{all_parked, open_for_change, remove, retry};
use super::*;

const EVENTS: u64 = 350;

fn park(seq: u64) -> Settlement {
    Settlement::Parked { seq, reason: "no queue".to_owned() }
}

/// Takes the lock without waiting, as a relay's writer that looks again in the pause, and parks this event.
fn park_now(path: &Path, seq: u64) {
    let writer = Connection::open(path).unwrap();
    writer.busy_timeout(Duration::ZERO).unwrap();
    let sql = "BEGIN IMMEDIATE; UPDATE ledger SET parked = parked + 1, pending = pending - 1";
    writer.execute_batch(sql).unwrap();
    writer.execute("UPDATE event SET parked_reason = 'no queue', tried_ms = 0 WHERE seq = ?1", [seq]).unwrap();
    writer.execute_batch("COMMIT").unwrap();
}

#[tokio::test]
async fn webhooks_get_their_turn_while_all_parked_events_are_changed() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..EVENTS {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    // The first event and the last one are still pending.
    opened.spool.settle((2..EVENTS).map(park).collect()).await;
    opened.spool.flush().await;
    let mut inspector = Inspector::of_running_for_change(&path).unwrap();
    let all = all_parked(&open_for_change(&path).unwrap()).unwrap();
    assert_eq!(all, (2..EVENTS).collect::<Vec<_>>());

    let mut pauses = Vec::new();
    let retried = inspector.in_turns(&all, |pause| pauses.push(pause), retry).unwrap();
    assert_eq!((retried.len(), retried.iter().sum::<usize>()), (4, 348));
    assert!(pauses.len() == 3 && pauses.iter().all(|pause| *pause >= Duration::from_millis(5)), "{pauses:?}");

    let refused = inspector.remove_parked(all.len() as u64 - 1).unwrap();
    assert_eq!(refused, Err(348), "nothing is removed if there are more than somebody has seen");
    let mut unseen = vec![1, EVENTS];
    let pause = |_| unseen.pop().into_iter().for_each(|seq| park_now(&path, seq));
    let removed = inspector.in_turns(&all, pause, |transaction, some| remove(transaction, some, true)).unwrap();
    assert_eq!(removed.concat().len(), 348);
    let left = all_parked(&open_for_change(&path).unwrap()).unwrap();
    assert_eq!(left, [1, EVENTS], "an event that is parked meanwhile stays, also if it is older");
    let ledger = inspector.ledger().unwrap();
    assert_eq!((ledger.parked, ledger.pending, ledger.removed), (2, 0, 348));
    opened.close().await;
}

/// A confirm of a parked event may come before its turn, and one with its number is never another event.
#[tokio::test]
async fn only_parked_events_are_removed_together() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    for number in 0..4 {
        opened.spool.append(event(number.to_string()), None).await.unwrap();
    }
    opened.spool.settle(vec![park(2), park(3)]).await;
    opened.spool.flush().await;
    let mut inspector = Inspector::of_running_for_change(&path).unwrap();
    let removed = inspector.in_turns(&[1, 2, 9], |_| {}, |transaction, some| remove(transaction, some, true)).unwrap();
    assert_eq!(removed.concat().len(), 1);
    assert_eq!(inspector.in_turns(&[1, 2, 3, 9], |_| {}, retry).unwrap(), [1]);
    assert_eq!(inspector.remove_parked(1).unwrap().map(|ids| ids.len()), Ok(1));
    assert!(inspector.remove_seq(4).unwrap() && !inspector.remove_seq(4).unwrap());
    let ledger = inspector.ledger().unwrap();
    assert_eq!((ledger.parked, ledger.pending, ledger.removed), (0, 1, 3));
    opened.close().await;
}
