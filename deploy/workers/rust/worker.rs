//! A worker for prism-relay: saves the body of each event as `OUT/<message_id>.json`. SIGTERM or Ctrl-C ends it.
//!
//! Change `save` and `handle` for your own work; `kit.rs` does the rest.

mod kit;
mod types;

#[cfg(test)]
mod sqlite_store;
#[cfg(test)]
mod vectors;

use std::path::PathBuf;
use std::{env, fs, io, io::Write};

use kit::{BoxError, Failure, Message, Options, Payload, Store};

#[allow(clippy::disallowed_methods, reason = "the lint is for the relay")]
fn setting(name: &str, default: &str) -> String {
    env::var(name).unwrap_or_else(|_| default.to_owned())
}

/// The store of this example: a message is done when its file exists, so work and record are one step.
struct Files(PathBuf);

impl Files {
    fn path(&self, message_id: &str) -> PathBuf {
        self.0.join(format!("{message_id}.json"))
    }

    /// Writes a temporary file and renames it: the result is complete or absent.
    fn save(&self, message: &Message) -> io::Result<()> {
        let path = self.path(&message.id);
        let temporary = path.with_extension(format!("{:016x}.tmp", fastrand::u64(..)));
        fs::File::create(&temporary)
            .and_then(|mut file| file.write_all(&message.body).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&temporary, path))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        fs::File::open(&self.0)?.sync_all() // so that the new name survives a power loss
    }
}

impl Store for &Files {
    async fn is_done(&self, message_id: &str) -> Result<bool, BoxError> {
        Ok(self.path(message_id).try_exists()?)
    }

    async fn mark_done(&self, _message_id: &str) -> Result<(), BoxError> {
        Ok(())
    }
}

async fn handle(message: &Message, files: &Files) -> Result<(), Failure> {
    match message.payload()? {
        // Typed: scan.scan_id, scan.state; a new state is State::Unknown.
        Payload::Scan(_scan) => files.save(message)?,
        Payload::Prediction(_prediction) => files.save(message)?,
        // A dead letter, where a person sees it.
        Payload::Other(_) => return Err(Failure::GiveUp("no handler for this type".to_owned())),
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let files = Files(setting("OUT", "./out").into());
    let options = Options {
        url: setting("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f"),
        queue: setting("QUEUE", "prism.scan"),
        prefetch: setting("PREFETCH", "20").parse()?,
        metrics: |_: &_, _: &_, _| {},
    };
    kit::run(async |message: &Message| handle(message, &files).await, &files, options).await
}
