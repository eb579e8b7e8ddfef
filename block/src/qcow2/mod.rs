//! qcow2: images that are read, and files that are written once.
//!
//! [`Qcow2Image`] is a disk that is read: an image, the images behind it and the files that have their
//! data. What an image says is checked where it is used, and every file that it names must lie in a folder
//! that the user allows.
//!
//! The one thing that is ever written into somebody else's image is a dirty bitmap, while nobody uses it
//! ([`store_bitmap`]).
//!
//! What a file is to hold that we write is known before the first byte of it is written. So the place of
//! everything follows from that alone ([`Layout`]): header, refcounts, L1 table, L2 tables, and then
//! the data, in the order of the disk. Data can be written in any order, from any thread, and by a
//! process that goes on with what another left; and any byte of the rest can be told again, to see
//! whether it is still there. It is the part of the format (QEMU's `qcow2.txt`, version 3) that needs no
//! allocator: no snapshots, no compression, no encryption, refcounts of 16 bits that are all 1.

mod image;

mod bitmaps;
mod chain;
mod entry;
mod folders;
mod header;
mod layer;
mod tables;
mod unpack;

mod layout;
mod metadata;
mod places;

mod deposit;

pub use bitmaps::{BitmapFile, Room, StoredBitmap};
pub use chain::{OpenError, Unreadable};
pub use deposit::{Existing, NewBitmap, NotStored, store_bitmap};
pub use folders::NameError;
pub use header::{Backing, BitmapDirectory, Compression, DataFile, Encryption, Header, Refusal};
pub use image::{Depth, Qcow2Image};
pub use layout::{Layout, LayoutError, Part};
