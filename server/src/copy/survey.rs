//! From a map to what has to be copied.

use std::ops::Range;

use super::source::{Content, Source, SourceError, Stretch};

/// What a disk holds, in runs that neither touch nor overlap, in order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Survey {
    /// How large the disk is, in bytes.
    pub(crate) size: u64,
    /// What is to be fetched.
    pub(crate) data: Vec<Range<u64>>,
    /// What is to read as zeroes.
    pub(crate) zero: Vec<Range<u64>>,
}

/// Asks for the whole map.
pub(crate) async fn survey(source: &impl Source) -> Result<Survey, SourceError> {
    let mut survey = Survey {
        size: source.size(),
        ..Survey::default()
    };
    let mut offset = 0;
    while offset < survey.size {
        for stretch in source.map(offset).await? {
            survey.push(offset, stretch);
            offset += stretch.length;
        }
    }
    Ok(survey)
}

impl Survey {
    fn push(&mut self, offset: u64, stretch: Stretch) {
        let range = offset..offset + stretch.length;
        match stretch.content {
            Content::Clean => {}
            Content::Zero => append(&mut self.zero, range),
            Content::Data => append(&mut self.data, range),
        }
    }

    /// The largest power of two, [`GRANULARITY_MAX`] at most, in units of which clean and dirty change
    /// places: with clusters of that size nothing that is clean is fetched.
    pub(crate) fn granularity(&self) -> u64 {
        let mut edges = 0;
        for run in self.dirty() {
            edges |= run.start;
            // The end of the disk is one for every size.
            if run.end != self.size {
                edges |= run.end;
            }
        }
        match edges {
            0 => GRANULARITY_MAX,
            edges => GRANULARITY_MAX.min(1 << edges.trailing_zeros()),
        }
    }

    /// What is not clean.
    fn dirty(&self) -> Vec<Range<u64>> {
        let mut all: Vec<_> = self.data.iter().chain(&self.zero).cloned().collect();
        all.sort_unstable_by_key(|range| range.start);
        let mut dirty = Vec::new();
        for range in all {
            append(&mut dirty, range);
        }
        dirty
    }
}

/// Adds a range that begins where the last one did, or later.
fn append(runs: &mut Vec<Range<u64>>, range: Range<u64>) {
    match runs.last_mut() {
        Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
        _ => runs.push(range),
    }
}

/// As coarse as a disk's changes can be known.
const GRANULARITY_MAX: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn survey_of(stretches: &[(u64, Content)]) -> Survey {
        let mut survey = Survey::default();
        for &(length, content) in stretches {
            survey.push(survey.size, Stretch { length, content });
            survey.size += length;
        }
        survey
    }

    #[test]
    fn neighbours_of_one_kind_are_one_run() {
        let found = survey_of(&[
            (512, Content::Data),
            (512, Content::Data),
            (1024, Content::Clean),
            (512, Content::Zero),
            (512, Content::Data),
            (512, Content::Zero),
        ]);
        assert_eq!(found.data, [0..1024, 2560..3072]);
        assert_eq!(found.zero, [2048..2560, 3072..3584]);
    }

    #[test]
    fn the_granularity_is_that_of_where_clean_meets_dirty() {
        let all = survey_of(&[(1000, Content::Data), (24, Content::Zero)]);
        assert_eq!(all.granularity(), GRANULARITY_MAX, "nothing is clean");
        let chunks = survey_of(&[
            (1 << 20, Content::Clean),
            (512, Content::Zero),
            ((32 << 10) - 512, Content::Data),
            (1 << 20, Content::Clean),
        ]);
        assert_eq!(chunks.granularity(), 32 << 10);
        let at_the_end = survey_of(&[(1 << 20, Content::Clean), (512, Content::Data)]);
        assert_eq!(at_the_end.granularity(), 1 << 20, "not the end of the disk");
        let fine = survey_of(&[(512, Content::Data), (1024, Content::Clean)]);
        assert_eq!(fine.granularity(), 512);
    }
}
