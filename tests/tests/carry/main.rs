//! What is known of changes is brought from elsewhere and taken elsewhere.
//!
//! Bitmaps come from images that QEMU made and go into such; the oracles are `qemu-nbd -B`, `nbdinfo` and
//! `qemu-img check`. States move to another folder, and are compared with what they were.

mod images;

mod imports;
mod lists;
mod refusals;

mod into_images;
mod not_into_images;

mod moved;
mod not_moved;
mod written_meanwhile;

mod kills;
