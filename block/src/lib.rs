//! Things that can be read and written by offset.
//!
//! [`Storage`] is what a disk, or its scratch, is made of. [`FileStorage`] is a regular file or a
//! block device; [`ImageLock`] keeps everyone else from writing it; [`Cells`] is a small file of
//! bookkeeping that survives the process with every single store. [`qcow2`] reads images of that format.

mod buffer;
mod cells;
mod direct;
mod engine;
mod fiemap;
mod file;
mod lock;
mod pool;
pub mod qcow2;
mod ring;
mod storage;
mod sync;
mod unreachable;

pub use buffer::Buffer;
pub use cells::Cells;
pub use engine::Engine;
pub use file::FileStorage;
pub use lock::{ImageLock, LockError};
pub use storage::{Extent, Storage, Zeroing, is_zero};
pub use sync::SharedSync;
pub use unreachable::Unreachable;
