//! Replies, simple and structured.

use stillpoint_tests::raw_nbd::{Chunk, chunk, command, errno, flag};
use stillpoint_tests::{CHUNK, KIB, MIB, Server};

use crate::peer::{EXPORT, Peer, SIZE};
use crate::rows::rows;
use crate::talk::in_step;

rows![
    (
        "replies-1",
        "Simple reply message",
        "Without structured replies every reply is a simple one, errors too",
        Any(without_negotiation_all_replies_are_simple)
    ),
    (
        "replies-2",
        "Structured reply chunk message",
        "With structured replies a read never has a simple one, not even a read that is refused",
        Any(reads_are_answered_in_chunks)
    ),
    (
        "replies-3",
        "NBD_CMD_READ",
        "The chunks of a read cover what was asked for, each byte once, and none is empty",
        Any(chunks_cover_each_byte_once)
    ),
    (
        "replies-4",
        "NBD_REPLY_FLAG_DONE",
        "The last chunk of a reply says that it is, no other does, and no other flag is set",
        Any(the_last_chunk_is_the_last)
    ),
    (
        "replies-5",
        "NBD_REPLY_TYPE_OFFSET_HOLE",
        "Zeroes of a hole come as a hole, in 12 bytes",
        Any(a_hole_comes_as_a_hole)
    ),
    (
        "replies-6",
        "NBD_CMD_READ",
        "Chunks begin and end at multiples of 512, except where the read does not",
        Any(chunks_are_cut_at_sectors)
    ),
    (
        "replies-7",
        "NBD_CMD_FLAG_DF",
        "With DF a read of up to 64 KiB comes in one chunk of data, zeroes and all",
        Any(df_means_one_chunk)
    ),
    (
        "replies-8",
        "NBD_CMD_FLAG_DF",
        "A longer read with DF comes in one chunk, or is EOVERFLOW without any",
        Any(a_long_read_with_df_is_one_chunk_or_none)
    ),
    (
        "replies-9",
        "Structured reply types",
        "No chunk has more data than the largest payload",
        Any(no_chunk_exceeds_the_largest_payload)
    ),
    (
        "replies-10",
        "Structured reply chunk message; NBD_REPLY_TYPE_ERROR",
        "Errors come as structured replies with a text that can be shown",
        Any(errors_come_with_a_text)
    ),
    (
        "replies-11",
        "NBD_CMD_READ",
        "A read that fails has an error in its reply, and the connection goes on",
        Any(a_read_that_fails_is_an_error_in_its_reply)
    ),
    (
        "replies-12",
        "NBD_CMD_READ",
        "A read that fails has no payload in a simple reply, and the connection goes on",
        Any(a_simple_reply_with_an_error_has_no_payload)
    ),
    (
        "replies-13",
        "NBD_CMD_READ",
        "The past comes in holes and data too, from scratch as from the disk",
        Ours(the_past_comes_in_holes_and_data)
    ),
];

fn without_negotiation_all_replies_are_simple(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open_simple();
    // The reader of replies takes no chunk here.
    nbd.write(0, &[1; 512]).unwrap();
    assert_eq!(nbd.read(0, 512), Ok(vec![1; 512]));
    for request in [
        (command::READ, 1 << 9),
        (command::TRIM, 1 << 9),
        (command::BLOCK_STATUS, 0),
        (99, 0),
    ] {
        let answer = nbd.call(request, 0, 512, &[]);
        assert!(answer.error != 0 && answer.chunks[0].simple, "{request:?}");
    }
    in_step(&mut nbd);
}

fn reads_are_answered_in_chunks(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    // The reader of replies takes no simple one for a read.
    for (flags, offset, length) in [
        (0, 0, 512),
        (1 << 9, 0, 512),
        (0, SIZE, 512),
        (0, u64::MAX, 1),
        (0, 0, u32::MAX),
    ] {
        let answer = nbd.call((command::READ, flags), offset, length, &[]);
        assert!(answer.chunks.iter().all(|part| !part.simple));
        assert_eq!(answer.error == 0, (flags, offset, length) == (0, 0, 512));
    }
    in_step(&mut nbd);
}

