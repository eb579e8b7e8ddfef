//! Sockets that clients connect to.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Gid, Mode};
use tokio::net::{TcpListener, UnixListener};

use crate::failure::Failure;

/// A group that sockets belong to.
#[derive(Debug)]
pub(crate) struct Group {
    /// As it was named.
    name: String,
    gid: Gid,
}

impl Group {
    /// The group with this name or number, as `/etc/group` has it.
    pub(crate) fn find(name: &str) -> Result<Self, Failure> {
        let number = name.parse().ok().or_else(|| {
            let groups = fs::read_to_string("/etc/group").ok()?;
            let line = groups
                .lines()
                .find(|line| line.split(':').next() == Some(name))?;
            line.split(':').nth(2)?.parse().ok()
        });
        match number {
            Some(number) if number != u32::MAX => Ok(Self {
                name: name.to_owned(),
                gid: Gid::from_raw(number),
            }),
            _ => Err(Failure::new(
                "unknown-group",
                format!("there is no group '{name}'"),
            )),
        }
    }
}

/// Listens at `path`, in the place of a socket that nobody answers on any more.
pub(crate) fn unix(path: &Path, mode: u32, group: Option<&Group>) -> Result<UnixListener, Failure> {
    check_length(path)?;
    make_way(path)?;
    // Nobody may connect before the permissions are as they should be. No thread has been started
    // yet that this mask would surprise.
    let before = rustix::process::umask(Mode::from_raw_mode(0o777));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(|error| cannot_listen(path, &error))?;
    if let Err(failure) = admit(path, mode, group) {
        // Nobody can connect to it, so that it would be in the way of the next server. If it cannot be
        // removed either, the failure is still the same.
        let _ = fs::remove_file(path);
        return Err(failure);
    }
    Ok(listener)
}

/// Lets those connect to a new socket who may.
fn admit(path: &Path, mode: u32, group: Option<&Group>) -> Result<(), Failure> {
    if let Some(Group { name, gid }) = group {
        rustix::fs::chown(path, None, Some(*gid)).map_err(|error| {
            let (path, error) = (path.display(), io::Error::from(error));
            let message = format!("cannot give '{path}' to the group '{name}': {error}");
            Failure::new("cannot-listen", message)
                .hint("run it as a member of that group, or without --socket-group")
        })?;
    }
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(|error| cannot_listen(path, &error))
}

fn cannot_listen(path: &Path, error: &io::Error) -> Failure {
    let message = format!("cannot listen on '{}': {error}", path.display());
    Failure::new("cannot-listen", message)
}

/// Listens on a TCP port; says which one, if any would do.
pub(crate) async fn tcp(host: &str, port: u16) -> Result<(TcpListener, u16), Failure> {
    let cannot = |error: io::Error| {
        Failure::new(
            "cannot-listen",
            format!("cannot listen on {host}, port {port}: {error}"),
        )
    };
    let listener = TcpListener::bind((host, port)).await.map_err(cannot)?;
    let port = listener.local_addr().map_err(cannot)?.port();
    Ok((listener, port))
}

/// Refuses a path that no socket can have.
pub(crate) fn check_length(path: &Path) -> Result<(), Failure> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let message = format!(
        "the socket path '{}' is too long: {length} bytes, and {SOCKET_PATH_MAX} are possible",
        path.display()
    );
    Err(Failure::new("path-too-long", message)
        .hint("choose a shorter --run-dir, or path of a socket"))
}

fn make_way(path: &Path) -> Result<(), Failure> {
    let in_use = |why: String| Failure::new("socket-in-use", format!("'{}' {why}", path.display()));
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(in_use(format!("cannot be looked at: {error}"))),
    };
    if !kind.is_socket() {
        return Err(in_use("exists and is not a socket".to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(in_use("is in use: another server answers on it".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| in_use(format!("cannot be replaced: {error}")))
        }
        Err(error) => Err(in_use(format!("cannot be tried: {error}"))),
    }
}

/// What fits into the kernel's `sockaddr_un`, with its end.
const SOCKET_PATH_MAX: usize = 107;
