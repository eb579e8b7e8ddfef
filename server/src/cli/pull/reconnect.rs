//! A server that is gone for a while: it was restarted, or the network is.
//!
//! What is copied is known by the uuid of its backup, so whatever server has that open has the same bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::local::Local;
use super::server::Server;
use super::stop::Stop;
use super::{Failed, Ready};
use crate::archive::Identity;
use crate::cli::progress::{Watch, missing_bytes};
use crate::control::answers::BackupState;
use crate::copy::{CopyError, SourceError};

impl Local<'_> {
    /// Fetches what a draft lacks, over new connections where those that there were are lost.
    pub(super) async fn fetch(
        &mut self,
        ready: &mut Ready,
        backup: &Identity,
        watch: &Arc<Watch>,
        stop: &mut Stop,
    ) -> Result<(), Failed> {
        let patience = self.common.args.reconnect;
        let mut lost: Option<(u64, Instant)> = None;
        loop {
            let failed = match self.common.fetch(ready, watch, stop).await {
                Err(Failed::Copy(CopyError::Source(disk, error))) => (disk, error),
                end => return end,
            };
            let missing: u64 = ready.draft.disks().iter().map(|it| missing_bytes(it)).sum();
            // One that brings nothing counts as none.
            let since = match lost {
                Some((before, since)) if before == missing => since,
                _ => Instant::now(),
            };
            lost = Some((missing, since));
            let is_back = failed.1.is_disconnection()
                && self
                    .is_back(ready, backup, (&failed.1, since + patience), stop)
                    .await?;
            if !is_back {
                return Err(Failed::Copy(CopyError::Source(failed.0, failed.1)));
            }
        }
    }

    /// Waits for a server that has the backup open, and enters its exports.
    async fn is_back(
        &mut self,
        ready: &mut Ready,
        backup: &Identity,
        (error, until): (&SourceError, Instant),
        stop: &mut Stop,
    ) -> Result<bool, Failed> {
        let mut pause = PAUSE_MIN;
        let mut is_told = false;
        while Instant::now() + pause <= until {
            stop.unless_stopped(sleep(pause))
                .await
                .ok_or(Failed::Stopped)?;
            pause = PAUSE_MAX.min(pause * 2);
            let Ok(mut server) = Server::connect(self.server.run_dir()) else {
                if !is_told {
                    is_told = true;
                    let note = format!("the server is gone ({error}): waiting for it");
                    self.common.report.note(&note);
                }
                continue;
            };
            let found = match server.backup(backup.uuid) {
                Ok(Some(found)) if found.state == BackupState::Open => found,
                // What has become of it is told by whoever asks next.
                Ok(_) => return Ok(false),
                Err(_) => continue,
            };
            let entering = self.sources(ready.draft.plan(), &found);
            let entered = stop.unless_stopped(entering).await.ok_or(Failed::Stopped)?;
            if let Ok(sources) = entered {
                (self.server, ready.sources) = (server, sources);
                self.common.report.note("the server is back: going on");
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A server that is restarted may be back by then.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Often enough for whoever waits.
const PAUSE_MAX: Duration = Duration::from_secs(2);