fn chunks_cover_each_byte_once(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    let mut expected = vec![0; SIZE as usize];
    for at in (0..SIZE).step_by(300_000) {
        nbd.write(at, &[7; 5000]).unwrap();
        expected[at as usize..][..5000].fill(7);
    }
    for (offset, length) in [
        (0, SIZE),
        (1, SIZE - 1),
        (299_999, 2),
        (70_000, 3 * MIB + 7),
    ] {
        // That they do is asserted where they are joined.
        let found = nbd.read(offset, length as u32).unwrap();
        assert!(found == expected[offset as usize..][..length as usize]);
    }
}

fn the_last_chunk_is_the_last(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(MIB, &vec![1; CHUNK as usize]).unwrap();
    for (command, length) in [
        (command::READ, SIZE),
        (command::BLOCK_STATUS, SIZE),
        (command::TRIM, 512),
        (99, 0),
    ] {
        // What follows the last would be taken for the answer to the next.
        let answer = nbd.call((command, 0), 0, length as u32, &[]);
        let (last, before) = answer.chunks.split_last().expect("there is one");
        assert!(last.done && before.iter().all(|part| !part.done));
        let empty =
            |part: &Chunk| part.kind != chunk::NONE || part.simple || part.payload.is_empty();
        assert!(answer.chunks.iter().all(empty));
        in_step(&mut nbd);
    }
}

fn a_hole_comes_as_a_hole(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(MIB, &vec![1; CHUNK as usize]).unwrap();
    let answer = nbd.call((command::READ, 0), 0, 2 * MIB as u32, &[]);
    let of = |kind| answer.chunks.iter().filter(move |part| part.kind == kind);
    assert!(of(chunk::OFFSET_HOLE).all(|part| part.payload.len() == 12));
    assert!(of(chunk::OFFSET_DATA).count() > 0, "no data");
    // Nobody has to; we do.
    let holes = of(chunk::OFFSET_HOLE).count();
    assert!(holes > 0 || peer != Peer::Stillpoint, "no hole");
    let mut expected = vec![0; 2 * MIB as usize];
    expected[MIB as usize..][..CHUNK as usize].fill(1);
    assert!(answer.data(0, 2 * MIB as u32).unwrap() == expected);
}

fn chunks_are_cut_at_sectors(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for at in (0..SIZE).step_by(100_000) {
        nbd.write(at, &[7; 3000]).unwrap();
    }
    let (offset, length) = (1000, 3 * MIB);
    let answer = nbd.call((command::READ, 0), offset, length as u32, &[]);
    for part in answer.chunks.iter().filter(|part| part.kind != chunk::NONE) {
        let start = u64::from_be_bytes(part.payload[..8].try_into().unwrap());
        let size = match part.kind {
            chunk::OFFSET_HOLE => {
                u32::from_be_bytes(part.payload[8..12].try_into().unwrap()) as usize
            }
            _ => part.payload.len() - 8,
        };
        let end = start + size as u64;
        assert!(start == offset || start.is_multiple_of(512), "{start}");
        assert!(end == offset + length || end.is_multiple_of(512), "{end}");
    }
}

/// The chunks that have content.
fn content(chunks: &[Chunk]) -> Vec<&Chunk> {
    let has_content = [chunk::OFFSET_DATA, chunk::OFFSET_HOLE];
    let with_content = chunks
        .iter()
        .filter(|part| has_content.contains(&part.kind));
    with_content.collect()
}

fn df_means_one_chunk(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(32 * KIB, &[1; 4096]).unwrap();
    for (offset, length) in [(0, CHUNK as u32), (1, 65536), (32 * KIB, 4096), (0, 512)] {
        let answer = nbd.call((command::READ, flag::DF), offset, length, &[]);
        let mut expected = vec![0; CHUNK as usize + 1];
        expected[32 * KIB as usize..][..4096].fill(1);
        let expected = &expected[offset as usize..][..length as usize];
        assert!(answer.data(offset, length).unwrap() == expected);
        let content = content(&answer.chunks);
        assert_eq!(content.len(), 1, "{offset}+{length}");
        let mixed = expected.contains(&0) && expected.contains(&1);
        assert!(!mixed || content[0].kind == chunk::OFFSET_DATA);
    }
}

