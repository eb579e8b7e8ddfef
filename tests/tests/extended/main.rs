//! Extended headers, rule by rule.

mod negotiation;

mod requests;

mod length;

mod block_status;

mod size;

use stillpoint_tests::{MIB, RawNbd, Server};

const SIZE: u64 = 4 * MIB;

const ALLOCATION: &str = "base:allocation";

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
