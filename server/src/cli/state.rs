//! `stillpoint state`: a disk moves to another machine, with all that is known of it.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;
use tokio::runtime;
use tokio::task::LocalSet;

use super::disk_option;
use super::problem::Problem;
use super::{Answers, Done};
use crate::archive::Digest;
use crate::carry::{ImageHash, Occupied, export_state, import_state};
use crate::failure::Failure;
use crate::served::DiskSpec;
use crate::state::Description;

#[derive(Debug, Subcommand)]
pub(super) enum StateCommand {
    /// Write all that is known of a disk into one file: checkpoints, bitmaps, consumers, and what changed
    /// when. No server may have the disk, and no backup may be open.
    Export {
        #[command(flatten)]
        disk: Disk,
        /// The file to write.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        /// Replace a file that is there.
        #[arg(long)]
        force: bool,
        /// Do not read the image: whoever imports the file has to vouch for its image.
        #[arg(long)]
        no_image_hash: bool,
    },
    /// Take in such a file, for an image that has the same bytes. No server may have the disk.
    Import {
        /// The file to read.
        file: PathBuf,
        #[command(flatten)]
        disk: Disk,
        /// Replace what is known of the disk here.
        #[arg(long)]
        force: bool,
        /// Do not compare the image. If it is not the one of that moment, byte for byte, backups will miss
        /// changes.
        #[arg(long)]
        no_image_hash: bool,
    },
}

#[derive(Args, Debug)]
pub(super) struct Disk {
    /// The disk, which no server has; as for serve.
    #[arg(
        long = "disk",
        value_name = "NAME=PATH[,KEY=VALUE]...",
        value_parser = OsStringValueParser::new().try_map(|text| disk_option::parse(&text).map(Box::new))
    )]
    spec: Box<DiskSpec>,
}

/// What was moved.
#[derive(Debug, Deserialize, Serialize)]
struct Answer {
    disk: String,
    disk_uuid: String,
    size: u64,
    granularity: u64,
    image_blake3: Option<String>,
    exported_at: String,
    checkpoints: Vec<String>,
    bitmaps: Vec<String>,
    file: String,
}

impl StateCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Export { .. } => "state export",
            Self::Import { .. } => "state import",
        }
    }

    pub(super) fn run(self, answers: &Answers) -> Result<Done, Problem> {
        let occupied = |force| {
            if force {
                Occupied::Goes
            } else {
                Occupied::Stays
            }
        };
        let hash = |skipped| {
            if skipped {
                ImageHash::Skipped
            } else {
                ImageHash::Read
            }
        };
        let (moved, disk, file, verb) = match self {
            Self::Export {
                disk: Disk { spec },
                to,
                force,
                no_image_hash,
            } => {
                let (force, hash) = (occupied(force), hash(no_image_hash));
                let exported = run(export_state(&spec, &to, force, hash))?;
                (exported, spec.name, to, "is in")
            }
            Self::Import {
                file,
                disk: Disk { spec },
                force,
                no_image_hash,
            } => {
                let (force, hash) = (occupied(force), hash(no_image_hash));
                let imported = run(import_state(&spec, &file, force, hash))?;
                (imported, spec.name, file, "is taken in from")
            }
        };
        let answer = Answer {
            disk: disk.to_string(),
            disk_uuid: moved.disk_uuid.to_string(),
            size: moved.size,
            granularity: moved.granularity,
            image_blake3: moved.image_blake3.as_ref().map(Digest::to_string),
            exported_at: moved.exported_at,
            checkpoints: moved.checkpoints.iter().map(ToString::to_string).collect(),
            bitmaps: moved.bitmaps,
            file: file.display().to_string(),
        };
        let answer = to_raw_value(&answer).expect("names and numbers");
        answers.show(&answer, |moved: &Answer| {
            let (checkpoints, bitmaps) = (moved.checkpoints.len(), moved.bitmaps.len());
            format!(
                "the state of {} {verb} {}: {checkpoints} checkpoints, {bitmaps} bitmaps\n",
                moved.disk, moved.file
            )
        })
    }
}

fn run(work: impl Future<Output = Result<Description, Failure>>) -> Result<Description, Problem> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Problem::new("cannot-start", format!("cannot start a runtime: {error}"))
    })?;
    Ok(LocalSet::new().block_on(&runtime, work)?)
}
