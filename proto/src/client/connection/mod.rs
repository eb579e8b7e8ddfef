//! The client that does I/O, on any stream that it is handed.
//!
//! [`Haggling`] looks for an export; entering one yields a [`Client`], for whoever has requests,
//! and a [`Connection`], the task that carries them.

pub use driver::Connection;
pub use error::Error;
pub use haggling::{AfterTls, Haggling};
pub use map::Map;
pub use requests::{BYTES_MAX, Client, Durability, REQUESTS_MAX, Zeroing};

mod haggling;

mod map;
mod requests;

mod driver;
mod sending;
mod shared;

mod error;
