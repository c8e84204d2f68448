//! The table of results: each measured value over the rounds, and its target.

use std::collections::BTreeMap;

/// The target of a value.
#[derive(Clone, Copy)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// A reference value without a target.
    None,
}

/// Values by name, in the order in which they were first added. Each round adds one.
#[derive(Default)]
pub struct Report {
    order: Vec<(String, &'static str, Target)>,
    values: BTreeMap<String, Vec<f64>>,
}

impl Report {
    pub fn add(&mut self, what: impl Into<String>, unit: &'static str, target: Target, value: f64) {
        let what = what.into();
        if !self.values.contains_key(&what) {
            self.order.push((what.clone(), unit, target));
        }
        eprintln!("  {what}: {} {unit}", show(value));
        self.values.entry(what).or_default().push(value);
    }

    /// Prints the table as Markdown: the median of the rounds, the lowest and the highest value, and the target.
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

/// Three significant digits. Values of 100 and more are shown as whole numbers.
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
