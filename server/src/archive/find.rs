//! Which point is meant.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::error::ArchiveError;
use super::folder::Archive;
use super::manifest::Point;

impl Archive {
    /// The point that `text` means: `latest`, a number, the name or uuid of a checkpoint, or a time, which
    /// means the last point not after it. Only points that have `disk` count, if that is given.
    pub fn find(&self, text: &str, disk: Option<&str>) -> Result<&Point, ArchiveError> {
        let found = self.find_with(text, disk);
        match (&found, disk) {
            // Where it is the disk that is wrong, the point is not.
            (Err(ArchiveError::Unknown(_)), Some(disk)) => {
                let point = self.find_with(text, None)?;
                Err(point.without(disk))
            }
            _ => found,
        }
    }

    fn find_with(&self, text: &str, disk: Option<&str>) -> Result<&Point, ArchiveError> {
        let has_disk = |point: &&Point| disk.is_none_or(|disk| point.disk(disk).is_some());
        let newest_first = || self.points().iter().rev().filter(has_disk);
        if text == "latest" || text == "last" {
            let found = newest_first().next();
            return self.not_before_unsound(found, u64::MAX, text);
        }
        if let Ok(number) = text.parse::<u64>() {
            let found = newest_first().find(|point| point.number == number);
            return match found {
                Some(point) => Ok(point),
                None if self.has(number) && self.point(number).is_none() => {
                    Err(self.manifest(number).err().unwrap_or_else(|| unknown(text)))
                }
                None => Err(unknown(text)),
            };
        }
        let is_named = |point: &&Point| {
            let checkpoint = point.checkpoint.as_ref();
            checkpoint.is_some_and(|it| it.name == text || it.uuid.to_string() == text)
        };
        if let Some(point) = newest_first().find(is_named) {
            return Ok(point);
        }
        let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) else {
            let forms = "a number, the name or uuid of a checkpoint, a time such as 2026-11-20T21:14:03Z, \
                         or latest";
            let message = format!("there is no point '{text}': give {forms}");
            return Err(ArchiveError::Unknown(message));
        };
        let found = newest_first().find(|point| point.instant <= time);
        let next = self.points().iter().find(|point| point.instant > time);
        self.not_before_unsound(found, next.map_or(u64::MAX, |next| next.number), text)
    }

    /// What was found, unless the right one may be a later point that nobody can read.
    fn not_before_unsound<'a>(
        &self,
        found: Option<&'a Point>,
        before: u64,
        text: &str,
    ) -> Result<&'a Point, ArchiveError> {
        let after = found.map_or(0, |point| point.number);
        let between = |number: &u64| (after + 1..before).contains(number);
        let mut numbers = self.unsound().iter().map(|(number, _)| *number);
        if let Some(number) = numbers.rfind(between)
            && let Err(error) = self.manifest(number)
        {
            return Err(error);
        }
        found.ok_or_else(|| unknown(text))
    }

    /// Whether there is a point of this number, sound or not.
    pub(super) fn has(&self, number: u64) -> bool {
        let is_unsound = |(unsound, _): &(u64, _)| *unsound == number;
        self.point(number).is_some() || self.unsound().iter().any(is_unsound)
    }
}

impl Point {
    /// That it does not have `disk`.
    pub(super) fn without(&self, disk: &str) -> ArchiveError {
        let names: Vec<_> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
        let (point, has) = (self.number, names.join(", "));
        ArchiveError::Unknown(format!("point {point} has no disk '{disk}': it has {has}"))
    }
}

fn unknown(text: &str) -> ArchiveError {
    ArchiveError::Unknown(format!("there is no point '{text}'"))
}
