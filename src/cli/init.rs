//! `init`: prints a starter configuration.

use super::output::out;

#[derive(clap::Args)]
pub(super) struct Options {
    /// For a Prism account that does not sign its webhooks
    #[arg(long)]
    unsigned: bool,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    out(starter(options.unsigned).as_bytes())
}

/// At most 20 lines. Signed, it has one mistake until the secret is filled in: a made-up one would start, and refuse
/// every real webhook.
fn starter(unsigned: bool) -> String {
    let signature = if unsigned {
        "# This account does not sign: any client that knows the address can post.\nrequired = false"
    } else {
        "# The signing secret of your Prism account, in quotation marks. Keep this file private.\nsecrets = []"
    };
    format!(
        r#"# A starter configuration of prism-relay. To see every key: prism-relay config show --defaults
# To check it: prism-relay --config FILE check    To run it: prism-relay --config FILE
[http]
listen = "127.0.0.1:8080"
path = "/webhooks/prism"

[signature]
{signature}

[spool]
# On a local disk that survives restarts.
path = "data/spool.db"

[broker]
urls = ["amqp://guest:guest@127.0.0.1:5672/%2f"]

[ops]
listen = "127.0.0.1:9090"
"#
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::config::{Config, Purpose};

    fn load(starter: &str) -> Result<Config, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(starter.as_bytes()).unwrap();
        Config::load(Some(file.path()), [], Purpose::Serve).map_err(|error| error.to_string())
    }

    #[test]
    fn a_starter_needs_only_the_secret_and_without_signatures_nothing() {
        assert!(!load(&starter(true)).unwrap().signature.required);
        let error = load(&starter(false)).unwrap_err();
        assert!(error.contains("has a mistake") && error.contains("signature.secrets: is empty"), "{error}");
        let filled = starter(false).replace("secrets = []", "secrets = [\"whsec_0123456789\"]");
        assert!(load(&filled).unwrap().signature.required);
        for starter in [starter(true), starter(false)] {
            assert!(starter.lines().count() <= 20, "{starter}");
        }
    }
}
