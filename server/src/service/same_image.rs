//! One image, or one state, under two names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::failure::Failure;
use crate::names::Name;
use crate::nbd_uri::NbdUri;
use crate::served::{DiskSpec, ServedDisk, likely_state_dir};
use crate::state::State;

/// Refuses an image that one of `disks` is on. Its lock would refuse it too, and not say why.
pub(crate) fn refuse_same_image<'a>(
    spec: &DiskSpec,
    mut disks: impl Iterator<Item = &'a ServedDisk>,
) -> Result<(), Failure> {
    let wanted = identity(&spec.path);
    let is_same = |disk: &&ServedDisk| match &spec.remote {
        // Nothing locks the export of another server.
        Some(remote) => is_export(&disk.path, &remote.uri),
        None => wanted.is_some() && identity(&disk.path) == wanted,
    };
    let Some(disk) = disks.find(is_same) else {
        return Ok(());
    };
    let message = format!(
        "cannot use '{}': it is disk '{}' already",
        spec.path.display(),
        disk.name
    );
    Err(Failure::new("image-locked", message))
}

/// Whether what a disk is named by is a URI of this export, however that is written.
fn is_export(path: &Path, uri: &NbdUri) -> bool {
    let other = path.to_str().and_then(|text| text.parse::<NbdUri>().ok());
    other.is_some_and(|other| other.address == uri.address && other.export == uri.export)
}

/// Refuses disks of which one was copied from another, with its state. Nothing of them is changed.
pub(crate) fn refuse_copies(specs: &[DiskSpec]) -> Result<(), Failure> {
    let mut states = Vec::new();
    for spec in specs {
        refuse_same_state(spec, &states)?;
        states.extend(DiskState::of(spec));
    }
    Ok(())
}

/// Refuses a disk that is about to be opened, if its state and one of `states` are copies of each other.
/// Nothing of it is changed.
pub(super) fn refuse_same_state(spec: &DiskSpec, states: &[DiskState]) -> Result<(), Failure> {
    DiskState::of(spec).map_or(Ok(()), |own| own.refuse_copy(states))
}

/// Where the state of a disk is, and which disk it says that it is of.
pub(super) struct DiskState {
    disk: Name,
    image: PathBuf,
    uuid: Uuid,
    folder: PathBuf,
}

impl DiskState {
    /// That of a disk that is about to be served, if there is one that can be read. Where it cannot,
    /// whoever opens it says why.
    fn of(spec: &DiskSpec) -> Option<Self> {
        let folder = likely_state_dir(spec)?;
        Some(Self {
            disk: spec.name.clone(),
            image: spec.path.clone(),
            uuid: State::disk_in(&folder)?,
            folder,
        })
    }

    /// Refuses it if it and one of `others` are copies of each other: all that is recorded of either
    /// would be taken for the other's.
    pub(super) fn refuse_copy(&self, others: &[Self]) -> Result<(), Failure> {
        // A folder that two disks are to have is no copy, and its lock refuses it.
        let is_copy = |other: &&Self| {
            other.uuid == self.uuid && identity(&other.folder) != identity(&self.folder)
        };
        let Some(other) = others.iter().find(is_copy) else {
            return Ok(());
        };
        let message = format!(
            "cannot serve '{}': its state in '{}' is the same as disk '{}''s in '{}'",
            self.image.display(),
            self.folder.display(),
            other.disk,
            other.folder.display()
        );
        let hint = "one is a copy of the other: remove the folder of the disk that is the copy, \
                    whose first backup is then a full one";
        Err(Failure::new("disk-exists", message).hint(hint))
    }
}

impl From<&ServedDisk> for DiskState {
    fn from(disk: &ServedDisk) -> Self {
        Self {
            disk: disk.name.clone(),
            image: disk.path.clone(),
            uuid: disk.uuid,
            folder: disk.state_dir.clone(),
        }
    }
}

/// What tells one file, one folder or one device from all others.
fn identity(path: &Path) -> Option<(bool, u64, u64)> {
    let found = fs::metadata(path).ok()?;
    if found.file_type().is_block_device() {
        return Some((true, found.rdev(), 0));
    }
    Some((false, found.dev(), found.ino()))
}
