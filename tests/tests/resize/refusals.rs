//! What is refused, and changes nothing.

use std::fs;

use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{MIB, Mount, Output, Server};

use super::{
    AFTER, BEFORE, WRITTEN, changed_since, grown_map, map_before, prepared, size_of, write,
};

#[track_caller]
fn refused(server: &Server, size: &str, saying: &str) -> Output {
    let output = server.cli(&["disk", "resize", "vda", size]);
    output.refused(saying);
    assert_eq!(size_of(server), BEFORE, "{output}");
    output
}

#[test]
fn a_size_that_cannot_be_is_refused_with_the_reason() {
    let server = prepared();
    let smaller = (BEFORE - 512).to_string();
    refused(&server, &smaller, "a disk only grows");
    refused(&server, "-512", "a disk only grows");
    refused(&server, "0", "a disk only grows");
    refused(&server, "+1", "no multiple of 512");
    refused(&server, "7E", "17592186044416");
    refused(&server, "nonsense", "no size").exits(2);
    server.cli(&["disk", "resize", "vdx", "1G"]).error(1);
    let same = server.cli(&["disk", "resize", "vda", &BEFORE.to_string()]);
    assert!(same.ok().contains("already"), "{same}");
    let found = changed_since(&server, "i1", "cp1", "after refusals");
    assert_eq!(found, map_before(&[WRITTEN]));
}

/// Nobody could read or write what is behind the last whole block, and no start would have it.
#[test]
fn a_size_of_which_direct_access_cannot_be_made_is_refused() {
    // Whatever it is made of, it does not tell.
    let mount = Mount::tmpfs(8 * MIB);
    let builder = Server::builder();
    let (image, state) = (mount.path().join("vda.raw"), builder.path("state"));
    sparse_file(&image, MIB);
    let disk = format!("vda={},cache=none,state={}", path(&image), path(&state));
    let server = builder.disk_as(&disk).start();
    let odd = server.cli(&["disk", "resize", "vda", "+512"]);
    odd.refused("no multiple of 4096");
    assert!(odd.stderr.contains("cache=writeback"), "{odd}");
    server.cli(&["disk", "resize", "vda", "+4096"]).ok();
}

#[test]
fn a_disk_that_is_read_only_or_in_use_is_refused() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, MIB);
    let disk = format!("vda={},read-only", path(&image));
    let server = builder.disk_as(&disk).start();
    server
        .cli(&["disk", "resize", "vda", "2M"])
        .refused("read-only");
    for keys in [",read-only", ""] {
        let disk = format!("vda={}{keys}", path(&image));
        let args = ["disk", "resize", "--disk", &disk, "vda", "2M"];
        let saying = if keys.is_empty() {
            "in use"
        } else {
            "read-only"
        };
        server.cli(&args).refused(saying);
    }
    let other = format!("vda={}", path(&image));
    let args = ["disk", "resize", "--disk", &other, "vdb", "2M"];
    server.cli(&args).exits(2);
}

#[test]
fn an_image_that_someone_else_has_made_longer_is_not_cut() {
    let server = prepared();
    let image = fs::File::options().write(true).open(server.image("vda"));
    image.unwrap().set_len(AFTER).unwrap();
    refused(&server, "60M", &AFTER.to_string());
    server
        .cli(&["disk", "resize", "vda", &AFTER.to_string()])
        .ok();
    let found = changed_since(&server, "i1", "cp1", "made longer");
    assert_eq!(found, grown_map(&[WRITTEN]));
}

#[test]
fn a_size_that_the_file_system_cannot_hold_leaves_everything_as_it_was() {
    let mount = Mount::ext4(64 * MIB);
    let builder = Server::builder();
    let image = mount.path().join("vda.raw");
    sparse_file(&image, BEFORE);
    let state = builder.path("state");
    let disk = format!("vda={},state={}", path(&image), path(&state));
    let mut server = builder.disk_as(&disk).start();
    write(&server);
    // Blocks of 1 KiB, or of 4: a file has fewer than 2^32 of them.
    refused(&server, "16T", "cannot be made").exits(1);
    let found = changed_since(&server, "i1", "cp1", "after a refusal");
    assert_eq!(found, map_before(&[WRITTEN]));
    server.stop();
    server.start();
    let found = changed_since(&server, "i2", "cp1", "after a restart");
    assert_eq!(found, map_before(&[WRITTEN]));
    let map = fs::metadata(state.join("eras")).unwrap().len();
    assert_eq!(map, 8192, "room that nobody needs is given back");
}

#[test]
fn a_map_that_has_no_room_to_grow_leaves_everything_as_it_was() {
    let mount = Mount::ext4(16 * MIB);
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, BEFORE);
    let state = mount.path().join("state");
    let scratch = builder.path("scratch");
    let disk = format!("vda={},state={}", path(&image), path(&state));
    let server = builder
        .disk_as(&disk)
        .arg(&format!("--scratch-dir={}", path(&scratch)))
        .start();
    write(&server);
    let filler = mount.fill();
    refused(&server, "100G", "No space left").exits(1);
    assert_eq!(fs::metadata(&image).unwrap().len(), BEFORE);
    drop(filler);
    let found = changed_since(&server, "i1", "cp1", "after a refusal");
    assert_eq!(found, map_before(&[WRITTEN]));
    server
        .cli(&["disk", "resize", "vda", &AFTER.to_string()])
        .ok();
    let found = changed_since(&server, "i2", "cp1", "with room");
    assert_eq!(found, grown_map(&[WRITTEN]));
}
