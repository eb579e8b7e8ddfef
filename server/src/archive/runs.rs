//! Runs of bytes: ascending, not empty, without overlaps.

/// As they stand in JSON: pairs of start and length.
pub(super) mod pairs {
    use std::ops::Range;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        runs: &[Range<u64>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(runs.iter().map(|run| [run.start, run.end - run.start]))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Range<u64>>, D::Error> {
        let pairs = Vec::<[u64; 2]>::deserialize(deserializer)?;
        let range = |[start, length]: [u64; 2]| Some(start..start.checked_add(length)?);
        let runs = pairs.into_iter().map(range).collect::<Option<_>>();
        runs.ok_or_else(|| D::Error::custom("a run beyond all numbers"))
    }
}
