//! The NBD protocol as values, for both ends, without I/O.
