//! Disks that another NBD server has: what is true of files is true of them, whatever becomes of that
//! server, and whatever it performs after it was given up.

mod kinds;

mod gone;
mod late;
mod returns;
mod starts;
mod together;

use stillpoint_tests::server::Builder;
use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, sha256};
use stillpoint_tests::{Guest, MIB, NbdBase, Server};

const SIZE: u64 = 8 * MIB;

/// A server to be, with the disk `vda` on this base.
fn on(base: &NbdBase, options: &str) -> Builder {
    at(&base.uri(), options)
}

/// The same by the URI.
fn at(uri: &str, options: &str) -> Builder {
    let builder = Server::builder();
    let state = builder.path("state");
    builder.disk_as(&format!("vda={uri},state={}{options}", state.display()))
}

/// A file of zeroes beside other things of the test.
fn image(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let path = directory.path().join("image");
    stillpoint_tests::tools::sparse_file(&path, SIZE);
    path
}

/// Sees that an incremental backup has every byte and exactly the chunks that it should.
#[track_caller]
fn check_backup(server: &Server, guest: &mut Guest, (id, since): (&str, &str), what: &str) {
    server.begin(id, &["--since", since, "--checkpoint", &format!("cp-{id}")]);
    let (expected, map) = (sha256(&guest.disk), guest.expected_map());
    let uri = server.frozen_uri(&format!("vda@{id}"));
    guest.write(0, &vec![0xee; 100_000]);
    guest.zeroes(MIB + 1, 70_000, 0);
    let context = format!("qemu:dirty-bitmap:{since}");
    assert_eq!(nbdinfo_map(&uri, &context), map, "{what}: the map");
    assert_eq!(
        nbdcopy_sha256(&uri, server.directory()),
        expected,
        "{what}: the bytes"
    );
    server.commit(id);
}
