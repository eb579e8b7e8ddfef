//! Bytes arrive in any pieces, and can be any bytes.

use bytes::{BufMut, Bytes, BytesMut};

use crate::proto::{Headers, Reply, RequestDecoder, Step};
use crate::talk::{Talk, contexts, info, option_header};
use crate::wire::*;

#[test]
fn it_makes_no_difference_how_the_bytes_arrive_and_requests_stay_in_the_input() {
    let mut wire = Talk::new(3).input.to_vec();
    for (option, data) in [
        (STRUCTURED_REPLY, vec![]),
        (LIST, vec![]),
        (STARTTLS, vec![1, 2, 3]),
        (LIST_META_CONTEXT, contexts("vda", &[])),
        (SET_META_CONTEXT, contexts("vda", &["base:allocation"])),
        (INFO, info("no", &[1])),
        (GO, info("vda", &[1, 2, 3])),
    ] {
        wire.extend(option_header(option, data.len() as u32));
        wire.extend(data);
    }
    let handshake = wire.len();
    wire.extend(b"\x25\x60\x95\x13 and so on");

    let whole = run(&wire, wire.len(), handshake);
    for split in 0..wire.len() {
        assert_eq!(run(&wire, split, handshake), whole, "split at {split}");
    }
}

#[test]
fn one_byte_at_a_time_is_enough() {
    let mut talk = Talk::empty();
    let mut wire = Talk::new(3).input.to_vec();
    wire.extend(option_header(GO, 9));
    wire.extend(info("vda", &[]));
    let (last, before) = wire.split_last().unwrap();
    for byte in before {
        talk.input.put_u8(*byte);
        assert!(matches!(talk.advance(), Ok(Step::NeedMore)));
    }
    talk.input.put_u8(*last);
    assert!(matches!(talk.advance(), Ok(Step::Ready(_))));
}

#[test]
fn no_bytes_make_it_panic() {
    for seed in 1..3000_u64 {
        let mut random = Random(seed);
        let what = std::panic::catch_unwind(move || {
            let mut talk = Talk::new(random.below(4) as u32);
            for _ in 0..30 {
                random.put_some(&mut talk.input);
                if !matches!(talk.advance(), Ok(Step::NeedMore | Step::WriteFirst)) {
                    break;
                }
                talk.output.clear();
            }
            let forms: [(_, &[u8], &[u8], usize); 2] = [
                (
                    Headers::Structured,
                    b"\x25\x60\x95\x13\0",
                    b"\x66\x8e\x33\xef",
                    11,
                ),
                (
                    Headers::Extended,
                    b"\x21\xe4\x1c\x71\0",
                    b"\x6e\x8a\x27\x8c",
                    23,
                ),
            ];
            for (headers, request, chunk, rest_of_head) in forms {
                let mut requests = RequestDecoder::new(headers);
                let mut input = BytesMut::new();
                let mut replies = BytesMut::new();
                for _ in 0..30 {
                    input.put_slice(request);
                    random.put_some(&mut input);
                    while let Ok(Some(_)) = requests.decode(&mut input) {}
                    replies.put_slice(chunk);
                    replies.put_slice(&[0; 3]);
                    replies.put_u8(random.below(7) as u8);
                    replies.put_bytes(0, rest_of_head);
                    random.put_some(&mut replies);
                    while let Ok(Some(_)) = Reply::decode(headers, &mut replies) {}
                    replies.clear();
                }
            }
        });
        assert!(what.is_ok(), "seed {seed}");
    }
}

fn run(wire: &[u8], split: usize, handshake: usize) -> Bytes {
    let mut talk = Talk::empty();
    let mut ready = false;
    for piece in [&wire[..split], &wire[split..]] {
        talk.input.put_slice(piece);
        ready = ready || matches!(talk.advance(), Ok(Step::Ready(_)));
    }
    assert!(ready);
    assert_eq!(talk.input, wire[handshake..]);
    talk.output.freeze()
}

/// Xorshift: enough to stumble about with.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Bytes that are often close to an option, sometimes to nothing.
    fn put_some(&mut self, output: &mut BytesMut) {
        if self.below(16) > 0 {
            let length = self.below(24) as u32;
            output.put_slice(&option_header(self.below(13) as u32, length));
        }
        for _ in 0..self.below(24) {
            // Mostly small numbers: lengths and counts that nearly fit.
            let byte = if self.below(4) == 0 {
                self.below(256)
            } else {
                self.below(4)
            };
            output.put_u8(byte as u8);
        }
    }
}
