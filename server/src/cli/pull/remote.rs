//! An export of any NBD server: without an instant that somebody keeps, and without a commit.

use std::rc::Rc;
use std::sync::Arc;

use time::OffsetDateTime;

use super::report::Row;
use super::stop::Stop;
use super::{Common, Failed, Ready, source_problem, stopped};
use crate::archive::{DiskPlan, Leftover, Mode, Origin, Plan, Point, Since};
use crate::cli::Done;
use crate::cli::problem::Problem;
use crate::cli::progress::Watch;
use crate::copy::reasons::{ASKED_FOR, FIRST, resized};
use crate::copy::{CopyError, NbdSource, Source, SourceError, Survey, survey};
use crate::names::Name;
use crate::nbd_uri::NbdUri;

/// Pulls one export.
pub(super) async fn pull(
    common: &Common<'_>,
    uri: &NbdUri,
    stop: &mut Stop,
) -> Result<Done, Problem> {
    if common.args.hooks.are_wanted() {
        let message = "hooks are for an instant, and --uri pulls what somebody else has frozen";
        return Err(Problem::usage(message));
    }
    let name = disk_name(&common.args.disks, uri)?;
    if common.args.dry_run {
        let points = common.points()?;
        let (_, disk) = plan(common, &points, uri, name, stop).await?;
        return Ok(common.dry_run(&points, &[row(&disk)]));
    }
    let archive = common.archive()?;
    let (source, disk) = plan(common, archive.points(), uri, name, stop).await?;

    // Nobody can say whether what is served now is what was being copied then.
    if let Leftover::Interrupted(interrupted) = archive.leftover()? {
        interrupted.discard()?;
        common.report.note(
            "what an interrupted run left is of no use, as nobody knows whether it was of the same \
             instant: beginning anew",
        );
    }
    let draft = archive.begin(Plan {
        origin: Origin {
            place: uri.to_string(),
            vouched: false,
        },
        backup: None,
        instant: OffsetDateTime::now_utc(),
        checkpoint: None,
        held_us: None,
        disks: vec![disk],
    })?;
    let rows = common.announce(&draft);
    let watch = Arc::new(Watch::of(&draft));
    let mut ready = Ready {
        draft,
        sources: vec![Rc::new(source)],
    };
    match common.fetch(&mut ready, &watch, stop).await {
        Ok(()) => {}
        Err(Failed::Stopped) => return Err(stopped()),
        Err(Failed::Copy(CopyError::Source(_, error))) => return Err(source_problem(&error)),
        Err(Failed::Copy(error)) => return Err(error.into()),
    }
    let point = common.finish(ready, &watch, stop).await?;
    Ok(common.finished(archive.points(), &point, &rows, None))
}

/// Enters the export, and says how it comes.
async fn plan(
    common: &Common<'_>,
    points: &[Point],
    uri: &NbdUri,
    name: String,
    stop: &mut Stop,
) -> Result<(NbdSource, DiskPlan), Problem> {
    let planning = open(common, points, uri, name);
    let planned = stop.unless_stopped(planning).await.ok_or_else(stopped)?;
    planned.map_err(|error| source_problem(&error))
}

async fn open(
    common: &Common<'_>,
    points: &[Point],
    uri: &NbdUri,
    name: String,
) -> Result<(NbdSource, DiskPlan), SourceError> {
    let mut newest_first = points.iter().rev();
    let last = newest_first.find_map(|point| Some((point, point.disk(&name)?)));
    let bitmap = common.args.bitmap.as_deref();
    let tls = common.tls.as_ref();
    let source = NbdSource::open(uri, tls, bitmap).await?;
    let size = source.size();
    let why_full = match (bitmap, last) {
        _ if common.args.full => Some(ASKED_FOR.to_owned()),
        (_, None) => Some(FIRST.to_owned()),
        (None, Some(_)) => Some("no --bitmap says what has changed".to_owned()),
        (Some(_), Some((_, entry))) if entry.size != size => Some(resized(entry.size, size)),
        (Some(_), Some(_)) => None,
    };
    let source = match (&why_full, bitmap) {
        // What is clean has to be copied too.
        (Some(_), Some(_)) => {
            source.close().await;
            NbdSource::open(uri, tls, None).await?
        }
        _ => source,
    };
    let survey = survey(&source).await?;
    Ok((
        source,
        disk_plan(
            name,
            survey,
            why_full,
            bitmap,
            last.map(|(point, _)| point.number),
        ),
    ))
}

fn disk_plan(
    name: String,
    survey: Survey,
    why_full: Option<String>,
    bitmap: Option<&str>,
    last: Option<u64>,
) -> DiskPlan {
    let is_full = why_full.is_some();
    let since = bitmap.filter(|_| !is_full).map(|name| Since {
        name: name.to_owned(),
        uuid: None,
    });
    DiskPlan {
        name,
        uuid: None,
        size: survey.size,
        mode: if is_full {
            Mode::Full
        } else {
            Mode::Incremental
        },
        reason: why_full,
        since,
        parent: last.filter(|_| !is_full),
        granularity: survey.granularity(),
        data: survey.data,
        zero: survey.zero,
    }
}

/// What the disk is called here: as asked, or as the export is called without what follows an `@`.
fn disk_name(asked: &[String], uri: &NbdUri) -> Result<String, Problem> {
    let name = match asked {
        [] => uri.export.split('@').next().unwrap_or_default(),
        [name] => name,
        _ => return Err(Problem::usage("--uri pulls one disk")),
    };
    match Name::parse(name) {
        Ok(name) => Ok(name.to_string()),
        Err(_) if asked.is_empty() && name.is_empty() => Ok("disk".to_owned()),
        Err(error) => Err(Problem::usage(error.to_string())
            .hint("say what the disk is to be called: stillpoint pull NAME --uri URI --to DIR")),
    }
}

fn row(disk: &DiskPlan) -> Row {
    let sum =
        |runs: &[std::ops::Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>();
    let (data, zero) = (sum(&disk.data), sum(&disk.zero));
    Row {
        disk: disk.name.clone(),
        size: disk.size,
        mode: disk.mode,
        reason: disk.reason.clone(),
        since: disk.since.as_ref().map(|since| since.name.clone()),
        since_uuid: None,
        parent: disk.parent,
        changed_bytes: data + zero,
        zero_bytes: Some(zero),
        copy_bytes: data,
        copied_bytes: 0,
    }
}
