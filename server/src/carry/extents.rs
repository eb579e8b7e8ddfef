//! What is dirty, as a list of extents in JSON.
//!
//! It is what `nbdinfo --json --map=qemu:dirty-bitmap:NAME` prints: extents in order, each beginning
//! where the one before ends, from the start of the disk to its end, and each says of itself in words
//! whether it is clean or dirty. So a list that was cut, or one of something else such as
//! `base:allocation`, where 1 is a hole, cannot be taken for one that has less dirty.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::rc::Rc;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use thiserror::Error;

/// Why a list is not taken.
#[derive(Debug, Error)]
#[error("it is no list of extents as nbdinfo --json --map prints it: {0}")]
pub(super) struct NoList(serde_json::Error);

/// Reads the list of a disk of `size` bytes, and says what is dirty: ranges in order, none empty.
///
/// It takes as much memory as its longest extent, which is bounded.
pub(super) fn read(
    list: impl Read,
    size: u64,
    dirty: impl FnMut(Range<u64>),
) -> Result<(), NoList> {
    let left = Rc::new(Cell::new(ENTRY_BYTES_MAX));
    let list = Rationed {
        list,
        left: Rc::clone(&left),
    };
    let mut list = serde_json::Deserializer::from_reader(list);
    let visitor = ListVisitor { size, left, dirty };
    let read = list.deserialize_seq(visitor).and_then(|()| list.end());
    read.map_err(NoList)
}

/// Writes the list of a disk of `size` bytes on which `dirty` is dirty: ranges in order, none empty.
pub(crate) fn write(
    list: &mut impl Write,
    size: u64,
    dirty: impl IntoIterator<Item = Range<u64>>,
) -> io::Result<()> {
    let mut at = 0;
    let mut separator = "[";
    let mut extent = |range: Range<u64>, kind: u64| {
        let (offset, length) = (range.start, range.end - range.start);
        let description = DESCRIPTIONS[kind as usize];
        write!(
            list,
            "{separator}\n{{ \"offset\": {offset}, \"length\": {length}, \"type\": {kind}, \
             \"description\": \"{description}\"}}"
        )?;
        separator = ",";
        Ok::<_, io::Error>(())
    };
    for range in dirty {
        if at < range.start {
            extent(at..range.start, CLEAN)?;
        }
        at = range.end;
        extent(range, DIRTY)?;
    }
    if at < size {
        extent(at..size, CLEAN)?;
    }
    writeln!(list, "\n]")
}

#[derive(Deserialize)]
struct Extent {
    offset: u64,
    length: u64,
    #[serde(rename = "type")]
    kind: u64,
    description: String,
}

impl Extent {
    /// The range, and whether it is dirty, of one that begins `at`.
    fn check(&self, at: u64, size: u64) -> Result<(Range<u64>, bool), String> {
        let Self {
            offset,
            length,
            kind,
            description,
        } = self;
        if ALLOCATION.contains(&description.as_str()) {
            return Err(
                "it is of base:allocation, which says what takes space, and not what has changed"
                    .to_owned(),
            );
        }
        let is_dirty = *kind == DIRTY;
        if *kind > DIRTY || description != DESCRIPTIONS[usize::from(is_dirty)] {
            let description: String = description.chars().take(40).collect();
            return Err(format!(
                "an extent of type {kind} that is called {description:?} is neither clean (0) nor \
                 dirty (1)"
            ));
        }
        if *offset != at {
            return Err(format!(
                "an extent begins at {offset}, where the one before it ends at {at}"
            ));
        }
        match offset.checked_add(*length).filter(|end| *end <= size) {
            _ if *length == 0 => Err(format!("the extent at {offset} is empty")),
            None => Err(format!(
                "the extent at {offset} of {length} bytes ends behind the disk, which has {size}"
            )),
            Some(end) => Ok((at..end, is_dirty)),
        }
    }
}

struct ListVisitor<F> {
    size: u64,
    left: Rc<Cell<u64>>,
    dirty: F,
}

impl<'de, F: FnMut(Range<u64>)> Visitor<'de> for ListVisitor<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of extents")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        let mut at = 0;
        while let Some(extent) = list.next_element::<Extent>()? {
            self.left.set(ENTRY_BYTES_MAX);
            let checked = extent.check(at, self.size);
            let (range, is_dirty) = checked.map_err(A::Error::custom)?;
            at = range.end;
            if is_dirty {
                (self.dirty)(range);
            }
        }
        if at == self.size {
            return Ok(());
        }
        let size = self.size;
        Err(A::Error::custom(format!(
            "it ends at {at}, and the disk has {size} bytes"
        )))
    }
}

/// Ends when one extent takes more bytes than any has: a text would be collected in memory first.
struct Rationed<R> {
    list: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Rationed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::Error::other("an extent is too long"));
        }
        let most = buffer.len().min(left as usize);
        let length = self.list.read(&mut buffer[..most])?;
        self.left.set(left - length as u64);
        Ok(length)
    }
}

