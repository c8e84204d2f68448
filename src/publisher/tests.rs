//! The order and the fate of events, over a model of lapin and a broker that returns, nacks, stays silent and closes
//! channels: no returned event is confirmed, none is forgotten, and the events of a subject arrive in order.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use uuid::Uuid;

use super::backlog::Backlog;
use super::read_ahead::ReadAhead;
use super::window::{Flight, Lane, Next, Settled, Verdict, Window};
use crate::event::{Event, Fingerprint, Source, SubjectKey};
use crate::metrics::Metrics;
use crate::spool::{self, Settlement, Spool, Stored};

fn stored(seq: u64, subject: Option<i64>) -> Stored {
    stored_with(seq, subject, "{}")
}

pub(super) fn stored_with(seq: u64, subject: Option<i64>, body: &'static str) -> Stored {
    let body = Bytes::from_static(body.as_bytes());
    let event = Event {
        id: Uuid::from_u128(u128::from(seq)),
        accepted_ms: 0,
        source: Source::Webhook,
        authentic: true,
        trace: None,
        fingerprint: Fingerprint::of(&body),
        subject: subject.map(SubjectKey),
        body,
    };
    Stored { seq, event }
}

/// What the broker does with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// A queue has it, and the broker confirms it.
    Routed,
    /// No queue takes it: the broker returns and confirms it.
    Returned,
    /// A queue is full.
    Nacked,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The session publishes what it may, in this window.
    Fill(usize),
    /// The session retries the parked events.
    Retry,
    /// The broker reads the next message.
    Process(Fate),
    /// The broker confirms one of the messages that it has read, not necessarily the oldest.
    Confirm(usize),
    /// The session takes completions out of lapin's queue.
    Take(usize, usize),
    /// The channel fails, and the session sees every outcome until then, or gives up waiting for them.
    Fail { complete: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let fate = prop_oneof![5 => Just(Fate::Routed), 2 => Just(Fate::Returned), 1 => Just(Fate::Nacked)];
    prop_oneof![
        5 => (1..6usize).prop_map(Step::Fill),
        1 => Just(Step::Retry),
        9 => fate.prop_map(Step::Process),
        9 => (0..4usize).prop_map(Step::Confirm),
        6 => (0..4usize, 1..4usize).prop_map(|(first, count)| Step::Take(first, count)),
        1 => any::<bool>().prop_map(|complete| Step::Fail { complete }),
    ]
}

/// What lapin's queue of completions yields.
enum Item {
    Outcome(u64, Verdict, Option<Uuid>),
    Marker(Vec<super::window::Confirmed<()>>),
}

/// An event in the spool.
#[derive(Clone, Copy)]
struct Kept {
    subject: Option<i64>,
    parked: bool,
}

#[derive(Default)]
struct World {
    spool: BTreeMap<u64, Kept>,
    backlog: Backlog,
    window: Window<()>,
    /// Messages that the broker has not read.
    on_the_wire: VecDeque<u64>,
    /// Messages that the broker has read and not confirmed.
    unconfirmed: Vec<(u64, Verdict)>,
    /// Returns that lapin has not attached to a confirm.
    waiting_returns: VecDeque<Uuid>,
    completions: VecDeque<Item>,
    /// The fate of the latest publish of each event.
    fates: HashMap<u64, Fate>,
    /// The events that reached a queue.
    arrived: BTreeSet<u64>,
    /// The last event of each subject that reached a queue for the first time.
    newest: HashMap<i64, u64>,
    subjects: Vec<Option<i64>>,
    in_flight: BTreeSet<u64>,
}

impl World {
    fn new(subjects: Vec<Option<i64>>) -> Self {
        let mut world = Self { subjects: subjects.clone(), ..Self::default() };
        let kept = |subject| Kept { subject, parked: false };
        world.spool = (1..).zip(subjects.into_iter().map(kept)).collect();
        world.read();
        world
    }

    fn subject(&self, seq: u64) -> Option<i64> {
        self.subjects[usize::try_from(seq - 1).unwrap()]
    }

