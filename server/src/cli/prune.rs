//! `stillpoint prune`: points that nobody wants to keep.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::problem::Problem;
use super::table::Table;
use super::units::parse_count;
use super::{Answers, Done};
use crate::archive::{Archive, Fate, Keep, Point, fates};
use crate::control::answers::time_text;

/// A point stays if any rule keeps it, or if one that stays builds on it. The newest always stays.
#[derive(Args, Debug)]
pub(super) struct PruneArgs {
    /// The folder of backups.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    keep: KeepArgs,
    /// Only show what would go.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args, Debug)]
#[expect(
    clippy::struct_field_names,
    reason = "they are options that are called so"
)]
#[group(required = true, multiple = true)]
struct KeepArgs {
    /// Keep the newest N points.
    #[arg(long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    keep_last: Option<u64>,
    /// Keep the last point of each of the newest N days that have one, by UTC.
    #[arg(long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    keep_daily: Option<u64>,
    /// The same for weeks, which begin on Mondays.
    #[arg(long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    keep_weekly: Option<u64>,
    /// The same for months.
    #[arg(long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    keep_monthly: Option<u64>,
    /// The same for years.
    #[arg(long, value_name = "N", value_parser = parse_count, allow_negative_numbers = true)]
    keep_yearly: Option<u64>,
}

#[derive(Serialize)]
struct Outcome {
    dry_run: bool,
    kept: Vec<u64>,
    pruned: Vec<u64>,
}

impl PruneArgs {
    pub(super) fn run(self, answers: &Answers) -> Result<Done, Problem> {
        let archive = if self.dry_run {
            Archive::open(&self.folder)?
        } else {
            // One that is not there is not made.
            drop(Archive::open(&self.folder)?);
            Archive::open_for_writing(&self.folder)?
        };
        let keep = Keep {
            last: self.keep.keep_last.unwrap_or(0),
            daily: self.keep.keep_daily.unwrap_or(0),
            weekly: self.keep.keep_weekly.unwrap_or(0),
            monthly: self.keep.keep_monthly.unwrap_or(0),
            yearly: self.keep.keep_yearly.unwrap_or(0),
        };
        let fates = fates(archive.points(), &keep);
        let (pruned, kept): (Vec<_>, Vec<_>) =
            fates.iter().partition(|(_, fate)| *fate == Fate::Pruned);
        let numbers = |points: Vec<(u64, Fate)>| points.into_iter().map(|(number, _)| number);
        let pruned: Vec<_> = numbers(pruned).collect();
        if !self.dry_run {
            archive.prune(&pruned)?;
        }
        if answers.is_json {
            let outcome = Outcome {
                dry_run: self.dry_run,
                kept: numbers(kept).collect(),
                pruned,
            };
            let text = serde_json::to_string(&outcome).expect("numbers can be JSON") + "\n";
            return Ok(Done { text, exit: 0 });
        }
        let text = table(archive.points(), &fates, self.dry_run);
        Ok(Done { text, exit: 0 })
    }
}

fn table(points: &[Point], fates: &[(u64, Fate)], is_dry_run: bool) -> String {
    if points.is_empty() {
        return "no points\n".to_owned();
    }
    let mut table = Table::new(["POINT", "INSTANT", "FATE"]);
    for (point, (number, fate)) in points.iter().zip(fates) {
        let fate = match fate {
            Fate::Kept => "kept".to_owned(),
            Fate::Needed(by) => format!("kept, because point {by} builds on it"),
            Fate::Pruned if is_dry_run => "would be pruned".to_owned(),
            Fate::Pruned => "pruned".to_owned(),
        };
        table.push([number.to_string(), time_text(point.instant), fate]);
    }
    table.render()
}
