use std::ops::Range;

use super::stage::{Moment, Stage};
use super::storage::Contents;

/// Something that a guest did, or that was there before.
pub(super) struct Operation {
    pub(super) disk: usize,
    pub(super) range: Range<u64>,
    pub(super) zero: bool,
    pub(super) issued: u64,
    /// When the guest was told of the outcome.
    pub(super) completed: Option<u64>,
    pub(super) succeeded: bool,
}

/// What operation `number` puts into `range`: every word says who wrote it and where it belongs.
pub(super) fn contents_of(number: usize, range: &Range<u64>, zero: bool) -> Vec<u8> {
    if zero {
        return vec![0; (range.end - range.start) as usize];
    }
    let stamp = (number as u32 + 1) << 16;
    let words = (range.start / 4..range.end / 4).map(|at| stamp | (at as u32 & 0xffff));
    words.flat_map(u32::to_le_bytes).collect()
}

/// Who wrote the word at `at`, or `None` if it is zero.
fn writer(seed: u64, copy: &Contents, at: u64) -> Option<usize> {
    let bytes = &copy.bytes[at as usize..at as usize + 4];
    let word = u32::from_le_bytes(bytes.try_into().expect("these are four bytes"));
    if word == 0 {
        return None;
    }
    assert_eq!(
        word & 0xffff,
        (at / 4) as u32 & 0xffff,
        "seed {seed}: a word at {at} is misplaced"
    );
    Some((word >> 16) as usize - 1)
}

/// Checks that each copy is a moment, knowing only when operations were issued and completed.
///
/// Whatever was completed before the freeze began is in, whatever was issued after it returned is
/// out; everything else is wholly in or wholly out, in one causal order over all disks: if something
/// is in, so is what had been completed when it was issued.
pub(super) fn check_moments(stage: &Stage) {
    for moment in &*stage.moments.borrow() {
        check_moment(stage, moment);
    }
}

fn check_moment(stage: &Stage, moment: &Moment) {
    let seed = stage.sim.seed;
    let operations = stage.operations.borrow();
    let copied = |disk: usize| {
        let (_, copy) = moment.copies.iter().find(|(index, _)| *index == disk)?;
        Some(copy)
    };
    let mut present = vec![false; operations.len()];
    for operation in &*operations {
        let Some(copy) = copied(operation.disk) else {
            continue;
        };
        for at in samples(&operation.range) {
            if let Some(number) = writer(seed, copy, at) {
                present[number] = true;
            }
        }
    }
    let visible = || {
        operations
            .iter()
            .zip(&present)
            .filter(|(_, present)| **present)
    };
    let latest = visible()
        .map(|(operation, _)| operation.issued)
        .max()
        .unwrap_or(0);
    assert!(
        latest < moment.returned,
        "seed {seed}: what was issued after a freeze returned is in it",
    );

    for (number, operation) in operations.iter().enumerate().filter(|(_, o)| o.succeeded) {
        let completed = operation.completed.unwrap_or(u64::MAX);
        let must_be_in = completed < moment.begun.max(latest) || present[number];
        let Some(copy) = copied(operation.disk).filter(|_| must_be_in) else {
            continue;
        };
        for at in samples(&operation.range) {
            let not_older = |other: &Operation| {
                other.issued < moment.returned
                    && other
                        .completed
                        .is_none_or(|completed| completed >= operation.issued)
            };
            let right = match writer(seed, copy, at) {
                Some(other) => other == number || not_older(&operations[other]),
                None => operations.iter().any(|other| {
                    let here = other.disk == operation.disk && other.range.contains(&at);
                    here && other.zero && not_older(other)
                }),
            };
            assert!(
                right,
                "seed {seed}: the freeze of {}..{} lacks, at {at}, operation {number} on disk {}, \
                 {:?}, issued {}, completed {completed}",
                moment.begun, moment.returned, operation.disk, operation.range, operation.issued,
            );
        }
    }
}

/// The first word of a range, its last, and one in each sector.
fn samples(range: &Range<u64>) -> impl Iterator<Item = u64> {
    let sectors = range.start / 512 + 1..range.end.div_ceil(512);
    let inner = sectors.map(|sector| sector * 512);
    [range.start, range.end - 4].into_iter().chain(inner)
}
