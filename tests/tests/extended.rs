//! Extended headers, rule by rule.

use std::collections::BTreeMap;
use std::path::Path;

use stillpoint_tests::raw_nbd::extended::{Extents, status_payload};
use stillpoint_tests::raw_nbd::{can, chunk, command, errno, flag, option, rep};
use stillpoint_tests::{CHUNK, GIB, MIB, RawNbd, Server};

const SIZE: u64 = 4 * MIB;

/// The longest payload.
const PAYLOAD_MAX: u64 = 32 * MIB;

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";

fn server() -> Server {
    Server::with_disk(SIZE)
}

fn open(server: &Server, contexts: &[&str]) -> RawNbd {
    RawNbd::open_extended(&server.live(), "vda", contexts)
}

/// The connection is still in step: it answers, and answers right.
#[track_caller]
fn in_step(nbd: &mut RawNbd) {
    let end = nbd.export().size - 512;
    assert_eq!(nbd.read(end, 512), Ok(vec![0; 512]), "out of step");
}

mod negotiation {
    use super::*;

    #[test]
    fn extended_headers_are_agreed_on_with_and_without_structured_replies() {
        let server = server();
        for structured_first in [false, true] {
            let mut nbd = RawNbd::connect(&server.live());
            if structured_first {
                nbd.structured_replies();
            }
            nbd.extended_headers();
            nbd.go("vda").unwrap();
            in_step(&mut nbd);
        }
    }

    #[test]
    fn extended_headers_take_no_data() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        let refused = nbd.option(option::EXTENDED_HEADERS, b"x");
        assert_eq!(refused, Err(rep::ERR_INVALID));
        nbd.go("vda").unwrap();
        // Requests are compact still.
        in_step(&mut nbd);
    }

    #[test]
    fn extended_headers_asked_for_twice_are_agreed_on_twice() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.extended_headers();
        nbd.extended_headers();
        nbd.go("vda").unwrap();
        in_step(&mut nbd);
    }

    #[test]
    fn structured_replies_are_refused_afterwards() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.extended_headers();
        let refused = nbd.option(option::STRUCTURED_REPLY, &[]);
        assert_eq!(refused, Err(rep::ERR_EXT_HEADER_REQD));
        nbd.go("vda").unwrap();
        in_step(&mut nbd);
    }

    #[test]
    fn the_old_way_in_ends_the_connection() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.extended_headers();
        nbd.send_option(option::EXPORT_NAME, b"vda");
        assert!(nbd.is_closed());
        server.is_well();
    }

    #[test]
    fn contexts_and_df_need_nothing_else() {
        let server = server();
        let mut nbd = RawNbd::connect(&server.live());
        nbd.extended_headers();
        let listed = nbd.list_contexts("vda", &["base:"]).unwrap();
        assert_eq!(listed, [ALLOCATION]);
        assert_eq!(nbd.set_contexts("vda", &[ALLOCATION]).unwrap(), listed);
        assert_eq!(nbd.go("vda").unwrap().flags & can::DF, can::DF);
    }

    #[test]
    fn filters_are_offered_to_whoever_chose_contexts_of_the_export() {
        let two = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let offered = |extended: bool, chosen_for: Option<&str>| {
            let mut nbd = RawNbd::connect(&two.live());
            nbd.structured_replies();
            if extended {
                nbd.extended_headers();
            }
            if let Some(name) = chosen_for {
                nbd.set_contexts(name, &[ALLOCATION]).unwrap();
            }
            let told = nbd.info("vda").unwrap();
            assert_eq!(nbd.go("vda"), Ok(told.clone()), "INFO and GO");
            told.flags & can::BLOCK_STATUS_PAYLOAD != 0
        };
        assert!(offered(true, Some("vda")));
        assert!(!offered(true, Some("vdb")));
        assert!(!offered(true, None));
        assert!(!offered(false, Some("vda")));
    }
}

mod requests {
    use super::*;

