//! qcow2 images as QEMU makes them, read by us.
//!
//! The oracle is QEMU: `qemu-img convert` for what is in them, `qemu-img map` for where it is.

mod images;

mod chains;
mod reads;
mod refused;

mod served;
