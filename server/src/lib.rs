//! Serving disks: sockets, names, sessions.

pub mod disk;

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
