//! `qemu-nbd` as the server.

use bytes::Bytes;
use proto::Headers;
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{nbdinfo_map, path, sparse_file, tool, with_qemu_nbd};
use stillpoint_tests::{KIB, MIB, server};

use crate::client::{Durability, Error, Piece, Reason, Zeroing};
use crate::connected::{begin, map, read_all, run, with_client, with_client_at_most};

#[test]
fn what_is_written_through_the_client_is_in_the_image() {
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let directory = temporary_directory();
        let image = directory.path().join("image");
        sparse_file(&image, 64 * MIB);
        let args = ["-f", "raw", "-x", "disk", path(&image)];
        let pattern = Bytes::from(pattern(40 * MIB));
        with_qemu_nbd(&args, |socket| {
            with_client_at_most(headers, socket, ("disk", &[]), async |client| {
                // Longer than any request: written and read in parts.
                let write = client.write(MIB, pattern.clone(), Durability::Now);
                write.await.unwrap();
                client
                    .write_zeroes(2 * MIB..3 * MIB, Zeroing::default())
                    .await
                    .unwrap();
                client
                    .trim(50 * MIB..60 * MIB, Durability::Later)
                    .await
                    .unwrap();
                client.flush().await.unwrap();
                assert!(
                    client.read(MIB..41 * MIB).await.unwrap() == zeroed(&pattern),
                    "{headers:?}: other bytes than were written"
                );
            });
        });
        let file = std::fs::read(&image).unwrap();
        assert!(
            file[MIB as usize..][..40 * MIB as usize] == zeroed(&pattern),
            "{headers:?}"
        );
    }
}

#[test]
fn holes_come_as_holes() {
    let directory = temporary_directory();
    let image = directory.path().join("image");
    sparse_file(&image, 4 * MIB);
    let args = ["-f", "raw", path(&image)];
    with_qemu_nbd(&args, |socket| {
        with_client(socket, ("", &[]), async |client| {
            let bytes = Bytes::from(vec![7; 4096]);
            client
                .write(MIB, bytes.clone(), Durability::Later)
                .await
                .unwrap();
            let pieces = client.read_pieces(0..2 * MIB).await.unwrap();
            let of_data: u64 = pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Data { data, .. } => data.len() as u64,
                    Piece::Hole { .. } => 0,
                })
                .sum();
            assert!((4096..MIB).contains(&of_data), "{of_data} bytes of data");
            let all = read_all(client).await;
            assert!(all[MIB as usize..][..4096] == bytes);
        });
    });
}

#[test]
fn a_persistent_bitmap_of_qemu_is_the_map_that_nbdinfo_shows() {
    let directory = temporary_directory();
    let image = directory.path().join("a.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", path(&image), "8M"]).ok();
    let bitmap = ["bitmap", "--add", "-g", "64k", path(&image), "cp1"];
    tool("qemu-img", &bitmap).ok();
    for at in ["write 100k 1k", "write 1M 192k", "write 8191k 1k"] {
        tool("qemu-io", &["-f", "qcow2", "-c", at, path(&image)]).ok();
    }
    let args = ["-r", "-f", "qcow2", "-B", "cp1", path(&image)];
    with_qemu_nbd(&args, |socket| {
        // It serves one client at a time.
        let expected_allocation = nbdinfo_map(&server::uri(socket, ""), "base:allocation");
        let contexts = ["base:allocation", "qemu:dirty-bitmap:cp1"];
        for headers in [Headers::Structured, Headers::Extended] {
            with_client_at_most(headers, socket, ("", &contexts), async |client| {
                let dirty = map(client, "qemu:dirty-bitmap:cp1").await;
                let expected = [
                    (0, 64 * KIB, 0),
                    (64 * KIB, 64 * KIB, 1),
                    (128 * KIB, 896 * KIB, 0),
                    (MIB, 192 * KIB, 1),
                    (MIB + 192 * KIB, 7 * MIB - 256 * KIB, 0),
                    (8 * MIB - 64 * KIB, 64 * KIB, 1),
                ];
                assert_eq!(dirty, expected, "{headers:?}");
                let allocation = map(client, "base:allocation").await;
                assert_eq!(allocation, expected_allocation, "{headers:?}");
                assert!(client.context("qemu:dirty-bitmap:cp2").is_err());
            });
        }
    });
}

#[test]
fn a_list_an_info_and_a_refusal_are_told() {
    let directory = temporary_directory();
    let image = directory.path().join("image");
    sparse_file(&image, MIB);
    let args = [
        "-r",
        "-f",
        "raw",
        "-x",
        "disk",
        "-D",
        "a description",
        path(&image),
    ];
    with_qemu_nbd(&args, |socket| {
        run(async {
            let mut haggling = begin(socket).await.unwrap();
            let exports = haggling.list().await.unwrap();
            assert_eq!(exports.len(), 1);
            assert_eq!(exports[0].name, "disk");
            assert_eq!(exports[0].description.as_deref(), Some("a description"));
            let info = haggling.info("disk").await.unwrap();
            assert_eq!(info.size, MIB);
            assert_eq!(info.description.as_deref(), Some("a description"));
            let contexts = haggling.contexts("disk", &[]).await.unwrap();
            assert!(
                contexts.contains(&"base:allocation".to_owned()),
                "{contexts:?}"
            );

            let Err(Error::Declined(declined)) = haggling.info("other").await else {
                panic!("there is no other");
            };
            assert_eq!(declined.reason, Reason::Unknown);
            // It has been no harm.
            assert_eq!(haggling.info("disk").await.unwrap().size, MIB);
            haggling.abort().await.unwrap();
        });
        with_client(socket, ("disk", &[]), async |client| {
            let bytes = Bytes::from_static(b"x");
            let write = client.write(0, bytes, Durability::Later).await;
            assert!(matches!(write, Err(Error::Refused(_))), "{write:?}");
        });
    });
}

/// Bytes of which no block is like another, none of them zero.
fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at / 512 % 255) as u8 + 1).collect()
}

/// What is left of the pattern, written at 1 MiB, when the second MiB of it has been zeroed.
fn zeroed(pattern: &[u8]) -> Vec<u8> {
    let mut bytes = pattern.to_vec();
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    bytes
}