const CLEAN: u64 = 0;
const DIRTY: u64 = 1;

/// By type.
const DESCRIPTIONS: [&str; 2] = ["clean", "dirty"];

/// What `nbdinfo` calls extents of `base:allocation`.
const ALLOCATION: [&str; 4] = ["data", "hole", "zero", "hole,zero"];

/// Some times what one takes with the largest numbers and some white space.
const ENTRY_BYTES_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn dirty(text: &str) -> Result<Vec<(u64, u64)>, String> {
        let mut found = Vec::new();
        let read = read(text.as_bytes(), SIZE, |range| {
            found.push((range.start, range.end));
        });
        read.map(|()| found).map_err(|error| error.to_string())
    }

    fn extent(offset: u64, length: u64, kind: u64, description: &str) -> String {
        format!(
            "{{\"offset\": {offset}, \"length\": {length}, \"type\": {kind}, \
             \"description\": \"{description}\"}}"
        )
    }

    #[test]
    fn what_nbdinfo_prints_is_read() {
        let text = r#"[
{ "offset": 0, "length": 65536, "type": 0, "description": "clean"},
{ "offset": 65536, "length": 65536, "type": 1, "description": "dirty"},
{ "offset": 131072, "length": 917504, "type": 0, "description": "clean"}
]
"#;
        assert_eq!(dirty(text), Ok(vec![(65_536, 131_072)]));
        let mut again = Vec::new();
        write(&mut again, SIZE, [65_536..131_072]).unwrap();
        assert_eq!(String::from_utf8(again).unwrap(), text);
    }

    #[test]
    fn what_is_written_is_read_again() {
        for ranges in [
            vec![],
            vec![0..SIZE],
            vec![0..1],
            vec![SIZE - 1..SIZE],
            vec![0..512, 4096..8192, SIZE - 512..SIZE],
        ] {
            let mut text = Vec::new();
            write(&mut text, SIZE, ranges.clone()).unwrap();
            let expected: Vec<_> = ranges.iter().map(|r| (r.start, r.end)).collect();
            assert_eq!(dirty(std::str::from_utf8(&text).unwrap()), Ok(expected));
        }
    }

    #[test]
    fn a_list_that_could_hide_a_change_is_refused_and_told_why() {
        let whole = |parts: &[String]| format!("[{}]", parts.join(","));
        let clean = |offset, length| extent(offset, length, 0, "clean");
        for (text, why) in [
            (whole(&[]), "it ends at 0"),
            (whole(&[clean(0, SIZE - 1)]), "it ends at 1048575"),
            (whole(&[clean(0, SIZE + 1)]), "ends behind the disk"),
            (whole(&[clean(0, u64::MAX)]), "ends behind the disk"),
            (
                whole(&[clean(0, 512), clean(1024, SIZE - 1024)]),
                "begins at 1024",
            ),
            (whole(&[clean(0, 512), clean(0, SIZE)]), "begins at 0"),
            (whole(&[clean(512, SIZE - 512)]), "begins at 512"),
            (whole(&[clean(0, 0), clean(0, SIZE)]), "is empty"),
            (whole(&[extent(0, SIZE, 0, "data")]), "base:allocation"),
            (whole(&[extent(0, SIZE, 1, "hole")]), "base:allocation"),
            (whole(&[extent(0, SIZE, 3, "hole,zero")]), "base:allocation"),
            (whole(&[extent(0, SIZE, 0, "dirty")]), "neither clean"),
            (whole(&[extent(0, SIZE, 1, "clean")]), "neither clean"),
            (whole(&[extent(0, SIZE, 2, "2")]), "neither clean"),
            ("[]x".to_owned(), "it ends at 0"),
            (format!("{}x", whole(&[clean(0, SIZE)])), "trailing"),
            ("{}".to_owned(), "a list of extents"),
            (String::new(), "EOF"),
            ("[{\"offset\": 0}]".to_owned(), "missing field"),
            (
                "[{\"offset\": -1, \"length\": 1, \"type\": 0, \"description\": \"clean\"}]"
                    .to_owned(),
                "invalid value",
            ),
            (
                "[{\"offset\": 0, \"length\": 1048576, \"type\": 0}]".to_owned(),
                "missing field `description`",
            ),
            (
                "[{\"start\": 0, \"length\": 1048576, \"data\": true}]".to_owned(),
                "missing field",
            ),
            (
                whole(&[extent(0, SIZE, 0, &"x".repeat(1 << 20))]),
                "too long",
            ),
            ("[".repeat(10_000), "invalid type"),
        ] {
            let error = dirty(&text).unwrap_err();
            let start: String = text.chars().take(90).collect();
            assert!(error.contains(why), "{start}: {error}");
        }
    }
}
