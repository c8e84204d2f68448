//! What webhooks and Prism's API tell about a scan or a prediction: it began, and it ended. Pure; takes the time.
//!
//! Prism gives a webhook up after 35 s. The relay then asks Prism's API, and publishes the event that no webhook told.
//! The webhook may still come: [`State::on`] decides whether a webhook is such a late copy. When in doubt it is not,
//! because a late copy is not published: only one webhook for each event that the API told, of the same step, within
//! ten minutes, as long as the subject has not begun again. A signed webhook is a late copy only of an answer over TLS.
//! An unsigned one may be a stranger's, so it takes the place of unsigned ones only.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use uuid::Uuid;

use crate::event::{Envelope, Source, SubjectKey};

/// Maximum length of the id of a subject. Prism's ids have 36 characters.
const ID_BYTES_MAX: usize = 128;

/// How long after an event that the API told its webhook may come. Prism sends for 35 s; a clock that is corrected, a
/// proxy that holds requests back and a relay that is stopped add to that.
const LATE_MS: u64 = 600_000;

/// How long after an end the webhook of the beginning may arrive for the first time, because it was refused before:
/// more than the 35 s for which Prism sends.
const REORDERED_MS: u64 = 120_000;

/// What a subject is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A scan.
    Scan,
    /// A Future Me avatar: a body shape prediction.
    Prediction,
}

impl Kind {
    /// The word before the colon in the name of a subject.
    pub fn text(self) -> &'static str {
        match self {
            Self::Scan => "scan",
            Self::Prediction => "prediction",
        }
    }

    pub(crate) fn of(text: &str) -> Option<Self> {
        [Self::Scan, Self::Prediction].into_iter().find(|kind| kind.text() == text)
    }
}

/// A scan or a prediction that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    kind: Kind,
    id: String,
}

impl Subject {
    /// `None` if the id is not 1 to 128 characters of printable ASCII without blanks, or could be read as a path.
    pub fn new(kind: Kind, id: &str) -> Option<Self> {
        let is_plain = (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
        (is_plain && id != "." && id != "..").then(|| Self { kind, id: id.to_owned() })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Prism's id of it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its short name.
    pub fn key(&self) -> SubjectKey {
        SubjectKey::of(self.kind.text(), &self.id)
    }
}

/// `scan:ID` or `prediction:ID`, as in the header `prism-subject`.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.text(), self.id)
    }
}

/// The text is not a subject.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("not scan:ID or prediction:ID with an ID of 1 to {ID_BYTES_MAX} printable characters without blanks")]
pub struct NotASubject;

impl FromStr for Subject {
    type Err = NotASubject;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, id) = text.split_once(':').ok_or(NotASubject)?;
        Kind::of(kind).and_then(|kind| Self::new(kind, id)).ok_or(NotASubject)
    }
}

/// A step of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Prism works on it.
    Began,
    /// It ended well.
    Succeeded,
    /// It ended badly.
    Failed,
}

impl Step {
    const ALL: [Self; 3] = [Self::Began, Self::Succeeded, Self::Failed];

    /// One word for operators and for the file of the spool.
    pub fn text(self) -> &'static str {
        match self {
            Self::Began => "began",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing is to come after it.
    pub fn is_end(self) -> bool {
        self != Self::Began
    }

    pub(crate) fn of(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.text() == text)
    }
}

/// What one event tells about a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What the event is about.
    pub subject: Subject,
    /// How far it is.
    pub step: Step,
}

impl Progress {
    /// What an event with this envelope tells; `None` for a type that Prism does not document, and without a usable id.
    pub fn of(envelope: &Envelope<'_>) -> Option<Self> {
        let kinds = [(Kind::Scan, &envelope.scan_id), (Kind::Prediction, &envelope.prediction_id)];
        let (kind, step, id) = kinds.into_iter().find_map(|(kind, id)| {
            let step = Step::ALL.into_iter().find(|step| event_type(kind, *step) == envelope.event_type)?;
            Some((kind, step, id.as_deref()?))
        })?;
        Some(Self { subject: Subject::new(kind, id)?, step })
    }

    /// The documented event type.
    pub fn event_type(&self) -> &'static str {
        event_type(self.subject.kind, self.step)
    }
}

