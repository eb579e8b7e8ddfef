//! Serving disks: sockets, names, sessions.
