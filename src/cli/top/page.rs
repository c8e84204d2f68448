//! The page of `top` as lines of text: what `/api/status`, `/api/history` and `/api/parked` say, in their own words.
//! Pure. Shows a missing value as `?`, because the relay may have another version.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use super::text::{Line, Style, spark, wrapped};
use crate::text::{clean, grouped, span};

const TYPES_MAX: usize = 8;
const TIMELINE_MAX: usize = 5;
const REASONS_MAX: usize = 5;
/// The time that the sparklines show, and the longest rate.
const CHART: i64 = 900;
/// A point without a predecessor nearby covers this time, in seconds.
const POINT: i64 = 5;
/// Width of the left column.
const LEFT: usize = 22;
/// The text is no wider, because long lines are hard to read.
const WIDTH_MAX: usize = 80;
/// A table of the answers needs this width.
const TABLE: usize = 50;

/// The answers of the relay; `null` where there is none.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub status: Value,
    pub history: Value,
    pub parked: Value,
}

/// Why there is no status, and what `top` does about it.
pub(super) fn failure(error: &str, width: Option<usize>) -> Vec<Line> {
    let mut page = Page::new(width);
    page.item("NO ANSWER", Style::Bad, &clean(error));
    if error.contains(" answers 401: ") {
        page.item(
            "",
            Style::Plain,
            "top reads the token from ops.token or ops.token_file: name the relay's file with --config.",
        );
    }
    page.item("", Style::Plain, "Trying again.");
    page.lines
}

/// The page. `width`: the columns of the terminal; `None`: lines are not wrapped, for files and pipes.
pub(super) fn page(seen: &Seen, width: Option<usize>) -> Vec<Line> {
    let Seen { status, history, parked } = seen;
    let mut page = Page::new(width);
    page.headline(&status["headline"]);
    page.answers(status);
    page.rates(history, status);
    page.queues(&status["watch"]);
    page.parked(parked);
    page.totals(status);
    page.broker(status);
    for kind in list(&status["types"]).take(TYPES_MAX) {
        page.item("", Style::Plain, &format!("{:>8}  {}", count(&kind["accepted"]), text_of(&kind["type"])));
    }
    let up = Duration::from_secs(status["uptime_seconds"].as_u64().unwrap_or(0));
    let host = status["host"].as_str().map(|host| format!(" on {}", clean(host))).unwrap_or_default();
    page.item("", Style::Dim, &format!("prism-relay {}{host}, up for {}", text_of(&status["version"]), span(up)));
    page.lines
}

struct Page {
    lines: Vec<Line>,
    /// `None`: not limited.
    width: Option<usize>,
}

impl Page {
    fn new(width: Option<usize>) -> Self {
        Self { lines: Vec::new(), width: width.map(|width| width.clamp(1, WIDTH_MAX)) }
    }

    /// Adds a text with a name in the left column, which is above the text if the terminal is narrow.
    fn item(&mut self, name: &str, style: Style, text: &str) {
        let indent = match self.width {
            Some(width) if width < 2 * LEFT => {
                if !name.is_empty() {
                    self.lines.push(Line::of(style, name));
                }
                2
            }
            _ => LEFT,
        };
        let (first, style) = if indent == LEFT { (name, style) } else { ("", Style::Plain) };
        self.lines.extend(wrapped(indent, first, style, text, self.width));
    }

    /// Adds a text that may have several lines, such as the steps of a remedy.
    fn paragraphs(&mut self, text: &str, mut add: impl FnMut(&mut Self, &str)) {
        text.lines().filter(|line| !line.is_empty()).for_each(|line| add(self, &clean(line)));
    }

    fn blank(&mut self) {
        self.lines.push(Line::default());
    }

    fn headline(&mut self, headline: &Value) {
        let (word, style) = match headline["level"].as_str() {
            Some("ok") => ("all is well", Style::Good),
            Some("note") => ("note", Style::Good),
            Some("warning") => ("NEEDS ATTENTION", Style::Attention),
            Some("problem") => ("PROBLEM", Style::Bad),
            _ => ("?", Style::Plain),
        };
        self.item(word, style, &text_of(&headline["text"]));
        for more in ["detail", "advice"] {
            let text = headline[more].as_str().unwrap_or_default();
            self.paragraphs(text, |page, line| page.item("", Style::Plain, line));
        }
        self.blank();
    }

