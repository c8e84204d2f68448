//! The lifetime totals, kept in the same transactions as the events, so that they balance at every instant.

use rusqlite::{Connection, OptionalExtension, Row};

use super::error::{Result, StoreError};

/// The totals of a spool. They always satisfy `accepted = confirmed + pending + parked + removed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Events ever accepted; also the `seq` of the last one.
    pub accepted: u64,
    /// Delivered events: confirmed by the broker and routed to a queue.
    pub confirmed: u64,
    /// Events that wait for their confirm.
    pub pending: u64,
    /// Events kept because the broker does not take them.
    pub parked: u64,
    /// Events removed by an operator, or unreadable after damage of the file.
    pub removed: u64,
    /// Re-sends answered with the first id; no part of the balance.
    pub duplicates: u64,
    /// Bytes that pending and parked events count for in `spool.max_bytes`.
    pub bytes: u64,
}

/// How many events were deleted, and how many bytes they counted for.
pub(super) struct Deleted {
    pub pending: u64,
    pub parked: u64,
    pub bytes: u64,
}

impl Deleted {
    pub(super) fn events(&self) -> u64 {
        self.pending + self.parked
    }
}

impl Ledger {
    /// Whether the totals add up.
    pub fn balances(&self) -> bool {
        let parts = [self.confirmed, self.pending, self.parked, self.removed];
        u128::from(self.accepted) == parts.map(u128::from).iter().sum()
    }

    /// Subtracts deleted events. Fails if the totals are smaller than that: then they are wrong.
    pub(super) fn take_out(&mut self, deleted: &Deleted) -> Result<()> {
        let left = |total: u64, by: u64| total.checked_sub(by).ok_or(StoreError::WrongTotals);
        self.pending = left(self.pending, deleted.pending)?;
        self.parked = left(self.parked, deleted.parked)?;
        self.bytes = left(self.bytes, deleted.bytes)?;
        Ok(())
    }

    /// Counts one pending event as parked.
    pub(super) fn park(&mut self) -> Result<()> {
        self.pending = self.pending.checked_sub(1).ok_or(StoreError::WrongTotals)?;
        self.parked += 1;
        Ok(())
    }

    pub(super) fn read(connection: &Connection) -> Result<Self> {
        let mut statement = connection.prepare_cached(
            "SELECT accepted, confirmed, pending, parked, removed, duplicates, bytes FROM ledger WHERE id = 1",
        )?;
        // The relay never deletes the row.
        statement.query_row([], Self::from_row).optional()?.ok_or(StoreError::WrongTotals)
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            accepted: row.get(0)?,
            confirmed: row.get(1)?,
            pending: row.get(2)?,
            parked: row.get(3)?,
            removed: row.get(4)?,
            duplicates: row.get(5)?,
            bytes: row.get(6)?,
        })
    }

    pub(super) fn write(&self, connection: &Connection) -> Result<()> {
        let mut statement = connection.prepare_cached(
            "UPDATE ledger SET accepted = ?1, confirmed = ?2, pending = ?3, parked = ?4, removed = ?5,
                               duplicates = ?6, bytes = ?7 WHERE id = 1",
        )?;
        statement.execute((
            self.accepted,
            self.confirmed,
            self.pending,
            self.parked,
            self.removed,
            self.duplicates,
            self.bytes,
        ))?;
        Ok(())
    }
}
