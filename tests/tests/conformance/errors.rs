//! Requests that are refused, and with which error.

use stillpoint_tests::raw_nbd::{RawNbd, can, command, errno, flag};
use stillpoint_tests::{MIB, Mount, Server};

use crate::peer::{EXPORT, Peer, SIZE};
use crate::rows::rows;
use crate::talk::{in_step, request};

rows![
    (
        "errors-1",
        "Error values; NBD_CMD_WRITE_ZEROES",
        "A write or a zeroing past the end is ENOSPC",
        Any(writes_past_the_end_have_no_space)
    ),
    (
        "errors-2",
        "Error values; Size constraints",
        "A read, trim or caching past the end is EINVAL",
        Any(the_rest_past_the_end_is_invalid)
    ),
    (
        "errors-3",
        "Size constraints",
        "An offset and a length that overflow together lie past the end",
        Any(a_range_that_overflows_is_past_the_end)
    ),
    (
        "errors-4",
        "Error values; NBD_FLAG_READ_ONLY",
        "A write, trim or zeroing of a read-only export is EPERM, and changes nothing",
        Any(a_read_only_export_is_not_changed)
    ),
    (
        "errors-5",
        "Error values",
        "An unknown command is EINVAL",
        Any(unknown_commands_are_invalid)
    ),
    (
        "errors-6",
        "Error values; Command flags",
        "An unknown flag is EINVAL, on any command",
        Any(unknown_flags_are_invalid)
    ),
    (
        "errors-7",
        "Error values; Command flags",
        "A flag on a command that does not have it is EINVAL",
        Any(flags_of_other_commands_are_invalid)
    ),
    (
        "errors-8",
        "NBD_CMD_FLAG_DF; NBD_CMD_FLAG_FAST_ZERO",
        "A flag that was not negotiated is EINVAL",
        Any(flags_that_were_not_negotiated_are_invalid)
    ),
    (
        "errors-9",
        "NBD_CMD_FLAG_FUA",
        "FUA is accepted on every command",
        Any(fua_goes_with_every_command)
    ),
    (
        "errors-10",
        "NBD_CMD_WRITE",
        "The payload of a write that is refused is read past, and nothing of it is written",
        Any(the_payload_of_a_refused_write_is_read_past)
    ),
    (
        "errors-11",
        "Error values",
        "Nothing but the values of the protocol is sent, and none of ENOMEM, EOVERFLOW and ENOTSUP \
         without its reason",
        Any(errors_are_those_of_the_protocol)
    ),
    (
        "errors-12",
        "Error values",
        "A full file system is ENOSPC; so are EDQUOT and EFBIG",
        Ours(a_full_file_system_is_no_space)
    ),
    (
        "errors-13",
        "Error values",
        "An error of the storage is EIO, and the connection goes on",
        Any(an_error_of_the_storage_is_eio)
    ),
    (
        "errors-14",
        "NBD_CMD_FLUSH",
        "FLUSH of a range is EINVAL or flushes; either way the connection goes on",
        Any(a_flush_of_a_range_ends_nothing)
    ),
];

fn writes_past_the_end_have_no_space(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        for (offset, length) in [(SIZE, 512), (SIZE - 512, 1024), (1 << 40, 512)] {
            let found = nbd.write(offset, &vec![1; length as usize]);
            assert_eq!(found, Err(errno::ENOSPC), "write of {offset}+{length}");
            let found = nbd.zeroes(offset, length, 0);
            assert_eq!(found, Err(errno::ENOSPC), "zeroing of {offset}+{length}");
            assert_eq!(nbd.read(SIZE - 1, 1), Ok(vec![0]));
        }
    }
}

fn the_rest_past_the_end_is_invalid(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        for (offset, length) in [(SIZE, 512), (SIZE - 512, 1024), (0, SIZE as u32 + 512)] {
            for command in [command::READ, command::TRIM, command::CACHE] {
                let answer = nbd.call((command, 0), offset, length, &[]);
                let which = format!("command {command}, {offset}+{length}");
                assert_eq!(answer.error, errno::EINVAL, "{which}");
                in_step(&mut nbd);
            }
        }
    }
}

