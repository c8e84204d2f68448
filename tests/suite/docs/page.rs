//! A page in Markdown: its prose, code blocks, code spans, links and headings.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A page of the repository.
pub struct Page {
    /// Below the root of the repository.
    pub name: String,
    pub text: String,
    lines: Vec<Line>,
}

/// A fenced code block.
pub struct Block {
    /// The word behind the fence, such as `sh`.
    pub language: String,
    pub text: String,
    /// The reason of the comment `<!-- not run: reason -->` in front of the block.
    pub not_run: Option<String>,
}

enum Line {
    Prose(String),
    Code(String),
    Fence(String),
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All pages of the repository.
pub fn all() -> Vec<Page> {
    let mut paths = Vec::new();
    collect(root(), &mut paths);
    paths.sort();
    assert!(paths.len() > 15, "{} pages", paths.len());
    paths.iter().map(|path| Page::read(path)).collect()
}

/// One page, by its name below the root.
pub fn page(name: &str) -> Page {
    Page::read(&root().join(name))
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() && !["target", ".git", ".quickstart", "node_modules", "data"].contains(&name.as_str()) {
            collect(&entry, into);
        } else if name.ends_with(".md") {
            into.push(entry);
        }
    }
}

impl Page {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        Self { name, lines: lines(&text), text }
    }

    pub fn blocks(&self) -> Vec<Block> {
        let (mut blocks, mut open, mut before): (Vec<Block>, Option<Block>, String) = (Vec::new(), None, String::new());
        for line in &self.lines {
            match (line, &mut open) {
                (Line::Fence(language), None) => {
                    let mark = before.strip_prefix("<!-- not run: ").and_then(|rest| rest.strip_suffix(" -->"));
                    let not_run = mark.map(str::to_owned);
                    open = Some(Block { language: language.clone(), text: String::new(), not_run });
                }
                (Line::Fence(_), Some(_)) => blocks.extend(open.take()),
                (Line::Code(code), Some(block)) => block.text.push_str(&format!("{code}\n")),
                (Line::Prose(prose), _) if !prose.trim().is_empty() => prose.trim().clone_into(&mut before),
                _ => {}
            }
        }
        assert!(open.is_none(), "{}: a code block has no end", self.name);
        blocks
    }

    /// The words outside of code blocks, tables and comments.
    pub fn prose_words(&self) -> usize {
        let prose = self.prose().filter(|line| !line.starts_with('|') && !line.starts_with('<'));
        prose.flat_map(str::split_whitespace).filter(|word| word.chars().any(char::is_alphanumeric)).count()
    }

    /// The lines of prose over this width, with their numbers. Tables and HTML have a line for each part.
    pub fn prose_wider_than(&self, columns: usize) -> Vec<(usize, &str)> {
        let numbered = (1..).zip(&self.lines).filter_map(|(number, line)| match line {
            Line::Prose(prose) if !prose.trim_start().starts_with(['|', '<']) => Some((number, prose.as_str())),
            Line::Prose(_) | Line::Code(_) | Line::Fence(_) => None,
        });
        numbered.filter(|(_, prose)| prose.chars().count() > columns).collect()
    }

    fn prose(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(|line| match line {
            Line::Prose(prose) => Some(prose.trim_start()),
            Line::Code(_) | Line::Fence(_) => None,
        })
    }

    /// The text in backticks.
    pub fn code_spans(&self) -> Vec<String> {
        let prose = self.prose().collect::<Vec<_>>().join("\n");
        // A span may go on in the next line, but not beyond the paragraph.
        let paragraphs = prose.split("\n\n").flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2));
        paragraphs.map(|span| span.replace('\n', " ")).collect()
    }

    /// All code: spans, and the lines of blocks.
    pub fn code(&self) -> Vec<String> {
        let blocks = self.blocks().into_iter().flat_map(|block| {
            // A line that ends with a backslash goes on in the next one.
            block.text.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>()
        });
        self.code_spans().into_iter().chain(blocks).collect()
    }

    /// Links to other pages and files of the repository, and to anchors.
    pub fn links(&self) -> Vec<String> {
        let prose = self.prose().collect::<Vec<_>>().join("\n");
        let without_code: String = prose.split('`').step_by(2).collect::<Vec<_>>().join("x");
        let after = |mark: &str, end: char| {
            let found = without_code.match_indices(mark).map(|(at, _)| &without_code[at + mark.len()..]);
            found.filter_map(|rest| Some(rest.split_once(end)?.0.to_owned())).collect::<Vec<_>>()
        };
        let links = [after("](", ')'), after("src=\"", '"'), after("srcset=\"", '"')].concat();
        links.into_iter().filter(|link| !link.starts_with("http")).collect()
    }

    /// The anchors of the headings, as GitHub makes them.
    pub fn anchors(&self) -> BTreeSet<String> {
        self.headings().map(anchor).collect()
    }

    pub fn headings(&self) -> impl Iterator<Item = &str> {
        self.prose().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim())
    }
}

fn lines(text: &str) -> Vec<Line> {
    let mut in_code = false;
    let line = |line: &str| match line.trim_start().strip_prefix("```") {
        Some(language) => {
            in_code = !in_code;
            Line::Fence(language.trim().to_owned())
        }
        None if in_code => Line::Code(line.to_owned()),
        None => Line::Prose(line.to_owned()),
    };
    text.lines().map(line).collect()
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().trim().to_lowercase().replace(' ', "-")
}
