//! What of a disk is to lie where in its file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use block::qcow2::Layout;

use super::chunk::{Chunk, chunk_size};
use super::error::ArchiveError;
use super::plan::{self, DiskPlan};
use super::runs;
use super::zeroes::{self, Space};

/// What of a disk is to lie where in its file.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) data: Vec<Range<u64>>,
    pub(super) zero: Vec<Range<u64>>,
    pub(super) layout: Layout,
    pub(super) cluster_size: u64,
    pub(super) chunk_size: u64,
}

impl Map {
    pub(super) fn of(plan: &DiskPlan) -> Result<Self, ArchiveError> {
        let (data, zero) = plan.by_clusters();
        let cluster_size = plan.cluster_size();
        let layout = plan::layout(
            &plan.name,
            plan.size,
            cluster_size,
            plan.parent,
            (&data, &zero),
        );
        let layout = layout.map_err(|error| {
            ArchiveError::Plan(format!("no file can hold {}: {error}", plan.name))
        })?;
        Ok(Self {
            data,
            zero,
            layout,
            cluster_size,
            chunk_size: chunk_size(plan.size),
        })
    }

    /// The chunk of this index, if it has data.
    pub(super) fn chunk(&self, index: u64) -> Option<Chunk> {
        let start = index.checked_mul(self.chunk_size)?;
        let end = start.saturating_add(self.chunk_size);
        let runs: Vec<_> = runs::within(&self.data, &(start..end)).collect();
        (!runs.is_empty()).then_some(Chunk { index, runs })
    }

    /// Where in the file a chunk lies, in one piece.
    pub(super) fn host(&self, chunk: &Chunk) -> u64 {
        let host = self.layout.host_offset(chunk.runs[0].start);
        host.expect("a chunk is made of data")
    }

    /// Makes the file what it was before the first byte of data came, where it is not.
    pub(super) fn restore_metadata(&self, file: &File) -> io::Result<()> {
        file.set_len(self.layout.file_size())?;
        let mut expected = vec![0; self.cluster_size as usize];
        let mut found = expected.clone();
        for offset in self.layout.metadata_offsets() {
            self.layout.fill(offset, &mut expected);
            let is_read = file.read_exact_at(&mut found, offset).is_ok();
            if !is_read || found != expected {
                file.write_all_at(&expected, offset)?;
            }
        }
        // After the end of the disk there is nothing.
        match self.data.last() {
            Some(last) if !last.end.is_multiple_of(self.cluster_size) => {
                let end = self.layout.host_offset(last.end - 1).expect("it is data") + 1;
                let length = self.layout.file_size() - end;
                zeroes::fill(file, end, length, Space::Kept)
            }
            _ => Ok(()),
        }
    }
}