fn a_long_read_with_df_is_one_chunk_or_none(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(MIB, &vec![1; MIB as usize]).unwrap();
    for length in [CHUNK + 1, MIB + 1, SIZE] {
        let answer = nbd.call((command::READ, flag::DF), 0, length as u32, &[]);
        let chunks = content(&answer.chunks).len();
        match answer.error {
            0 => assert_eq!(chunks, 1, "{length}"),
            error => assert_eq!((error, chunks), (errno::EOVERFLOW, 0), "{length}"),
        }
    }
    in_step(&mut nbd);
}

fn no_chunk_exceeds_the_largest_payload(peer: Peer) {
    let server = peer.serve_size(80 * MIB);
    let mut nbd = server.open();
    let [.., maximum] = server.block_sizes();
    let advertises = nbd.export().block_sizes.is_some();
    nbd.write(0, &vec![1; 32 * MIB as usize]).unwrap();
    nbd.write(32 * MIB, &vec![1; 32 * MIB as usize]).unwrap();
    for length in [maximum, 48 * MIB as u32] {
        let answer = nbd.call((command::READ, 0), 0, length, &[]);
        // Who advertises none sends as much as it likes.
        for part in answer.chunks.iter().filter(|_| advertises) {
            assert!(part.payload.len() <= maximum as usize + 8);
        }
        let declined = [errno::EINVAL, errno::EOVERFLOW].contains(&answer.error);
        assert!(answer.error == 0 || length > maximum && declined);
    }
    in_step(&mut nbd);
}

fn errors_come_with_a_text(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (request, offset) in [
        ((command::READ, 0), SIZE),
        ((command::WRITE_ZEROES, 0), SIZE),
        ((command::TRIM, 1 << 9), 0),
        ((command::BLOCK_STATUS, 0), SIZE),
        ((99, 0), 0),
    ] {
        let answer = nbd.call(request, offset, 512, &[]);
        assert_ne!(answer.error, 0, "{request:?}");
        let errors = answer.chunks.iter().filter(|part| part.error != 0);
        let errors: Vec<_> = errors.collect();
        assert_eq!(errors.len(), 1, "{request:?}");
        assert!(!errors[0].simple, "{request:?}: a simple reply");
        let text = str::from_utf8(&errors[0].payload).expect("UTF-8");
        assert!(text.len() <= 4096, "{request:?}: {text:?}");
        // Nobody has to say why; we do.
        let is_silent = text.is_empty() && peer == Peer::Stillpoint;
        assert!(!is_silent, "{request:?}: no text");
        assert!(!text.contains('\0'), "{request:?}: {text:?}");
    }
}

fn a_read_that_fails_is_an_error_in_its_reply(peer: Peer) {
    let server = peer.serve_failing();
    let mut nbd = server.open();
    for (length, flags) in [(512, 0), (512, flag::DF), (SIZE as u32, 0)] {
        let answer = nbd.call((command::READ, flags), 0, length, &[]);
        assert_eq!(answer.error, errno::EIO, "{length}");
    }
    in_step(&mut nbd);
}

fn a_simple_reply_with_an_error_has_no_payload(peer: Peer) {
    let server = peer.serve_failing();
    let mut nbd = server.open_simple();
    for length in [512, MIB as u32, 512] {
        let answer = nbd.call((command::READ, 0), 0, length, &[]);
        assert_eq!(answer.error, errno::EIO, "{length}");
    }
    in_step(&mut nbd);
}

fn the_past_comes_in_holes_and_data() {
    let server = Server::with_disk(SIZE);
    let mut guest = server.open_live(EXPORT);
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
