//! The spool against a model, with reopening among the operations.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use jiff::Timestamp;
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::{Opened, WINDOW, event};
use crate::event::{Envelope, Event, Source, SubjectKey};
use crate::spool::{
    AppendError, EVENT_OVERHEAD_BYTES, Ledger, MadeReceipt, Receipt, Settlement, Spool, Stored, subjects,
};
use crate::subject::{Kind, Made, News, Progress, State, Step, Subject, Told, Verdict};

#[derive(Clone, Debug)]
enum Operation {
    /// A body of this byte, one longer than this length. The same number and length are the same body.
    Append(u8, u16),
    /// The n-th pending event, counted from the oldest.
    Confirm(usize),
    Park(usize),
    ConfirmParked(usize),
    ConfirmUnknown,
    /// A webhook about one of a few scans, or an answer of the API, so many minutes later.
    Tell(Tell),
    Reopen,
}

#[derive(Clone, Copy, Debug)]
struct Tell {
    scan: u8,
    step: Step,
    source: Source,
    authentic: bool,
    minutes: i64,
    /// Bodies with another number are other ones.
    body: u8,
}

fn tell() -> impl Strategy<Value = Tell> {
    let step = prop_oneof![Just(Step::Began), Just(Step::Succeeded), Just(Step::Failed)];
    let source = prop_oneof![Just(Source::Webhook), Just(Source::Api)];
    (0..3u8, step, source, any::<bool>(), 0..40i64, 0..20u8).prop_map(
        |(scan, step, source, authentic, minutes, body)| Tell { scan, step, source, authentic, minutes, body },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => (0..40u8, 0..2000u16).prop_map(|(number, length)| Operation::Append(number, length)),
        3 => (0..10usize).prop_map(Operation::Confirm),
        1 => (0..10usize).prop_map(Operation::Park),
        1 => (0..10usize).prop_map(Operation::ConfirmParked),
        1 => Just(Operation::ConfirmUnknown),
        6 => tell().prop_map(Operation::Tell),
        1 => Just(Operation::Reopen),
    ]
}

/// What the spool should hold.
#[derive(Default)]
struct Model {
    pending: BTreeMap<u64, Event>,
    parked: BTreeMap<u64, Event>,
    seen: HashMap<Bytes, (u64, Uuid)>,
    subjects: HashMap<Subject, State>,
    ledger: Ledger,
}

impl Model {
    fn append(&mut self, event: &Event, max_bytes: u64) -> Result<Receipt, AppendError> {
        let is_webhook = event.source == Source::Webhook;
        if let Some(&(seq, id)) = self.seen.get(&event.body).filter(|_| is_webhook) {
            self.ledger.duplicates += 1;
            return Ok(Receipt { seq, id, duplicate: true });
        }
        let progress = Envelope::parse(&event.body).ok().and_then(|envelope| Progress::of(&envelope));
        let mut told = None;
        if let Some(Progress { subject, step }) = progress {
            let mut state = self.subjects.get(&subject).copied().unwrap_or_default();
            let by = Told { at_ms: event.accepted_ms, source: event.source, is_trusted: event.authentic };
            match state.on(&News { seq: self.ledger.accepted + 1, id: event.id, step, told: by }) {
                Verdict::LateCopy(Made { seq, id, .. }) => {
                    self.ledger.duplicates += 1;
                    self.seen.insert(event.body.clone(), (seq, id));
                    self.subjects.insert(subject, state);
                    return Ok(Receipt { seq, id, duplicate: true });
                }
                Verdict::Known => return Ok(Receipt::of_known(event)),
                Verdict::New => told = Some((subject, state)),
            }
        }
        let cost = event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
        if self.ledger.bytes + cost > max_bytes {
            return Err(AppendError::Full);
        }
        self.subjects.extend(told);
        self.ledger.accepted += 1;
        self.ledger.pending += 1;
        self.ledger.bytes += cost;
        let seq = self.ledger.accepted;
        if is_webhook {
            self.seen.insert(event.body.clone(), (seq, event.id));
        }
        self.pending.insert(seq, event.clone());
        Ok(Receipt { seq, id: event.id, duplicate: false })
    }

    fn confirm(&mut self, seq: u64) {
        let event = if let Some(event) = self.pending.remove(&seq) {
            self.ledger.pending -= 1;
            event
        } else {
            self.ledger.parked -= 1;
            self.parked.remove(&seq).unwrap()
        };
        self.ledger.confirmed += 1;
        self.ledger.bytes -= event.body.len() as u64 + EVENT_OVERHEAD_BYTES;
    }

    fn park(&mut self, seq: u64) {
        let event = self.pending.remove(&seq).unwrap();
        self.parked.insert(seq, event);
        self.ledger.pending -= 1;
        self.ledger.parked += 1;
    }
}