    #[test]
    fn every_answer_is_in_extended_chunks_that_repeat_the_offset_of_the_request() {
        let server = server();
        let mut nbd = open(&server, &[ALLOCATION]);
        // The raw client accepts no other chunks, and compares the offset in each.
        nbd.write(MIB + 512, &[1; 4096]).unwrap();
        let answer = nbd.call((command::READ, 0), 512, 2 * MIB as u32, &[]);
        assert!(answer.chunks.len() > 2, "{}", answer.chunks.len());
        assert_eq!(answer.data(512, 2 * MIB as u32).unwrap()[MIB as usize], 1);
        nbd.zeroes(MIB, 4096, 0).unwrap();
        nbd.trim(MIB + 4096, 4096).unwrap();
        nbd.cache(MIB, 4096).unwrap();
        nbd.flush().unwrap();
        nbd.extended_status(MIB, MIB, 0).unwrap();
        assert_eq!(nbd.read(SIZE, 1), Err(errno::EINVAL));
        assert_eq!(nbd.call((77, 0), 12345, 1, &[]).error, errno::EINVAL);
        let answer = nbd.call((command::READ, flag::DF), 512, MIB as u32, &[]);
        assert_eq!(answer.chunks.len(), 1, "one chunk where DF is set");
        nbd.disconnect();
    }

    #[test]
    fn an_error_has_a_text() {
        let server = server();
        let mut nbd = open(&server, &[]);
        let answer = nbd.call((command::WRITE_ZEROES, 0), SIZE, 1, &[]);
        assert_eq!(answer.error, errno::ENOSPC);
        let [part] = &answer.chunks[..] else {
            panic!("more than one chunk: {answer:?}")
        };
        assert_eq!(part.kind, chunk::ERROR);
        assert!(!part.payload.is_empty(), "an error without a text");
    }

    #[test]
    fn a_write_without_the_flag_has_a_payload_all_the_same_as_some_clients_forget_it() {
        let server = server();
        let mut nbd = open(&server, &[]);
        let answer = nbd.call_extended((command::WRITE, 0), 512, 512, &[7; 512]);
        assert_eq!(answer.error, 0);
        assert_eq!(nbd.read(512, 512), Ok(vec![7; 512]));
        let answer = nbd.call_extended((command::WRITE, 0), SIZE, 512, &[7; 512]);
        assert_eq!(answer.error, errno::ENOSPC);
        in_step(&mut nbd);
    }

    #[test]
    fn a_payload_where_it_has_no_meaning_is_skipped_and_invalid() {
        let server = server();
        let mut nbd = open(&server, &[]);
        let payload = vec![7; PAYLOAD_MAX as usize];
        let commands = [
            command::READ,
            command::FLUSH,
            command::TRIM,
            command::CACHE,
            command::WRITE_ZEROES,
            command::BLOCK_STATUS,
            77,
        ];
        for command in commands {
            for payload in [&payload[..0], &payload[..1], &payload[..4096], &payload] {
                let length = payload.len() as u64;
                let asked = (command, flag::PAYLOAD_LEN);
                let answer = nbd.call_extended(asked, 0, length, payload);
                assert_eq!(answer.error, errno::EINVAL, "{command} with {length} bytes");
                in_step(&mut nbd);
            }
        }
    }

    #[test]
    fn the_payload_of_a_refused_write_is_skipped() {
        let server = server();
        server.begin("b1", &[]);
        let mut nbd = open(&server, &[]);
        assert_eq!(nbd.write(SIZE - 1, &[1; 512]), Err(errno::ENOSPC));
        in_step(&mut nbd);
        assert_eq!(nbd.write(u64::MAX, &[1; 512]), Err(errno::ENOSPC));
        in_step(&mut nbd);
        let answer = nbd.call((command::WRITE, flag::DF), 0, 512, &[1; 512]);
        assert_eq!(answer.error, errno::EINVAL);
        in_step(&mut nbd);

        let mut nbd = RawNbd::open_extended(&server.frozen(), "vda@b1", &[]);
        assert_eq!(nbd.write(0, &[1; 512]), Err(errno::EPERM));
        in_step(&mut nbd);
    }

    #[test]
    fn the_longest_payload_is_written_and_a_longer_one_ends_the_connection() {
        let server = Server::with_disk(2 * PAYLOAD_MAX);
        let mut other = open(&server, &[]);
        let mut nbd = open(&server, &[]);
        nbd.write(1, &vec![3; PAYLOAD_MAX as usize]).unwrap();
        assert_eq!(nbd.read(PAYLOAD_MAX, 2), Ok(vec![3, 0]));
        for command in [command::WRITE, command::READ, 77] {
            for length in [PAYLOAD_MAX + 1, 1 << 32, u64::MAX] {
                let mut nbd = open(&server, &[]);
                let (sender, _) = nbd.halves();
                sender
                    .extended((command, flag::PAYLOAD_LEN), 1, 0, length, &[])
                    .unwrap();
                assert!(nbd.is_closed(), "{command} with {length} bytes");
            }
        }
        in_step(&mut other);
    }