fn a_range_that_overflows_is_past_the_end(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (offset, length) in [(u64::MAX, 2), (u64::MAX - 511, 512), (1 << 63, u32::MAX)] {
        for command in [
            command::READ,
            command::TRIM,
            command::CACHE,
            command::WRITE_ZEROES,
            command::BLOCK_STATUS,
        ] {
            let answer = nbd.call((command, 0), offset, length, &[]);
            let expected = [errno::EINVAL, errno::ENOSPC].contains(&answer.error);
            assert!(expected, "command {command}: error {}", answer.error);
        }
        in_step(&mut nbd);
    }
    let answer = nbd.call((command::WRITE, 0), u64::MAX, 2, &[1; 2]);
    let expected = [errno::EINVAL, errno::ENOSPC].contains(&answer.error);
    assert!(expected, "error {}", answer.error);
    in_step(&mut nbd);
}

fn a_read_only_export_is_not_changed(peer: Peer) {
    let server = peer.serve_read_only();
    for mut nbd in [server.open(), server.open_simple()] {
        assert_eq!(nbd.write(0, &[9; 4608]), Err(errno::EPERM), "write");
        in_step(&mut nbd);
        assert_eq!(nbd.zeroes(0, 4096, 0), Err(errno::EPERM), "zeroing");
        assert_eq!(nbd.trim(0, 4096), Err(errno::EPERM), "trim");
        assert_eq!(nbd.read(0, 4096), Ok(vec![1; 4096]));
        in_step(&mut nbd);
    }
}

fn unknown_commands_are_invalid(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        for command in [8, 9, 77, u16::MAX] {
            let answer = nbd.call((command, 0), 0, 4096, &[]);
            assert_eq!(answer.error, errno::EINVAL, "command {command}");
            in_step(&mut nbd);
        }
    }
}

/// Every command, with a length that it may have and the payload that it has then.
const COMMANDS: [(u16, u32, &[u8]); 7] = [
    (command::READ, 512, &[]),
    (command::WRITE, 512, &[1; 512]),
    (command::FLUSH, 0, &[]),
    (command::TRIM, 512, &[]),
    (command::CACHE, 512, &[]),
    (command::WRITE_ZEROES, 512, &[]),
    (command::BLOCK_STATUS, 512, &[]),
];

fn unknown_flags_are_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (command, length, payload) in COMMANDS {
        for bit in 5..16 {
            let answer = nbd.call((command, 1 << bit), 0, length, payload);
            let which = format!("command {command}, bit {bit}");
            assert_eq!(answer.error, errno::EINVAL, "{which}");
        }
        assert_eq!(nbd.read(0, 512), Ok(vec![0; 512]), "command {command}");
    }
}

fn flags_of_other_commands_are_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (command, length, payload) in COMMANDS {
        let own = match command {
            command::READ => flag::DF,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        for other in [flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO] {
            if own & other == 0 {
                let answer = nbd.call((command, other), 0, length, payload);
                let which = format!("command {command}, flag {other:#x}");
                assert_eq!(answer.error, errno::EINVAL, "{which}");
            }
        }
        assert_eq!(nbd.read(0, 512), Ok(vec![0; 512]), "command {command}");
    }
}

fn flags_that_were_not_negotiated_are_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open_simple();
    assert_eq!(nbd.export().flags & can::DF, 0);
    let answer = nbd.call((command::READ, flag::DF), 0, 512, &[]);
    assert_eq!(answer.error, errno::EINVAL, "DF");
    in_step(&mut nbd);
    let server = peer.serve_read_only();
    let mut nbd = server.open();
    assert_eq!(nbd.export().flags & can::FAST_ZERO, 0);
    let answer = nbd.call((command::WRITE_ZEROES, flag::FAST_ZERO), 0, 512, &[]);
    let refused = [errno::EINVAL, errno::EPERM].contains(&answer.error);
    assert!(refused, "FAST_ZERO: error {}", answer.error);
}

