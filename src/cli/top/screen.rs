//! The terminal while `top` runs: the alternate screen, and keys that arrive one by one. It is restored when this is
//! dropped, and before the message of a panic is printed.
//!
//! The escape sequences are those of xterm, which every terminal emulator knows.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

use super::text::{Colours, Line};

/// Alternate screen on, cursor hidden, and no wrapping at the right edge.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// Moves the cursor to the upper left corner. The old page is then overwritten line by line, which does not flicker.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_REST: &str = "\x1b[J";
/// The size of a terminal that does not know its own.
const USUAL: Size = Size { columns: 80, rows: 24 };
const LAST_LINE: &str = "q ends";

/// The size of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub columns: usize,
    pub rows: usize,
}

/// Restores the terminal, only at the first call.
#[derive(Clone)]
struct Restore {
    /// The mode of the terminal before, if keys come from one.
    mode: Option<Termios>,
    is_done: Arc<AtomicBool>,
}

/// The terminal in the mode of `top`.
pub(super) struct Screen {
    restore: Restore,
    colours: Colours,
}

impl Screen {
    pub(super) fn enter(colours: Colours) -> io::Result<Self> {
        let stdin = io::stdin();
        let mode = if stdin.is_terminal() { tcgetattr(&stdin).ok() } else { None };
        let screen = Self { restore: Restore { mode, is_done: Arc::default() }, colours };
        let restore = screen.restore.clone();
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore.now();
            print(panic);
        }));
        if let Some(mode) = &screen.restore.mode {
            let mut keys = mode.clone();
            // Each key arrives at once and is not shown. Ctrl-C still sends its signal; Ctrl-Z and Ctrl-\ do not,
            // because a top that they stop or end would leave the shell on the alternate screen.
            keys.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            keys.special_codes[SpecialCodeIndex::VMIN] = 1;
            keys.special_codes[SpecialCodeIndex::VTIME] = 0;
            keys.special_codes[SpecialCodeIndex::VSUSP] = 0;
            keys.special_codes[SpecialCodeIndex::VQUIT] = 0;
            tcsetattr(&stdin, OptionalActions::Now, &keys)?;
        }
        print_all(ENTER)?;
        Ok(screen)
    }

    /// Shows as much of the page as there is room for.
    pub(super) fn show(&self, lines: &[Line]) -> io::Result<()> {
        print_all(&frame(lines, size(), self.colours))
    }

    /// Receives once when `q` is pressed, or never if no keys can be read.
    pub(super) fn quit(&self) -> mpsc::Receiver<()> {
        let (pressed, quit) = mpsc::channel(1);
        let is_interactive = self.restore.mode.is_some();
        // A thread, because reading a terminal blocks. It ends with the process.
        std::thread::spawn(move || {
            let mut keys = io::stdin().lock().bytes();
            if !is_interactive || !keys.any(|key| matches!(key, Ok(b'q' | b'Q') | Err(_))) {
                std::mem::forget(pressed);
                return;
            }
            let _ = pressed.blocking_send(());
        });
        quit
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.restore.now();
    }
}

impl Restore {
    /// Errors are ignored: a terminal that went away needs no restoring.
    fn now(&self) {
        if self.is_done.swap(true, Ordering::SeqCst) {
            return;
        }
        let _ = print_all(LEAVE);
        if let Some(mode) = &self.mode {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, mode);
        }
    }
}

/// The size of the terminal now.
pub(super) fn size() -> Size {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
        }
        _ => USUAL,
    }
}

/// What is printed for a page: its first lines, and on the last row how to end and how many lines have no room.
fn frame(lines: &[Line], size: Size, colours: Colours) -> String {
    let mut frame = HOME.to_owned();
    let room = size.rows.saturating_sub(1);
    for line in lines.iter().take(room) {
        frame.push_str(&format!("{}{CLEAR_LINE}\n", line.shown(size.columns, colours)));
    }
    let last = match lines.len().saturating_sub(room) {
        0 => LAST_LINE.to_owned(),
        hidden => format!("{LAST_LINE}; {hidden} more lines, for which the terminal is too small"),
    };
    let last: String = last.chars().take(size.columns).collect();
    frame + &last + CLEAR_LINE + CLEAR_REST
}

fn print_all(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::super::text::Style;
    use super::*;

    #[test]
    fn a_frame_has_as_many_rows_as_the_terminal_and_says_how_to_end() {
        let lines: Vec<_> = (0..9).map(|number| Line::of(Style::Plain, &format!("line {number}"))).collect();
        let expected = "\x1b[Hline\x1b[K\nline\x1b[K\nq en\x1b[K\x1b[J";
        assert_eq!(frame(&lines, Size { columns: 4, rows: 3 }, Colours::None), expected);
        assert_eq!(
            frame(&lines[..1], Size { columns: 80, rows: 24 }, Colours::None),
            "\x1b[Hline 0\x1b[K\nq ends\x1b[K\x1b[J"
        );
        let last = "q ends; 7 more lines, for which the terminal is too small\x1b[K\x1b[J";
        let cut = frame(&lines, Size { columns: 80, rows: 3 }, Colours::None);
        assert_eq!(cut, format!("\x1b[Hline 0\x1b[K\nline 1\x1b[K\n{last}"));
        assert_eq!(frame(&lines, Size { columns: 1, rows: 1 }, Colours::None), "\x1b[Hq\x1b[K\x1b[J");
    }
}
