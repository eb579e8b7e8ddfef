//! One image, or one state, under two names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use crate::failure::Failure;
use crate::served::{DiskSpec, ServedDisk};

/// Refuses an image that one of `disks` is on. Its lock would refuse it too, and not say why.
pub(super) fn refuse_same_image<'a>(
    spec: &DiskSpec,
    mut disks: impl Iterator<Item = &'a Arc<ServedDisk>>,
) -> Result<(), Failure> {
    let wanted = identity(&spec.path);
    let is_same = |disk: &&Arc<ServedDisk>| match &spec.remote {
        // Nothing locks the export of another server.
        Some(_) => disk.path == spec.path,
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

/// Refuses a disk whose state was copied from one of `disks`: all that is recorded of either would be
/// taken for the other's.
pub(super) fn refuse_same_state<'a>(
    disk: &ServedDisk,
    mut disks: impl Iterator<Item = &'a Arc<ServedDisk>>,
) -> Result<(), Failure> {
    let Some(other) = disks.find(|other| other.uuid == disk.uuid) else {
        return Ok(());
    };
    let message = format!(
        "cannot serve '{}': its state is a copy of disk '{}''s",
        disk.path.display(),
        other.name
    );
    let hint = "remove the copy of the state: its first backup is then a full one";
    Err(Failure::new("disk-exists", message).hint(hint))
}

/// What tells one file, or one device, from all others.
fn identity(path: &Path) -> Option<(bool, u64, u64)> {
    let found = fs::metadata(path).ok()?;
    if found.file_type().is_block_device() {
        return Some((true, found.rdev(), 0));
    }
    Some((false, found.dev(), found.ino()))
}
