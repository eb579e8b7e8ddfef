//! `stillpoint bitmap`: dirty bitmaps, as QEMU has them.

use clap::Subcommand;
use serde::Serialize;

use super::carry::{ExportArgs, ImportedBitmapArgs, Kind};
use super::client::Client;
use super::problem::Problem;
use super::table::Table;
use super::units::{parse_size, size};
use super::{Answers, Done, NONE};
use crate::control::bitmaps::{DirtyBitmap, Node};

#[derive(Debug, Subcommand)]
pub(super) enum BitmapCommand {
    /// Make a bitmap that records what changes on a disk from now on.
    Add {
        /// The disk.
        disk: String,
        /// What to call the bitmap.
        name: String,
        #[command(flatten)]
        bitmap: NewBitmapArgs,
    },
    /// Forget a bitmap.
    Remove(Which),
    /// Begin anew: nothing is dirty.
    Clear(Which),
    /// Record from now on; what is dirty stays so.
    Enable(Which),
    /// Record no more; what is dirty stays so.
    Disable(Which),
    /// Make dirty in one bitmap what is dirty in others.
    Merge {
        /// The disk.
        disk: String,
        /// The bitmap that changes.
        target: String,
        /// The others.
        #[arg(required = true)]
        sources: Vec<String>,
    },
    /// Make a bitmap of what a file says has changed, which records from now on: a bitmap in a qcow2
    /// image, or a list of extents.
    Import(ImportedBitmapArgs),
    /// Write what is dirty into a qcow2 image, as a dirty bitmap, or as a list of extents.
    Export(ExportArgs),
    /// Show the bitmaps of all disks.
    List,
}

/// What a new bitmap is to be like.
#[derive(Debug, clap::Args)]
pub(super) struct NewBitmapArgs {
    /// How much of the disk one bit stands for: a power of two, not finer than the disk's own
    /// granularity [default: 64k, or the disk's if that is coarser].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) granularity: Option<u64>,
    /// Do not record before it is enabled.
    #[arg(long)]
    pub(super) disabled: bool,
    /// Forget it when the server stops.
    #[arg(long)]
    pub(super) transient: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// The disk.
    disk: String,
    /// The bitmap.
    name: String,
}

impl BitmapCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "bitmap add",
            Self::Remove(_) => "bitmap remove",
            Self::Clear(_) => "bitmap clear",
            Self::Enable(_) => "bitmap enable",
            Self::Disable(_) => "bitmap disable",
            Self::Merge { .. } => "bitmap merge",
            Self::Import(_) => "bitmap import",
            Self::Export(_) => "bitmap export",
            Self::List => "bitmap list",
        }
    }

    pub(super) fn run(self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        let mut change = |which: &Which, verb: &str, done: &str| {
            let Which { disk, name } = which;
            let command = format!("block-dirty-bitmap-{verb}");
            let answer = client.execute(&command, &Named { node: disk, name })?;
            Ok(answers.confirm(&answer, &format!("bitmap {name} of {disk} {done}\n")))
        };
        match &self {
            Self::Remove(which) => change(which, "remove", "is removed"),
            Self::Clear(which) => change(which, "clear", "is clear"),
            Self::Enable(which) => change(which, "enable", "records"),
            Self::Disable(which) => change(which, "disable", "records no more"),
            Self::Add { disk, name, bitmap } => {
                let arguments = Addition {
                    node: disk,
                    name,
                    granularity: bitmap.granularity,
                    persistent: !bitmap.transient,
                    disabled: bitmap.disabled,
                };
                let answer = client.execute("block-dirty-bitmap-add", &arguments)?;
                Ok(answers.confirm(&answer, &format!("bitmap {name} of {disk} is made\n")))
            }
            Self::Merge {
                disk,
                target,
                sources,
            } => {
                let arguments = Merger {
                    node: disk,
                    target,
                    bitmaps: sources,
                };
                let answer = client.execute("block-dirty-bitmap-merge", &arguments)?;
                let sources = sources.join(", ");
                Ok(answers.confirm(
                    &answer,
                    &format!("bitmap {target} of {disk} has {sources}\n"),
                ))
            }
            Self::Import(args) => args.run(client, answers),
            Self::Export(args) => args.run(Kind::Bitmap, client, answers),
            Self::List => {
                let answer = client.execute("query-named-block-nodes", &NONE)?;
                answers.show(&answer, |nodes: &Vec<Node>| list(nodes))
            }
        }
    }
}

fn list(nodes: &[Node]) -> String {
    let mut table = Table::new(["DISK", "BITMAP", "DIRTY", "GRANULARITY", "KEPT", "STATE"]);
    let mut is_empty = true;
    for node in nodes {
        // The oldest first, as everywhere here but in QEMU's answer.
        for bitmap in node.dirty_bitmaps.iter().rev() {
            is_empty = false;
            table.push([
                node.disk.to_string(),
                printable(&bitmap.name),
                size(bitmap.count),
                size(bitmap.granularity),
                if bitmap.persistent { "yes" } else { "no" }.to_owned(),
                state(bitmap),
            ]);
        }
    }
    if is_empty {
        return "no bitmaps\n".to_owned();
    }
    table.render()
}

fn state(bitmap: &DirtyBitmap) -> String {
    if bitmap.inconsistent {
        return "inconsistent".to_owned();
    }
    let recording = if bitmap.recording {
        "recording"
    } else {
        "disabled"
    };
    let busy = if bitmap.busy { ", busy" } else { "" };
    format!("{recording}{busy}")
}

/// Names may hold anything; a terminal is not to be told what to do by one.
fn printable(name: &str) -> String {
    let escape = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.into()
        }
    };
    name.chars().map(escape).collect()
}

#[derive(Serialize)]
struct Named<'a> {
    node: &'a str,
    name: &'a str,
}

#[derive(Serialize)]
struct Addition<'a> {
    node: &'a str,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    granularity: Option<u64>,
    persistent: bool,
    disabled: bool,
}

#[derive(Serialize)]
struct Merger<'a> {
    node: &'a str,
    target: &'a str,
    bitmaps: &'a [String],
}
