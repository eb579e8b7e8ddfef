//! qcow2 files that are written once.
//!
//! What such a file is to hold is known before the first byte of it is written. So the place of
//! everything follows from that alone ([`Layout`]): header, refcounts, L1 table, L2 tables, and then
//! the data, in the order of the disk. Data can be written in any order, from any thread, and by a
//! process that goes on with what another left; and any byte of the rest can be told again, to see
//! whether it is still there.
//!
//! It is the part of the format (QEMU's `qcow2.txt`, version 3) that needs no allocator: no
//! snapshots, no compression, no encryption, refcounts of 16 bits that are all 1.

mod layout;
mod metadata;
mod places;

pub use layout::{Layout, LayoutError, Part};
