//! Numbers in runs, and the place that each has when all of them stand in a row.

use std::ops::Range;

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Places {
    runs: Vec<Run>,
    count: u64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Run {
    numbers: Range<u64>,
    /// The place of the first.
    place: u64,
}

impl Places {
    /// `None` unless the runs ascend, and none is empty. Adjacent ones become one.
    pub(super) fn new(runs: impl IntoIterator<Item = Range<u64>>) -> Option<Self> {
        let mut places = Self::default();
        for numbers in runs {
            if numbers.is_empty() {
                return None;
            }
            let count = numbers.end - numbers.start;
            match places.runs.last_mut() {
                Some(last) if last.numbers.end > numbers.start => return None,
                Some(last) if last.numbers.end == numbers.start => last.numbers.end = numbers.end,
                _ => places.runs.push(Run {
                    numbers,
                    place: places.count,
                }),
            }
            places.count += count;
        }
        Some(places)
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Where a number stands, if it is one of them.
    pub(super) fn place_of(&self, number: u64) -> Option<u64> {
        let (_, place) = self.within(number..number.checked_add(1)?).next()?;
        Some(place)
    }

    /// Which number stands there.
    pub(super) fn number_at(&self, place: u64) -> Option<u64> {
        let after = self.runs.partition_point(|run| run.place <= place);
        let run = &self.runs[after.checked_sub(1)?];
        let number = run.numbers.start + (place - run.place);
        run.numbers.contains(&number).then_some(number)
    }

    /// The runs of them in a range, each with the place of its first.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let first = self
            .runs
            .partition_point(|run| run.numbers.end <= range.start);
        let runs = self.runs[first..].iter();
        runs.map_while(move |run| {
            let start = run.numbers.start.max(range.start);
            let end = run.numbers.end.min(range.end);
            (start < end).then(|| (start..end, run.place + (start - run.numbers.start)))
        })
    }

    /// All the runs.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|run| run.numbers.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_numbers_are_each_others_inverse() {
        let places = Places::new([2..4, 4..5, 9..10, 20..23]).unwrap();
        assert_eq!(places.count(), 7);
        let numbers: Vec<_> = (0..7).map(|place| places.number_at(place)).collect();
        assert_eq!(numbers, [2, 3, 4, 9, 20, 21, 22].map(Some));
        assert_eq!(places.number_at(7), None);
        for number in 0..30 {
            match places.place_of(number) {
                Some(place) => assert_eq!(places.number_at(place), Some(number)),
                None => assert!(!numbers.contains(&Some(number)), "{number}"),
            }
        }
        assert_eq!(
            places.within(4..21).collect::<Vec<_>>(),
            [(4..5, 2), (9..10, 3), (20..21, 4)]
        );
        assert_eq!(places.runs().collect::<Vec<_>>(), [2..5, 9..10, 20..23]);
        assert_eq!(places.within(5..9).next(), None);
    }

    #[test]
    fn runs_out_of_order_are_none() {
        for runs in [vec![2..4, 3..5], vec![2..4, 0..1], vec![2..2]] {
            assert_eq!(Places::new(runs), None);
        }
        assert_eq!(Places::new([]).unwrap().number_at(0), None);
    }
}
