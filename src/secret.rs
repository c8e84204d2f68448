//! A secret that can be used but not printed or compared: it has no `Display`, no `Serialize` and no `PartialEq`.

use std::fmt;

/// Text that must not appear in a log, a metric, an error or a page.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps the text of a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Review each call: the caller must not log, show or compare it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_show_the_text() {
        assert_eq!(format!("{:?}", Some(Secret::new("whsec_1"))), "Some([secret])");
    }
}