    /// Reads pending events as the spool hands them out.
    fn read(&mut self) {
        self.backlog = Backlog::default();
        for (&seq, kept) in &self.spool {
            let is_before = |(_, other): &(&u64, &Kept)| other.parked && other.subject == kept.subject;
            if kept.parked {
            } else if kept.subject.is_some() && self.spool.range(..seq).any(|event| is_before(&event)) {
                self.backlog.left_out(seq);
            } else {
                self.backlog.enter(stored(seq, kept.subject));
            }
        }
    }

    fn publish(&mut self, stored: Stored, lane: Lane) {
        let seq = stored.seq;
        if let Some(subject) = self.subject(seq) {
            let rivals = self.in_flight.iter().filter(|seq| self.subject(**seq) == Some(subject)).count();
            assert_eq!(rivals, 0, "two events of a subject in flight");
        }
        assert!(self.in_flight.insert(seq), "an event is in flight twice");
        self.fates.remove(&seq);
        self.on_the_wire.push_back(seq);
        self.window.published(Flight { stored, lane, published_at: Instant::now(), span: () });
    }

    fn fill(&mut self, window: usize) {
        while self.window.next(false, false) == Next::Publish
            && self.window.in_flight() < window
            && let Some(stored) = self.backlog.pop()
        {
            self.publish(stored, Lane::Pending);
        }
    }

    fn retry(&mut self) {
        if self.window.next(false, true) == Next::RetryParked {
            let parked: Vec<_> =
                self.spool.iter().filter(|(_, kept)| kept.parked).map(|(seq, kept)| (*seq, kept.subject)).collect();
            for (seq, subject) in parked {
                self.publish(stored(seq, subject), Lane::Parked);
            }
        }
    }

    fn process(&mut self, fate: Fate) {
        let Some(seq) = self.on_the_wire.pop_front() else { return };
        self.fates.insert(seq, fate);
        match fate {
            Fate::Routed => self.arrive(seq),
            Fate::Returned => self.waiting_returns.push_back(Uuid::from_u128(u128::from(seq))),
            Fate::Nacked => {}
        }
        self.unconfirmed.push((seq, if fate == Fate::Nacked { Verdict::Nacked } else { Verdict::Acked }));
    }

    fn arrive(&mut self, seq: u64) {
        if self.arrived.insert(seq)
            && let Some(subject) = self.subject(seq)
            && let Some(before) = self.newest.insert(subject, seq)
        {
            assert!(before < seq, "event {seq} of subject {subject} arrived after {before}");
        }
    }

    /// lapin attaches the oldest return to whichever confirm completes next.
    fn confirm(&mut self, nth: usize) {
        if !self.unconfirmed.is_empty() {
            let (seq, verdict) = self.unconfirmed.remove(nth % self.unconfirmed.len());
            self.completions.push_back(Item::Outcome(seq, verdict, self.waiting_returns.pop_front()));
        }
    }

    /// Takes completions, the first of them not necessarily from the front: a future that was woken early comes out
    /// with what it knows by then. A marker waits for all before it.
    fn take(&mut self, first: usize, count: usize) {
        for nth in std::iter::once(first).chain(std::iter::repeat_n(0, count - 1)) {
            let outcomes: Vec<_> = (0..self.completions.len())
                .filter(|index| *index == 0 || matches!(self.completions[*index], Item::Outcome(..)))
                .collect();
            let Some(index) = outcomes.get(nth % outcomes.len().max(1)) else { break };
            let item = self.completions.remove(*index).unwrap();
            self.completion(item);
            let settled = self.window.settle();
            self.settled(settled);
        }
        if let Some(batch) = self.window.take_batch() {
            self.completions.push_back(Item::Marker(batch));
        }
    }

    fn completion(&mut self, item: Item) {
        match item {
            Item::Outcome(seq, verdict, returned) => {
                if let Some(id) = returned {
                    self.window.returned(id, "no route".to_owned());
                }
                let ended = self.window.outcome(seq, verdict, 0).expect("an event in flight");
                self.backlog.release(ended.released);
                if verdict == Verdict::Nacked {
                    self.in_flight.remove(&seq);
                }
            }
            Item::Marker(batch) => self.window.marker(batch),
        }
    }

