//! The client of `proto/`, on other people's servers, on ours, and on one that lies.
//!
//! This is the one place where a client of ours meets servers; what is expected of them is written
//! by other people's tools, or known because the test wrote it.

use proto::client;

mod nbdkit;
mod ours;
mod qemu;

mod lies;

mod connected;
#[path = "../../../proto/tests/client/wire.rs"]
#[expect(
    dead_code,
    reason = "what a server says by hand, of which the liar says some"
)]
mod wire;
