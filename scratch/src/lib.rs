//! A disk as it was at one moment, while the guest goes on writing to it.