    fn settled(&mut self, settled: Settled<()>) {
        for settlement in settled.settlements() {
            match settlement {
                Settlement::Confirmed(seq) => {
                    assert_eq!(self.fates[&seq], Fate::Routed, "event {seq} is confirmed");
                    self.spool.remove(&seq).expect("an event in the spool");
                }
                Settlement::Parked { seq, .. } => {
                    assert_eq!(self.fates[&seq], Fate::Returned, "event {seq} is parked");
                    self.spool.get_mut(&seq).expect("an event in the spool").parked = true;
                }
                Settlement::Tried(_) => unreachable!("the window settles no try"),
            }
        }
        let mut read_again = false;
        for event in &settled.delivered {
            self.in_flight.remove(&event.seq);
            match event.lane {
                Lane::Pending => self.backlog.delivered(event.subject),
                Lane::Parked => read_again = true,
            }
        }
        for (event, _) in &settled.returned {
            self.in_flight.remove(&event.seq);
            if event.lane == Lane::Pending {
                self.backlog.parked(event.subject);
            }
        }
        // Parked events are retried alone, so that nothing else is in flight.
        if read_again {
            assert!(self.in_flight.iter().all(|seq| self.spool[seq].parked));
            self.read();
        }
    }

    /// The next session starts with what is in the spool.
    fn fail(&mut self, complete: bool) {
        let completions = std::mem::take(&mut self.completions);
        if complete {
            completions.into_iter().for_each(|item| self.completion(item));
        }
        let settled = self.window.wind_up(complete);
        self.settled(settled);
        self.window = Window::default();
        self.on_the_wire.clear();
        self.unconfirmed.clear();
        self.waiting_returns.clear();
        self.in_flight.clear();
        self.read();
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Fill(window) => self.fill(window),
            Step::Retry => self.retry(),
            Step::Process(fate) => self.process(fate),
            Step::Confirm(nth) => self.confirm(nth),
            Step::Take(first, count) => self.take(first, count),
            Step::Fail { complete } => self.fail(complete),
        }
        if self.window.end(false, false).is_some() {
            self.fail(true);
        }
    }

    /// From now on the broker takes everything.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            if self.spool.is_empty() {
                return;
            }
            for step in [Step::Retry, Step::Fill(5), Step::Process(Fate::Routed), Step::Confirm(0), Step::Take(0, 2)] {
                self.run(step);
            }
        }
        panic!("forgotten: {:?}", self.spool.keys().collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn no_order_of_outcomes_confirms_a_returned_event_forgets_one_or_turns_a_subject_round(
        subjects in prop::collection::vec(prop::option::weighted(0.9, 0..4i64), 1..20),
        steps in prop::collection::vec(step(), 0..150),
    ) {
        let count = subjects.len();
        let mut world = World::new(subjects);
        steps.into_iter().for_each(|step| world.run(step));
        world.finish();
        prop_assert_eq!(world.arrived.len(), count);
        prop_assert_eq!((world.window.in_flight(), world.backlog.bytes()), (0, 0));
    }
}

#[test]
fn only_one_event_of_a_subject_is_out_and_the_others_are_not_held_up() {
    let mut backlog = Backlog::default();
    for (seq, subject) in [(1, Some(7)), (2, Some(7)), (3, Some(8)), (4, None), (5, None), (6, Some(7))] {
        backlog.enter(stored(seq, subject));
    }
    let out = |backlog: &mut Backlog| std::iter::from_fn(|| backlog.pop().map(|stored| stored.seq)).collect::<Vec<_>>();
    assert_eq!(out(&mut backlog), [1, 3, 4, 5]);
    backlog.delivered(Some(SubjectKey(7)));
    assert_eq!((out(&mut backlog), backlog.len(), backlog.oldest()), (vec![2], 1, Some(6)));
    backlog.parked(Some(SubjectKey(7)));
    backlog.enter(stored(9, Some(7)));
    backlog.delivered(Some(SubjectKey(8)));
    backlog.enter(stored(10, Some(8)));
    let left_out = backlog.left_out_so_far();
    assert_eq!((out(&mut backlog), left_out.count, left_out.first, backlog.oldest()), (vec![10], 2, Some(6), Some(6)));
}

