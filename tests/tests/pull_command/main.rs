//! `stillpoint pull`: points in a folder, each of which is the instant, whatever happened on the way.

mod bitmaps;
mod folder;
mod histories;
mod interrupted;
mod kills;
mod push;
mod reasons;
mod refusals;
mod remote;
