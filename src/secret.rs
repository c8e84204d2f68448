//! A secret that can be used but not shown: it has no `Display`, no `Serialize` and no `PartialEq`.
//! Knows nothing of what the secret is for.

use std::fmt;

/// Text that must not appear in a log, a metric, an error or a page.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Each call is a place where the secret leaves its wrapping, so look twice.
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
