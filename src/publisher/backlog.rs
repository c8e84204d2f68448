//! Events read from the spool and not yet published. At most one event of a subject is out at a time: the next one
//! follows when it is delivered, and none follows while it is parked. Events without a subject are free. Pure.

use std::collections::{HashMap, VecDeque};

use super::window::Lane;
use crate::event::SubjectKey;
use crate::spool::Stored;

/// The events in memory, in the order of acceptance.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// Events that may be published, as they were read.
    ready: VecDeque<Stored>,
    /// Events that may be published because the one before them was delivered.
    released: VecDeque<Stored>,
    subjects: HashMap<SubjectKey, Turn>,
    /// How many events wait for another one of their subject.
    waiting: usize,
    /// Size of the bodies of all events that were taken in and have no outcome.
    bytes: usize,
    left_out: LeftOut,
    /// How many subjects have a parked event, as far as is known here.
    parked_subjects: usize,
}

/// What the events of a subject wait for. A subject without an entry is free.
#[derive(Debug)]
enum Turn {
    /// One event of the subject is ready or in flight. These are the next ones.
    Taken(VecDeque<Stored>),
    /// An event of the subject was parked. The spool leaves later ones out as soon as it has recorded that.
    Parked,
}

/// Events that wait behind a parked one. They are not in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// How many there are.
    pub count: u64,
    /// The oldest one.
    pub first: Option<u64>,
}

impl LeftOut {
    pub(super) fn add(&mut self, seq: u64) {
        self.count += 1;
        self.first = Some(self.first.map_or(seq, |first| first.min(seq)));
    }
}

impl Backlog {
    /// Takes in the next event that was read.
    pub(super) fn enter(&mut self, stored: Stored) {
        let turn = stored.event.subject.map(|subject| self.subjects.entry(subject));
        self.bytes += stored.event.body.len();
        match turn {
            None => self.ready.push_back(stored),
            Some(std::collections::hash_map::Entry::Vacant(free)) => {
                free.insert(Turn::Taken(VecDeque::new()));
                self.ready.push_back(stored);
            }
            Some(std::collections::hash_map::Entry::Occupied(mut turn)) => match turn.get_mut() {
                Turn::Taken(next) => {
                    next.push_back(stored);
                    self.waiting += 1;
                }
                Turn::Parked => {
                    self.bytes -= stored.event.body.len();
                    self.left_out.add(stored.seq);
                }
            },
        }
    }

    /// The spool left this event out.
    pub(super) fn left_out(&mut self, seq: u64) {
        self.left_out.add(seq);
    }

    /// The next event to publish: the older one of the two that may go first, so that neither a busy subject nor the
    /// others wait for long.
    pub(super) fn pop(&mut self) -> Option<Stored> {
        let is_older = |(released, ready): (&Stored, &Stored)| released.seq < ready.seq;
        let released_first = self.released.front().zip(self.ready.front()).is_none_or(is_older);
        let [first, second] =
            if released_first { [&mut self.released, &mut self.ready] } else { [&mut self.ready, &mut self.released] };
        first.pop_front().or_else(|| second.pop_front())
    }

    /// Gives back the memory of a body.
    pub(super) fn release(&mut self, bytes: usize) {
        self.bytes -= bytes;
    }

    /// This event is not published, but parked. It came from here if it was pending.
    pub(super) fn untried(&mut self, stored: &Stored, lane: Lane) {
        if lane == Lane::Pending {
            self.release(stored.event.body.len());
            self.parked(stored.event.subject);
        }
    }

    /// The published event of this subject was delivered: the next one may go.
    pub(super) fn delivered(&mut self, subject: Option<SubjectKey>) {
        let Some(subject) = subject else { return };
        let Some(Turn::Taken(next)) = self.subjects.get_mut(&subject) else { return };
        match next.pop_front() {
            Some(stored) => {
                self.waiting -= 1;
                self.released.push_back(stored);
            }
            None => {
                self.subjects.remove(&subject);
            }
        }
    }

    /// The published event of this subject is parked: the others stay where they are, in the spool.
    pub(super) fn parked(&mut self, subject: Option<SubjectKey>) {
        let Some(subject) = subject else { return };
        self.parked_subjects += 1;
        if let Some(Turn::Taken(next)) = self.subjects.insert(subject, Turn::Parked) {
            self.waiting -= next.len();
            for stored in next {
                self.bytes -= stored.event.body.len();
                self.left_out.add(stored.seq);
            }
        }
    }

    /// How many events may be published.
    pub(super) fn ready(&self) -> usize {
        self.ready.len() + self.released.len()
    }

    /// How many events are in memory and not published.
    pub(super) fn len(&self) -> usize {
        self.ready() + self.waiting
    }

    /// Size of the bodies in memory, of published events as well.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is no event, neither here nor left out.
    pub(super) fn knows_of_none(&self) -> bool {
        self.len() == 0 && self.left_out.count == 0 && self.subjects.is_empty()
    }

    /// How many subjects are held back here because an event of them was parked.
    pub(super) fn parked_subjects(&self) -> usize {
        self.parked_subjects
    }

    /// The events that wait behind a parked one.
    pub(super) fn left_out_so_far(&self) -> LeftOut {
        self.left_out
    }

    /// The oldest event that is not published, here or left out.
    pub(super) fn oldest(&self) -> Option<u64> {
        let waiting = self.subjects.values().filter_map(|turn| match turn {
            Turn::Taken(next) => next.front(),
            Turn::Parked => None,
        });
        let here = self.ready.iter().chain(&self.released).chain(waiting).map(|stored| stored.seq);
        here.chain(self.left_out.first).min()
    }
}
