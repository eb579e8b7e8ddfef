//! Serving disks: sockets, names, sessions.

pub mod cli;
mod serve;

mod address;
mod control;
mod handed_over;
mod limits;
mod listen;
mod listeners;
mod nbd;
mod nbd_uri;
mod notify;
mod tls;

mod carry;
mod copy;

mod clients;
mod export;
mod push;
mod service;

mod disk_spec;
mod served;
mod state;

pub mod archive;

pub mod disk;
mod failure;
mod files;
mod folder;
mod hooks;
mod image;
mod io_engine;
mod lock_file;
mod lookups;
mod names;
mod new_size;
mod place;
mod sync;

/// What nobody outside needs but a benchmark.
#[cfg(feature = "benches")]
#[doc(hidden)]
pub mod benches {
    pub use crate::nbd::benches::{FragmentedDisk, WRITTEN};
}

/// The parsers that nobody outside needs but a fuzzer.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::archive::fuzzing::manifest;
    pub use crate::carry::fuzzing::list as extents;
    pub use crate::control::fuzzing::control;
    pub use crate::state::fuzzing::{bits, header, journal, parcel};
}
