//! The client that does I/O, on streams in memory, with a server by hand at the other end.

mod ends;
mod entering;
mod limits;
mod requests;

mod server;
