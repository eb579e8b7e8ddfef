//! What the names in a folder of backups mean.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

/// What a name in the folder means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Entry {
    /// A point.
    Point(u64),
    /// One that is being made.
    Partial(u64),
    /// One that is being removed.
    Pruned(u64),
    /// Something else that we make.
    Ours,
    /// Anything else.
    Foreign,
}

/// Everything in a folder.
pub(super) fn entries(path: &Path) -> io::Result<Vec<(Entry, OsString)>> {
    let entries = fs::read_dir(path)?.map(|entry| {
        let name = entry?.file_name();
        Ok((meaning(&name.to_string_lossy()), name))
    });
    entries.collect()
}

/// What a name in it means.
pub(super) fn meaning(name: &str) -> Entry {
    if [LOCK, READERS, IDENTITY].contains(&name) {
        return Entry::Ours;
    }
    let number = |text: &str| {
        let number = text.parse::<u64>().ok()?;
        // As we write it, and not with a sign or zeroes before it.
        (number > 0 && number.to_string() == text).then_some(number)
    };
    if let Some(number) = number(name) {
        return Entry::Point(number);
    }
    if let Some(number) = name.strip_suffix(PARTIAL).and_then(number) {
        return Entry::Partial(number);
    }
    if let Some(number) = name.strip_suffix(PRUNED).and_then(number) {
        return Entry::Pruned(number);
    }
    Entry::Foreign
}

/// Held, exclusively, by whoever changes the folder.
pub(super) const LOCK: &str = "lock";

/// Held, shared, by whoever reads points; exclusively by whoever removes some.
pub(super) const READERS: &str = "readers";

/// Has the folder's own uuid.
pub(super) const IDENTITY: &str = "folder.json";

/// How the folder of a point ends that is being made, or removed.
pub(super) const PARTIAL: &str = ".partial";
pub(super) const PRUNED: &str = ".pruned";

/// What a new file system has in its root.
pub(super) const LOST_AND_FOUND: &str = "lost+found";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_we_write_and_nothing_else() {
        for (name, expected) in [
            ("1", Entry::Point(1)),
            ("120", Entry::Point(120)),
            ("3.partial", Entry::Partial(3)),
            ("3.pruned", Entry::Pruned(3)),
            ("lock", Entry::Ours),
            ("0", Entry::Foreign),
            ("01", Entry::Foreign),
            ("+1", Entry::Foreign),
            ("1.", Entry::Foreign),
            ("1.old", Entry::Foreign),
            ("x.partial", Entry::Foreign),
            ("99999999999999999999", Entry::Foreign),
        ] {
            assert_eq!(meaning(name), expected, "{name}");
        }
    }
}
