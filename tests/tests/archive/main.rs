//! Folders of backups: what is put in comes out, at every point; and whatever happens to them is told.

mod against;
mod damage;
mod interruptions;
mod order;
mod points;
mod pruning;
mod read_back;
mod reading;
mod refusals;
mod replaced;
