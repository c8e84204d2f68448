//! `--rate`: how many events a second a command sends or moves.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// After a pause, the events of at most this time are made up for: workers must not get them in one burst.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Batches of this time. A large batch at a low rate would be a burst.
const BATCH_SECONDS: f64 = 0.25;
/// Messages of this time are read ahead. RabbitMQ closes a channel that holds a message for half an hour.
const AHEAD_SECONDS: f64 = 60.0;

/// Parses the option `--rate`.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.001..=1_000_000.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number of events per second, from 0.001 to 1000000".to_owned()),
    }
}

/// The moments at which the next events may go.
pub(super) struct Pace {
    /// Time between two events; none without a rate.
    gap: Duration,
    next: Instant,
}

impl Pace {
    pub(super) fn new(rate: Option<f64>) -> Self {
        let gap = rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate));
        Self { gap, next: Instant::now() }
    }

    /// Waits until the next event may go.
    pub(super) async fn tick(&mut self) {
        if self.gap.is_zero() {
            return;
        }
        sleep_until(self.next).await;
        let earliest = Instant::now().checked_sub(CATCH_UP).unwrap_or(self.next);
        self.next = self.next.max(earliest) + self.gap;
    }
}

/// Maximum number of messages in a batch at this rate.
pub(super) fn batch(rate: Option<f64>, most: usize) -> usize {
    rate.map_or(most, |rate| ((rate * BATCH_SECONDS) as usize).clamp(1, most))
}

/// Maximum number of messages to read ahead at this rate: more than a batch.
pub(super) fn read_ahead(rate: Option<f64>, most: u16) -> u16 {
    rate.map_or(most, |rate| ((rate * AHEAD_SECONDS) as u16).clamp(2, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pace_keeps_its_rate_and_makes_up_for_a_second_at_most() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(10.0));
        for _ in 0..11 {
            pace.tick().await;
        }
        assert_eq!(start.elapsed(), Duration::from_secs(1));
        tokio::time::sleep(Duration::from_secs(60)).await;
        let late = Instant::now();
        for _ in 0..21 {
            pace.tick().await;
        }
        assert_eq!(late.elapsed(), Duration::from_secs(1), "11 at once, and 10 in the next second");
        let mut unlimited = Pace::new(None);
        let now = Instant::now();
        for _ in 0..1000 {
            unlimited.tick().await;
        }
        assert_eq!(now.elapsed(), Duration::ZERO);
    }

    #[test]
    fn batches_and_reading_ahead_fit_the_rate() {
        for (rate, expected) in [
            (None, (200, 500)),
            (Some(0.001), (1, 2)),
            (Some(1.0), (1, 60)),
            (Some(40.0), (10, 500)),
            (Some(1_000_000.0), (200, 500)),
        ] {
            assert_eq!((batch(rate, 200), read_ahead(rate, 500)), expected, "{rate:?}");
        }
    }

    #[test]
    fn a_rate_is_a_number_above_zero() {
        assert_eq!(rate("2.5"), Ok(2.5));
        for wrong in ["", "0", "-1", "NaN", "inf", "2/s"] {
            assert!(rate(wrong).is_err(), "{wrong:?}");
        }
    }
}
