//! The headline: one steady sentence about the worst fact, and a second line about what is safe and what else is worth
//! a look. Pure.

use super::super::words::{ago, coarse, events_are, percent};
use super::{Answer, Broker, Facts, Headline, Hindrance, Level, NEARLY_FULL, sentence};
use crate::text::grouped;

impl Facts {
    pub(super) fn headline(&self, answers: &[Answer]) -> Headline {
        let of = |id: &str| answers.iter().find(|answer| answer.id == id);
        let level = answers.iter().map(|answer| answer.level).max().unwrap_or(Level::Ok);
        // The order of importance among answers of one level. Scarce room is a consequence of missing deliveries.
        let (one, two) = if self.is_open() { ("broker", "accepting") } else { ("accepting", "broker") };
        let order = [one, two, "lost", "workers", "lag", "parked", "sending"];
        let worst = order.iter().filter_map(|id| of(id)).find(|answer| answer.level == level);
        let first = worst.filter(|_| level > Level::Ok);
        let (text, mut details) = match first.map(|answer| (answer.id, answer)) {
            Some(("accepting", _)) => self.not_accepting(),
            Some(("broker", _)) => self.not_delivering(),
            Some(("lag", _)) => self.behind(),
            Some(("parked", _)) => self.some_parked(),
            Some(("sending", answer)) => (answer.detail.clone(), Vec::new()),
            Some(("lost", _)) if level > Level::Note => self.some_lost(),
            Some(("workers", answer)) if level > Level::Note => (answer.detail.clone(), vec![self.well().0]),
            Some(_) | None => self.well(),
        };
        for id in order.iter().filter(|id| Some(**id) != first.map(|answer| answer.id)) {
            let other = of(id).filter(|answer| answer.level > Level::Note);
            details.extend(other.and_then(|other| self.note(other, first.map(|answer| answer.id))));
        }
        if level > Level::Note && self.is_answering() {
            details.push("Prism is being answered.".to_owned());
        }
        let nothing = if level == Level::Ok { "Nothing to do." } else { "" };
        let advice = worst.and_then(|answer| answer.remedy.clone()).unwrap_or_else(|| nothing.to_owned());
        Headline {
            level,
            answer: first.map(|answer| answer.id),
            text,
            detail: details.join(" "),
            advice,
            runbook: worst.and_then(|answer| answer.runbook),
        }
    }

    /// Whether webhooks reach the relay, and at least some are accepted.
    fn is_open(&self) -> bool {
        self.blocker.is_none()
            && !self.refusing().is_some_and(|refusing| refusing.all)
            && self.barrier().is_none_or(|barrier| barrier.word != "No")
    }

    /// Whether Prism's webhooks arrive and are answered 200, as far as the relay knows.
    fn is_answering(&self) -> bool {
        self.is_open() && !self.draining && self.refusing().is_none() && self.last_30_minutes.accepted > 0
    }

    /// A short sentence about an answer, in the second line below a sentence about the answer `first`.
    fn note(&self, answer: &Answer, first: Option<&str>) -> Option<String> {
        let is_told = |id: &str| first == Some(id);
        match answer.id {
            // The sentence about accepting says what may still be lost.
            "lost" => {
                let worst = self.losses().into_iter().next()?;
                (worst.level == Level::Problem || !is_told("accepting")).then_some(worst.note)
            }
            "workers" => Some(answer.detail.clone()),
            "broker" => Some(format!("{}.", self.why_not_delivering()?)),
            // Said by the sentence about deliveries, or its consequence.
            "lag" if is_told("broker") || !self.is_delivering() => None,
            "lag" => Some(self.behind().0),
            "parked" => Some(self.some_parked().0),
            "accepting" => match self.hindrance()? {
                Hindrance::Refusing(refusing) => Some(refusing.text()),
                // Scarce room is in the second line anyway.
                Hindrance::Scarce if self.share() < NEARLY_FULL => None,
                _ => Some(self.not_accepting().0),
            },
            _ => None,
        }
    }

