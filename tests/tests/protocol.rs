//! The protocol, message by message, on both data sockets.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;

use rand::Rng as _;
use stillpoint_tests::raw_nbd::{can, chunk, command, errno, flag, option, rep};
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::{CHUNK, KIB, MIB, RawNbd, Server, Syncs};

const SIZE: u64 = 4 * MIB;

fn server() -> Server {
    Server::with_disk(SIZE)
}

/// A server with some data on `vda`, a checkpoint `cp1`, a change since, and a backup `b1`.
fn server_with_backup() -> Server {
    let server = server();
    let mut nbd = server.open_live("vda");
    nbd.write(0, &vec![1; MIB as usize]).unwrap();
    server.checkpoint("cp1");
    nbd.write(3 * CHUNK, &[2; 4096]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    server
}

/// The connection is still in step: it answers, and answers right.
#[track_caller]
fn in_step(nbd: &mut RawNbd) {
    assert_eq!(
        nbd.read(SIZE - 512, 512),
        Ok(vec![0; 512]),
        "the connection is out of step"
    );
}

mod handshake {
    use super::*;

    #[test]
    fn go_and_info_tell_the_same() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        let info = nbd.info("vda").unwrap();
        assert_eq!(info.size, SIZE);
        let expected = can::HAS_FLAGS
            | can::FLUSH
            | can::FUA
            | can::TRIM
            | can::WRITE_ZEROES
            | can::MULTI_CONN
            | can::CACHE
            | can::FAST_ZERO;
        assert_eq!(info.flags & expected, expected, "{:#x}", info.flags);
        assert_eq!(info.flags & can::READ_ONLY, 0);
        assert_eq!(nbd.go("vda"), Ok(info));
        nbd.disconnect();
    }

    #[test]
    fn block_sizes_are_told_and_legal() {
        for (socket, export) in [("live", "vda"), ("frozen", "vda@b1")] {
            let server = server_with_backup();
            let socket = if socket == "live" {
                server.live()
            } else {
                server.frozen()
            };
            let info = RawNbd::connect(&socket).info(export).unwrap();
            let [minimum, preferred, maximum] = info.block_sizes.expect("they were asked for");
            assert_eq!(minimum, 1, "one byte can be written");
            assert!(
                preferred.is_power_of_two() && preferred >= 512,
                "{preferred}"
            );
            assert!(
                maximum >= MIB as u32 && maximum % preferred == 0,
                "{maximum}"
            );
        }
    }

    #[test]
    fn structured_replies_make_df_possible() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        assert_eq!(nbd.info("vda").unwrap().flags & can::DF, 0);
        nbd.structured_replies();
        assert_eq!(nbd.go("vda").unwrap().flags & can::DF, can::DF);
    }

    #[test]
    fn the_empty_name_is_the_only_disk() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        assert_eq!(nbd.go("").unwrap().size, SIZE);
        nbd.write(0, &[1]).unwrap();
        assert_eq!(server.open_live("vda").read(0, 1), Ok(vec![1]));

        let two = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        assert_eq!(RawNbd::connect(&two.live()).go(""), Err(rep::ERR_UNKNOWN));
    }

    #[test]
    fn the_old_way_in_works_with_and_without_zeroes() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        let export = nbd.export_name("vda").unwrap();
        assert_eq!(export.size, SIZE);
        nbd.write(100, &[9; 10]).unwrap();
        assert_eq!(
            nbd.read(99, 12).unwrap(),
            [0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0]
        );

        let mut nbd = RawNbd::connect_silently(&server.live());
        nbd.receive_raw(18).unwrap();
        nbd.send_raw(&1u32.to_be_bytes()).unwrap();
        nbd.export_name("vda").unwrap();
        assert_eq!(nbd.receive_raw(124).unwrap(), [0; 124]);
        assert_eq!(nbd.read(99, 2).unwrap(), [0, 9]);
    }

    #[test]
    fn the_old_way_to_an_unknown_export_ends_the_connection() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.send_option(option::EXPORT_NAME, b"nothing");
        assert!(nbd.is_closed());
        server.is_well();
    }

    #[test]
    fn an_unknown_export_is_refused_and_another_may_be_tried() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        for name in [
            "nothing",
            "vdb",
            "vda@b1",
            "../vda",
            "VDA",
            &"x".repeat(4096),
        ] {
            assert_eq!(nbd.info(name), Err(rep::ERR_UNKNOWN), "{name:?}");
            assert_eq!(nbd.go(name), Err(rep::ERR_UNKNOWN), "{name:?}");
        }
        let refused = nbd.go("vda\0").unwrap_err();
        assert!(
            [rep::ERR_UNKNOWN, rep::ERR_INVALID].contains(&refused),
            "{refused:#x}"
        );
        nbd.go("vda").unwrap();
        in_step(&mut nbd);
    }

    #[test]
    fn the_live_socket_lists_the_disks() {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let mut nbd = RawNbd::connect(&server.live());
        let names: Vec<_> = nbd
            .list()
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["vda", "vdb"]);
        assert_eq!(nbd.option(option::LIST, b"data"), Err(rep::ERR_INVALID));
        assert_eq!(nbd.list().unwrap().len(), 2);
    }

    #[test]
    fn abort_is_acknowledged_and_ends_the_connection() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        assert_eq!(nbd.option(option::ABORT, &[]), Ok(vec![]));
        assert!(nbd.is_closed());
    }

    #[test]
    fn unknown_and_malformed_options_are_refused_and_the_handshake_goes_on() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        assert_eq!(nbd.option(99, &[]), Err(rep::ERR_UNSUP));
        assert_eq!(nbd.option(99, &[0; 1000]), Err(rep::ERR_UNSUP));
        assert_eq!(
            nbd.option(option::STRUCTURED_REPLY, &[1]),
            Err(rep::ERR_INVALID)
        );
        let name_past_the_end = [0, 0, 0, 9, b'v', 0, 0];
        let infos_past_the_end = [0, 0, 0, 1, b'v', 0, 9, 0, 1];
        for option in [option::GO, option::INFO] {
            for data in [&[][..], &[0; 3], &name_past_the_end, &infos_past_the_end] {
                assert_eq!(
                    nbd.option(option, data),
                    Err(rep::ERR_INVALID),
                    "{option} {data:?}"
                );
            }
        }
        assert!(
            nbd.option(option::STARTTLS, &[]).is_err(),
            "there is no TLS here"
        );
        nbd.structured_replies();
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            for data in [
                &[][..],
                &name_past_the_end,
                &[0, 0, 0, 3, b'v', b'd', b'a', 0, 0, 0, 5],
            ] {
                assert_eq!(
                    nbd.option(option, data),
                    Err(rep::ERR_INVALID),
                    "{option} {data:?}"
                );
            }
        }
        nbd.go("vda").unwrap();
        in_step(&mut nbd);
    }

    #[test]
    fn what_is_no_option_ends_the_connection() {
        let server = server();
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[255; 64]] {
            let mut nbd = RawNbd::connect(&server.live());
            nbd.send_raw(garbage).unwrap();
            assert!(nbd.is_closed(), "{garbage:?}");
        }
        let mut nbd = RawNbd::connect(&server.live());
        let announced = [&b"IHAVEOPT"[..], &[0, 0, 0, 99], &[255; 4]].concat();
        nbd.send_raw(&announced).unwrap();
        assert!(nbd.is_closed(), "an option of 4 GiB");
        server.is_well();
    }

    #[test]
    fn contexts_are_listed_and_selected_by_query() {
        let server = server_with_backup();
        let all = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:cp1",
        ];
        let mut nbd = RawNbd::connect(&server.frozen());
        nbd.structured_replies();
        assert_eq!(nbd.list_contexts("vda@b1", &[]).unwrap(), all);
        assert_eq!(nbd.list_contexts("vda@b1", &["base:"]).unwrap(), all[..1]);
        assert_eq!(nbd.list_contexts("vda@b1", &["qemu:"]).unwrap(), all[1..]);
        assert_eq!(
            nbd.list_contexts("vda@b1", &["qemu:dirty-bitmap:"])
                .unwrap(),
            all[2..]
        );
        assert_eq!(
            nbd.list_contexts("vda@b1", &["other:thing"]).unwrap(),
            [""; 0]
        );
        assert_eq!(nbd.list_contexts("nothing", &[]), Err(rep::ERR_UNKNOWN));
        assert_eq!(nbd.set_contexts("nothing", &all), Err(rep::ERR_UNKNOWN));
        assert_eq!(
            nbd.set_contexts("vda@b1", &["other:thing"]).unwrap(),
            [""; 0]
        );
        assert_eq!(
            nbd.set_contexts("vda@b1", &["qemu:dirty-bitmap:cp9"])
                .unwrap(),
            [""; 0]
        );
        assert_eq!(nbd.set_contexts("vda@b1", &all).unwrap(), all);
        assert_eq!(
            nbd.set_contexts("vda@b1", &all[..1]).unwrap(),
            all[..1],
            "the last one counts"
        );
        nbd.go("vda@b1").unwrap();
        let status = nbd.block_status(0, MIB as u32, 0).unwrap();
        assert_eq!(status.keys().collect::<Vec<_>>(), [&nbd.context(all[0])]);
    }

    #[test]
    fn libvirts_default_name_of_the_bitmap_is_understood_and_not_listed() {
        let server = server_with_backup();
        let name = "qemu:dirty-bitmap:backup-vda";
        let mut nbd = server.open_frozen("vda@b1", &[name, "qemu:dirty-bitmap:cp1"]);
        assert_eq!(nbd.map(name), nbd.map("qemu:dirty-bitmap:cp1"));
    }

    #[test]
    fn without_a_base_the_16_newest_bitmaps_are_listed_and_any_may_be_selected() {
        let server = server();
        let name = |number: u32| format!("cp{number:02}");
        let context = |number: u32| format!("qemu:dirty-bitmap:{}", name(number));
        (1..=20).for_each(|number| server.checkpoint(&name(number)));
        let begun = server.begin("b1", &[]);
        let mut expected = vec![
            "base:allocation".to_owned(),
            "qemu:allocation-depth".to_owned(),
        ];
        expected.extend((5..=20).rev().map(context));
        assert_eq!(begun["disks"][0]["contexts"], serde_json::json!(expected));
        // One that is made later says nothing of this instant.
        server.checkpoint(&name(21));

        let mut nbd = RawNbd::connect(&server.frozen());
        nbd.structured_replies();
        assert_eq!(nbd.list_contexts("vda@b1", &[]).unwrap(), expected);
        for number in [1, 4, 20] {
            let context = context(number);
            let chosen = nbd.set_contexts("vda@b1", &[&context]).unwrap();
            assert_eq!(chosen, [context]);
        }
        for refused in [&context(21), "qemu:dirty-bitmap:backup-vda"] {
            assert_eq!(nbd.set_contexts("vda@b1", &[refused]).unwrap(), [""; 0]);
        }

        // Each can be seen as a difference, with a bitmap of its own alone.
        for number in [1, 20] {
            let export = format!("vda@{}..b1", name(number));
            let listed = nbd.list_contexts(&export, &["qemu:"]).unwrap();
            assert_eq!(
                listed,
                ["qemu:allocation-depth".to_owned(), context(number)]
            );
            let other = nbd.set_contexts(&export, &[&context(2)]).unwrap();
            assert_eq!(other, [""; 0], "{export}");
        }
        assert_eq!(nbd.info("vda@cp21..b1"), Err(rep::ERR_UNKNOWN));
    }

    #[test]
    fn with_a_base_its_bitmap_is_listed_and_any_other_may_be_selected() {
        let server = server();
        let mut guest = server.open_live("vda");
        for name in ["cp1", "cp2", "cp3"] {
            server.checkpoint(name);
            guest
                .write(u64::from(name.as_bytes()[2] - b'0') * CHUNK, &[1])
                .unwrap();
        }
        server.begin("b1", &["--since", "cp2"]);
        let bitmap = |name: &str| format!("qemu:dirty-bitmap:{name}");
        let mut nbd = RawNbd::connect(&server.frozen());
        nbd.structured_replies();
        let listed = nbd
            .list_contexts("vda@b1", &["qemu:dirty-bitmap:"])
            .unwrap();
        assert_eq!(listed, [bitmap("cp2")]);
        for (name, first) in [("cp1", 1), ("cp2", 2), ("cp3", 3)] {
            let map = server
                .open_frozen("vda@b1", &[&bitmap(name)])
                .map(&bitmap(name));
            let dirty = (first * CHUNK, (4 - first) * CHUNK, 1);
            assert_eq!(map[..2], [(0, first * CHUNK, 0), dirty], "{name}");
        }
        nbd.go("vda@cp2..b1").unwrap();
        let mut nbd = RawNbd::connect(&server.frozen());
        for export in ["vda@cp1..b1", "vda@cp3..b1", "vda@backup-vda..b1"] {
            assert_eq!(nbd.info(export), Err(rep::ERR_UNKNOWN), "{export}");
        }
    }

    #[test]
    fn contexts_need_structured_replies_and_the_same_export() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        let refused = nbd.set_contexts("vda", &["base:allocation"]);
        assert_eq!(refused, Err(rep::ERR_INVALID));
        nbd.go("vda").unwrap();
        assert_eq!(
            nbd.call((command::BLOCK_STATUS, 0), 0, 4096, &[]).error,
            errno::EINVAL
        );
        in_step(&mut nbd);

        let two = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let mut nbd = RawNbd::connect(&two.live());
        nbd.structured_replies();
        nbd.set_contexts("vda", &["base:allocation"]).unwrap();
        nbd.go("vdb").unwrap();
        assert_eq!(
            nbd.call((command::BLOCK_STATUS, 0), 0, 4096, &[]).error,
            errno::EINVAL
        );
    }
}

