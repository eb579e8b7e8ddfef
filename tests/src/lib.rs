//! What the tests share: a running server, and other people's tools.

pub mod simulation;
