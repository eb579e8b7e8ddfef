//! What earlier runs have left, in the folder and on the server.

use super::bitmap::is_by_bitmap;
use super::local::{BROKEN, Local};
use super::stop::Stop;
use super::{Ready, broken, source_problem};
use crate::archive::{DiskPlan, Identity, Interrupted, Leftover, Mode, Plan};
use crate::cli::problem::Problem;
use crate::control::answers::{BackupAnswer, BackupState, DiskAnswer};

impl Local<'_> {
    /// Ends what earlier runs have left on the server: commits the backups of points that were
    /// published, and aborts those that nobody knows of.
    pub(super) fn commit_published(&mut self) -> Result<(), Problem> {
        let ours = self.prefix()?;
        let draft = match self.archive.leftover()? {
            Leftover::Interrupted(draft) => draft.plan().backup.clone(),
            Leftover::Removed(why) => {
                self.common
                    .report
                    .note(&format!("what an interrupted run left is gone: {why}"));
                None
            }
            Leftover::Nothing => None,
        };
        for backup in self.server.backups()? {
            let is = |of: &Option<Identity>| of.as_ref().is_some_and(|of| of.uuid == backup.uuid);
            let id = backup.id.as_str();
            let published = self.archive.points().iter().find(|point| is(&point.backup));
            if let Some(point) = published {
                self.commit_late(point.number, &backup)?;
            } else if id.starts_with(&ours) && !is(&draft) {
                self.server.abort(id)?;
            }
        }
        Ok(())
    }

    fn commit_late(&mut self, point: u64, backup: &BackupAnswer) -> Result<(), Problem> {
        let id = backup.id.as_str();
        match self.server.commit(id) {
            Ok(()) => {
                let note = format!("point {point} was complete: its backup {id} is committed now");
                self.common.report.note(&note);
                Ok(())
            }
            Err(problem) if problem.code() == BROKEN => {
                let note = format!(
                    "point {point} is complete, but its backup {id} broke before it was committed: \
                     the next changes are known since the point before"
                );
                self.common.report.note(&note);
                self.server.abort(id)
            }
            Err(problem) => Err(problem),
        }
    }

    /// Goes on with what an interrupted run has left, if that is what is asked for and the instant
    /// is still there.
    pub(super) async fn go_on(
        &mut self,
        disks: &[DiskAnswer],
        stop: &mut Stop,
    ) -> Result<Option<Ready>, Problem> {
        let Leftover::Interrupted(interrupted) = self.archive.leftover()? else {
            return Ok(None);
        };
        let Some(identity) = interrupted.plan().backup.clone() else {
            self.give_up(interrupted, "it was pulled from elsewhere")?;
            return Ok(None);
        };
        let id = &identity.name;
        let Some(backup) = self.server.backup(identity.uuid)? else {
            self.give_up(interrupted, &format!("its backup {id} has ended"))?;
            return Ok(None);
        };
        if backup.state == BackupState::Broken {
            let reason = backup.broken_reason.unwrap_or_default();
            self.server.abort(id)?;
            interrupted.discard()?;
            return Err(broken(id, &reason));
        }
        if !self.is_asked_for(interrupted.plan(), disks) {
            self.server.abort(id)?;
            self.give_up(interrupted, "something else is asked for now")?;
            return Ok(None);
        }
        let sources = self.sources(interrupted.plan(), &backup).await;
        let sources = match sources {
            Ok(sources) => sources,
            Err(error) => return Err(source_problem(&error)),
        };
        let draft = self.common.go_on(interrupted, stop).await?;
        let note = format!("going on with backup {id} of {}", backup.frozen_at);
        self.common.report.note(&note);
        Ok(Some(Ready { draft, sources }))
    }

    fn give_up(&self, interrupted: Interrupted, why: &str) -> Result<(), Problem> {
        interrupted.discard()?;
        let note = format!("what an interrupted run left is of no use, as {why}: beginning anew");
        self.common.report.note(&note);
        Ok(())
    }

    fn is_asked_for(&self, plan: &Plan, disks: &[DiskAnswer]) -> bool {
        let is_full = plan.disks.iter().all(|disk| disk.mode == Mode::Full);
        let has = |disk: &DiskAnswer| {
            let mut planned = plan.disks.iter();
            planned.any(|of| of.name == disk.disk.as_str() && of.uuid == Some(disk.uuid))
        };
        // What came by a bitmap came by the one that is asked for.
        let asked = self.common.args.bitmap.as_deref();
        let is_other = |disk: &DiskPlan| {
            let since = disk.since.as_ref().map(|since| since.name.as_str());
            is_by_bitmap(disk) && since != asked
        };
        (is_full || !self.common.args.full)
            && !plan.disks.iter().any(is_other)
            && plan.disks.len() == disks.len()
            && disks.iter().all(has)
    }
}
