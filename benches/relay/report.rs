//! The table: what was measured, over the rounds, beside what it should be.

use std::collections::BTreeMap;

/// What a figure should be.
#[derive(Clone, Copy)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// A reference, measured for the sake of the others.
    None,
}

/// Figures by name, in the order in which they first came; one value a round.
#[derive(Default)]
pub struct Report {
    order: Vec<(&'static str, &'static str, Target)>,
    values: BTreeMap<&'static str, Vec<f64>>,
}

impl Report {
    pub fn add(&mut self, what: &'static str, unit: &'static str, target: Target, value: f64) {
        if !self.values.contains_key(what) {
            self.order.push((what, unit, target));
        }
        eprintln!("  {what}: {} {unit}", show(value));
        self.values.entry(what).or_default().push(value);
    }

    /// Prints the table as Markdown: the median of the rounds, and how far they lie apart.
    pub fn print(&self) {
        println!("| what | median | lowest to highest | target |\n|---|---|---|---|");
        for (what, unit, target) in &self.order {
            let mut values = self.values[what].clone();
            values.sort_unstable_by(f64::total_cmp);
            let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
            let spread = match values[..] {
                [_] => "one run".to_owned(),
                _ => format!("{} to {}", show(values[0]), show(values[values.len() - 1])),
            };
            let judge = |met: bool, sign, limit| format!("{sign} {}{}", show(limit), if met { "" } else { ": missed" });
            let target = match *target {
                Target::AtLeast(limit) => judge(median >= limit, "≥", limit),
                Target::AtMost(limit) => judge(median <= limit, "≤", limit),
                Target::None => String::new(),
            };
            println!("| {what} | {} {unit} | {spread} | {target} |", show(median));
        }
    }
}

/// Three significant digits, thousands as a whole number.
fn show(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), ""), |(whole, _)| (whole, &text[whole.len()..]));
    let grouped: Vec<_> =
        whole.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or("")).collect();
    grouped.join(",") + rest
}
