//! Which messages are done, in a SQLite file. Purge it now and then: a duplicate comes within minutes, a redriven
//! dead letter within days. Needs `rusqlite`.
#![allow(dead_code, unreachable_pub, reason = "a worker uses what it needs")]

use rusqlite::Connection;

use super::kit::{BoxError, Store};

/// One table, with the `message_id` as its key.
pub struct SqliteStore(Connection);

impl SqliteStore {
    /// Opens or creates the file.
    pub fn open(path: &str) -> Result<Self, BoxError> {
        let database = Connection::open(path)?;
        let table = "CREATE TABLE IF NOT EXISTS done (message_id TEXT PRIMARY KEY, \
                     at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)";
        database.execute(table, ())?;
        Ok(Self(database))
    }

    /// Forgets messages that were done more than `days` ago.
    pub fn purge(&self, days: u32) -> Result<(), BoxError> {
        self.0.execute("DELETE FROM done WHERE at < datetime('now', ?)", [format!("-{days} days")])?;
        Ok(())
    }
}

impl Store for SqliteStore {
    async fn is_done(&self, message_id: &str) -> Result<bool, BoxError> {
        Ok(self.0.prepare_cached("SELECT 1 FROM done WHERE message_id = ?")?.exists([message_id])?)
    }

    async fn mark_done(&self, message_id: &str) -> Result<(), BoxError> {
        self.0.execute("INSERT OR IGNORE INTO done (message_id) VALUES (?)", [message_id])?;
        Ok(())
    }
}
