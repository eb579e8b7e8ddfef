//! The machine that uses a disk, with the simplest model of it: a copy, and the chunks it touched.

use std::collections::BTreeSet;

use rand::{Rng as _, RngCore as _};

use crate::raw_nbd::RawNbd;
use crate::seeds::Rng;
use crate::tools::merged;
use crate::{CHUNK, Extent, KIB, Server};

/// A guest that keeps a copy of its disk.
#[derive(Debug)]
pub struct Guest {
    nbd: RawNbd,
    /// What the disk holds.
    pub disk: Vec<u8>,
    /// The chunks touched since this was last cleared.
    pub touched: BTreeSet<u64>,
}

impl Guest {
    /// A guest of a live export that is all zeroes so far.
    #[track_caller]
    pub fn new(server: &Server, disk: &str) -> Self {
        let nbd = server.open_live(disk);
        let size = nbd.export().size as usize;
        Self {
            nbd,
            disk: vec![0; size],
            touched: BTreeSet::new(),
        }
    }

    /// Goes on with a server that was started again.
    #[track_caller]
    pub fn reconnect(&mut self, server: &Server, disk: &str) {
        self.nbd = server.open_live(disk);
    }

    /// The size of the disk.
    pub fn size(&self) -> u64 {
        self.disk.len() as u64
    }

    /// Writes.
    #[track_caller]
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.nbd.write(offset, bytes).expect("the guest can write");
        let start = offset as usize;
        self.disk[start..start + bytes.len()].copy_from_slice(bytes);
        self.touch(offset, bytes.len() as u64);
    }

    /// Writes random bytes.
    #[track_caller]
    pub fn write_random(&mut self, rng: &mut Rng, offset: u64, length: u64) {
        let mut bytes = vec![0; length as usize];
        rng.fill_bytes(&mut bytes);
        self.write(offset, &bytes);
    }

    /// Writes zeroes.
    #[track_caller]
    pub fn zeroes(&mut self, offset: u64, length: u64, flags: u16) {
        self.nbd
            .zeroes(offset, length as u32, flags)
            .expect("the guest can write zeroes");
        self.disk[offset as usize..(offset + length) as usize].fill(0);
        self.touch(offset, length);
    }

    /// Trims. What is there afterwards is the server's choice, so the copy takes it from there.
    #[track_caller]
    pub fn trim(&mut self, offset: u64, length: u64) {
        self.nbd
            .trim(offset, length as u32)
            .expect("the guest can trim");
        let now = self
            .nbd
            .read(offset, length as u32)
            .expect("the guest can read");
        self.disk[offset as usize..(offset + length) as usize].copy_from_slice(&now);
        self.touch(offset, length);
    }

    /// Does something drawn, somewhere drawn; mostly small, often unaligned.
    #[track_caller]
    pub fn do_something(&mut self, rng: &mut Rng) {
        let length = match rng.random_range(0..10) {
            0 => rng.random_range(1..4 * KIB),
            1..7 => 4 * KIB * rng.random_range(1..=4),
            7..9 => 4 * KIB * rng.random_range(4..=32),
            _ => rng.random_range(1..=256 * KIB),
        };
        let length = length.min(self.size());
        let mut offset = rng.random_range(0..=self.size() - length);
        if rng.random_bool(0.7) {
            offset = offset / (4 * KIB) * (4 * KIB);
        }
        match rng.random_range(0..10) {
            0..6 => self.write_random(rng, offset, length),
            6..8 => self.zeroes(offset, length, 0),
            _ => {
                let offset = offset / (4 * KIB) * (4 * KIB);
                let length = length.next_multiple_of(4 * KIB).min(self.size() - offset);
                self.trim(offset, length);
            }
        }
    }

    /// Flushes.
    #[track_caller]
    pub fn flush(&mut self) {
        self.nbd.flush().expect("the guest can flush");
    }

    /// The dirty map that must be found for what was touched.
    pub fn expected_map(&self) -> Vec<Extent> {
        dirty_map(&self.touched, self.size())
    }

    /// How many bytes the touched chunks have.
    pub fn expected_bytes(&self) -> u64 {
        self.expected_map()
            .iter()
            .filter(|extent| extent.2 == 1)
            .map(|extent| extent.1)
            .sum()
    }

    fn touch(&mut self, offset: u64, length: u64) {
        self.touched
            .extend(offset / CHUNK..(offset + length).div_ceil(CHUNK));
    }
}

/// The dirty map of a disk of this size on which these chunks were touched.
pub fn dirty_map(touched: &BTreeSet<u64>, size: u64) -> Vec<Extent> {
    merged((0..size.div_ceil(CHUNK)).map(|chunk| {
        let start = chunk * CHUNK;
        (
            start,
            CHUNK.min(size - start),
            u32::from(touched.contains(&chunk)),
        )
    }))
}
