//! What is known of changes, brought from elsewhere and taken elsewhere.
//!
//! A file of somebody else's says what is dirty ([`read`]): a bitmap in a qcow2 image, or a list of
//! extents as `nbdinfo` prints it. Nobody can check that it is about this disk; so what can be
//! checked is, and what is doubtful is refused.
//!
//! The state of a disk goes to another machine as one file ([`export_state`], [`import_state`]).

mod extents;
mod source;

mod moving;

mod aside;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;

pub(crate) use aside::{NotWritten, Occupied, write_aside};
pub(crate) use extents::write as write_extents;
pub(crate) use moving::{ImageHash, export_state, import_state};
pub(crate) use source::{Wanted, read};
