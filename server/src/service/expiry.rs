//! Backups that nobody ended in time.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;

use super::Service;
use super::book::BeginRequest;
use crate::failure::Failure;

impl Service {
    /// Aborts what has expired, for as long as the server runs.
    ///
    /// The clock is the one on the wall, which may be set at any time, and goes on while no server
    /// does; so it is looked at again and again.
    pub(crate) async fn keep_to_expiry(self: Arc<Self>) {
        loop {
            let aborted = self.abort_expired().await;
            tokio::time::sleep(if aborted { CHECK } else { AGAIN }).await;
        }
    }

    /// Aborts the open backups whose time has come, and says whether it could.
    pub(super) async fn abort_expired(&self) -> bool {
        let mut aborted = true;
        let now = (self.clock)();
        let is_over = |at: Option<OffsetDateTime>| at.is_some_and(|at| at <= now);
        let open = self.book().backups.clone();
        for backup in open.iter().filter(|backup| is_over(backup.expires_at)) {
            tracing::warn!(backup = %backup.id, "it has expired");
            if let Err(failure) = self.abort_backup(&backup.id).await {
                // Or it was committed at the last moment.
                tracing::warn!(backup = %backup.id, %failure, "it is not aborted");
                aborted = false;
            }
        }
        aborted
    }
}

/// When a backup that is begun at `now` expires.
pub(super) fn expiry(
    request: &BeginRequest,
    now: OffsetDateTime,
) -> Result<Option<OffsetDateTime>, Failure> {
    match request.expires_s {
        None => Ok(None),
        Some(seconds @ 1..=EXPIRES_MAX_S) => Ok(Some(now + Duration::from_secs(seconds))),
        Some(seconds) => {
            let message = format!("a backup cannot expire after {seconds} seconds");
            let hint = format!("from 1 to {EXPIRES_MAX_S} seconds; without, it never expires");
            Err(Failure::new("bad-argument", message).hint(hint))
        }
    }
}

/// How late a backup may be aborted, at most.
const CHECK: Duration = Duration::from_secs(1);

/// When the journal cannot be written, it may be some time until somebody sees to the storage.
const AGAIN: Duration = Duration::from_secs(30);

/// Ten years: whoever means more means never.
const EXPIRES_MAX_S: u64 = 10 * 366 * 24 * 3600;
