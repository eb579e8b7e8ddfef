//! Serving disks: sockets, names, sessions.

pub mod disk;