    fn answers(&mut self, status: &Value) {
        for answer in list(&status["answers"]) {
            let (mark, style) = match answer["level"].as_str() {
                Some("warning") => ("!", Style::Attention),
                Some("problem") => ("!", Style::Bad),
                _ => (" ", Style::Plain),
            };
            let (question, word) = (text_of(&answer["question"]), text_of(&answer["word"]));
            let is_table = self.width.is_none_or(|width| width >= TABLE);
            let question = if is_table { format!("{question:<30}") } else { question };
            self.lines.extend(wrapped(2, mark, style, &format!("{question} {word}"), self.width));
            if mark == "!" {
                for text in [&answer["detail"], &answer["remedy"]].into_iter().filter_map(Value::as_str) {
                    self.paragraphs(text, |page, line| {
                        page.lines.extend(wrapped(6, "", Style::Plain, line, page.width));
                    });
                }
            }
        }
        self.blank();
    }

    /// Rates of webhooks and events, and how many wait, each with a sparkline.
    fn rates(&mut self, history: &Value, status: &Value) {
        let points = Points::new(history);
        if points.0.is_empty() {
            return;
        }
        let head = format!("{:>8}{:>8}{:>8}  last 15 min", "10 s", "1 min", "15 min");
        self.row("a second", Style::Dim, &head, "");
        let columns = self.width.unwrap_or(WIDTH_MAX).saturating_sub(LEFT + 26).min(40);
        for (name, key) in [("accepted", "accepted"), ("refused", "refused"), ("confirmed", "confirmed")] {
            let rates =
                [10, 60, CHART].map(|seconds| points.mean(key, seconds).map(rate).unwrap_or_else(|| "-".to_owned()));
            let text = format!("{:>8}{:>8}{:>8}  ", rates[0], rates[1], rates[2]);
            self.row(name, Style::Plain, &text, &spark(&points.chart(key, columns)));
        }
        let pending = count(&status["spool"]["pending"]);
        self.row(
            "waiting on disk",
            Style::Plain,
            &format!("{pending:>8}{:18}", ""),
            &spark(&points.chart("depth", columns)),
        );
        if points.mean("queued", CHART).is_some() {
            let chart = spark(&points.chart("queued", columns));
            let queued = points.0.last().map_or_else(|| "?".to_owned(), |(_, point)| count(&point["queued"]));
            self.row("in work queues", Style::Plain, &format!("{queued:>8}{:18}", ""), &chart);
        }
        self.blank();
    }

    /// A row of a table, which is not wrapped. A narrow terminal has room for its name and its first number.
    fn row(&mut self, name: &str, style: Style, text: &str, chart: &str) {
        let text = format!("{name:<LEFT$}{text}");
        let mut line = Line::of(style, &text);
        line.push(Style::Good, chart);
        self.lines.push(line);
    }

    /// What is in the queues, and how many workers they have. The relay's own queues only if they hold something.
    fn queues(&mut self, watch: &Value) {
        let is_shown = |queue: &&Value| queue["role"] == "work" || queue["messages"].as_u64() != Some(0);
        let shown: Vec<_> = list(&watch["queues"]).filter(is_shown).collect();
        if shown.is_empty() {
            return;
        }
        let longest =
            shown.iter().map(|queue| text_of(&queue["name"]).chars().count()).max().unwrap_or(0).max(LEFT - 2);
        self.lines.push(Line::of(Style::Dim, &format!("{:<longest$}{:>10}{:>9}", "queue", "messages", "workers")));
        for queue in shown {
            let workers = if queue["role"] == "work" { count(&queue["consumers"]) } else { String::new() };
            let text = format!("{:<longest$}{:>10}{workers:>9}", text_of(&queue["name"]), count(&queue["messages"]));
            // What is wrong with a queue is in the answers.
            let style = if queue["trouble"].is_null() { Style::Plain } else { Style::Bad };
            self.lines.push(Line::of(style, &text));
        }
        self.blank();
    }

    /// Why events are parked, the most frequent reason first.
    fn parked(&mut self, parked: &Value) {
        let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
        for event in list(&parked["parked"]) {
            *reasons.entry(text_of(&event["reason"])).or_default() += 1;
        }
        let listed: u64 = reasons.values().sum();
        let mut name = "parked";
        if let Some(total) = parked["total"].as_u64().filter(|total| *total > listed) {
            let text = format!("the first {} of {}:", grouped(listed), grouped(total));
            self.item(std::mem::take(&mut name), Style::Attention, &text);
        }
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        for (reason, count) in reasons.iter().take(REASONS_MAX) {
            self.item(std::mem::take(&mut name), Style::Attention, &format!("{count:>8}  {reason}"));
        }
    }

