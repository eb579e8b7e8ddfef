//! Which chunks changed since when.
