//! Opening an image, and what it names.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::folders::{Folders, NameError, Named};
use super::header::{Backing, Header, Refusal, START_BYTES};
use super::layer::Layer;
use crate::{Engine, FileStorage, ImageLock, LockError, Storage};

/// One image of a chain.
pub(crate) enum Link {
    Qcow2(Box<Layer>),
    /// Its bytes are those of the disk.
    Raw(FileStorage),
}

/// Why an image cannot be read.
#[derive(Debug, Error)]
#[error("'{path}': {why}")]
pub struct OpenError {
    /// The image, which may be one that another names.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: Unreadable,
}

/// What is wrong with an image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// What its head says.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The file that it names.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The format of the image behind it is not told.
    #[error("the format of its backing file is not told, and is not guessed")]
    NoFormat,
    /// The image behind it has a format that is not read.
    #[error("its backing file is of format '{0}', and only raw and qcow2 are read")]
    Format(String),
    /// It is behind itself.
    #[error("it is in its own backing chain")]
    Loop,
    /// There is too much behind it.
    #[error("the backing chain is longer than {CHAIN_MAX} images")]
    TooLong,
    /// Somebody may write it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It cannot be read at all.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A file that is to be a link.
struct Next {
    file: File,
    path: PathBuf,
    raw: bool,
}

/// Opens all images from `file` on, which the user calls `path`, each with its data. Those behind the
/// first are locked against writers; the first is the caller's to lock.
pub(crate) async fn open_chain(
    file: File,
    path: &Path,
    allowed: &[PathBuf],
    engine: Engine,
) -> Result<Vec<Link>, OpenError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |why: Unreadable| OpenError { path, why }
    };
    let folders = Folders::of(path, allowed).map_err(|error| at(path)(error.into()))?;
    let name = path.file_name().unwrap_or_default();
    let mut next = Some(Next {
        file,
        path: folders.own().join(name),
        raw: false,
    });
    let (mut links, mut seen) = (Vec::new(), BTreeSet::new());
    while let Some(Next { file, path, raw }) = next.take() {
        let at = at(&path);
        let opened = async {
            if links.len() == CHAIN_MAX {
                return Err(Unreadable::TooLong);
            }
            let found = file.metadata()?;
            if !seen.insert((found.dev(), found.ino())) {
                return Err(Unreadable::Loop);
            }
            if !links.is_empty() {
                ImageLock::share(&file)?;
            }
            let file = FileStorage::new(file, engine)?;
            if raw {
                links.push(Link::Raw(file));
                return Ok(None);
            }
            let header = read_header(&file).await?;
            let folder = path.parent().unwrap_or(Path::new("/"));
            let data = match &header.data_file {
                Some(data) => {
                    let Named { file, .. } = folders.open(folder, &data.name)?;
                    ImageLock::share(&file)?;
                    Some(FileStorage::new(file, engine)?)
                }
                None => None,
            };
            let next = match &header.backing {
                Some(backing) => Some(open_backing(&folders, folder, backing)?),
                None => None,
            };
            let layer = Layer::new(links.len(), header, file, data)?;
            links.push(Link::Qcow2(Box::new(layer)));
            Ok(next)
        };
        next = opened.await.map_err(at)?;
    }
    Ok(links)
}

fn open_backing(folders: &Folders, folder: &Path, backing: &Backing) -> Result<Next, Unreadable> {
    // What it is is asked before it is touched.
    let raw = match backing.format.as_deref() {
        None | Some(b"") => return Err(Unreadable::NoFormat),
        Some(b"raw") => true,
        Some(b"qcow2") => false,
        Some(other) => {
            let other = String::from_utf8_lossy(other).escape_debug().to_string();
            return Err(Unreadable::Format(other));
        }
    };
    let Named { file, path } = folders.open(folder, &backing.name)?;
    Ok(Next { file, path, raw })
}

/// What the head of `file` says.
pub(super) async fn read_header(file: &FileStorage) -> Result<Header, Unreadable> {
    let mut start = [0; START_BYTES];
    if file.size() < START_BYTES as u64 {
        return Err(Refusal::NotQcow2.into());
    }
    file.read(0, &mut start).await?;
    let length = file.size().min(Header::length(&start)? as u64);
    let mut head = vec![0; length as usize];
    file.read(0, &mut head).await?;
    Ok(Header::parse(&head)?)
}

/// As many as libvirt follows. Each costs an open file, and a lookup where all before it have nothing.
const CHAIN_MAX: usize = 200;