mod requests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_at_any_alignment() {
        let server = server();
        let mut nbd = server.open_live("vda");
        for (offset, length) in [
            (0, 1),
            (511, 2),
            (4095, 8194),
            (CHUNK - 1, 2),
            (SIZE - 1, 1),
        ] {
            let bytes = vec![7; length as usize];
            nbd.write(offset, &bytes).unwrap();
            assert_eq!(
                nbd.read(offset, length).unwrap(),
                bytes,
                "{offset}+{length}"
            );
        }
    }

    #[test]
    fn a_read_of_a_hole_comes_as_a_hole() {
        let server = server();
        let mut nbd = server.open_live("vda");
        nbd.write(MIB, &vec![1; CHUNK as usize]).unwrap();
        let answer = nbd.call((command::READ, 0), 0, 2 * MIB as u32, &[]);
        let kinds: BTreeSet<_> = answer.chunks.iter().map(|chunk| chunk.kind).collect();
        assert!(kinds.contains(&chunk::OFFSET_HOLE), "{kinds:?}");
        assert!(kinds.contains(&chunk::OFFSET_DATA), "{kinds:?}");
        let mut expected = vec![0; 2 * MIB as usize];
        expected[MIB as usize..][..65536].fill(1);
        assert!(answer.data(0, 2 * MIB as u32).unwrap() == expected);
    }

    #[test]
    fn a_read_of_the_past_comes_in_holes_and_data_too() {
        let server = server();
        let mut guest = server.open_live("vda");
        guest.write(MIB, &vec![1; CHUNK as usize]).unwrap();
        server.begin("b1", &[]);
        // Half of what is read is in scratch by then, and the guest has filled its holes.
        guest.write(0, &vec![2; MIB as usize + 4096]).unwrap();
        let mut nbd = server.open_frozen("vda@b1", &[]);
        let answer = nbd.call((command::READ, 0), 0, 2 * MIB as u32, &[]);
        let told: Vec<_> = answer.chunks.iter().map(|chunk| chunk.kind).collect();
        let expected = [chunk::OFFSET_HOLE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE];
        assert_eq!(told, expected);
        let mut expected = vec![0; 2 * MIB as usize];
        expected[MIB as usize..][..CHUNK as usize].fill(1);
        assert!(answer.data(0, 2 * MIB as u32).unwrap() == expected);
    }

    #[test]
    fn cache_is_done_and_counts_as_no_read() {
        let server = server_with_backup();
        let mut live = server.open_live("vda");
        assert_eq!(live.cache(0, SIZE as u32), Ok(()));
        let mut frozen = server.open_frozen("vda@b1", &[]);
        assert_eq!(frozen.cache(1, SIZE as u32 - 1), Ok(()));
        assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 0);
        in_step(&mut live);
        in_step(&mut frozen);
        assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 512);
    }

    #[test]
    fn what_is_ready_does_not_wait_for_what_is_not() {
        let server = server();
        let mut nbd = server.open_live("vda");
        nbd.write(0, &vec![1; SIZE as usize]).unwrap();
        // Both arrive at once; the first needs the device, and the second is in memory.
        let request = |command: u16, cookie: u64, length: u32| {
            let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
            bytes.extend([0, 0]);
            bytes.extend(command.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(0u64.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            bytes
        };
        let both = [
            request(command::FLUSH, 1, 0),
            request(command::READ, 2, 512),
        ];
        nbd.send_raw(&both.concat()).unwrap();
        let (_, receiver) = nbd.halves();
        let answered: Vec<_> = (0..2).map(|_| receiver.answer().unwrap()).collect();
        assert!(answered.iter().all(|answer| answer.error == 0));
        assert_eq!([answered[0].cookie, answered[1].cookie], [2, 1]);
    }

    #[test]
    fn df_means_one_chunk() {
        let server = server();
        let mut nbd = server.open_live("vda");
        nbd.write(32 * KIB, &[1; 4096]).unwrap();
        let answer = nbd.call((command::READ, flag::DF), 0, CHUNK as u32, &[]);
        assert_eq!(
            answer.data(0, CHUNK as u32).unwrap()[32 * KIB as usize - 1..][..2],
            [0, 1]
        );
        let content = answer.chunks.iter().filter(|part| part.kind != chunk::NONE);
        assert_eq!(content.count(), 1, "{:?}", answer.chunks.len());
    }

    #[test]
    fn past_the_end_is_no_space_for_writes_and_invalid_for_the_rest() {
        let server = server();
        let mut nbd = server.open_live("vda");
        for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2), (1 << 63, 512)] {
            let at = format!("{offset}+{length}");
            assert_eq!(
                nbd.write(offset, &vec![1; length as usize]),
                Err(errno::ENOSPC),
                "{at}"
            );
            assert_eq!(nbd.zeroes(offset, length, 0), Err(errno::ENOSPC), "{at}");
            assert_eq!(nbd.read(offset, length), Err(errno::EINVAL), "{at}");
            assert_eq!(nbd.trim(offset, length), Err(errno::EINVAL), "{at}");
            assert_eq!(nbd.cache(offset, length), Err(errno::EINVAL), "{at}");
            assert_eq!(
                nbd.block_status(offset, length, 0),
                Err(errno::EINVAL),
                "{at}"
            );
            in_step(&mut nbd);
        }
    }

    #[test]
    fn unknown_commands_and_flags_are_invalid_and_payload_is_skipped() {
        let server = server();
        let mut nbd = server.open_live("vda");
        assert_eq!(nbd.call((77, 0), 0, 4096, &[]).error, errno::EINVAL);
        in_step(&mut nbd);
        for command in [command::READ, command::TRIM, command::FLUSH, command::CACHE] {
            let answer = nbd.call((command, 1 << 9), 0, 4096, &[]);
            assert_eq!(answer.error, errno::EINVAL, "command {command}");
        }
        let answer = nbd.call((command::WRITE, 1 << 9), 0, 4096, &[1; 4096]);
        assert_eq!(answer.error, errno::EINVAL);
        assert_eq!(
            nbd.read(0, 1),
            Ok(vec![0]),
            "a refused write changes nothing"
        );
        in_step(&mut nbd);
    }

    #[test]
    fn what_is_no_request_ends_the_connection_and_no_other() {
        let server = server();
        let mut other = server.open_live("vda");
        let mut nbd = server.open_live("vda");
        nbd.send_raw(&[0; 28]).unwrap();
        assert!(nbd.is_closed());
        in_step(&mut other);
    }

    #[test]
    fn a_frozen_export_is_read_only_and_stays_in_step() {
        let server = server_with_backup();
        for export in ["vda@b1", "vda", "", "vda@cp1..b1"] {
            let mut nbd = server.open_frozen(export, &[]);
            assert_eq!(
                nbd.export().flags & can::READ_ONLY,
                can::READ_ONLY,
                "{export}"
            );
            assert_eq!(nbd.write(0, &[9; 5000]), Err(errno::EPERM), "{export}");
            in_step(&mut nbd);
            assert_eq!(nbd.trim(0, 4096), Err(errno::EPERM), "{export}");
            assert_eq!(nbd.zeroes(0, 4096, 0), Err(errno::EPERM), "{export}");
            assert_eq!(nbd.read(0, 1), Ok(vec![1]), "{export}");
            in_step(&mut nbd);
        }
    }

    #[test]
    fn fua_goes_with_every_command() {
        let server = server();
        let mut nbd = server.open_live("vda");
        let plain = [
            command::READ,
            command::TRIM,
            command::CACHE,
            command::WRITE_ZEROES,
        ];
        for command in plain.into_iter().chain([command::BLOCK_STATUS]) {
            let answer = nbd.call((command, flag::FUA), 0, 4096, &[]);
            assert_eq!(answer.error, 0, "command {command}");
        }
        assert_eq!(nbd.call((command::FLUSH, flag::FUA), 0, 0, &[]).error, 0);
        assert_eq!(
            nbd.call((command::WRITE, flag::FUA), 0, 4096, &[3; 4096])
                .error,
            0
        );
        assert_eq!(nbd.read(0, 4096), Ok(vec![3; 4096]));
    }

    #[test]
    fn zeroes_are_zeroes_with_holes_without_and_fast() {
        let server = server();
        let mut nbd = server.open_live("vda");
        for flags in [0, flag::NO_HOLE, flag::NO_HOLE | flag::FUA] {
            nbd.write(0, &vec![1; MIB as usize]).unwrap();
            nbd.zeroes(4096 - 7, CHUNK as u32, flags).unwrap();
            let bytes = nbd.read(0, 2 * CHUNK as u32).unwrap();
            let end = 4096 - 7 + CHUNK as usize;
            assert!(
                bytes[..4096 - 7].iter().all(|byte| *byte == 1),
                "flags {flags}"
            );
            assert!(
                bytes[4096 - 7..end].iter().all(|byte| *byte == 0),
                "flags {flags}"
            );
            assert!(bytes[end..].iter().all(|byte| *byte == 1), "flags {flags}");
        }
        nbd.write(0, &vec![1; CHUNK as usize]).unwrap();
        // Fast or not supported, but never slow and never half.
        match nbd.zeroes(0, CHUNK as u32, flag::FAST_ZERO) {
            Ok(()) => assert_eq!(nbd.read(0, CHUNK as u32), Ok(vec![0; CHUNK as usize])),
            Err(error) => {
                assert_eq!(error, errno::ENOTSUP);
                assert_eq!(nbd.read(0, CHUNK as u32), Ok(vec![1; CHUNK as usize]));
            }
        }
        in_step(&mut nbd);
    }

    #[test]
    fn no_hole_keeps_the_space_and_a_trim_gives_it_back() {
        let server = server();
        let mut nbd = server.open_live("vda");
        nbd.zeroes(0, MIB as u32, flag::NO_HOLE).unwrap();
        // Not by the map: a file system may show reserved space that was never written as a hole.
        let space = || fs::metadata(server.image("vda")).unwrap().blocks() * 512;
        assert!(space() >= MIB, "{} bytes written without a hole", space());
        nbd.trim(0, MIB as u32).unwrap();
        assert!(space() < MIB, "{} bytes after a trim", space());
        assert_eq!(nbd.map("base:allocation"), [(0, SIZE, 3)]);
    }

    #[test]
    fn block_status_tells_all_contexts_over_the_same_length() {
        let server = server_with_backup();
        let contexts = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:cp1",
        ];
        let mut nbd = server.open_frozen("vda@b1", &contexts);
        for (offset, length) in [(0, SIZE), (1, 100), (3 * CHUNK + 1, CHUNK), (SIZE - 1, 1)] {
            for flags in [0, flag::REQ_ONE] {
                let status = nbd.block_status(offset, length as u32, flags).unwrap();
                assert_eq!(status.len(), contexts.len());
                let lengths: BTreeSet<u64> = status
                    .values()
                    .map(|extents| extents.iter().map(|extent| u64::from(extent.0)).sum())
                    .collect();
                assert_eq!(lengths.len(), 1, "{offset}+{length} {flags}: {status:?}");
                let total = *lengths.first().expect("one length");
                assert!(
                    (1..=length).contains(&total),
                    "{offset}+{length} {flags}: {status:?}"
                );
                if flags == flag::REQ_ONE {
                    assert!(
                        status.values().all(|extents| extents.len() == 1),
                        "{status:?}"
                    );
                }
            }
        }
        assert_eq!(
            nbd.map("qemu:dirty-bitmap:cp1"),
            [
                (0, 3 * CHUNK, 0),
                (3 * CHUNK, CHUNK, 1),
                (4 * CHUNK, SIZE - 4 * CHUNK, 0)
            ]
        );
        assert_eq!(
            nbd.map("base:allocation"),
            [(0, MIB, 0), (MIB, SIZE - MIB, 3)]
        );
    }

    #[test]
    fn many_requests_in_flight_are_each_answered_once() {
        for seed in seeds(&[1, 2]) {
            let mut rng = rng(seed);
            let server = server();
            let mut nbd = server.open_live("vda");
            let (sender, receiver) = nbd.halves();
            let mut expected = BTreeSet::new();
            for cookie in 1..=500u64 {
                let offset = rng.random_range(0..SIZE - 8192);
                let length = rng.random_range(1..=4096);
                let payload = vec![7; length as usize];
                let (kind, payload) = match rng.random_range(0..10) {
                    0..4 => (command::READ, &[][..]),
                    4..8 => (command::WRITE, &payload[..]),
                    8 => (command::WRITE_ZEROES, &[][..]),
                    _ => (command::BLOCK_STATUS, &[][..]),
                };
                let cookie = cookie << 32 | rng.random_range(0..1 << 20);
                sender
                    .request((kind, 0), cookie, offset, length, payload)
                    .unwrap();
                expected.insert(cookie);
                // So that neither side waits for the other with full buffers.
                while expected.len() >= 128 {
                    let answer = receiver.answer().unwrap();
                    assert_eq!(answer.error, 0, "seed {seed}");
                    assert!(
                        expected.remove(&answer.cookie),
                        "seed {seed}: answered twice"
                    );
                }
            }
            while !expected.is_empty() {
                let answer = receiver.answer().unwrap();
                assert_eq!(answer.error, 0, "seed {seed}");
                assert!(
                    expected.remove(&answer.cookie),
                    "seed {seed}: answered twice"
                );
            }
            in_step(&mut nbd);
            nbd.disconnect();
        }
    }

    #[test]
    fn requests_before_a_good_bye_are_answered() {
        let server = server();
        let (mut sender, mut receiver) = server.open_live("vda").split();
        for cookie in 1..=64 {
            sender
                .request((command::WRITE, 0), cookie, cookie * 4096, 4096, &[1; 4096])
                .unwrap();
        }
        sender.disconnect().unwrap();
        let answered: BTreeSet<_> = (0..64).map(|_| receiver.answer().unwrap().cookie).collect();
        assert_eq!(answered, (1..=64).collect());
        assert!(receiver.answer().is_err(), "the server hangs up");
    }

    #[test]
    fn a_flush_on_one_connection_covers_all() {
        let server = server();
        let (mut one, mut other) = (server.open_live("vda"), server.open_live("vda"));
        assert_eq!(one.export().flags & can::MULTI_CONN, can::MULTI_CONN);
        for round in 0..20u8 {
            one.write(u64::from(round) * 512, &[round; 512]).unwrap();
            other.flush().unwrap();
            assert_eq!(
                other.read(u64::from(round) * 512, 512),
                Ok(vec![round; 512])
            );
        }
    }

    #[test]
    fn a_flush_and_a_forced_write_reach_the_device() {
        let server = server();
        let trace = Syncs::of(&server);
        let image = server.image("vda");
        let (mut one, mut other) = (server.open_live("vda"), server.open_live("vda"));
        one.write(0, &[1; 512]).unwrap();
        other.flush().unwrap();
        trace.shows(&image, 1, "a flush on the other connection");
        let forced = [
            (command::WRITE, &[1; 4096][..]),
            (command::WRITE_ZEROES, &[]),
            (command::TRIM, &[]),
        ];
        for (done, (command, payload)) in forced.into_iter().enumerate() {
            let answer = one.call((command, flag::FUA), 0, 4096, payload);
            assert_eq!(answer.error, 0, "command {command}");
            trace.shows(&image, done + 2, &format!("command {command}"));
        }
    }

    #[test]
    fn a_request_may_come_byte_by_byte() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.structured_replies();
        nbd.go("vda").unwrap();
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5]);
        request.extend(0u64.to_be_bytes());
        request.extend([0, 0, 0, 3, b'a', b'b', b'c']);
        for byte in request {
            nbd.send_raw(&[byte]).unwrap();
        }
        let (_, receiver) = nbd.halves();
        let answer = receiver.answer().unwrap();
        assert_eq!((answer.cookie, answer.error), (5, 0));
        assert_eq!(nbd.read(0, 4), Ok(b"abc\0".to_vec()));
    }
}

