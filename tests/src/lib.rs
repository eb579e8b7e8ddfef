//! What the tests share: a running server, and other people's tools.
//!
//! Nothing here uses the server's own crates: what a test believes about the protocol it has from
//! the protocol's documents, not from the code under test. The exceptions are [`simulation`], which
//! runs the server's own types on storage of its making, and [`backup_folder`], which has them write
//! folders of backups that no server was asked for. (`tests/client` is about a crate, not about the
//! server.)

pub mod server;

pub mod attacks;
pub mod backup_folder;
pub mod base;
pub mod bitmap;
pub mod control;
pub mod guest;
pub mod guest_agent;
pub mod killer;
pub mod loop_device;
pub mod mount;
pub mod peers;
pub mod process;
pub mod qemu;
pub mod raw_nbd;
pub mod relay;
pub mod rude;
pub mod seeds;
pub mod shadow;
pub mod state;
pub mod syncs;
pub mod tls;
pub mod tools;

pub mod simulation;

pub use base::NbdBase;
pub use control::Qmp;
pub use guest::Guest;
pub use guest_agent::GuestAgent;
pub use loop_device::LoopDevice;
pub use mount::Mount;
pub use process::Output;
pub use raw_nbd::RawNbd;
pub use server::Server;
pub use shadow::Shadow;
pub use syncs::Syncs;

/// A stretch of an export with a property: offset, length, flags of the metadata context.
pub type Extent = (u64, u64, u32);

/// A KiB.
pub const KIB: u64 = 1 << 10;
/// A MiB.
pub const MIB: u64 = 1 << 20;
/// A GiB.
pub const GIB: u64 = 1 << 30;
/// The chunk size that a disk has unless told otherwise.
pub const CHUNK: u64 = 64 * KIB;