fn event_type(kind: Kind, step: Step) -> &'static str {
    match (kind, step) {
        (Kind::Scan, Step::Began) => "scan.processing.started",
        (Kind::Scan, Step::Succeeded) => "scan.processing.succeeded",
        (Kind::Scan, Step::Failed) => "scan.processing.failed",
        (Kind::Prediction, Step::Began) => "body_shape_prediction.processing.started",
        (Kind::Prediction, Step::Succeeded) => "body_shape_prediction.processing.succeeded",
        (Kind::Prediction, Step::Failed) => "body_shape_prediction.processing.failed",
    }
}

/// Who told a step, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// When the event was accepted, in milliseconds since 1970.
    pub at_ms: i64,
    /// Who told it.
    pub source: Source,
    /// Whether it is certainly Prism's: a webhook with a valid signature, or an answer of Prism's API over TLS.
    pub is_trusted: bool,
}

/// The end of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How it ended.
    pub step: Step,
    /// Who told it.
    pub told: Told,
}

/// The last event of a subject that the API told. Its webhook may come late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// The number of the event.
    pub seq: u64,
    /// The id of the event.
    pub id: Uuid,
    /// The step that it tells.
    pub step: Step,
    /// When it was accepted, in milliseconds since 1970.
    pub at_ms: i64,
    /// Which webhooks can be copies of it.
    pub copies: Copies,
}

/// Which webhooks can be late copies of an event that the API told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Unsigned ones: the API answered without TLS.
    Unsigned,
    /// The next one, signed or not.
    Any,
    /// The next signed one: an unsigned one came before.
    Signed,
}

impl Copies {
    fn include(self, is_signed: bool) -> bool {
        match self {
            Self::Unsigned => !is_signed,
            Self::Any => true,
            Self::Signed => is_signed,
        }
    }

    /// Which ones still can be after a webhook.
    fn after(self, is_signed: bool) -> Option<Self> {
        match (self, is_signed) {
            (Self::Any | Self::Signed, false) => Some(Self::Signed),
            (Self::Any | Self::Signed, true) | (Self::Unsigned, _) => None,
        }
    }
}

impl Made {
    /// What is left of it after a webhook that is its copy, or that shows that the subject has moved on.
    fn after(self, is_signed: bool) -> Option<Self> {
        self.copies.after(is_signed).map(|copies| Self { copies, ..self })
    }
}

/// How often the API was asked about an open subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// When it was asked last, in milliseconds since 1970.
    pub last_ms: Option<i64>,
    /// How often it was asked.
    pub tries: u32,
    /// When to ask again, in milliseconds since 1970.
    pub next_ms: i64,
}

/// What is known of one subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The beginning of its last run, if it was told. While the subject is open this is the beginning that waits for
    /// its end.
    pub began: Option<Told>,
    /// Its last end, if it was told.
    pub ended: Option<Ended>,
    /// Whether it began and its end is still to come.
    pub is_open: bool,
    /// When something was last told, in milliseconds since 1970.
    pub last_ms: i64,
    /// How often the API was asked.
    pub asked: Asked,
    /// The event of the API whose webhook may come late.
    pub made: Option<Made>,
}

/// Whether the steps came in the order in which they happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// They did, or more are to come.
    Possible,
    /// The subject ended, and nothing told that it began.
    EndWithoutBeginning,
    /// The beginning was told after the end.
    BeginningAfterEnd,
}

/// An event about a subject, for [`State::on`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    /// The number that the event has if it is stored.
    pub seq: u64,
    /// The id of the event.
    pub id: Uuid,
    /// What it tells.
    pub step: Step,
    /// Who tells it.
    pub told: Told,
}

/// What to do with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To be published.
    New,
    /// The webhook of an event that the API told: to be answered as a re-send of that.
    LateCopy(Made),
    /// The API tells what is known already.
    Known,
}