    #[test]
    fn a_request_in_the_form_that_was_not_agreed_on_ends_the_connection() {
        let server = server();
        let mut nbd = open(&server, &[]);
        let mut compact = 0x2560_9513u32.to_be_bytes().to_vec();
        compact.extend([0; 28]);
        nbd.send_raw(&compact).unwrap();
        assert!(nbd.is_closed());

        let mut nbd = server.open_live("vda");
        let (sender, _) = nbd.halves();
        sender.extended((command::READ, 0), 1, 0, 512, &[]).unwrap();
        assert!(nbd.is_closed());
        server.is_well();
    }

    #[test]
    fn a_compact_request_must_not_have_the_flag_of_a_payload() {
        let server = server();
        let mut nbd = server.open_live("vda");
        let answer = nbd.call((command::WRITE, flag::PAYLOAD_LEN), 0, 512, &[1; 512]);
        assert_eq!(answer.error, errno::EINVAL);
        let answer = nbd.call((command::READ, flag::PAYLOAD_LEN), 0, 512, &[]);
        assert_eq!(answer.error, errno::EINVAL);
        in_step(&mut nbd);
    }

    #[test]
    fn a_read_longer_than_a_payload_overflows_and_past_the_end_it_is_invalid() {
        let server = Server::with_disk(8 * GIB);
        let mut nbd = open(&server, &[]);
        let mut read = |offset, length| {
            let error = nbd.call_extended((command::READ, 0), offset, length, &[]);
            error.done()
        };
        assert_eq!(read(0, PAYLOAD_MAX), Ok(()));
        assert_eq!(read(0, PAYLOAD_MAX + 1), Err(errno::EOVERFLOW));
        // Neither is taken for 512 bytes.
        assert_eq!(read(0, (1 << 32) + 512), Err(errno::EOVERFLOW));
        assert_eq!(read(0, (1 << 40) + 512), Err(errno::EINVAL));
        assert_eq!(read(u64::MAX - 511, 512), Err(errno::EINVAL));
        in_step(&mut nbd);
    }

    #[test]
    fn fua_is_accepted_on_every_command() {
        let server = server();
        let mut nbd = open(&server, &[ALLOCATION]);
        for (command, length) in [
            (command::READ, 512),
            (command::FLUSH, 0),
            (command::TRIM, 512),
            (command::CACHE, 512),
            (command::WRITE_ZEROES, 512),
            (command::BLOCK_STATUS, 512),
        ] {
            let answer = nbd.call_extended((command, flag::FUA), 0, length, &[]);
            assert_eq!(answer.error, 0, "{command}");
        }
        let answer = nbd.call((command::WRITE, flag::FUA), 0, 512, &[1; 512]);
        assert_eq!(answer.error, 0);
    }
}

mod length {
    use super::*;

    const LARGE: u64 = 16 * GIB;
    const MARKS: [u64; 4] = [0, 4 * GIB, 9 * GIB, 12 * GIB];

    fn marked() -> (Server, RawNbd) {
        let server = Server::with_disk(LARGE);
        let mut nbd = open(&server, &[ALLOCATION]);
        for mark in MARKS {
            nbd.write(mark, &[1; 8192]).unwrap();
        }
        (server, nbd)
    }

    fn check_marks(nbd: &mut RawNbd, expected: [[u8; 2]; 4]) {
        for (mark, expected) in MARKS.into_iter().zip(expected) {
            let found = [nbd.read(mark, 1), nbd.read(mark + 8191, 1)];
            assert_eq!(found, expected.map(|byte| Ok(vec![byte])), "at {mark}");
        }
    }

    #[test]
    fn zeroes_of_64_bits_reach_to_their_end_and_no_further() {
        let (_server, mut nbd) = marked();
        let asked = (command::WRITE_ZEROES, flag::FUA);
        let answer = nbd.call_extended(asked, 4096, 9 * GIB, &[]);
        assert_eq!(answer.done(), Ok(()));
        check_marks(&mut nbd, [[1, 0], [0, 0], [0, 1], [1, 1]]);
    }