fn told(tell: &Tell, at_ms: i64) -> (Event, Progress) {
    let subject = Subject::new(Kind::Scan, &tell.scan.to_string()).unwrap();
    let progress = Progress { subject, step: tell.step };
    let (event_type, Tell { scan, body, .. }) = (progress.event_type(), tell);
    let body = format!(r#"{{"eventType":"{event_type}","payload":{{"scanId":"{scan}","n":{body}}}}}"#);
    let (source, authentic) = (tell.source, tell.authentic);
    let subject = Some(progress.subject.key());
    (Event { accepted_ms: at_ms, source, authentic, subject, ..event(body) }, progress)
}

fn nth(events: &BTreeMap<u64, Event>, n: usize) -> Option<u64> {
    events.keys().nth(n).copied()
}

async fn check(spool: &Spool, model: &Model) {
    spool.flush().await;
    let ledger = spool.status().ledger();
    assert_eq!(ledger, model.ledger);
    assert!(ledger.balances(), "{ledger:?}");
    let expect = |events: &BTreeMap<u64, Event>| -> Vec<Stored> {
        events.iter().map(|(seq, event)| Stored { seq: *seq, event: event.clone() }).collect()
    };
    let waits = |(seq, event): &(&u64, &Event)| {
        let mut before = model.parked.range(..*seq);
        event.subject.is_some() && before.any(|(_, parked)| parked.subject == event.subject)
    };
    let (waiting, free): (Vec<_>, Vec<_>) = model.pending.iter().partition(waits);
    let pending = spool.pending_after(0, 10_000).await.unwrap();
    let free: BTreeMap<_, _> = free.into_iter().map(|(seq, event)| (*seq, event.clone())).collect();
    assert_eq!(pending.events, expect(&free));
    assert_eq!(pending.waiting, waiting.into_iter().map(|(seq, _)| *seq).collect::<Vec<_>>());
    let mut parked = spool.parked_due(i64::MAX, 0, 10_000).await.unwrap().events;
    parked.sort_by_key(|stored| stored.seq);
    assert_eq!(parked, expect(&model.parked));
    for (subject, state) in &model.subjects {
        assert_eq!(spool.subject(subject.clone()).await.unwrap().as_ref(), Some(state), "{subject}");
    }
    let open = model.subjects.values().filter(|state| state.is_open).count() as u64;
    assert_eq!(spool.subject_counts(0).await.unwrap().open, open);
    let oldest = model.pending.values().next().map(|event| event.accepted_ms);
    assert_eq!(spool.oldest_pending_ms().await.unwrap(), oldest);
}

async fn replay(operations: Vec<Operation>) {
    const MAX_BYTES: u64 = 16 * 1024;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let mut model = Model::default();
    let subjects = subjects::Settings { max: 1000, keep: WINDOW };
    let open = || Opened::with(&path, MAX_BYTES, WINDOW, Some(&subjects));
    let (mut opened, mut now_ms) = (open(), Timestamp::now().as_millisecond());
    for operation in operations {
        let spool = &opened.spool;
        match operation {
            Operation::Append(number, length) => {
                let subject = (!number.is_multiple_of(4)).then(|| SubjectKey(i64::from(number % 4)));
                let event = Event { subject, ..event(vec![number; usize::from(length) + 1]) };
                assert_eq!(spool.append(event.clone(), None).await, model.append(&event, MAX_BYTES));
            }
            Operation::Confirm(n) => {
                if let Some(seq) = nth(&model.pending, n) {
                    model.confirm(seq);
                    spool.settle(vec![Settlement::Confirmed(seq)]).await;
                }
            }
            Operation::Park(n) => {
                if let Some(seq) = nth(&model.pending, n) {
                    model.park(seq);
                    spool.settle(vec![Settlement::Parked { seq, reason: "test".to_owned() }]).await;
                }
            }
            Operation::ConfirmParked(n) => {
                if let Some(seq) = nth(&model.parked, n) {
                    model.confirm(seq);
                    spool.settle(vec![Settlement::Tried(seq), Settlement::Confirmed(seq)]).await;
                }
            }
            Operation::ConfirmUnknown => spool.settle(vec![Settlement::Confirmed(1 << 40)]).await,
            Operation::Tell(tell) => {
                now_ms += tell.minutes * 60_000;
                let (event, progress) = told(&tell, now_ms);
                let expected = model.append(&event, MAX_BYTES);
                match event.source {
                    Source::Webhook => assert_eq!(spool.append(event, None).await, expected),
                    Source::Api => {
                        let expected = expected.map(|receipt| match receipt.duplicate {
                            true => MadeReceipt::Known,
                            false => MadeReceipt::Stored(receipt),
                        });
                        assert_eq!(spool.append_made(event, progress).await, expected);
                    }
                }
            }
            Operation::Reopen => {
                opened.close().await;
                opened = open();
            }
        }
    }
    check(&opened.spool, &model).await;
    opened.close().await;
    let opened = open();
    check(&opened.spool, &model).await;
    opened.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_the_model(operations in proptest::collection::vec(operation(), 1..60)) {
        Runtime::new().unwrap().block_on(replay(operations));
    }
}
