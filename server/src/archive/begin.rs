//! How a point begins, and goes on that was interrupted.
//!
//! It lies in a folder of its own, `N.partial`, which has in it
//!
//! - the qcow2 file of each disk, its tables first of all;
//! - `DISK.done`, the [records](super::records::Records) of what is stored of it;
//! - `plan.json`, which is made last: without it the folder is nothing, and is removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::chunk::chunk_size;
use super::draft::{DONE, DiskDraft, Draft, records_name};
use super::error::ArchiveError;
use super::folder::{self, Archive, Writer};
use super::manifest::{CHUNKS_MAX, DISKS_MAX, Parent};
use super::plan::{self, DiskPlan, Plan};
use super::progress::Progress;
use super::sealed::{self, Unsound};

/// What an interrupted run has left in a folder.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in a run")]
pub enum Leftover {
    /// Nothing.
    Nothing,
    /// A point that can go on.
    Interrupted(Interrupted),
    /// Something that could not go on, for this reason; it has been removed.
    Removed(String),
}

/// A point whose making was interrupted.
#[derive(Debug)]
pub struct Interrupted {
    number: u64,
    plan: Plan,
    parents: Vec<Option<Parent>>,
    folder: PathBuf,
    place: PathBuf,
    writer: Writer,
}

impl Interrupted {
    /// What it was to hold.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Goes on with it: reads back what is stored, and keeps what is right.
    pub fn go_on(self, progress: &dyn Progress) -> Result<Draft, ArchiveError> {
        let disks = self.plan.disks.iter().zip(self.parents);
        let disks = disks.map(|(disk, parent)| {
            let disk = DiskDraft::open(&self.folder, disk.clone(), parent, progress)?;
            Ok(Arc::new(disk))
        });
        Ok(Draft {
            number: self.number,
            disks: disks.collect::<Result<_, ArchiveError>>()?,
            followers: Vec::new(),
            plan: self.plan,
            folder: self.folder,
            place: self.place,
            writer: self.writer,
        })
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ArchiveError> {
        remove(&self.folder)
    }
}

/// Makes point `number` of the folder begin.
pub(super) fn begin(
    archive: &Archive,
    number: u64,
    plan: Plan,
    writer: Writer,
) -> Result<Draft, ArchiveError> {
    let parents = check(archive, number, &plan)?;
    let folder = archive.partial_folder_of(number);
    let writing = |error| ArchiveError::writing(&folder, error);
    let made = DirBuilder::new().mode(0o700).create(&folder);
    made.map_err(writing)?;
    let disks = plan.disks.iter().zip(parents).map(|(disk, parent)| {
        let disk = DiskDraft::create(&folder, disk.clone(), parent)?;
        Ok(Arc::new(disk))
    });
    let disks = disks.collect::<Result<_, ArchiveError>>();
    let document = PlanDocument {
        version: VERSION,
        point: number,
        plan,
    };
    let written = disks.and_then(|disks| {
        let text = sealed::seal(&document);
        folder::write_aside(&folder.join(PLAN), &text).map_err(writing)?;
        Ok(disks)
    });
    match written {
        Ok(disks) => Ok(Draft {
            number,
            plan: document.plan,
            disks,
            followers: Vec::new(),
            place: archive.folder_of(number),
            folder,
            writer,
        }),
        Err(error) => {
            // Nothing has come yet. What cannot be removed now is when the next run finds it.
            let _ = fs::remove_dir_all(&folder);
            Err(error)
        }
    }
}

/// What lies in the folder of point `number` that is being made.
pub(super) fn found(
    archive: &Archive,
    number: u64,
    writer: Writer,
) -> Result<Leftover, ArchiveError> {
    let folder = archive.partial_folder_of(number);
    let path = folder.join(PLAN);
    let useless = |reason: String| {
        remove(&folder)?;
        Ok(Leftover::Removed(reason))
    };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return useless("it had not begun to copy".to_owned());
        }
        file => file.map_err(|error| ArchiveError::reading(&path, error))?,
    };
    let text = sealed::read_at_most(file, PLAN_MAX);
    let Some(text) = text.map_err(|error| ArchiveError::reading(&path, error))? else {
        return useless("its plan is damaged".to_owned());
    };
    let document: PlanDocument = match sealed::unseal(&text, VERSION) {
        Ok(document) => document,
        Err(Unsound::Damaged(reason)) => {
            return useless(format!("its plan is damaged: {reason}"));
        }
        Err(Unsound::Newer(version)) => {
            let known = VERSION;
            return Err(ArchiveError::Newer {
                path,
                version,
                known,
            });
        }
    };
    let PlanDocument { point, plan, .. } = document;
    let parents = match check(archive, number, &plan) {
        Ok(parents) if point == number => parents,
        Ok(_) => return useless(format!("its plan is that of point {point}")),
        Err(error) => return useless(error.to_string()),
    };
    let is_there = |disk: &DiskPlan| {
        folder.join(plan::file_name(&disk.name)).is_file()
            && folder.join(records_name(&disk.name)).is_file()
    };
    if !plan.disks.iter().all(is_there) {
        return useless("files of it are missing".to_owned());
    }
    Ok(Leftover::Interrupted(Interrupted {
        number,
        plan,
        parents,
        place: archive.folder_of(number),
        folder,
        writer,
    }))
}