#[test]
fn a_released_event_goes_before_younger_ones() {
    let mut backlog = Backlog::default();
    for (seq, subject) in [(1, Some(7)), (2, Some(7)), (3, None), (4, None)] {
        backlog.enter(stored(seq, subject));
    }
    assert_eq!(backlog.pop().map(|stored| stored.seq), Some(1));
    backlog.delivered(Some(SubjectKey(7)));
    assert_eq!(backlog.pop().map(|stored| stored.seq), Some(2));
}

#[test]
fn a_pending_event_that_is_parked_without_a_publish_frees_its_memory_and_holds_its_subject_back() {
    let mut backlog = Backlog::default();
    [1, 2].into_iter().for_each(|seq| backlog.enter(stored(seq, Some(7))));
    let first = backlog.pop().unwrap();
    backlog.untried(&first, Lane::Parked);
    assert_eq!((backlog.bytes(), backlog.len()), (4, 1), "a parked event is not from here");
    backlog.untried(&first, Lane::Pending);
    assert_eq!((backlog.bytes(), backlog.len(), backlog.left_out_so_far().count), (0, 0, 1));
}

/// The delivery of a parked event was confirmed, but the disk could not record it before the connection was lost.
#[tokio::test]
async fn what_waited_for_a_parked_event_is_read_once_the_disk_has_recorded_its_delivery() {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("spool.db");
    let settings = spool::Settings {
        path: path.clone(),
        max_bytes: 1 << 20,
        durability: spool::Durability::Disk,
        body_bytes_max: 1 << 10,
    };
    let dedupe = spool::dedupe::Settings { window: Duration::ZERO, entries_max: 0 };
    let (spool, _end) = Spool::open(&settings, &dedupe, None, Arc::new(Metrics::new())).unwrap();
    for (number, subject) in [(1, Some(7)), (2, Some(7)), (3, Some(8)), (4, Some(8))] {
        spool.append(stored(number, subject).event, None).await.unwrap();
    }
    spool.settle(vec![Settlement::Parked { seq: 1, reason: "returned".to_owned() }]).await;
    spool.flush().await;
    let disk = rusqlite::Connection::open(&path).unwrap();
    disk.execute_batch("CREATE TRIGGER f BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'fails'); END").unwrap();
    spool.settle(vec![Settlement::Confirmed(1)]).await;
    spool.flush().await;
    assert!(!spool.status().takes_settlements() && spool.status().ledger().parked == 1);

    // The next connection. The other subject goes on.
    let mut pending = ReadAhead::new(spool.clone(), 10);
    let out = |pending: &mut ReadAhead| pending.backlog().pop().map(|stored| stored.seq);
    pending.read_on();
    pending.finish_read().await.unwrap();
    assert_eq!((out(&mut pending), out(&mut pending), pending.left_out()), (Some(3), None, 1));
    spool.settle(vec![Settlement::Confirmed(3)]).await;
    pending.backlog().delivered(Some(SubjectKey(8)));
    assert_eq!(out(&mut pending), Some(4));
    pending.check_spool().await.unwrap();
    assert!(!pending.is_stale());
    // The same over the old connection.
    let mut earlier = ReadAhead::new(spool.clone(), 10);
    earlier.on_delivered(Lane::Parked, None);
    assert!(!earlier.is_stale(), "no event waits for one without a subject");
    earlier.on_delivered(Lane::Parked, Some(SubjectKey(7)));
    assert!(earlier.is_stale());
    earlier.read_again().await;
    assert!(!earlier.is_stale(), "the other subjects go on");

    disk.execute_batch("DROP TRIGGER f").unwrap();
    spool.settle(vec![Settlement::Confirmed(4)]).await;
    spool.flush().await;
    assert!(spool.status().takes_settlements());
    pending.check_spool().await.unwrap();
    earlier.check_spool().await.unwrap();
    assert!(pending.is_stale() && earlier.is_stale());
    pending.read_again().await;
    pending.read_on();
    pending.finish_read().await.unwrap();
    assert_eq!((out(&mut pending), out(&mut pending)), (Some(2), None));
}
