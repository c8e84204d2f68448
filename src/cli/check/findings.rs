//! What `check` found, and how it is printed: a table for people, JSON for scripts. Pure.

use serde::Serialize;
use serde_json::{Value, json};

/// How a finding bears on the question whether the relay would work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) enum Level {
    #[serde(rename = "ok")]
    Ok,
    /// Worth knowing. The relay works anyway, or `check` could not find out.
    #[serde(rename = "note")]
    Note,
    /// The relay would not work, or events would be lost.
    #[serde(rename = "WRONG")]
    Wrong,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Wrong => "WRONG",
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What was checked, such as `spool` or `queue prism.scan`.
    pub area: String,
    pub level: Level,
    pub text: String,
    /// What to do about it; may have several lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    pub(super) fn new(level: Level, area: impl Into<String>, text: impl Into<String>) -> Self {
        Self { area: area.into(), level, text: text.into(), remedy: None }
    }

    pub(super) fn ok(area: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(Level::Ok, area, text)
    }

    pub(super) fn note(area: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(Level::Note, area, text)
    }

    pub(super) fn wrong(area: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(Level::Wrong, area, text)
    }

    pub(super) fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    fn line(&self) -> String {
        let indented = |text: &str| text.replace('\n', "\n        ");
        let mut line = format!("  {:<5} {:<34} {}", self.level.word(), self.area, indented(&self.text));
        if let Some(remedy) = &self.remedy {
            line += &format!("\n        {}", indented(remedy));
        }
        line
    }
}

/// All findings, in the order in which they are printed.
#[derive(Debug, Default)]
pub(super) struct Findings(pub Vec<Finding>);

impl Findings {
    pub(super) fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|finding| finding.level == level).count()
    }

    /// One line for each finding and one that sums them up.
    pub(super) fn table(&self) -> String {
        let lines: Vec<_> = self.0.iter().map(Finding::line).collect();
        format!("{}\n{}", lines.join("\n"), self.sum())
    }

    fn sum(&self) -> String {
        let notes = match self.count(Level::Note) {
            0 => String::new(),
            count => format!("; notes: {count}"),
        };
        match self.count(Level::Wrong) {
            0 if notes.is_empty() => "all is well".to_owned(),
            0 => format!("nothing is wrong{notes}"),
            count => format!("problems: {count}{notes}"),
        }
    }

    pub(super) fn json(&self) -> Value {
        json!({ "problems": self.count(Level::Wrong), "notes": self.count(Level::Note), "findings": self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_and_the_last_line_sums_them_up() {
        let mut findings = Findings(vec![Finding::ok("spool", "fine")]);
        assert_eq!(findings.table(), "  ok    spool                              fine\nall is well");
        findings.0.push(Finding::note("topology", "not known yet"));
        assert!(findings.table().ends_with("\nnothing is wrong; notes: 1"));
        findings.0.push(Finding::wrong("broker", "no answer").remedy("start it\nor wait"));
        let table = findings.table();
        let end = "\n  WRONG broker                             no answer\n        start it\n        or wait\n\
                   problems: 1; notes: 1";
        assert!(table.ends_with(end), "{table}");
    }

    #[test]
    fn json_has_the_same_words() {
        let findings =
            Findings(vec![Finding::ok("a", "b"), Finding::note("c", "d"), Finding::wrong("e", "f").remedy("g")]);
        let expected = json!({
            "problems": 1, "notes": 1,
            "findings": [
                { "area": "a", "level": "ok", "text": "b" },
                { "area": "c", "level": "note", "text": "d" },
                { "area": "e", "level": "WRONG", "text": "f", "remedy": "g" },
            ],
        });
        assert_eq!(findings.json(), expected);
    }
}
