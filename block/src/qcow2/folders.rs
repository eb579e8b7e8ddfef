//! From where an image may have the files that it names.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, fcntl_setfl, openat2};
use rustix::io::Errno;
use thiserror::Error;

/// The folders from which files are opened that an image names: its own, and those that the user
/// allows. Whoever could write the image chose the names.
#[derive(Debug)]
pub(crate) struct Folders(Vec<Folder>);

#[derive(Debug)]
struct Folder {
    /// What all paths within it are opened from, whatever becomes of its name.
    open: File,
    /// Without symbolic links.
    path: PathBuf,
    /// As the user wrote it.
    given: PathBuf,
}

/// A file that was named by an image.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) file: File,
    /// Without symbolic links.
    pub(crate) path: PathBuf,
}

/// Why a file that an image names is not opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NameError {
    /// It asks for something else than a file.
    #[error("'{0}' is no plain path: URLs, json: and other protocols are not opened for an image")]
    Protocol(String),
    /// It is not where it may be.
    #[error("'{0}' is outside the folder of the image and of those that --allow-backing names")]
    Outside(PathBuf),
    /// It is reached by way of a symbolic link.
    #[error("'{0}' is a symbolic link, or behind one: links are not followed for an image")]
    Link(PathBuf),
    /// It is no file that has bytes.
    #[error("'{0}' is neither a file nor a block device")]
    Kind(PathBuf),
    /// It cannot be opened.
    #[error("'{path}' cannot be opened")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
}

impl Folders {
    /// Those for the image that the user calls `image`.
    pub(crate) fn of(image: &Path, allowed: &[PathBuf]) -> Result<Self, NameError> {
        let own = match image.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let all = std::iter::once(own).chain(allowed.iter().map(PathBuf::as_path));
        let all: Result<_, _> = all.map(Folder::open).collect();
        Ok(Self(all?))
    }

    /// The folder of the image itself, without symbolic links.
    pub(crate) fn own(&self) -> &Path {
        &self.0[0].path
    }

    /// Opens what an image in the folder `from` calls `name`, for reading.
    pub(crate) fn open(&self, from: &Path, name: &[u8]) -> Result<Named, NameError> {
        if names_protocol(name) || name.contains(&0) {
            let name = String::from_utf8_lossy(name).escape_debug().to_string();
            return Err(NameError::Protocol(name));
        }
        let path = plain(&from.join(OsStr::from_bytes(name)));
        let found = self.0.iter().find_map(|folder| {
            let mut within = [&folder.path, &folder.given].into_iter();
            let within = within.find_map(|at| path.strip_prefix(at).ok())?;
            Some((folder, within))
        });
        let Some((folder, within)) = found else {
            return Err(NameError::Outside(path));
        };
        let within = if within == Path::new("") {
            Path::new(".")
        } else {
            within
        };
        // Whoever opens a pipe would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let file = match openat2(&folder.open, within, flags, Mode::empty(), resolve) {
            Ok(file) => File::from(file),
            Err(Errno::LOOP) => return Err(NameError::Link(path)),
            Err(Errno::XDEV) => return Err(NameError::Outside(path)),
            Err(error) => {
                let error = error.into();
                return Err(NameError::Io { path, error });
            }
        };
        let path = folder.path.join(within);
        let kind = file.metadata().map(|found| found.file_type());
        match kind.and_then(|kind| Ok((kind, fcntl_setfl(&file, OFlags::empty())?))) {
            Ok((kind, ())) if kind.is_file() || kind.is_block_device() => Ok(Named { file, path }),
            Ok(_) => Err(NameError::Kind(path)),
            Err(error) => Err(NameError::Io { path, error }),
        }
    }
}

impl Folder {
    fn open(given: &Path) -> Result<Self, NameError> {
        let cannot = |error: io::Error| NameError::Io {
            path: given.to_owned(),
            error,
        };
        let path = given.canonicalize().map_err(cannot)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = rustix::fs::open(&path, flags, Mode::empty());
        let open = open.map_err(|error| cannot(error.into()))?;
        let given = plain(&std::path::absolute(given).map_err(cannot)?);
        Ok(Self {
            open: File::from(open),
            path,
            given,
        })
    }
}

/// Whether QEMU would take `name` for something else than a path: a colon before any slash.
fn names_protocol(name: &[u8]) -> bool {
    let end = name.iter().position(|byte| b":/".contains(byte));
    end.is_some_and(|at| name[at] == b':')
}

/// `path` without `.` and `..`, by its letters alone: what is opened by it is looked for without
/// following links, so that no `..` can mean anything else.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Images in one folder, an allowed one and one that is not, each with a file.
    fn world() -> (tempfile::TempDir, Folders) {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["images/below", "bases", "secret"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for file in ["images/a", "images/below/b", "bases/c", "secret/d"] {
            fs::write(dir.path().join(file), file).unwrap();
        }
        let allowed = [dir.path().join("bases")];
        let folders = Folders::of(&dir.path().join("images/top"), &allowed).unwrap();
        (dir, folders)
    }

    #[test]
    fn names_within_the_folders_are_opened_however_they_are_written() {
        let (dir, folders) = world();
        let own = folders.own().to_owned();
        let absolute = dir
            .path()
            .join("bases/c")
            .into_os_string()
            .into_encoded_bytes();
        let names: [&[u8]; 7] = [
            b"a",
            b"./a",
            b"below/b",
            b"below/../a",
            b"../images/a",
            b"../bases/c",
            &absolute,
        ];
        for name in names {
            let text = String::from_utf8_lossy(name);
            let opened = folders
                .open(&own, name)
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            let read = std::io::read_to_string(opened.file).unwrap();
            assert!(opened.path.ends_with(read), "{text}");
        }
    }

    #[test]
    fn nothing_else_is_opened() {
        let (dir, folders) = world();
        let own = folders.own().to_owned();
        let images = dir.path().join("images");
        symlink("../secret/d", images.join("link")).unwrap();
        symlink("../secret", images.join("tunnel")).unwrap();
        symlink("a", images.join("harmless")).unwrap();
        let pipe = rustix::fs::mknodat(
            rustix::fs::CWD,
            images.join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        );
        pipe.unwrap();
        let secret = dir
            .path()
            .join("secret/d")
            .into_os_string()
            .into_encoded_bytes();
        let cases: [(&[u8], &str); 13] = [
            (b"../secret/d", "outside"),
            (b"/etc/shadow", "outside"),
            (b"below/../../secret/d", "outside"),
            (b"../bases-not/c", "outside"),
            (&secret, "outside"),
            (b"link", "symbolic link"),
            (b"tunnel/d", "symbolic link"),
            (b"harmless", "symbolic link"),
            (b"json:{\"driver\":\"raw\"}", "protocol"),
            (b"nbd://localhost/x", "protocol"),
            (b"file:a", "protocol"),
            (b"below", "neither a file"),
            (b"pipe", "neither a file"),
        ];
        for (name, expected) in cases {
            let text = String::from_utf8_lossy(name);
            let error = folders.open(&own, name).expect_err(&text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(matches!(
            folders.open(&own, b"missing"),
            Err(NameError::Io { .. })
        ));
    }
}
