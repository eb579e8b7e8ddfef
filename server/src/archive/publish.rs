//! From a draft to a point.
//!
//! The order, and what a crash or a power cut leaves after each step:
//!
//! 1. Each file is synced, dropped from the page cache, read back and compared: by stretches, while the rest
//!    of it comes, or now. *A draft*: the next run reads it back and goes on.
//! 2. The manifest is written into the draft and synced, with the hash of each file; then the folder of
//!    the draft is synced. *A draft still*: its plan is there, and the manifest is written anew.
//! 3. The folder is renamed from `N.partial` to `N`. *A draft or a point*, never a part of one: the rename is
//!    one entry in one folder, and all that it brings into view has been synced before.
//! 4. The folder of backups is synced. *A point*; only now whoever pulls may tell the server so.
//! 5. Plan and records are removed. *A point* with files that nobody reads; whoever next opens the
//!    folder to write removes them.

use std::fs;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::begin::sweep;
use super::draft::{DiskDraft, Draft};
use super::error::ArchiveError;
use super::folder::{sync_folder, write_aside};
use super::manifest::{Contents, DiskEntry, MANIFEST, Manifest, Point};
use super::plan::file_name;
use super::progress::Progress;
use super::read_back::{Follower, read_back};
use super::runs;

/// Makes the draft a point.
pub(super) fn finish(draft: &mut Draft, progress: &dyn Progress) -> Result<Point, ArchiveError> {
    let (mut disks, mut contents) = (Vec::new(), Vec::new());
    let mut followers = std::mem::take(&mut draft.followers).into_iter();
    for disk in &draft.disks {
        let (entry, holds) = verified(disk, followers.next(), progress)?;
        disks.push(entry);
        contents.push(holds);
    }
    let plan = &draft.plan;
    let point = Point {
        number: draft.number,
        instant: plan.instant,
        origin: plan.origin.clone(),
        backup: plan.backup.clone(),
        checkpoint: plan.checkpoint.clone(),
        held_us: plan.held_us,
        disks,
    };
    let manifest = Manifest { point, contents };

    let (folder, place) = (&draft.folder, &draft.place);
    let written = write_aside(&folder.join(MANIFEST), &manifest.text());
    let written = written.and_then(|()| sync_folder(folder));
    written.map_err(|error| ArchiveError::writing(folder, error))?;
    let all = place.parent().expect("it is in the folder of backups");
    let published = match renameat_with(CWD, folder, CWD, place, RenameFlags::NOREPLACE) {
        // A file system without the flag. Nobody else writes here: the lock is held.
        Err(Errno::INVAL) => fs::rename(folder, place),
        renamed => renamed.map_err(Into::into),
    };
    let published = published.and_then(|()| sync_folder(all));
    published.map_err(|error| ArchiveError::writing(place, error))?;
    sweep(place);
    Ok(manifest.point)
}

/// What a disk has become, if what is stored is what was received.
fn verified(
    disk: &DiskDraft,
    follower: Option<Follower>,
    progress: &dyn Progress,
) -> Result<(DiskEntry, Contents), ArchiveError> {
    let (plan, map) = (disk.plan(), &disk.map);
    let missing = disk.chunks().count();
    if missing > 0 {
        let name = &plan.name;
        return Err(ArchiveError::Plan(format!(
            "{missing} chunks of {name} are missing"
        )));
    }
    let found = match follower.map(Follower::outcome) {
        // Threads may have ended since it began.
        None | Some(Err(ArchiveError::NoThread(_))) => read_back(disk, progress)?,
        Some(found) => found?,
    };
    if let Some(fault) = found.faults.first() {
        return Err(ArchiveError::Differs {
            path: disk.path.clone(),
            offset: fault.offset,
            what: fault.to_string(),
        });
    }
    // The data is durable, and this has what else there is to a file.
    let synced = disk.file.sync_all();
    synced.map_err(|error| ArchiveError::writing(&disk.path, error))?;
    let contents = Contents {
        data: map.data.clone(),
        zero: map.zero.clone(),
        hashes: disk.records.hashes(),
    };
    let entry = DiskEntry {
        name: plan.name.clone(),
        uuid: plan.uuid,
        size: plan.size,
        mode: plan.mode,
        reason: plan.reason.clone(),
        since: plan.since.clone(),
        parent: disk.parent.clone(),
        file: file_name(&plan.name),
        file_size: map.layout.file_size(),
        blake3: found.blake3,
        cluster_size: map.cluster_size,
        chunk_size: map.chunk_size,
        data_bytes: runs::bytes(&contents.data),
        zero_bytes: runs::bytes(&contents.zero),
    };
    Ok((entry, contents))
}
