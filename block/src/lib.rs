//! Things that can be read and written by offset.