    #[test]
    fn a_trim_of_64_bits_reaches_to_its_end_and_no_further() {
        let (_server, mut nbd) = marked();
        let answer = nbd.call_extended((command::TRIM, 0), 4096, 9 * GIB, &[]);
        assert_eq!(answer.done(), Ok(()));
        // This file system can punch holes.
        check_marks(&mut nbd, [[1, 0], [0, 0], [0, 1], [1, 1]]);
    }

    #[test]
    fn fast_zeroes_do_not_overflow() {
        let (_server, mut nbd) = marked();
        let asked = (command::WRITE_ZEROES, flag::FAST_ZERO);
        let answer = nbd.call_extended(asked, 0, LARGE, &[]);
        assert_eq!(answer.done(), Ok(()));
        check_marks(&mut nbd, [[0, 0]; 4]);
    }

    #[test]
    fn a_cache_request_may_be_of_the_whole_disk() {
        let (_server, mut nbd) = marked();
        let answer = nbd.call_extended((command::CACHE, 0), 0, LARGE, &[]);
        assert_eq!(answer.done(), Ok(()));
    }

    #[test]
    fn past_the_end_is_no_space_for_zeroes_and_invalid_for_the_rest() {
        let (_server, mut nbd) = marked();
        for (offset, length) in [
            (0, LARGE + 1),
            (LARGE, 1 << 32),
            (512, u64::MAX - 511),
            (512, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            for (command, expected) in [
                (command::WRITE_ZEROES, errno::ENOSPC),
                (command::TRIM, errno::EINVAL),
                (command::CACHE, errno::EINVAL),
                (command::BLOCK_STATUS, errno::EINVAL),
            ] {
                let answer = nbd.call_extended((command, 0), offset, length, &[]);
                assert_eq!(answer.error, expected, "{command} of {offset}+{length}");
            }
        }
        check_marks(&mut nbd, [[1, 1]; 4]);
    }

    #[test]
    fn what_was_changed_by_a_request_of_64_bits_is_in_the_map() {
        let (server, mut nbd) = marked();
        server.checkpoint("cp1");
        let (start, length) = (4 * GIB - 4096, 5 * GIB + 4097);
        nbd.call_extended((command::WRITE_ZEROES, 0), start, length, &[])
            .done()
            .unwrap();
        server.begin("b1", &["--since", "cp1"]);
        let context = "qemu:dirty-bitmap:cp1";
        let mut frozen = RawNbd::open_extended(&server.frozen(), "vda@b1", &[context]);
        let map = frozen.extended_status(0, LARGE, 0).unwrap();
        let dirty = 5 * GIB + 2 * CHUNK;
        let (before, after) = (4 * GIB - CHUNK, LARGE - 9 * GIB - CHUNK);
        let expected = vec![(before, 0), (dirty, 1), (after, 0)];
        assert_eq!(map[&frozen.context(context)], expected);
    }

    #[test]
    fn a_long_zeroing_is_no_hindrance_to_instants_nor_to_a_stop() {
        const HUGE: u64 = 12 << 40;
        let mut server = Server::with_disk(HUGE);
        let (mut one, mut other) = (open(&server, &[]), open(&server, &[]));
        one.write(0, &[1]).unwrap();
        let (sender, receiver) = one.halves();
        sender
            .extended((command::WRITE_ZEROES, 0), 1, 0, HUGE, &[])
            .unwrap();
        // It has begun when its first piece can be seen.
        while other.read(0, 1) != Ok(vec![0]) {}
        server.checkpoint("cp1");
        other.write(HUGE - 1, &[2]).unwrap();
        other.hang_up();
        // The end of the process is waited for, and for no minute.
        server.stop();
        let answer = receiver.answer().expect("an answer before the end");
        assert_eq!(answer.error, errno::ESHUTDOWN, "{answer:?}");
        server.start();
        let mut nbd = server.open_live("vda");
        assert_eq!(nbd.read(HUGE - 1, 1), Ok(vec![2]), "it went on to the end");
    }
}

mod block_status {
    use super::*;

    /// Data in the first of four MiB.
    fn with_data(contexts: &[&str]) -> (Server, RawNbd) {
        let server = server();
        let mut nbd = open(&server, contexts);
        nbd.write(0, &vec![1; MIB as usize]).unwrap();
        (server, nbd)
    }

