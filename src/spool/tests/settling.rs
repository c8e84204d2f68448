//! How much of what became of events is noted at a time, and when.

use std::path::Path;

use tempfile::TempDir;

use super::{Opened, WINDOW, event};
use crate::spool::delivered::{Delivered, Runs};
use crate::spool::log_keeper::Bounds;
use crate::spool::store::Store;
use crate::spool::writer::{Settled, settle};
use crate::spool::{AppendError, Durability, Settlement};

/// A file with events of one size.
fn filled(path: &Path, count: u64, body_bytes: usize) -> Store {
    let mut store = Store::open(path, Durability::Process).unwrap();
    let mut ledger = store.ledger().unwrap();
    store.begin(false).unwrap();
    for seq in 1..=count {
        let event = event(vec![7; body_bytes]);
        store.insertion().unwrap().insert(seq, &event).unwrap();
        ledger.accepted += 1;
        ledger.pending += 1;
        ledger.bytes += crate::spool::types::cost(&event.body);
    }
    store.write_ledger(&ledger).unwrap();
    store.commit().unwrap();
    store
}

/// One transaction of settlements, and how much it adds to the log.
fn settle_once(store: &mut Store, parked: &[Settlement], delivered: &Runs) -> (Settled, u64) {
    store.truncate_log(std::time::Duration::ZERO).unwrap();
    store.begin(false).unwrap();
    let mut ledger = store.ledger().unwrap();
    let settled = settle(store, &mut ledger, parked.iter(), delivered).unwrap();
    store.write_ledger(&ledger).unwrap();
    store.commit().unwrap();
    (settled, store.log_size().used)
}

/// A disk that is full has room for this much, whatever was delivered while it took no writes.
#[test]
fn one_transaction_of_settlements_takes_a_bounded_part_of_the_log() {
    for (count, body_bytes, every) in [
        (30_000, 2, 1),
        (30_000, 2, 30),
        (5000, 1500, 1),
        (5000, 2100, 1),
        (5000, 3000, 1),
        (5000, 3000, 3),
        (3000, 5000, 2),
        (40, 256 * 1024, 1),
    ] {
        let case = format!("every {every}th of {count} events of {body_bytes} bytes");
        let folder = TempDir::new().unwrap();
        let mut store = filled(&folder.path().join("spool.db"), count, body_bytes);
        let limit = Bounds::of(body_bytes as u64).settle;
        let (delivered, parked) = (Delivered::default(), 100.min(count / 2));
        let park = |seq| Settlement::Parked { seq, reason: "no queue".to_owned() };
        let parked: Vec<_> = (count - parked + 1..=count).map(park).collect();
        delivered.add((1..=count - parked.len() as u64).step_by(every).collect());
        let expected: u64 = delivered.runs().iter().map(|(first, last)| last - first + 1).sum();
        let mut transactions = 0;
        while !delivered.is_empty() {
            let (settled, log) = settle_once(&mut store, &[], &delivered.runs());
            assert!(log <= limit, "{case}: {log} bytes of the log");
            delivered.remove(&settled.deleted);
            transactions += 1;
        }
        assert_eq!(store.ledger().unwrap().confirmed, expected, "{case}");
        assert!(transactions < 60, "{case}: {transactions} transactions");
        let (_, log) = settle_once(&mut store, &parked, &Runs::default());
        assert!(log <= limit, "{case}: {log} bytes of the log for parked events");
    }
}

#[tokio::test]
async fn everything_is_settled_in_the_end() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    drop(filled(&path, 5000, 3000));
    let opened = Opened::open(&path, 1 << 30, WINDOW);
    let park = |seq| Settlement::Parked { seq, reason: "no queue".to_owned() };
    let delivered = |range: std::ops::RangeInclusive<u64>| range.map(Settlement::Confirmed);
    opened.spool.settle(delivered(1..=2000).chain((4001..=5000).map(park)).collect()).await;
    opened.spool.flush().await;
    let ledger = opened.spool.status().ledger();
    assert_eq!((ledger.confirmed, ledger.parked, ledger.pending), (2000, 1000, 2000), "a flush waits for all");
    opened.spool.settle(delivered(2001..=4000).collect()).await;
    super::eventually(|| opened.spool.status().ledger().pending == 0).await;
    opened.close().await;
}

/// What is left of the room may be too small for any webhook that comes.
#[tokio::test]
async fn a_spool_that_refuses_is_full_until_an_event_leaves() {
    let folder = TempDir::new().unwrap();
    let opened = Opened::open(&folder.path().join("spool.db"), 11_000, WINDOW);
    for number in 0..3u8 {
        opened.spool.append(event(vec![number; 3000]), None).await.unwrap();
    }
    let too_large = opened.spool.append(event(vec![3; 11_000]), None).await;
    assert_eq!((too_large, opened.spool.blocker()), (Err(AppendError::Full), None), "it never fits");
    let refused = opened.spool.append(event(vec![4; 3000]), None).await;
    assert_eq!((refused, opened.spool.blocker()), (Err(AppendError::Full), Some(AppendError::Full)));
    opened.spool.settle(vec![Settlement::Confirmed(1)]).await;
    opened.spool.flush().await;
    assert_eq!(opened.spool.blocker(), None);
    opened.spool.append(event(vec![5; 3000]), None).await.unwrap();
    opened.close().await;
}
