//! The server of this repository, as it is shipped.

use std::process::Command;

use proto::Headers;
use stillpoint_tests::process::run as run_program;
use stillpoint_tests::server::{example as built, temporary_directory};
use stillpoint_tests::tools::{nbdinfo_map, path, with_nbdkit};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

use crate::client::{Error, Reason};
use crate::connected::{begin, map, read_all, run, with_client, with_client_at_most};

const SIZE: u64 = 16 * MIB;
const EXPORT: &str = "vda@b1";
const CONTEXT: &str = "qemu:dirty-bitmap:cp1";

/// A server with a backup of what has changed since `cp1`; and what the disk was then.
fn backup() -> (Server, Vec<u8>) {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; 8 * MIB as usize]);
    server.checkpoint("cp1");
    guest.write(3 * CHUNK, &[2; 4096]);
    guest.write(SIZE - 4096, &[3; 4096]);
    server.begin("b1", &["--since", "cp1"]);
    let then = guest.disk.clone();
    guest.write(0, &vec![4; 4 * MIB as usize]);
    (server, then)
}

#[test]
fn a_frozen_export_and_its_maps_are_what_other_tools_see() {
    let (mut server, then) = backup();
    let uri = server.frozen_uri(EXPORT);
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let contexts = ["base:allocation", CONTEXT];
        let entered = (EXPORT, &contexts[..]);
        with_client_at_most(headers, &server.frozen(), entered, async |client| {
            assert_eq!(client.headers(), headers);
            assert!(read_all(client).await == then, "{headers:?}: other bytes");
            if headers == Headers::Simple {
                return;
            }
            for context in contexts {
                assert_eq!(
                    map(client, context).await,
                    nbdinfo_map(&uri, context),
                    "{headers:?}"
                );
            }
        });
    }
    server.commit("b1");
    server.stop();
}

#[test]
fn what_changed_is_enough_to_bring_a_copy_up_to_date() {
    let (mut server, then) = backup();
    let copy = server.path("copy.raw");
    let mut before = vec![1; 8 * MIB as usize];
    before.resize(SIZE as usize, 0);
    std::fs::write(&copy, before).unwrap();

    let printed = example(
        "copy",
        &[path(&server.frozen()), EXPORT, path(&copy), CONTEXT],
    );
    let printed = printed.ok();
    assert_eq!(printed.trim(), format!("{} bytes", 2 * CHUNK));
    assert!(
        std::fs::read(&copy).unwrap() == then,
        "the copy is not the disk"
    );

    let whole = server.path("whole.raw");
    example("copy", &[path(&server.frozen()), EXPORT, path(&whole)]).ok();
    assert!(
        std::fs::read(&whole).unwrap() == then,
        "the copy is not the disk"
    );

    let printed = example("map", &[path(&server.frozen()), EXPORT, CONTEXT]);
    let flags: Vec<&str> = printed
        .ok()
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    assert_eq!(flags, ["0", "1", "0", "1"], "{printed}");
    server.stop();
}

#[test]
fn cve_2022_0485_a_copy_fails_if_any_read_does() {
    let directory = temporary_directory();
    let copy = directory.path().join("copy.raw");
    // Of 64 reads some fail, unless chance is against it once in a thousand times a thousand.
    let args = [
        "--filter=error",
        "memory",
        "64M",
        "error=EIO",
        "error-pread-rate=20%",
    ];
    with_nbdkit(&args, |socket| {
        let failed = example("copy", &[path(socket), "", path(&copy)]);
        failed.exits(1);
        assert!(failed.stderr.contains("Io"), "{failed}");
    });
}

#[test]
fn what_is_not_there_is_refused_in_words() {
    let (mut server, _) = backup();
    run(async {
        let mut haggling = begin(&server.frozen()).await.unwrap();
        let names: Vec<_> = haggling
            .list()
            .await
            .unwrap()
            .into_iter()
            .map(|l| l.name)
            .collect();
        assert!(names.contains(&EXPORT.to_owned()), "{names:?}");
        let contexts = haggling.contexts(EXPORT, &["qemu:"]).await.unwrap();
        assert!(contexts.contains(&CONTEXT.to_owned()), "{contexts:?}");
        let Err(Error::Declined(declined)) = haggling.enter("vda@b2", &[]).await else {
            panic!("there is no b2");
        };
        assert_eq!(declined.reason, Reason::Unknown, "{declined}");
    });
    with_client(
        &server.frozen(),
        (EXPORT, &["qemu:dirty-bitmap:cp9"]),
        async |client| {
            let missing = client.context("qemu:dirty-bitmap:cp9").unwrap_err();
            assert!(missing.to_string().contains("cp9"), "{missing}");
        },
    );
    server.stop();
}

#[track_caller]
fn example(name: &str, args: &[&str]) -> stillpoint_tests::Output {
    run_program(Command::new(built(name)).args(args))
}
