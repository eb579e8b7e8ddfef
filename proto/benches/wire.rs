//! What it takes to read requests and to write replies, in every form that can be negotiated.

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use stillpoint_proto::command::{READ, WRITE};
use stillpoint_proto::{
    Chunk, ContextId, Cookie, DIRTY, Extents, Headers, Incoming, Origin, Replies, Reply, Request,
    RequestDecoder,
};

criterion_group!(wire, decode, encode_ok, encode_data, encode_block_status);
criterion_main!(wire);

/// Requests that arrived together, until there is none left.
fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(TOGETHER));
    let forms = [
        ("compact", Headers::Structured),
        ("extended", Headers::Extended),
    ];
    for (name, kind) in [("writes of 4 KiB", WRITE), ("reads of 4 KiB", READ)] {
        for (form, headers) in forms {
            let requests = requests(kind);
            let mut received = BytesMut::new();
            for request in &requests {
                request.encode(headers, &mut received);
            }
            let mut found = Vec::new();
            decode_all(headers, &mut received.clone(), |request| {
                found.push(request);
            });
            assert_eq!(found, requests, "seed {SEED}");

            group.bench_function(BenchmarkId::new(name, form), |bencher| {
                bencher.iter_batched_ref(
                    || received.clone(),
                    |input| decode_all(headers, input, drop),
                    BatchSize::LargeInput,
                );
            });
        }
    }
    group.finish();
}

/// Replies to writes, one after the other.
fn encode_ok(criterion: &mut Criterion) {
    let origins: Vec<Origin> = requests(WRITE).iter().map(Request::origin).collect();
    let expected: Vec<_> = origins.iter().map(|at| (at.cookie, Bytes::new())).collect();

    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Elements(TOGETHER));
    for (form, headers) in FORMS {
        let encode = |output: &mut BytesMut| {
            for origin in &origins {
                Replies::new(headers).ok(output, *origin);
            }
        };
        let mut output = BytesMut::new();
        encode(&mut output);
        assert_eq!(answers_in(headers, output.clone(), 0), expected);

        group.bench_function(BenchmarkId::new("ok", form), |bencher| {
            bencher.iter(|| {
                output.clear();
                encode(&mut output);
            });
        });
    }
    group.finish();
}

/// Replies to reads whose data is there already, one after the other.
fn encode_data(criterion: &mut Criterion) {
    let requests = requests(WRITE);
    let expected: Vec<_> = requests
        .iter()
        .map(|request| (request.cookie, request.data.clone()))
        .collect();

    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes(TOGETHER * LENGTH));
    for (form, headers) in FORMS {
        let encode = |output: &mut BytesMut| {
            for request in &requests {
                let origin = request.origin();
                Replies::new(headers).begin_data(output, origin, origin.offset, LENGTH, true);
                output.extend_from_slice(&request.data);
            }
        };
        let mut output = BytesMut::new();
        encode(&mut output);
        let found = answers_in(headers, output.clone(), LENGTH as usize);
        assert_eq!(found, expected, "seed {SEED}");

        group.bench_function(BenchmarkId::new("4 KiB of data", form), |bencher| {
            bencher.iter(|| {
                output.clear();
                encode(&mut output);
            });
        });
    }
    group.finish();
}

/// One reply, of two contexts.
fn encode_block_status(criterion: &mut Criterion) {
    let origin = requests(READ)[0].origin();

    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Elements(2 * EXTENTS));
    for (form, headers) in FORMS {
        if !headers.has_chunks() {
            continue;
        }
        let mut contexts = [1, 2].map(|id| (ContextId(id), extents(u64::from(id))));
        let expected = contexts.clone();
        let mut encode = |output: &mut BytesMut| {
            Replies::new(headers).block_status(output, origin, &mut contexts);
        };
        let mut output = BytesMut::new();
        encode(&mut output);
        check_block_status(headers, output.clone(), &expected);

        group.bench_function(BenchmarkId::new("block status", form), |bencher| {
            bencher.iter(|| {
                output.clear();
                encode(&mut output);
            });
        });
    }
    group.finish();
}

/// Requests of 4 KiB each, at places that are drawn; a write's payload is drawn too.
fn requests(kind: u16) -> Vec<Request> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut request = |cookie| {
        let mut data = vec![0; if kind == WRITE { LENGTH as usize } else { 0 }];
        rng.fill_bytes(&mut data);
        Request {
            cookie: Cookie(cookie),
            kind,
            flags: 0,
            offset: rng.random_range(0..1 << 28) * LENGTH,
            length: LENGTH,
            data: data.into(),
        }
    };
    (0..TOGETHER).map(&mut request).collect()
}

fn decode_all(headers: Headers, input: &mut BytesMut, mut take: impl FnMut(Request)) {
    let mut decoder = RequestDecoder::new(headers);
    while let Some(incoming) = decoder.decode(input).expect("they are legal") {
        match incoming {
            Incoming::Request(request) => take(request),
            Incoming::Disconnect => panic!("nobody leaves"),
        }
    }
    assert!(input.is_empty());
}

/// Which requests were answered, and with what: all in one piece, and `length` bytes where the form
/// does not say how many.
fn answers_in(headers: Headers, mut input: BytesMut, length: usize) -> Vec<(Cookie, Bytes)> {
    let mut answers = Vec::new();
    while let Some(reply) = Reply::decode(headers, &mut input).expect("they are legal") {
        answers.push(match reply {
            Reply::Simple {
                cookie,
                result: Ok(()),
            } => (cookie, input.split_to(length).freeze()),
            Reply::Chunk {
                cookie,
                chunk: Chunk::Data { data, .. },
                done: true,
                ..
            } => (cookie, data),
            Reply::Chunk {
                cookie,
                chunk: Chunk::None,
                ..
            } => (cookie, Bytes::new()),
            other => panic!("expected a success, found {other:?}"),
        });
    }
    answers
}

fn check_block_status(headers: Headers, mut input: BytesMut, expected: &[(ContextId, Extents)]) {
    for (id, list) in expected {
        let reply = Reply::decode(headers, &mut input).expect("it is legal");
        let Some(Reply::Chunk {
            chunk: Chunk::BlockStatus { context, extents },
            ..
        }) = reply
        else {
            panic!("expected a block status, found {reply:?}");
        };
        assert_eq!((context, &extents[..]), (*id, list.as_slice()));
    }
    assert!(input.is_empty());
}

/// Stretches of one length, with flags by turns.
fn extents(first: u64) -> Extents {
    let mut extents = Extents::new(EXTENTS * LENGTH, 2);
    for number in first..first + EXTENTS {
        extents.push(LENGTH, if number % 2 == 0 { 0 } else { DIRTY });
    }
    extents
}

const SEED: u64 = 1;
/// About as many writes as the server reads from a socket at once.
const TOGETHER: u64 = 64;
const LENGTH: u64 = 4096;
/// In each of two contexts, so that together they are as many as a reply has at most.
const EXTENTS: u64 = stillpoint_proto::EXTENTS_MAX as u64 / 2;
const FORMS: [(&str, Headers); 3] = [
    ("simple", Headers::Simple),
    ("structured", Headers::Structured),
    ("extended", Headers::Extended),
];
