//! What an image without times is known by: sums of some of what it holds.
//!
//! Fixed samples, which tell another image from this one, and what was written last, which tells an
//! older state of it. What a guest has written since they were taken is left out, by the map. What
//! someone else has written elsewhere is not seen.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::Path;

use bitmap::{Era, EraMap, Run};
use block::{Cells, Storage};
use scratch::Durable;

use crate::disk::{Ending, Recovery};

/// Some of an image, in the era before which it was so.
#[derive(Debug, Eq, PartialEq)]
struct Fingerprint {
    era: u32,
    samples: Vec<Sample>,
}

#[derive(Debug, Eq, PartialEq)]
struct Sample {
    range: Range<u64>,
    sum: u32,
}

/// Takes the fingerprint of `image` and stores it durably in `dir`: nothing was written in `era` yet.
pub(super) async fn store<P: Durable>(
    dir: &Path,
    image: &impl Storage,
    map: &EraMap<P>,
    era: Era,
) -> io::Result<()> {
    let mut samples = Vec::new();
    for range in fixed(image.size()).chain(last_written(map, era)) {
        let sum = sum_of(image, &range).await?;
        samples.push(Sample { range, sum });
    }
    let era = era.number();
    let bytes = Fingerprint { era, samples }.encode();
    let aside = dir.join(FILE_ASIDE);
    let cells = Cells::create(&aside)?;
    cells.store(0, &bytes)?;
    cells.sync().await?;
    fs::rename(&aside, dir.join(FILE))?;
    Cells::from(File::open(dir)?).sync().await
}

/// Why `image` is not the one whose fingerprint is in `dir`, if so; what `recovery` says was written
/// since is not compared, nor what may have changed by itself.
pub(super) async fn differs<P: Durable>(
    dir: &Path,
    image: &impl Storage,
    (recovery, ending): (&Recovery<P>, Ending),
) -> io::Result<Option<String>> {
    let found = match fs::read(dir.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Fingerprint::decode(&other?),
    };
    let Some(Fingerprint { era, samples }) = found else {
        let why = "what its image held when it was left is missing, or damaged";
        return Ok(Some(why.to_owned()));
    };
    let unsettled = image.unsettled();
    let is_settled = |range: &Range<u64>| {
        let mut others = unsettled.iter();
        !others.any(|other| range.start < other.end && other.start < range.end)
    };
    let is_left = |sample: &&Sample| {
        sample.range.end <= image.size()
            && is_settled(&sample.range)
            && recovery.is_unchanged(&sample.range, Era::from_number(era), ending)
    };
    for sample in samples.iter().filter(is_left) {
        if sum_of(image, &sample.range).await? != sample.sum {
            let why = "the image was changed, or is another, since the server left it";
            return Ok(Some(why.to_owned()));
        }
    }
    Ok(None)
}

async fn sum_of(image: &impl Storage, range: &Range<u64>) -> io::Result<u32> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    image.read(range.start, &mut bytes).await?;
    Ok(crc32fast::hash(&bytes))
}

/// Samples all over an image of this size, its ends among them.
fn fixed(size: u64) -> impl Iterator<Item = Range<u64>> {
    let count = (size / SAMPLE).clamp(1, FIXED);
    (0..count).map(move |number| {
        let start = match count {
            1 => 0,
            _ => (size - SAMPLE) / SAMPLE * number / (count - 1) * SAMPLE,
        };
        start..(start + SAMPLE).min(size)
    })
}

/// The beginnings of chunks that were written in the last eras before `era`.
fn last_written<P: Durable>(map: &EraMap<P>, era: Era) -> Vec<Range<u64>> {
    let chunk = map.granularity().bytes();
    for eras in 1..=ERAS {
        let since = Era::from_number(era.number().saturating_sub(eras).max(Era::FIRST.number()));
        let changed = map.changes(0..map.size(), since).filter(|run| run.dirty);
        let starts = changed.flat_map(|Run { range, .. }| range.step_by(chunk as usize));
        let found: Vec<_> = starts
            .take(LAST)
            .map(|start| start..(start + chunk.min(LAST_SAMPLE)).min(map.size()))
            .collect();
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

impl Fingerprint {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.era.to_le_bytes());
        for sample in &self.samples {
            bytes.extend(sample.range.start.to_le_bytes());
            bytes.extend(sample.range.end.to_le_bytes());
            bytes.extend(sample.sum.to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (told, sum) = bytes.split_last_chunk()?;
        let rest = told.strip_prefix(MAGIC)?;
        let (era, rest) = rest.split_first_chunk()?;
        let (samples, []) = rest.as_chunks::<20>() else {
            return None;
        };
        let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
        let sample = |bytes: &[u8; 20]| {
            let range = number(&bytes[..8])?..number(&bytes[8..16])?;
            let sum = u32::from_le_bytes(bytes[16..].try_into().ok()?);
            let length = range.end.checked_sub(range.start)?;
            (length <= LAST_SAMPLE).then_some(Sample { range, sum })
        };
        let samples: Option<Vec<_>> = samples.iter().map(sample).collect();
        (crc32fast::hash(told) == u32::from_le_bytes(*sum)).then_some(Self {
            era: u32::from_le_bytes(*era),
            samples: samples?,
        })
    }
}

const FILE: &str = "fingerprint";
const FILE_ASIDE: &str = "fingerprint.new";
const MAGIC: &[u8] = b"stillpoint fingerprint 1";

/// How many samples there are all over the image, and how long each is, in bytes.
const FIXED: u64 = 64;
const SAMPLE: u64 = 4096;

/// How many there are of what was written last, how long they are at most, and in how many eras they
/// are looked for.
const LAST: usize = 64;
const LAST_SAMPLE: u64 = 64 << 10;
const ERAS: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_samples_are_apart_and_reach_from_end_to_end() {
        for size in [512, 4096, 12_288, 1 << 20, (1 << 40) + 512] {
            let all: Vec<_> = fixed(size).collect();
            assert_eq!(all[0].start, 0, "{size}");
            assert!(
                all.windows(2).all(|two| two[0].end <= two[1].start),
                "{size}"
            );
            assert!(size - all[all.len() - 1].end < SAMPLE, "{size}: {all:?}");
        }
    }

    #[test]
    fn what_was_stored_is_read_and_anything_else_is_damage() {
        let sample = Sample {
            range: 4096..8192,
            sum: 7,
        };
        let fingerprint = Fingerprint {
            era: 3,
            samples: vec![sample],
        };
        let bytes = fingerprint.encode();
        assert_eq!(Fingerprint::decode(&bytes), Some(fingerprint));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Fingerprint::decode(&damaged), None, "byte {at}");
            assert_eq!(Fingerprint::decode(&bytes[..at]), None, "cut at {at}");
        }
    }
}
