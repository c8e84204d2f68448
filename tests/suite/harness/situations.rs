//! The situations that an operator has to recognise at a glance, with the words that console, `top` and `/api/status`
//! must share.

use serde_json::Value;

use super::eventually::eventually;
use super::relay::Relay;

/// The questions in the order of `/api/status`.
pub const QUESTIONS: [&str; 7] = ["sending", "accepting", "broker", "lag", "parked", "lost", "workers"];

/// A state of the relay and how it is described.
#[derive(Debug)]
pub struct Situation {
    pub name: &'static str,
    pub level: &'static str,
    /// How the headline begins.
    pub text: &'static str,
    /// How the second line begins, or what it contains.
    pub detail: &'static str,
    /// How the words of the answers begin.
    pub words: [&'static str; 7],
}

const fn situation(
    name: &'static str,
    level: &'static str,
    text: &'static str,
    detail: &'static str,
    words: [&'static str; 7],
) -> Situation {
    Situation { name, level, text, detail, words }
}

pub const WELL: Situation = situation(
    "well",
    "ok",
    "All accepted events are in RabbitMQ.",
    "The last one was confirmed",
    ["Yes", "Yes", "Yes", "Not at all", "No", "No", "Nothing waits"],
);
pub const NO_WORKERS: Situation = situation(
    "no-workers",
    "warning",
    "prism.scan: 5 wait, no worker connected.",
    "Prism is being answered.",
    ["Yes", "Yes", "Yes", "Not at all", "No", "No", "No"],
);
pub const DEAD_LETTERS: Situation = situation(
    "dead-letters",
    "warning",
    "1 dead letter in prism.dead",
    "Prism is being answered.",
    ["Yes", "Yes", "Yes", "Not at all", "No", "No", "1 dead letter"],
);
pub const BLOCKED: Situation = situation(
    "blocked",
    "problem",
    "RabbitMQ has been refusing messages for",
    "safe on disk.",
    ["Yes", "Yes", "No, it is blocked", "", "No", "No", ""],
);
pub const DOWN: Situation = situation(
    "down",
    "problem",
    "RabbitMQ has been unreachable for",
    "safe on disk.",
    ["Yes", "Yes", "No", "", "No", "No", ""],
);
pub const QUEUE_DOWN: Situation = situation(
    "queue-down",
    "problem",
    "Nothing has been delivered to RabbitMQ for",
    "prism.scan may be down",
    ["Yes", "Yes", "No", "", "No", "No", "No"],
);
pub const NEARLY_FULL: Situation = situation(
    "nearly-full",
    "problem",
    "RabbitMQ has been unreachable for",
    "The spool is 8",
    ["Yes", "Yes, for", "No", "", "No", "No", ""],
);
pub const FULL: Situation = situation(
    "full",
    "problem",
    "Webhooks are being refused now: the spool is full.",
    "Prism gives up on each after 35 s.",
    ["Yes", "No", "No", "", "No", "", ""],
);
pub const WRONG_SECRET: Situation = situation(
    "wrong-secret",
    "problem",
    "Every webhook is being refused: they are signed with another secret",
    "Prism gives up on each after 35 s.",
    ["Yes", "No", "Yes", "Not at all", "No", "", ""],
);
pub const PARKED: Situation = situation(
    "parked",
    "warning",
    "2 events are parked: RabbitMQ does not accept them.",
    "Prism is being answered.",
    ["Yes", "Yes", "Yes", "Not at all", "2 events", "No", ""],
);

impl Situation {
    /// Waits until `/api/status` and `top` describe this situation.
    pub async fn is_told(&self, relay: &Relay) {
        let answers = eventually(&format!("/api/status to describe {self:?}"), async || {
            let status = relay.status().await;
            let (headline, answers) = (&status["headline"], status["answers"].as_array().cloned().unwrap_or_default());
            let ids: Vec<_> = answers.iter().map(|answer| answer["id"].clone()).collect();
            assert_eq!(ids, QUESTIONS);
            let words: Vec<_> = answers.iter().map(|answer| answer["word"].as_str().unwrap_or_default()).collect();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let is_it = headline["level"] == self.level
                && text(&headline["text"]).starts_with(self.text)
                && text(&headline["detail"]).contains(self.detail)
                && self.fits(&words);
            if is_it { Ok(answers) } else { Err(format!("{headline} {words:?}")) }
        })
        .await;
        let top = relay.run(&["top", "--once", "--url", relay.ops()]).await;
        let said = top.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        let level = match self.level {
            "ok" => "all is well",
            "warning" => "NEEDS ATTENTION",
            _ => "PROBLEM",
        };
        let question = |answer: &Value| answer["question"].as_str().unwrap_or_default().to_owned();
        let answers = answers.iter().zip(self.words).map(|(answer, word)| question(answer) + " " + word);
        for words in [format!("{level} {}", self.text), self.detail.to_owned()].into_iter().chain(answers) {
            assert!(said.contains(&words), "{words:?} is not in the output of top: {top:?}");
        }
    }

    /// Whether these are the words of the answers.
    pub fn fits(&self, words: &[&str]) -> bool {
        words.len() == self.words.len() && words.iter().zip(self.words).all(|(word, begin)| word.starts_with(begin))
    }
}