    #[test]
    fn extents_are_of_64_bits_even_where_32_would_do() {
        let (_server, mut nbd) = with_data(&[ALLOCATION]);
        // Another kind of chunk is not accepted.
        let map = nbd.extended_status(0, SIZE, 0).unwrap();
        let id = nbd.context(ALLOCATION);
        assert_eq!(map, BTreeMap::from([(id, vec![(MIB, 0), (SIZE - MIB, 3)])]));
    }

    #[test]
    fn a_compact_session_gets_extents_of_32_bits() {
        let (server, _) = with_data(&[]);
        let mut nbd = RawNbd::open(&server.live(), "vda", &[ALLOCATION]);
        let answer = nbd.call((command::BLOCK_STATUS, 0), 0, SIZE as u32, &[]);
        let kinds: Vec<_> = answer.chunks.iter().map(|chunk| chunk.kind).collect();
        assert_eq!(kinds, [chunk::BLOCK_STATUS]);
    }

    #[test]
    fn an_extent_may_be_longer_than_32_bits_and_one_never_longer_than_the_request() {
        let server = Server::with_disk(8 << 40);
        let mut nbd = open(&server, &[ALLOCATION]);
        let id = nbd.context(ALLOCATION);
        for (length, flags) in [
            (8 << 40, 0),
            (8 << 40, flag::REQ_ONE),
            (5 << 32, flag::REQ_ONE),
            (512, flag::REQ_ONE),
        ] {
            let map = nbd.extended_status(0, length, flags).unwrap();
            assert_eq!(map, BTreeMap::from([(id, vec![(length, 3)])]), "{length}");
        }
    }

    #[test]
    fn a_filter_asks_for_some_of_the_chosen_contexts() {
        let (_server, mut nbd) = with_data(&[ALLOCATION, DEPTH]);
        let (allocation, depth) = (nbd.context(ALLOCATION), nbd.context(DEPTH));
        let all = nbd.extended_status(0, SIZE, 0).unwrap();
        assert_eq!(all.len(), 2);
        // By itself a context may say more than beside one that says little.
        for ids in [&[allocation][..], &[depth], &[depth, allocation]] {
            let some = nbd.status_of(0, SIZE, ids).unwrap();
            let mut asked = ids.to_vec();
            asked.sort_unstable();
            let answered: Vec<_> = some.keys().copied().collect();
            assert_eq!(answered, asked);
            for (id, extents) in some {
                assert_eq!(extents, all[&id]);
            }
        }
        in_step(&mut nbd);
    }

    #[test]
    fn a_filter_has_the_length_of_the_range_in_its_payload() {
        let (_server, mut nbd) = with_data(&[ALLOCATION]);
        let id = nbd.context(ALLOCATION);
        let some = |extents: Vec<(u64, u64)>| -> Result<Extents, u32> {
            Ok(BTreeMap::from([(id, extents)]))
        };
        let asked = nbd.status_of(512 * 1024, 1024, &[id]);
        assert_eq!(asked, some(vec![(1024, 0)]));
        let asked = nbd.status_of(512 * 1024, 3 * MIB, &[id]);
        assert_eq!(asked, some(vec![(MIB / 2, 0), (5 * MIB / 2, 3)]));

        let payload = status_payload(2 * MIB, &[id]);
        let flags = flag::PAYLOAD_LEN | flag::REQ_ONE;
        let asked = (command::BLOCK_STATUS, flags);
        let answer = nbd.call_extended(asked, 0, payload.len() as u64, &payload);
        assert_eq!(answer.extended_extents(), some(vec![(MIB, 0)]));
    }

    #[test]
    fn a_filter_of_contexts_that_are_unknown_or_repeated_or_none_is_invalid() {
        let (_server, mut nbd) = with_data(&[ALLOCATION, DEPTH]);
        let (one, two) = (nbd.context(ALLOCATION), nbd.context(DEPTH));
        let unknown = one.max(two) + 1;
        for ids in [
            vec![],
            vec![unknown],
            vec![one, unknown],
            vec![one, one],
            vec![one, two, one],
            vec![one; 10_000],
            (0..10_000).collect(),
        ] {
            let refused = nbd.status_of(0, SIZE, &ids);
            assert_eq!(refused, Err(errno::EINVAL), "{} ids", ids.len());
            in_step(&mut nbd);
        }
    }