fn fua_goes_with_every_command(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    assert_eq!(nbd.export().flags & can::FUA, can::FUA);
    for (command, length, payload) in COMMANDS {
        let answer = nbd.call((command, flag::FUA), 0, length, payload);
        assert_eq!(answer.error, 0, "command {command}");
    }
    let server = peer.serve_read_only();
    let mut nbd = server.open();
    let is_offered = nbd.export().flags & can::FUA != 0;
    assert!(is_offered || peer != Peer::Stillpoint, "ours offers it");
    for command in [command::READ, command::CACHE, command::BLOCK_STATUS] {
        let answer = nbd.call((command, flag::FUA), 0, 512, &[]);
        let accepted = answer.error == 0 || !is_offered;
        assert!(accepted, "command {command}, read-only");
    }
}

/// Requests, for whoever takes a payload for one.
fn payload(length: usize) -> Vec<u8> {
    let disconnect = request((command::DISC, 0), 0, (0, 0), &[]);
    let mut bytes = disconnect.repeat(length / disconnect.len() + 1);
    bytes.truncate(length);
    bytes
}

fn write(nbd: &mut RawNbd, flags: u16, offset: u64, length: u32) -> u32 {
    let payload = payload(length as usize);
    nbd.call((command::WRITE, flags), offset, length, &payload)
        .error
}

fn the_payload_of_a_refused_write_is_read_past(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for length in [512, 4096, MIB as u32] {
        assert_eq!(write(&mut nbd, 1 << 9, 0, length), errno::EINVAL);
        assert_eq!(
            write(&mut nbd, 0, SIZE - u64::from(length) + 512, length),
            errno::ENOSPC
        );
        assert_eq!(nbd.read(0, 4096), Ok(vec![0; 4096]));
        assert_eq!(nbd.read(SIZE - 4096, 4096), Ok(vec![0; 4096]));
    }
    let server = peer.serve_read_only();
    let mut nbd = server.open();
    assert_eq!(write(&mut nbd, 0, 0, MIB as u32), errno::EPERM);
    in_step(&mut nbd);
}

fn errors_are_those_of_the_protocol(peer: Peer) {
    let plain = [errno::EPERM, errno::EIO, errno::EINVAL, errno::ENOSPC];
    for server in [peer.serve(), peer.serve_read_only(), peer.serve_failing()] {
        let mut nbd = server.open();
        for command in [0, 1, 3, 4, 5, 6, 7, 8, 99] {
            for flags in [0, flag::FUA, flag::NO_HOLE, 1 << 8] {
                for offset in [0, SIZE, u64::MAX] {
                    let payload: &[u8] = if command == 1 { &[1; 64] } else { &[] };
                    let answer = nbd.call((command, flags), offset, 64, payload);
                    let known = answer.error == 0 || plain.contains(&answer.error);
                    assert!(known, "command {command}: error {}", answer.error);
                }
            }
        }
    }
}

fn a_full_file_system_is_no_space() {
    // The other two, which need a quota or a limit of the process, are with the code that maps
    // them: `nbd::perform::tests::quotas_and_limits_of_size_are_no_space`.
    let mount = Mount::ext4(16 * MIB);
    let image = mount.path().join("vda.raw");
    stillpoint_tests::tools::sparse_file(&image, 8 * MIB);
    let builder = Server::builder();
    let state = builder.path("state");
    let disk = format!("vda={},state={}", image.display(), state.display());
    let server = builder.disk_as(&disk).start();
    let mut nbd = server.open_live(EXPORT);
    let _full = mount.fill();
    assert_eq!(nbd.write(MIB, &vec![1; MIB as usize]), Err(errno::ENOSPC));
    in_step(&mut nbd);
}

fn an_error_of_the_storage_is_eio(peer: Peer) {
    let server = peer.serve_failing();
    for mut nbd in [server.open(), server.open_simple()] {
        for offset in [0, 4096, SIZE - 512] {
            assert_eq!(nbd.read(offset, 512), Err(errno::EIO));
        }
    }
}

fn a_flush_of_a_range_ends_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (offset, length) in [(0, 512), (512, 0), (SIZE, 1)] {
        let error = nbd.call((command::FLUSH, 0), offset, length, &[]).error;
        assert!(
            [0, errno::EINVAL].contains(&error),
            "{offset}+{length}: error {error}"
        );
        in_step(&mut nbd);
    }
}
