//! One image of a chain: where its bytes are.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::entry::{Geometry, Place};
use super::header::Header;
use super::tables::{PAGE, Page, Tables};
use crate::{FileStorage, Storage};

/// A qcow2 image without what is behind it.
pub(crate) struct Layer {
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    /// The image.
    pub(crate) file: FileStorage,
    /// Where its data is, if elsewhere.
    data: Option<FileStorage>,
    /// Much of the file takes no space, so clusters may have been reserved that nobody wrote.
    pub(crate) sparse: bool,
    number: usize,
}

/// A stretch of one image, from the offset that was asked for on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub(crate) place: Place,
    pub(crate) length: u64,
}

impl Layer {
    /// Image number `number` of a chain, whose head says `header`.
    pub(crate) fn new(
        number: usize,
        header: Header,
        file: FileStorage,
        data: Option<FileStorage>,
    ) -> io::Result<Self> {
        let geometry = Geometry::of(&header);
        Ok(Self {
            sparse: is_sparse(file.file(), geometry.cluster())?,
            header,
            geometry,
            file,
            data,
            number,
        })
    }

    /// Where data is.
    pub(crate) fn data(&self) -> &FileStorage {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// The file that its data is in, if that is another.
    pub(crate) fn data_file(&self) -> Option<&FileStorage> {
        self.data.as_ref()
    }

    /// Where the bytes at `at` are, and how many behind them continue there: at most `limit`, and
    /// as many as one page of a table tells.
    pub(crate) async fn find(&self, tables: &Tables, at: u64, limit: u64) -> io::Result<Stretch> {
        let table_bits = self.geometry.table_bits();
        let index = at >> table_bits;
        let entry_at = self.header.l1_offset + 8 * index;
        let page = tables.page(self.number, &self.file, entry_at).await?;
        let from = (entry_at % PAGE) as usize;
        let table = self.geometry.table(word(&page, from)?).map_err(damaged)?;
        let Some(table) = table else {
            // As many as lie beside each other are told together.
            let absent = page[from..].chunks_exact(8).skip(1);
            let absent = absent.take_while(|entry| {
                let entry = word(entry, 0).unwrap_or(1);
                matches!(self.geometry.table(entry), Ok(None))
            });
            let tables = 1 + absent.count() as u64;
            let end = (index + tables).saturating_mul(1 << table_bits);
            return Ok(Stretch {
                place: Place::Absent,
                length: limit.min(end - at),
            });
        };
        let within = at & ((1 << table_bits) - 1);
        let entry = (within >> self.geometry.cluster_bits) * self.geometry.entry_bytes();
        let entry_at = table + entry;
        let page = tables.page(self.number, &self.file, entry_at).await?;
        self.stretch(&page, (entry_at % PAGE) as usize, at, limit)
    }

    /// The same by the entry at `entry` of a page of the second table, and those behind it.
    fn stretch(&self, page: &Page, mut entry: usize, at: u64, limit: u64) -> io::Result<Stretch> {
        let Geometry {
            cluster_bits,
            part_bits,
            ..
        } = self.geometry;
        let step = self.geometry.entry_bytes() as usize;
        // A table ends with its cluster, or the page does.
        let page_clusters = (page.len() - entry.min(page.len())) / step;
        let table_clusters = {
            let table_bits = self.geometry.table_bits();
            ((1 << table_bits) - (at & ((1 << table_bits) - 1))).div_ceil(1 << cluster_bits)
        };
        let clusters = (page_clusters as u64).min(table_clusters);
        let first_cluster = at >> cluster_bits;
        let part = 1 << part_bits;

        let first = self.place(page, entry, at)?;
        let unit = match first {
            Place::Packed { .. } => 1 << cluster_bits,
            _ => part,
        };
        let mut end = (at / unit + 1) * unit;
        let start = at / unit * unit;
        while end - at < limit && !matches!(first, Place::Packed { .. }) {
            let cluster = end >> cluster_bits;
            if cluster - first_cluster >= clusters {
                break;
            }
            if end.is_multiple_of(1 << cluster_bits) {
                entry += step;
            }
            // What is wrong there is told to whoever asks for it.
            let next = self.place(page, entry, end);
            let continued = match first {
                Place::Data(offset) => Place::Data(offset + (end - start)),
                same => same,
            };
            if next.ok() != Some(continued) {
                break;
            }
            end += part;
        }
        let place = match first {
            Place::Data(offset) => Place::Data(offset + (at - start)),
            same => same,
        };
        Ok(Stretch {
            place,
            length: limit.min(end - at),
        })
    }

    fn place(&self, page: &Page, entry: usize, at: u64) -> io::Result<Place> {
        let parts = if self.geometry.entry_bytes() == 16 {
            word(page, entry + 8)?
        } else {
            0
        };
        let place = self.geometry.place(at, word(page, entry)?, parts);
        place.map_err(damaged)
    }

    /// Fills `buffer` with data at `offset`. A file may end within its last cluster.
    pub(crate) async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let file = self.data();
        let end = offset + buffer.len() as u64;
        if end > file.size().next_multiple_of(self.geometry.cluster()) {
            return Err(damaged(
                "data is behind the end of the file: it was cut off",
            ));
        }
        let there = file.size().saturating_sub(offset).min(buffer.len() as u64);
        let (there, missing) = buffer.split_at_mut(there as usize);
        missing.fill(0);
        file.read(offset, there).await
    }

    /// The compressed bytes at `offset`: `length`, or fewer where the file ends.
    pub(crate) async fn packed(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let length = self.file.size().saturating_sub(offset).min(length);
        let mut packed = vec![0; length as usize];
        self.file.read(offset, &mut packed).await?;
        Ok(packed)
    }
}

fn word(bytes: &[u8], at: usize) -> io::Result<u64> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    let word = word.ok_or_else(|| damaged("a table is behind the end of the file"))?;
    Ok(u64::from_be_bytes(*word))
}

/// What an image says that cannot be.
pub(crate) fn damaged(what: &'static str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the image is damaged: {what}"),
    )
}

/// Whether clearly more clusters are in the file than take space, as QEMU asks too.
fn is_sparse(file: &File, cluster: u64) -> io::Result<bool> {
    let found = file.metadata()?;
    let taken = found.blocks() * 512 / cluster;
    let enough = (taken * 10 / 9).max(taken + 2);
    Ok(found.len().div_ceil(cluster) >= enough)
}
