//! Lines of text with styles, as a terminal of some size shows them. Pure.

/// How a piece of text looks. Without colours every style is plain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Style {
    #[default]
    Plain,
    Dim,
    Good,
    Attention,
    Bad,
}

/// Whether the terminal shows colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    Shown,
    None,
}

/// One line: pieces of text, each with its style.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Line(Vec<(Style, String)>);

impl Style {
    /// The parameters of Select Graphic Rendition (ECMA-48, 8.3.117).
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "0",
            Self::Dim => "2",
            Self::Good => "32",
            Self::Attention => "1;33",
            Self::Bad => "1;31",
        }
    }
}

impl Line {
    pub(super) fn of(style: Style, text: &str) -> Self {
        let mut line = Self::default();
        line.push(style, text);
        line
    }

    pub(super) fn push(&mut self, style: Style, text: &str) {
        if !text.is_empty() {
            self.0.push((style, text.to_owned()));
        }
    }

    /// The text without styles.
    pub(super) fn plain(&self) -> String {
        let text: String = self.0.iter().map(|(_, text)| text.as_str()).collect();
        text.trim_end().to_owned()
    }

    /// The text for a terminal, cut off at `width` columns.
    pub(super) fn shown(&self, width: usize, colours: Colours) -> String {
        let (mut shown, mut left) = (String::new(), width);
        for (style, text) in &self.0 {
            let text: String = text.chars().take(left).collect();
            left -= text.chars().count();
            match (colours, style) {
                (Colours::None, _) | (_, Style::Plain) => shown.push_str(&text),
                (Colours::Shown, style) => shown.push_str(&format!("\x1b[{}m{text}\x1b[0m", style.code())),
            }
        }
        shown
    }
}

/// Breaks a text between words, and words that are too long, so that no line is longer than `width`. Every line is
/// indented; `name` stands in the indent of the first one.
pub(super) fn wrapped(indent: usize, name: &str, style: Style, text: &str, width: Option<usize>) -> Vec<Line> {
    let room = width.map_or(usize::MAX, |width| width.saturating_sub(indent).max(1));
    let mut rows = vec![String::new()];
    let mut is_new = true;
    for word in text.split(' ') {
        let letters: Vec<char> = word.chars().collect();
        let fits = |row: &String| row.chars().count() + 1 + letters.len() <= room;
        match rows.last_mut() {
            Some(row) if is_new => row.clear(),
            Some(row) if fits(row) => row.push(' '),
            _ => rows.push(String::new()),
        }
        is_new = false;
        let mut parts = letters.chunks(room);
        if let (Some(row), Some(part)) = (rows.last_mut(), parts.next()) {
            row.extend(part);
        }
        rows.extend(parts.map(|part| part.iter().collect()));
    }
    let row = |(number, row): (usize, String)| {
        let name = if number == 0 { name } else { "" };
        let mut line = Line::of(style, name);
        line.push(Style::Plain, &" ".repeat(indent.saturating_sub(name.chars().count())));
        line.push(Style::Plain, &row);
        line
    };
    rows.into_iter().enumerate().map(row).collect()
}

/// A sparkline: each value as a bar of eight heights, the largest value as the highest; a blank where there is none.
pub(super) fn spark(values: &[Option<f64>]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let largest = values.iter().flatten().fold(0.0, |largest: f64, value| largest.max(*value));
    let bar = |value: &Option<f64>| match value {
        Some(value) if largest > 0.0 => BARS[(value / largest * 7.0).round().clamp(0.0, 7.0) as usize],
        Some(_) => BARS[0],
        None => ' ',
    };
    values.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(lines: &[Line]) -> Vec<String> {
        lines.iter().map(Line::plain).collect()
    }

    #[test]
    fn text_breaks_between_words_and_is_indented() {
        let lines = wrapped(4, "ab", Style::Bad, "one two three", Some(12));
        assert_eq!(plain(&lines), ["ab  one two", "    three"]);
        assert_eq!(
            plain(&wrapped(2, "", Style::Plain, "longerthanthat is it", Some(6))),
            ["  long", "  erth", "  anth", "  at", "  is", "  it"]
        );
        assert_eq!(plain(&wrapped(2, "!", Style::Plain, "a   b", None)), ["! a   b"]);
        assert_eq!(plain(&wrapped(0, "", Style::Plain, "", Some(5))), [""]);
        assert_eq!(plain(&wrapped(2, "", Style::Plain, "       3  a", None)), ["         3  a"]);
    }

    #[test]
    fn colours_are_shown_only_if_they_may_and_lines_end_at_the_width() {
        let mut line = Line::of(Style::Bad, "PROBLEM");
        line.push(Style::Plain, " away");
        assert_eq!(line.shown(9, Colours::Shown), "\x1b[1;31mPROBLEM\x1b[0m a");
        assert_eq!(line.shown(4, Colours::None), "PROB");
        assert_eq!(line.plain(), "PROBLEM away");
    }

    #[test]
    fn a_sparkline_has_the_largest_value_at_the_top() {
        assert_eq!(spark(&[Some(0.0), Some(3.5), Some(7.0), None]), "▁▅█ ");
        assert_eq!(spark(&[Some(0.0), None]), "▁ ");
        assert_eq!(spark(&[]), "");
    }
}
