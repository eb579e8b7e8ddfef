//! Copies what is frozen: from a source that says what it holds, into a point that is being made.
//!
//! [`survey`] asks a [`Source`] for its map and says what has to be copied; [`run`] copies it. Neither
//! knows where the bytes come from nor who watches: a command pulls over NBD, and a server can
//! copy its own disks.

pub(crate) use frozen::FrozenSource;
pub(crate) use nbd::NbdSource;
pub(crate) use run::{CopyError, Progress, run};
pub(crate) use source::{Source, SourceError};
pub(crate) use survey::{Survey, survey};

mod source;
mod target;

mod frozen;
mod nbd;
mod survey;

mod run;

pub(crate) mod reasons;