/// Removes what a published point no longer needs.
pub(super) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == PLAN || Path::new(&name).extension().is_some_and(|end| end == DONE) {
            // It is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What each disk builds on, if the plan is one.
fn check(archive: &Archive, number: u64, plan: &Plan) -> Result<Vec<Option<Parent>>, ArchiveError> {
    let impossible = |reason| Err(ArchiveError::Plan(reason));
    if plan.disks.is_empty() || plan.disks.len() > DISKS_MAX {
        return impossible(format!("it has {} disks", plan.disks.len()));
    }
    if archive
        .points()
        .last()
        .is_some_and(|last| last.number >= number)
    {
        return impossible(format!("point {number} is not the next"));
    }
    let mut parents = Vec::new();
    for (at, disk) in plan.disks.iter().enumerate() {
        disk.check().map_err(ArchiveError::Plan)?;
        let name = &disk.name;
        if plan.disks[..at].iter().any(|other| other.name == *name) {
            return impossible(format!("disk {name} is in it twice"));
        }
        if disk.size.div_ceil(chunk_size(disk.size)) > CHUNKS_MAX as u64 {
            return impossible(format!("disk {name} is larger than 64 TiB"));
        }
        if let Some((_, last)) = archive.last_of(name)
            && let (Some(there), Some(here)) = (last.uuid, disk.uuid)
            && there != here
        {
            return Err(ArchiveError::OtherDisk {
                path: archive.path().to_owned(),
                disk: name.clone(),
            });
        }
        let parent = disk.parent.map(|point| {
            let entry = archive.point(point).and_then(|point| point.disk(name));
            let entry = entry.ok_or_else(|| ArchiveError::MissingLink {
                point: number,
                disk: name.clone(),
                missing: point,
            })?;
            let blake3 = entry.blake3;
            Ok::<_, ArchiveError>(Parent { point, blake3 })
        });
        parents.push(parent.transpose()?);
    }
    Ok(parents)
}

/// Removes a draft.
pub(super) fn remove(folder: &Path) -> Result<(), ArchiveError> {
    let writing = |error| ArchiveError::writing(folder, error);
    // Without its plan nobody takes for a draft what is left of it.
    match fs::remove_file(folder.join(PLAN)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(writing(error)),
        _ => {}
    }
    fs::remove_dir_all(folder).map_err(writing)
}

/// The shape of `plan.json`. How clusters and chunks follow from it belongs to the version.
#[derive(Deserialize, Serialize)]
struct PlanDocument {
    version: u64,
    point: u64,
    plan: Plan,
}

const PLAN: &str = "plan.json";
const VERSION: u64 = 1;

/// Some ten disks of the most runs.
const PLAN_MAX: u64 = 1 << 30;
