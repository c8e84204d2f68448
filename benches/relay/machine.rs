//! A description of the machine, and the memory and processor time of processes, from /proc.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// A figure from `/proc/<pid>/status`, in MiB.
pub fn memory(pid: u32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read a process's status");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
    let kibibytes: f64 = line.split_whitespace().nth(1).expect("a value").parse().expect("a number");
    kibibytes / 1024.0
}

/// The processor time of a process so far.
pub fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("read a process's stat");
    // The name, in parentheses, may contain anything; utime and stime are the 12th and 13th field after it, in
    // hundredths of a second on every Linux that Rust runs on.
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks = |nth| fields.split_whitespace().nth(nth).expect("a field").parse::<u64>().expect("a number");
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// One line about the machine.
pub fn describe(spools: &Path) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo").lines().find_map(|line| line.strip_prefix("model name").map(str::to_owned));
    let model = model.as_deref().map_or("processor unknown", |model| model.trim_start_matches([' ', '\t', ':']));
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{processors} x {model}, Linux {}, spools on {}",
        read("/proc/sys/kernel/osrelease").trim(),
        file_system(spools, &read("/proc/self/mounts"))
    )
}

/// The type of the file system that holds `path`, which is the one with the longest matching mount point.
fn file_system(path: &Path, mounts: &str) -> String {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let above = fields.filter(|mount| mount.len() > 2 && path.starts_with(mount[1]));
    above.max_by_key(|mount| mount[1].len()).map_or_else(|| "?".to_owned(), |mount| mount[2].to_owned())
}
