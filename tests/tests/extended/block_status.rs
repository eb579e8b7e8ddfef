//! Block status with extents of 64 bits, and of some of the contexts.

use std::collections::BTreeMap;

use stillpoint_tests::raw_nbd::extended::{Extents, status_payload};
use stillpoint_tests::raw_nbd::{can, chunk, command, errno, flag};
use stillpoint_tests::{MIB, RawNbd, Server};

use crate::{ALLOCATION, SIZE, in_step, open, server};

const DEPTH: &str = "qemu:allocation-depth";

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
    let some =
        |extents: Vec<(u64, u64)>| -> Result<Extents, u32> { Ok(BTreeMap::from([(id, extents)])) };
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
