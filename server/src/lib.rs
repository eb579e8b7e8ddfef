//! Serving disks: sockets, names, sessions.

pub mod cli;
pub mod disk;
pub mod serve;

mod address;
mod control;
mod export;
mod failure;
mod files;
mod hooks;
mod lock_file;
mod names;
mod served;
mod service;
