//! What a pull would do, as far as it can be known without an instant.

use super::Common;
use super::base::Base;
use super::local::{base_of, refuse_others};
use super::report::Row;
use super::server::Server;
use crate::archive::{Mode, Point};
use crate::cli::Done;
use crate::cli::problem::Problem;
use crate::control::answers::DiskAnswer;

/// Says how each disk would come.
pub(super) fn dry_run(
    common: &Common<'_>,
    server: &mut Server,
    disks: &[DiskAnswer],
) -> Result<Done, Problem> {
    let points = common.points()?;
    refuse_others(&common.args.to, &points, disks)?;
    let known = server.checkpoints()?;
    let rows = disks.iter().map(|disk| {
        let (reason, checkpoint, parent) = match base_of(common, &points, disk, &known) {
            Base::None(reason) => (Some(reason), None, None),
            Base::Checkpoint(uuid) => {
                let is_of =
                    |point: &&Point| point.checkpoint.as_ref().is_some_and(|of| of.uuid == uuid);
                let parent = points.iter().rev().find(is_of);
                let checkpoint = known.iter().find(|checkpoint| checkpoint.uuid == uuid);
                (None, checkpoint, parent)
            }
        };
        let parts = checkpoint.iter().flat_map(|checkpoint| &checkpoint.disks);
        let dirty = parts
            .filter(|part| part.disk_uuid == disk.uuid)
            .map(|part| part.dirty_bytes);
        let changed = dirty.clone().next().unwrap_or(disk.size);
        Row {
            disk: disk.disk.to_string(),
            size: disk.size,
            mode: dirty
                .clone()
                .next()
                .map_or(Mode::Full, |_| Mode::Incremental),
            reason,
            since: checkpoint.map(|checkpoint| checkpoint.name.to_string()),
            since_uuid: checkpoint.map(|checkpoint| checkpoint.uuid),
            parent: parent.map(|point| point.number),
            changed_bytes: changed,
            zero_bytes: None,
            copy_bytes: changed,
            copied_bytes: 0,
        }
    });
    let rows: Vec<Row> = rows.collect();
    Ok(common.dry_run(&points, &rows))
}
