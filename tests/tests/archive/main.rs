//! Folders of backups: what is put in comes out, at every point; and whatever happens to them is told.

mod against;
mod damage;
mod interruptions;
mod points;
mod pruning;
mod refusals;
