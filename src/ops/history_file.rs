//! Keeps the records of the history next to the spool, for the charts after a restart: a file of fixed size with one
//! place for each half minute of a day. It is written in place and never synced, and it is opened for each record, so
//! that a file that was deleted or replaced costs nothing. Whatever is wrong with it costs only the history.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::OFlags;
use tracing::warn;

use super::record::{RECORD_BYTES, RECORD_SECONDS, RECORDS_MAX, Record};

/// The first bytes of a history of any version.
const MAGIC: &[u8] = b"prism-relay history ";
/// The first bytes of this version.
const HEADER: &[u8] = b"prism-relay history 1\n";

/// The file of the history.
pub(super) struct HistoryFile {
    path: PathBuf,
    /// Whether a failure was logged that is not over yet.
    failing: bool,
}

impl HistoryFile {
    /// Reads the records of the last day, the oldest first. Creates the file if it is missing.
    pub(super) fn open(path: PathBuf, now: Timestamp) -> (Self, Vec<Record>) {
        let mut file = Self { path, failing: false };
        let records = open(&file.path).and_then(|open| read(&open, now.as_second())).unwrap_or_else(|error| {
            file.report(&error);
            Vec::new()
        });
        (file, records)
    }

    /// Writes a record in the place of its time. Waits for the disk.
    pub(super) fn write(&mut self, record: &Record) {
        match write(&self.path, record) {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => self.report(&error),
            Err(_) => {}
        }
    }

    fn report(&mut self, error: &io::Error) {
        self.failing = true;
        let path = self.path.display();
        warn!(%path, %error, "the history of the console's charts cannot be kept; webhooks are not affected");
    }
}

fn read(file: &File, now: i64) -> io::Result<Vec<Record>> {
    let mut bytes = vec![0; RECORD_BYTES * (RECORDS_MAX + 1)];
    let mut length = 0;
    while let read @ 1.. = file.read_at(&mut bytes[length..], length as u64)? {
        length += read;
    }
    let (_, places) = bytes[..length].split_at_checked(RECORD_BYTES).unwrap_or_default();
    let day = now - RECORDS_MAX as i64 * RECORD_SECONDS..=now;
    let records = places.as_chunks().0.iter().enumerate().filter_map(|(number, bytes)| {
        Record::of_bytes(bytes).filter(|record| day.contains(&record.at) && place(record) == number)
    });
    let mut records: Vec<Record> = records.collect();
    records.sort_by_key(|record| record.at);
    Ok(records)
}

fn write(path: &Path, record: &Record) -> io::Result<()> {
    open(path)?.write_all_at(&record.to_bytes(), ((place(record) + 1) * RECORD_BYTES) as u64)
}

/// Opens or creates the file. Waits for no other end of a pipe, follows no link, and leaves another program's file
/// alone.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.custom_flags(flags.bits().cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut start = [0; HEADER.len()];
    let length = file.read_at(&mut start, 0)?;
    if start == HEADER {
        return Ok(file);
    }
    let compared = length.min(MAGIC.len());
    if start[..compared] != MAGIC[..compared] {
        return Err(io::Error::other("it is not a history of prism-relay; move it away"));
    }
    // New, or of another version.
    file.set_len(0)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all_at(HEADER, 0)?;
    Ok(file)
}

/// The number of a record's place in the file.
fn place(record: &Record) -> usize {
    record.slot(RECORD_SECONDS).rem_euclid(RECORDS_MAX as i64) as usize
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const NOW: i64 = 1_764_376_200;

    fn record(at: i64) -> Record {
        Record { at, milliseconds: 30_000, accepted: at.cast_unsigned(), ..Record::default() }
    }

    fn records(path: &Path, now: i64) -> (bool, Vec<i64>) {
        let (file, records) = HistoryFile::open(path.to_owned(), Timestamp::from_second(now).unwrap());
        (file.failing, records.iter().map(|record| record.at).collect())
    }

    #[test]
    fn the_last_day_is_kept_in_a_private_file_of_limited_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool.db.history");
        let (mut file, none) = HistoryFile::open(path.clone(), Timestamp::UNIX_EPOCH);
        assert!(none.is_empty() && !file.failing && path.exists());
        let times: Vec<i64> = (0..2 * RECORDS_MAX as i64).map(|number| NOW - 2 * 86_400 + 30 * (number + 1)).collect();
        times.iter().for_each(|at| file.write(&record(*at)));
        assert_eq!(records(&path, NOW), (false, times[RECORDS_MAX..].to_vec()));
        assert_eq!(records(&path, NOW + 60).1, times[RECORDS_MAX + 1..], "older than a day");
        assert_eq!(records(&path, NOW - 60).1.last(), Some(&(NOW - 60)), "the clock was set back");
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(metadata.len() < 300_000, "{} bytes", metadata.len());
    }

    #[test]
    fn a_damaged_record_costs_that_record_and_an_old_version_the_history() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool.db.history");
        let (mut file, _) = HistoryFile::open(path.clone(), Timestamp::UNIX_EPOCH);
        [NOW - 60, NOW - 30, NOW].iter().for_each(|at| file.write(&record(*at)));
        let position = (place(&record(NOW - 30)) + 1) * RECORD_BYTES;
        let mut bytes = fs::read(&path).unwrap();
        bytes[position + 20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(records(&path, NOW), (false, vec![NOW - 60, NOW]));
        // Cut within a record, as by a full disk.
        fs::write(&path, &bytes[..position + RECORD_BYTES + 10]).unwrap();
        assert!(!records(&path, NOW).0);
        fs::write(&path, [b"prism-relay history 9\n".as_slice(), &[7; 5000]].concat()).unwrap();
        assert_eq!(records(&path, NOW), (false, Vec::new()), "another version");
        file.write(&record(NOW));
        assert_eq!((file.failing, records(&path, NOW)), (false, (false, vec![NOW])));
        fs::write(&path, "").unwrap();
        assert_eq!(records(&path, NOW), (false, Vec::new()));
    }

    #[test]
    fn what_is_not_a_history_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool.db.history");
        let look = |what: &str| {
            let (mut file, records) = HistoryFile::open(path.clone(), Timestamp::from_second(NOW).unwrap());
            assert!(file.failing && records.is_empty(), "{what}");
            file.write(&record(NOW));
            assert!(file.failing, "{what}");
        };
        fs::write(&path, "somebody else's notes").unwrap();
        look("a foreign file");
        assert_eq!(fs::read_to_string(&path).unwrap(), "somebody else's notes");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        look("a link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        look("a folder");
        fs::remove_dir(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        look("a pipe");
    }
}