mod simple_clients {
    use super::*;

    #[test]
    fn a_client_from_the_registry_reads_and_writes() {
        let server = server();
        let mut stream = UnixStream::connect(server.live()).unwrap();
        let export = nbd::client::handshake(&mut stream, b"vda").unwrap();
        assert_eq!(export.size, SIZE);
        assert!(!export.readonly && export.send_flush && export.send_trim);
        let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
        disk.seek(SeekFrom::Start(12_345)).unwrap();
        disk.write_all(b"still").unwrap();
        disk.flush().unwrap();
        disk.seek(SeekFrom::Start(12_344)).unwrap();
        let mut found = [1; 7];
        disk.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"\0still\0");
    }

    #[test]
    fn a_client_from_the_registry_reads_a_backup_and_cannot_write_it() {
        let server = server_with_backup();
        let mut stream = UnixStream::connect(server.frozen()).unwrap();
        let export = nbd::client::handshake(&mut stream, b"vda@b1").unwrap();
        assert!(export.readonly);
        let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
        let error = disk.write(b"x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        let mut found = [0; 4];
        disk.read_exact(&mut found).unwrap();
        assert_eq!(found, [1; 4]);
    }

    #[test]
    fn errors_come_as_simple_replies_and_reads_of_errors_have_no_data() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.export_name("vda").unwrap();
        assert_eq!(nbd.read(SIZE, 512), Err(errno::EINVAL));
        assert_eq!(nbd.write(SIZE, &[1; 512]), Err(errno::ENOSPC));
        in_step(&mut nbd);
    }
}

