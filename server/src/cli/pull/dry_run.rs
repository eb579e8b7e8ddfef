//! What a pull would do, as far as it can be known without an instant.

use super::Common;
use super::base::{Base, Coming};
use super::bitmap::{Bitmap, also};
use super::local::{base_of, bitmap_of, refuse_others};
use super::report::Row;
use super::server::Server;
use crate::archive::{Mode, Point};
use crate::cli::Done;
use crate::cli::problem::Problem;
use crate::control::answers::{CheckpointAnswer, DiskAnswer};

/// Says how each disk would come.
pub(super) fn dry_run(
    common: &Common<'_>,
    server: &mut Server,
    disks: &[DiskAnswer],
) -> Result<Done, Problem> {
    let points = common.points()?;
    refuse_others(&common.args.to, &points, disks)?;
    let known = server.checkpoints()?;
    let bitmap = bitmap_of(common, server, &known)?;
    let rows = foreseen(&points, common.args.full, disks, &known);
    let rows = rows.into_iter().zip(disks);
    let rows: Vec<Row> = rows
        .map(|(row, disk)| match &bitmap {
            Some(bitmap) => by_bitmap(row, bitmap, &points, disk),
            None => row,
        })
        .collect();
    Ok(common.dry_run(&points, &rows))
}

/// How a disk would come if there is a dirty bitmap to come by; `row` says how else.
fn by_bitmap(row: Row, bitmap: &Bitmap, points: &[Point], disk: &DiskAnswer) -> Row {
    let name = disk.disk.as_str();
    match bitmap.of(name) {
        Err(why_not) => Row {
            reason: row.reason.map(|reason| also(&why_not, reason)),
            ..row
        },
        Ok(dirty) => match bitmap.on_top_of(points, (name, disk.uuid), disk.size) {
            Coming::Full(reason) => Row {
                mode: Mode::Full,
                reason: Some(reason),
                since: None,
                since_uuid: None,
                parent: None,
                changed_bytes: disk.size,
                copy_bytes: disk.size,
                ..row
            },
            Coming::Incremental { since, parent } => Row {
                mode: Mode::Incremental,
                reason: None,
                since: Some(since.name),
                since_uuid: None,
                parent: Some(parent),
                changed_bytes: dirty,
                copy_bytes: dirty,
                ..row
            },
        },
    }
}

/// How each disk would come into a folder with these points, from a server that has these checkpoints.
pub(super) fn foreseen(
    points: &[Point],
    full: bool,
    disks: &[DiskAnswer],
    known: &[CheckpointAnswer],
) -> Vec<Row> {
    let rows = disks.iter().map(|disk| {
        let (reason, checkpoint, parent) = match base_of(full, points, disk, known) {
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
    rows.collect()
}
