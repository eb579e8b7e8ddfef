//! Images that are files or block devices, as their bytes are.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use block::{Engine, FileStorage, Storage};
use rustix::fs::OFlags;

use super::lock::lock;
use super::{SECTOR, cannot_open};
use crate::failure::Failure;
use crate::served::{Cache, DiskSpec};

/// Opens and locks the image of `spec`.
pub(super) async fn open(spec: &DiskSpec, engine: Engine) -> Result<FileStorage, Failure> {
    let file = open_image(spec)?;
    lock(&spec.path, &file).await?;
    let image = FileStorage::new(file, engine).map_err(|error| cannot_open(&spec.path, &error))?;
    // First, as the files of other formats have other sizes than their disks.
    if spec.format.is_none() {
        refuse_other_formats(&spec.path, &image).await?;
    }
    check_size(&spec.path, &image)?;
    Ok(image)
}

fn open_image(spec: &DiskSpec) -> Result<File, Failure> {
    let path = &spec.path;
    let kind = fs::metadata(path)
        .map_err(|error| cannot_open(path, &error))?
        .file_type();
    if kind.is_dir() {
        let message = format!("'{}' is a directory, not an image", path.display());
        return Err(Failure::new("bad-image", message));
    }
    if !kind.is_file() && !kind.is_block_device() {
        let message = format!("'{}' is neither a file nor a block device", path.display());
        return Err(Failure::new("bad-image", message));
    }
    let mut options = File::options();
    options.read(true).write(!spec.read_only);
    if spec.cache == Cache::None {
        options.custom_flags(OFlags::DIRECT.bits().cast_signed());
    }
    options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput if spec.cache == Cache::None => {
            let message = format!(
                "'{}' is on a file system without direct I/O",
                path.display()
            );
            Failure::new("no-direct-io", message).hint("serve it with cache=writeback")
        }
        _ => cannot_open(path, &error),
    })
}

fn check_size(path: &Path, image: &FileStorage) -> Result<(), Failure> {
    let size = image.size();
    if size == 0 {
        let failure = Failure::new("bad-image", format!("'{}' has size zero", path.display()));
        return Err(failure.hint("make it as large as the disk is to be: truncate --size"));
    }
    if !size.is_multiple_of(SECTOR) {
        let message = format!(
            "the size of '{}', {size} bytes, is no multiple of {SECTOR}",
            path.display()
        );
        return Err(Failure::new("bad-image", message));
    }
    if let Some(block) = image.block()
        && !size.is_multiple_of(block)
    {
        let message = format!(
            "the size of '{}', {size} bytes, is no multiple of {block}, of which direct I/O is made",
            path.display()
        );
        return Err(Failure::new("bad-image", message).hint("serve it with cache=writeback"));
    }
    Ok(())
}

/// A guest can write any header into a raw disk, so a format is never guessed: it is refused, or
/// the user says that the image is raw.
pub(super) async fn refuse_other_formats(path: &Path, image: &impl Storage) -> Result<(), Failure> {
    let mut head = [0; 512];
    let length = image.size().min(head.len() as u64) as usize;
    let read = image.read(0, &mut head[..length]).await;
    read.map_err(|error| cannot_open(path, &error))?;
    let found = OTHER_FORMATS
        .iter()
        .find(|(at, magic, _)| head[*at..].starts_with(magic));
    let Some((_, _, format)) = found else {
        return Ok(());
    };
    let message = format!(
        "'{}' looks like a {format} image, and no format was given",
        path.display()
    );
    let hint = "add ,format=raw if the bytes of the file are the disk, or ,format=qcow2,read-only; \
                serve other formats through qemu-nbd or convert them with qemu-img";
    Err(Failure::new("unknown-format", message).hint(hint))
}

/// Where in an image a format's magic stands, what it is, and the format.
const OTHER_FORMATS: [(usize, &[u8], &str); 10] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
];
