//! Polling until something becomes true. No test sleeps in any other way.

use std::fmt::{Debug, Display};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

/// How long anything may take before a test fails. Generous, because only a test that fails takes that long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Time between two probes. Short enough not to slow a test down, long enough not to load the machine.
const INTERVAL: Duration = Duration::from_millis(25);

/// Calls `probe` until it gives `Ok`, and returns the value. An `Err` says what was seen instead.
///
/// # Panics
/// After [`DEADLINE`], with `timed out waiting for: <what>` and the last `Err`.
pub async fn eventually<T, S: Display>(what: &str, probe: impl AsyncFnMut() -> Result<T, S>) -> T {
    eventually_within(DEADLINE, what, probe).await
}

/// As [`eventually()`], with another deadline.
pub async fn eventually_within<T, S: Display>(
    deadline: Duration,
    what: &str,
    probe: impl AsyncFnMut() -> Result<T, S>,
) -> T {
    poll(deadline, probe).await.unwrap_or_else(|seen| panic!("timed out waiting for: {what}; last seen: {seen}"))
}

/// Calls `probe` until it gives `Ok`. At the deadline, which also ends a probe that hangs, returns the last `Err`.
pub async fn poll<T, S: Display>(
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, S>,
) -> Result<T, String> {
    let end = Instant::now() + deadline;
    let mut last_seen = "nothing".to_owned();
    loop {
        match timeout_at(end, probe()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(seen)) => last_seen = seen.to_string(),
            Err(_) => return Err(format!("{last_seen} (then a probe that did not end)")),
        }
        sleep(INTERVAL).await;
        if Instant::now() >= end {
            return Err(last_seen);
        }
    }
}

/// Waits until `probe` gives `expected`.
pub async fn eventually_equal<T: PartialEq + Debug>(what: &str, expected: T, mut probe: impl AsyncFnMut() -> T) {
    eventually(what, async || {
        let seen = probe().await;
        if seen == expected { Ok(()) } else { Err(format!("{seen:?}, not {expected:?}")) }
    })
    .await;
}
