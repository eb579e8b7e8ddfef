//! Why disks come as a full, in words that are the same whoever copies.

use crate::archive::Point;

/// The first time.
pub(crate) const FIRST: &str = "nothing of it is in the folder yet";

/// Whatever is in the folder.
pub(crate) const ASKED_FOR: &str = "a full was asked for";

/// The server does not have the checkpoint of any point of a disk, of which this is the newest.
pub(crate) fn without_checkpoint(newest: &Point) -> String {
    match &newest.checkpoint {
        None => format!("there is no checkpoint of point {}", newest.number),
        Some(checkpoint) => format!(
            "the server no longer has the checkpoint of point {}, '{}' with uuid {}",
            newest.number, checkpoint.name, checkpoint.uuid
        ),
    }
}

/// A dirty bitmap says nothing of what is new.
pub(crate) fn resized(then: u64, now: u64) -> String {
    format!("its size was {then} then, and is {now} now")
}