    fn not_accepting(&self) -> (String, Vec<String>) {
        let given_up = "Prism gives up on each after 35 s.".to_owned();
        match self.hindrance() {
            Some(Hindrance::Draining) => {
                let detail = format!("Undelivered events stay on disk: {}.", grouped(self.ledger.pending));
                ("The relay is shutting down.".to_owned(), vec![detail])
            }
            Some(Hindrance::Full) => {
                let why = self.disk_trouble().map(|(why, _)| sentence(why));
                let text = "Webhooks are being refused now: the spool is full.".to_owned();
                (text, [given_up].into_iter().chain(why).collect())
            }
            Some(Hindrance::Unwritable(why, _)) => (format!("Webhooks are being refused now: {why}."), vec![given_up]),
            Some(Hindrance::Refusing(refusing)) => (refusing.state(), vec![refusing.figures()]),
            Some(Hindrance::Barrier(barrier)) => (barrier.detail, Vec::new()),
            Some(Hindrance::Scarce) => (format!("The spool is {} full.", percent(self.share())), self.safe()),
            Some(Hindrance::Disk(why, _)) => (sentence(why), Vec::new()),
            None => self.well(),
        }
    }

    fn not_delivering(&self) -> (String, Vec<String>) {
        let Some(why) = self.why_not_delivering() else {
            return ("There is no connection to RabbitMQ yet.".to_owned(), Vec::new());
        };
        let error = match &self.broker {
            Broker { connected: false, unreachable: false, error: Some(error), .. } => Some(sentence(error)),
            _ => None,
        };
        (format!("{why}."), error.into_iter().chain(self.safe()).collect())
    }

    /// What is on disk, and how long the room lasts.
    fn safe(&self) -> Vec<String> {
        let waiting = match self.ledger.pending {
            0 => "No event is waiting.".to_owned(),
            pending => format!("{} safe on disk.", events_are(pending)),
        };
        let room = self.room().1.trim().to_owned();
        [waiting, room].into_iter().filter(|text| !text.is_empty()).collect()
    }

    fn why_not_delivering(&self) -> Option<String> {
        let Broker { connected, blocked, error, unreachable, age, .. } = &self.broker;
        let time = coarse(*age);
        match (connected, blocked, error) {
            (true, Some(reason), _) => Some(format!("RabbitMQ has been refusing messages for {time} ({reason})")),
            (true, None, _) => {
                let time = coarse(self.nothing_confirmed()?);
                Some(match self.broker.failing {
                    Some(_) => format!("Nothing has been delivered to RabbitMQ for {time}"),
                    None => format!("RabbitMQ has confirmed nothing for {time}"),
                })
            }
            (false, _, None) => None,
            (false, _, Some(_)) if *unreachable => Some(format!("RabbitMQ has been unreachable for {time}")),
            (false, _, Some(_)) => {
                Some(format!("Nothing has been delivered to RabbitMQ for {}", coarse(self.failing())))
            }
        }
    }

    fn behind(&self) -> (String, Vec<String>) {
        match self.oldest {
            Some(oldest) => (format!("Deliveries are {} behind.", coarse(oldest)), self.safe()),
            None => (format!("{} waiting, safe on disk.", events_are(self.ledger.pending)), Vec::new()),
        }
    }

    fn some_parked(&self) -> (String, Vec<String>) {
        let them = if self.ledger.parked == 1 { "it" } else { "them" };
        let others = self.ledger.pending == 0 && self.ledger.removed == 0 && self.gap().is_none();
        let others = others.then(|| "All others are in RabbitMQ.".to_owned());
        (format!("{} parked: RabbitMQ does not accept {them}.", events_are(self.ledger.parked)), Vec::from_iter(others))
    }

    fn some_lost(&self) -> (String, Vec<String>) {
        let worst = self.losses().into_iter().next().map(|worst| worst.note);
        (worst.unwrap_or_default(), vec![self.well().0])
    }

    fn well(&self) -> (String, Vec<String>) {
        let last = match (self.last_confirm, self.last_accepted) {
            (Some(confirm), _) => Some(format!("The last one was confirmed {}.", ago(confirm))),
            (None, None) => Some("No event has come in since the relay started.".to_owned()),
            (None, Some(_)) => None,
        };
        // Removed and parked events are not there, so "all" would be wrong.
        let is_all = self.ledger.removed == 0 && self.ledger.parked == 0 && self.gap().is_none();
        let text = match (self.ledger.pending, is_all) {
            (0, true) if self.ledger.accepted == 0 => "All is well.",
            (0, true) => "All accepted events are in RabbitMQ.",
            (_, true) => "All accepted events are in RabbitMQ or on the way.",
            (0, false) => "Nothing is waiting.",
            (_, false) => "Events are on the way to RabbitMQ.",
        };
        (text.to_owned(), Vec::from_iter(last))
    }
}
