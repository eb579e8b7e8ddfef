//! Heads of requests and of replies, and payloads.

use stillpoint_tests::raw_nbd::{chunk, command, errno, flag};
use stillpoint_tests::{GIB, MIB, RawNbd, Server};

use crate::{ALLOCATION, SIZE, in_step, open, server};

/// The longest payload.
const PAYLOAD_MAX: u64 = 32 * MIB;

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
