//! Where tests may reach into the order of things. Without the feature `test-hooks`, nowhere.

use scratch::{Pace, Step};
use time::OffsetDateTime;

/// Steps in between for tests; compiled to nothing in a release.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hooks;

impl Pace for Hooks {
    fn now(&self) -> u64 {
        // The clock that file systems take their times from.
        let time = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        u64::try_from(time.tv_sec).unwrap_or(0)
    }

    #[cfg(not(feature = "test-hooks"))]
    async fn step(&self, _: Step) {}

    #[cfg(feature = "test-hooks")]
    async fn step(&self, before: Step) {
        if before == Step::Swap
            && let Some(delay) = milliseconds("STILLPOINT_TEST_SWAP_DELAY_MS")
        {
            tokio::time::sleep(delay).await;
        }
    }
}

/// Whether a freeze is to leave its gates open, to show that a test notices.
pub(crate) fn leaves_gates_open() -> bool {
    cfg!(feature = "test-hooks") && std::env::var_os("STILLPOINT_TEST_LEAVE_GATES_OPEN").is_some()
}

/// What the clock on the wall says.
pub(crate) fn wall_clock() -> OffsetDateTime {
    OffsetDateTime::now_utc() + offset()
}

#[cfg(not(feature = "test-hooks"))]
fn offset() -> std::time::Duration {
    std::time::Duration::ZERO
}

/// By how many seconds a test has set the clock forward.
#[cfg(feature = "test-hooks")]
fn offset() -> std::time::Duration {
    let file = std::env::var_os("STILLPOINT_TEST_CLOCK_FILE");
    let text = file.and_then(|path| std::fs::read_to_string(path).ok());
    let seconds = text.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    std::time::Duration::from_secs(seconds)
}

#[cfg(feature = "test-hooks")]
fn milliseconds(variable: &str) -> Option<std::time::Duration> {
    let value = std::env::var(variable).ok()?.parse().ok()?;
    Some(std::time::Duration::from_millis(value))
}