    #[test]
    fn a_filter_of_no_right_size_or_for_no_right_range_is_invalid() {
        let (_server, mut nbd) = with_data(&[ALLOCATION]);
        let id = nbd.context(ALLOCATION);
        let right = status_payload(SIZE, &[id]);
        let asked = (command::BLOCK_STATUS, flag::PAYLOAD_LEN);
        for length in [0, 1, 7, 8, 9, 11] {
            let payload = &right[..length];
            let answer = nbd.call_extended(asked, 0, length as u64, payload);
            assert_eq!(answer.error, errno::EINVAL, "{length} bytes");
            in_step(&mut nbd);
        }
        let longer = [&right[..], &[0; 3]].concat();
        let answer = nbd.call_extended(asked, 0, longer.len() as u64, &longer);
        assert_eq!(answer.error, errno::EINVAL);
        for (offset, length) in [(0, 0), (0, SIZE + 1), (512, SIZE), (512, u64::MAX)] {
            let refused = nbd.status_of(offset, length, &[id]);
            assert_eq!(refused, Err(errno::EINVAL), "{offset}+{length}");
        }
        in_step(&mut nbd);
    }

    #[test]
    fn a_filter_that_was_not_offered_is_invalid() {
        let (_server, mut nbd) = with_data(&[]);
        assert_eq!(nbd.export().flags & can::BLOCK_STATUS_PAYLOAD, 0);
        assert_eq!(nbd.status_of(0, SIZE, &[1]), Err(errno::EINVAL));
        in_step(&mut nbd);
    }
}

mod size {
    use std::fs::File;

    use rustix::fs::{FallocateFlags, fallocate};
    use stillpoint_tests::tools::{merged, path, proc_number, sparse_file};
    use stillpoint_tests::{KIB, Mount};

    use super::*;

    const HUGE: u64 = 15 << 40;
    const RUNS: u64 = 200_000;
    /// Of all contexts of a reply together.
    const EXTENTS_MAX: usize = 1 << 16;

    /// Allocates a block of every other chunk, as far as so many runs go.
    fn fragment(image: &Path) {
        sparse_file(image, HUGE);
        let file = File::options().write(true).open(image).unwrap();
        for run in (0..RUNS).step_by(2) {
            fallocate(&file, FallocateFlags::empty(), run * CHUNK, 4096).unwrap();
        }
    }

    fn anonymous(server: &Server) -> u64 {
        proc_number(server.pid(), "status", "RssAnon") * KIB
    }

    #[test]
    fn the_map_of_a_fragmented_disk_takes_little_memory_and_is_the_same_in_either_form() {
        // Goes as a whole, which to some file systems is less work than so many extents.
        let mount = Mount::ext4(GIB);
        let image = mount.path().join("fragmented.raw");
        fragment(&image);
        let builder = Server::builder();
        let state = builder.path("state");
        let server = builder
            .disk_as(&format!("vda={},state={}", path(&image), path(&state)))
            .start();
        server.checkpoint("cp1");
        server.begin("b1", &["--since", "cp1"]);
        let bitmap = "qemu:dirty-bitmap:cp1";
        let before = anonymous(&server);
        let mut most = before;

        let mut nbd = RawNbd::open_extended(&server.frozen(), "vda@b1", &[ALLOCATION, bitmap]);
        let (allocation, bitmap_id) = (nbd.context(ALLOCATION), nbd.context(bitmap));
        let (mut at, mut extended) = (0, Vec::new());
        while at < HUGE {
            let answer = nbd.extended_status(at, HUGE - at, 0).unwrap();
            let covered = |id| answer[&id].iter().map(|extent| extent.0).sum::<u64>();
            assert_eq!(covered(allocation), covered(bitmap_id), "at {at}");
            let told: usize = answer.values().map(Vec::len).sum();
            assert!(told <= EXTENTS_MAX, "{told} extents at {at}");
            assert!(answer[&bitmap_id].iter().all(|extent| extent.1 == 0));
            for (length, flags) in &answer[&allocation] {
                extended.push((at, *length, *flags as u32));
                at += length;
            }
            most = most.max(anonymous(&server));
        }
        let extended = merged(extended);
        assert_eq!(extended.len() as u64, RUNS);

        let mut nbd = RawNbd::open(&server.frozen(), "vda@b1", &[ALLOCATION]);
        let compact = nbd.map(ALLOCATION);
        most = most.max(anonymous(&server));
        assert!(compact == extended, "the maps differ");
        assert!(
            most - before < 16 * MIB,
            "{} MiB more than before",
            (most - before) / MIB
        );
    }
}