    fn totals(&mut self, status: &Value) {
        let (webhooks, spool) = (&status["webhooks"], &status["spool"]);
        let refused = || webhooks["refused"].as_object().into_iter().flatten();
        let sum: u64 = refused().filter_map(|(_, count)| count.as_u64()).fold(0, u64::saturating_add);
        let [accepted, duplicate] = ["accepted", "duplicate"].map(|key| count(&webhooks[key]));
        let text = format!("{accepted} accepted, {duplicate} duplicates, {} refused", grouped(sum));
        self.item("webhooks since start", Style::Plain, &text);
        for (code, number) in refused() {
            self.item("", Style::Plain, &format!("{:>8}  {}", count(number), clean(code)));
        }
        let text = format!("accepted {}, confirmed {}", ago(status, "accepted_at"), ago(status, "confirmed_at"));
        self.item("last", Style::Plain, &text);
        let [accepted, confirmed, pending, parked, removed] =
            ["accepted", "confirmed", "pending", "parked", "removed"].map(|key| count(&spool[key]));
        let text = format!(
            "{accepted} accepted = {confirmed} confirmed + {pending} pending + {parked} parked + {removed} removed"
        );
        self.item("spool, over its life", Style::Plain, &text);
        let oldest = spool["oldest_age_seconds"]
            .as_f64()
            .map(|age| span(Duration::try_from_secs_f64(age.max(0.0)).unwrap_or_default()));
        let oldest =
            oldest.map_or_else(|| "nothing is pending".to_owned(), |age| format!("the oldest has waited {age}"));
        let max_bytes = spool["max_bytes"].as_f64().unwrap_or(1.0).max(1.0);
        let share = 100.0 * spool["bytes"].as_f64().unwrap_or(0.0) / max_bytes;
        self.item("", Style::Plain, &format!("{share:.1} % full; {oldest}"));
    }

    fn broker(&mut self, status: &Value) {
        let broker = &status["broker"];
        let state = match (broker["connected"].as_bool(), broker["blocked"].as_str()) {
            (Some(true), None) => format!("connected to {}", text_of(&broker["url"])),
            (Some(true), Some(reason)) => format!("blocked: {}", clean(reason)),
            _ => format!("not connected: {}", text_of(&broker["error"])),
        };
        self.item("RabbitMQ", Style::Plain, &format!("{state}; {} in flight", count(&broker["in_flight"])));
        for entry in list(&status["timeline"]).take(TIMELINE_MAX) {
            let [at, what, detail] = [&entry["at"], &entry["what"], &entry["detail"]].map(text_of);
            self.item("", Style::Plain, &format!("{at} {what} {detail}"));
        }
    }
}

/// The points of `/api/history`, each with the time that it covers in seconds.
struct Points<'a>(Vec<(i64, &'a Value)>);

impl<'a> Points<'a> {
    fn new(history: &'a Value) -> Self {
        let longest = history["interval_seconds"].as_i64().unwrap_or(POINT).clamp(POINT, CHART) * 6;
        let mut before = None;
        let point = |point: &'a Value| {
            let at = point["at"].as_i64()?;
            let since = before.replace(at).map_or(POINT, |before| at.saturating_sub(before));
            Some((since.clamp(1, longest), point))
        };
        Self(list(&history["points"]).filter_map(point).collect())
    }

    fn at(point: &Value) -> i64 {
        point["at"].as_i64().unwrap_or_default()
    }

    /// The mean over about the last `seconds`.
    fn mean(&self, key: &str, seconds: i64) -> Option<f64> {
        let last = Self::at(self.0.last()?.1);
        self.mean_within(key, last.saturating_sub(seconds), last)
    }

    fn mean_within(&self, key: &str, after: i64, until: i64) -> Option<f64> {
        let within = self.0.iter().filter(|(_, point)| Self::at(point) > after && Self::at(point) <= until);
        let (sum, weight) = within.fold((0.0, 0.0), |(sum, weight), (covers, point)| match point[key].as_f64() {
            Some(value) => (sum + value * *covers as f64, weight + *covers as f64),
            None => (sum, weight),
        });
        (weight > 0.0).then(|| sum / weight)
    }

    /// The means of equal parts of the last 15 minutes; `None` where there are no points.
    fn chart(&self, key: &str, columns: usize) -> Vec<Option<f64>> {
        let Some((_, last)) = self.0.last() else { return Vec::new() };
        let (start, columns) = (Self::at(last).saturating_sub(CHART), columns as i64);
        let edge = |column: i64| start + CHART * column / columns;
        (0..columns).map(|column| self.mean_within(key, edge(column), edge(column + 1))).collect()
    }
}

fn rate(per_second: f64) -> String {
    if per_second >= 9.95 { grouped(per_second.round() as u64) } else { format!("{per_second:.1}") }
}

fn count(value: &Value) -> String {
    value.as_u64().map_or_else(|| "?".to_owned(), grouped)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text_of(value: &Value) -> String {
    clean(value.as_str().unwrap_or("?"))
}

/// The age of a time in `last`, at the time of the status.
fn ago(status: &Value, key: &str) -> String {
    let time = |value: &Value| value.as_str()?.parse::<Timestamp>().ok();
    match (time(&status["last"][key]), time(&status["now"])) {
        (Some(then), Some(now)) => format!("{} ago", span(now.duration_since(then).unsigned_abs())),
        _ => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests;
