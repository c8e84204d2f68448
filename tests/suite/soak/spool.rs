//! Reads the relay's ledger from the spool file while the relay runs, and compares it with the events in the file.

use std::fmt;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, Result};

/// The lifetime totals, and the number of events in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolLedger {
    pub accepted: u64,
    pub confirmed: u64,
    pub pending: u64,
    pub parked: u64,
    pub removed: u64,
    /// Rows in the table of events.
    pending_rows: u64,
    parked_rows: u64,
}

impl SpoolLedger {
    /// Reads everything in one transaction, so that the numbers are consistent.
    pub fn read(path: &Path) -> Result<Self> {
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        let sql = "SELECT accepted, confirmed, pending, parked, removed,
                          (SELECT count(*) FROM event WHERE parked_reason IS NULL),
                          (SELECT count(*) FROM event WHERE parked_reason IS NOT NULL)
                   FROM ledger";
        connection.query_row(sql, [], |row| {
            Ok(Self {
                accepted: row.get(0)?,
                confirmed: row.get(1)?,
                pending: row.get(2)?,
                parked: row.get(3)?,
                removed: row.get(4)?,
                pending_rows: row.get(5)?,
                parked_rows: row.get(6)?,
            })
        })
    }

    pub fn balances(&self) -> bool {
        self.accepted == self.confirmed + self.pending + self.parked + self.removed
            && (self.pending, self.parked) == (self.pending_rows, self.parked_rows)
    }
}

/// A process that reads the spool and does not stop, such as a backup or a query in a pager. Drop it to end it.
pub struct StayingReader(#[expect(dead_code, reason = "it holds the log until it is dropped")] Connection);

impl StayingReader {
    pub fn start(path: &Path) -> Result<Self> {
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.execute_batch("BEGIN; SELECT * FROM ledger")?;
        Ok(Self(connection))
    }
}

impl fmt::Display for SpoolLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accepted, confirmed, pending, parked, removed, pending_rows, parked_rows } = self;
        write!(
            f,
            "{accepted} accepted = {confirmed} confirmed + {pending} pending + {parked} parked + {removed} removed; \
             {pending_rows} + {parked_rows} rows"
        )
    }
}
