//! Notes about a valid configuration: what an operator may not have meant. `serve` logs them, `check` shows them.

/// A remark about a key whose value is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The configuration key, or the name of a variable.
    pub key: String,
    /// What the value means, and what to do: the rest of a sentence that begins with the key.
    pub text: String,
}

/// What was found while the configuration was read.
pub(super) struct Findings {
    pub mistakes: Vec<String>,
    pub notes: Vec<Note>,
}