impl State {
    /// Takes in an event, and decides whether it is published. Nothing changes if the API tells what is known.
    pub fn on(&mut self, news: &News) -> Verdict {
        let News { seq, id, step, told } = *news;
        match told.source {
            Source::Webhook => {
                if let Some(made) = self.made.filter(|made| self.is_late_copy(made, news)) {
                    self.made = made.after(told.is_trusted);
                    self.last_ms = told.at_ms;
                    return Verdict::LateCopy(made);
                }
            }
            Source::Api if self.knows(step) => return Verdict::Known,
            Source::Api => {}
        }
        self.last_ms = told.at_ms;
        match step {
            Step::Began => self.begin(told),
            Step::Succeeded | Step::Failed => self.end(Ended { step, told }),
        }
        if told.source == Source::Api {
            let copies = if told.is_trusted { Copies::Any } else { Copies::Unsigned };
            self.made = Some(Made { seq, id, step, at_ms: told.at_ms, copies });
        }
        Verdict::New
    }

    /// Whether the steps came in the order in which they happen.
    pub fn order(&self) -> Order {
        match (self.began, self.ended) {
            (None, Some(_)) => Order::EndWithoutBeginning,
            (Some(began), Some(ended)) if !self.is_open && began.at_ms > ended.told.at_ms => Order::BeginningAfterEnd,
            (_, _) => Order::Possible,
        }
    }

    /// What shows that the subject has moved on has cleared `made` before.
    fn is_late_copy(&self, made: &Made, news: &News) -> bool {
        let is_in_time = near(made.at_ms, news.told.at_ms, LATE_MS);
        // The webhook of a beginning may arrive after that of the end, but only shortly after.
        let is_overtaken = news.step == Step::Began && !self.is_open && !self.ended_just_before(news.told.at_ms);
        made.step == news.step && is_in_time && made.copies.include(news.told.is_trusted) && !is_overtaken
    }

    /// Whether an answer of the API would tell nothing new.
    pub(crate) fn knows(&self, step: Step) -> bool {
        match step {
            Step::Began => self.began.is_some() || self.ended.is_some(),
            Step::Succeeded | Step::Failed => !self.is_open && self.ended.is_some_and(|ended| ended.step == step),
        }
    }

    fn begin(&mut self, told: Told) {
        // The beginning of the run that has just ended, if no webhook told it: it was refused before, and comes late.
        // The webhook of the end may follow.
        let is_unheard = self.began.is_none_or(|began| began.source == Source::Api);
        if !self.is_open && is_unheard && self.ended_just_before(told.at_ms) {
            self.began = Some(told);
            return;
        }
        self.made = self.made.and_then(|made| made.after(told.is_trusted));
        let is_more_trusted = self.began.is_none_or(|began| told.is_trusted && !began.is_trusted);
        // While the subject is open, the first beginning counts: repeated ones would put off the question for its end.
        if !self.is_open || is_more_trusted {
            (self.began, self.asked) = (Some(told), Asked::default());
        }
        self.is_open = true;
    }

    fn end(&mut self, ended: Ended) {
        let (told, source) = (ended.told, ended.told.source);
        let is_known_better = !self.is_open && self.ended.is_some_and(|known| known.told.is_trusted);
        if is_known_better && !told.is_trusted && source == Source::Webhook {
            return;
        }
        // The webhook of a beginning may arrive after the end.
        self.made =
            self.made.and_then(|made| if made.step.is_end() { made.after(told.is_trusted) } else { Some(made) });
        // An end after an end is that of another run, whose beginning nothing has told yet.
        if !self.is_open && self.ended.is_some() {
            self.began = None;
        }
        self.ended = Some(ended);
        // An unsigned end does not hide that a signed beginning has no signed end. The API is asked for the end, and
        // would be asked again and again if its answer did not count.
        let is_as_trusted = told.is_trusted || self.began.is_none_or(|began| !began.is_trusted);
        if is_as_trusted || source == Source::Api {
            self.is_open = false;
        }
    }

    fn ended_just_before(&self, at_ms: i64) -> bool {
        self.ended.is_some_and(|ended| near(ended.told.at_ms, at_ms, REORDERED_MS))
    }
}

/// Whether two times are at most this far from each other. A clock may have been set back in between.
fn near(a_ms: i64, b_ms: i64, distance_ms: u64) -> bool {
    a_ms.abs_diff(b_ms) <= distance_ms
}

#[cfg(test)]
mod tests;