mod roles {
    use super::*;

    #[test]
    fn the_backup_socket_never_reaches_a_live_disk() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.frozen());
        assert_eq!(nbd.list().unwrap(), []);
        for name in ["vda", "", "vda@", "@", "vda@live", "vda@b1"] {
            assert_eq!(nbd.go(name), Err(rep::ERR_UNKNOWN), "{name:?}");
        }
    }

    #[test]
    fn the_live_socket_never_reaches_a_backup() {
        let server = server_with_backup();
        let mut nbd = RawNbd::connect(&server.live());
        assert_eq!(nbd.list().unwrap().len(), 1);
        assert_eq!(nbd.go("vda@b1"), Err(rep::ERR_UNKNOWN));
        assert_eq!(nbd.go("vda@cp1..b1"), Err(rep::ERR_UNKNOWN));
    }

    #[test]
    fn everything_that_the_backup_socket_lists_can_be_opened_and_is_read_only() {
        let server = server_with_backup();
        let list = RawNbd::connect(&server.frozen()).list().unwrap();
        let names: Vec<_> = list.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"vda@b1"), "{names:?}");
        assert!(
            !names.contains(&"vda@cp1..b1"),
            "a difference is never listed: {names:?}"
        );
        for name in names {
            let nbd = server.open_frozen(name, &[]);
            assert_eq!(
                nbd.export().flags & can::READ_ONLY,
                can::READ_ONLY,
                "{name}"
            );
        }
    }

    #[test]
    fn a_difference_says_that_it_needs_its_base() {
        let server = server_with_backup();
        let mut nbd = RawNbd::connect(&server.frozen());
        let info = nbd.info("vda@cp1..b1").unwrap();
        assert_eq!(
            info.description.as_deref(),
            Some("difference since cp1: needs its base")
        );
        nbd.structured_replies();
        let contexts = nbd
            .list_contexts("vda@cp1..b1", &["qemu:dirty-bitmap:"])
            .unwrap();
        assert_eq!(contexts, ["qemu:dirty-bitmap:cp1"]);
        assert_eq!(nbd.go("vda@cp9..b1"), Err(rep::ERR_UNKNOWN));
        assert_eq!(nbd.go("vda@cp1..b9"), Err(rep::ERR_UNKNOWN));
    }

    #[test]
    fn the_plain_name_belongs_to_the_backup_that_was_alone_until_that_one_ends() {
        let server = server();
        let mut guest = server.open_live("vda");
        let plain = || {
            let mut names = ["vda", ""].into_iter();
            let open = |name| RawNbd::try_open(&server.frozen(), name, &[]);
            let first = open(names.next().unwrap()).map(|mut nbd| nbd.read(0, 1).unwrap()[0]);
            let empty = open(names.next().unwrap()).map(|mut nbd| nbd.read(0, 1).unwrap()[0]);
            assert_eq!(first, empty, "the empty name is the same");
            first
        };
        guest.write(0, &[1]).unwrap();
        server.begin("b1", &[]);
        assert_eq!(plain(), Ok(1));
        guest.write(0, &[2]).unwrap();
        server.begin("b2", &[]);
        assert_eq!(plain(), Ok(1), "a second backup does not take it away");
        server.abort("b1");
        assert_eq!(
            plain(),
            Err(rep::ERR_UNKNOWN),
            "a second backup does not inherit it"
        );
        guest.write(0, &[3]).unwrap();
        server.begin("b3", &[]);
        assert_eq!(
            plain(),
            Err(rep::ERR_UNKNOWN),
            "another one was open when it was begun"
        );
        server.commit("b2");
        server.abort("b3");
        server.begin("b4", &[]);
        assert_eq!(plain(), Ok(3));
        server.commit("b4");
        assert_eq!(plain(), Err(rep::ERR_UNKNOWN));
    }

    #[test]
    fn the_empty_name_is_no_backup_where_there_are_two_disks() {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        server.begin("b1", &[]);
        let mut nbd = RawNbd::connect(&server.frozen());
        assert_eq!(nbd.info(""), Err(rep::ERR_UNKNOWN));
        assert_eq!(nbd.info("vda@"), Err(rep::ERR_UNKNOWN));
        for disk in ["vda", "vdb"] {
            assert_eq!(nbd.info(disk).unwrap().size, MIB, "{disk}");
        }
    }

    #[test]
    fn a_read_only_disk_is_read_only_when_it_is_live_too() {
        let builder = Server::builder();
        let image = builder.path("vda.raw");
        fs::write(&image, vec![7; MIB as usize]).unwrap();
        let disk = format!("vda={},read-only", image.display());
        let server = builder.disk_as(&disk).start();
        let mut nbd = server.open_live("vda");
        assert_eq!(nbd.export().flags & can::READ_ONLY, can::READ_ONLY);
        assert_eq!(nbd.write(0, &[1]), Err(errno::EPERM));
        assert_eq!(nbd.read(0, 1), Ok(vec![7]));
        server.begin("b1", &[]);
        let frozen = server.open_frozen("vda@b1", &[]).read(MIB - 1, 1);
        assert_eq!(frozen, Ok(vec![7]));
    }

    #[test]
    fn the_sockets_are_for_their_owner_alone() {
        let server = server();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for socket in [server.live(), server.frozen(), server.control()] {
            assert_eq!(mode(socket.clone()), 0o600, "{}", socket.display());
        }
        assert_eq!(mode(server.path("run")), 0o755);
    }
}
