//! `stillpoint checkpoint`: points in time from which changes are known.

use clap::Subcommand;
use serde::Serialize;

use super::carry::{ExportArgs, ImportArgs, Kind};
use super::client::Client;
use super::hooks::HookArgs;
use super::problem::Problem;
use super::show;
use super::{Answers, Disks, Done, NONE, pick};
use crate::control::answers::CheckpointAnswer;

#[derive(Debug, Subcommand)]
pub(super) enum CheckpointCommand {
    /// Name this instant of all disks, or of some.
    Create {
        /// What to call it.
        name: String,
        #[command(flatten)]
        disks: Disks,
        #[command(flatten)]
        hooks: Box<HookArgs>,
    },
    /// Show all checkpoints, with how much has changed since each.
    List,
    /// Show one checkpoint.
    Show {
        /// Its name.
        name: String,
    },
    /// Forget a checkpoint; what changed since any other one stays known.
    Delete {
        /// Its name.
        name: String,
        /// Also if it is the last one of a consumer, whose next backup is then a full one.
        #[arg(long)]
        force: bool,
    },
    /// Make a checkpoint of what a file says has changed: a bitmap in a qcow2 image, or a list of
    /// extents. It counts as changed since every other checkpoint too.
    Import(ImportArgs),
    /// Write what has changed since a checkpoint into a qcow2 image, as a dirty bitmap, or as a list of
    /// extents.
    Export(ExportArgs),
}

impl CheckpointCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Create { .. } => "checkpoint create",
            Self::List => "checkpoint list",
            Self::Show { .. } => "checkpoint show",
            Self::Delete { .. } => "checkpoint delete",
            Self::Import(_) => "checkpoint import",
            Self::Export(_) => "checkpoint export",
        }
    }
}

impl CheckpointCommand {
    pub(super) fn run(self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        match self {
            Self::Create { name, disks, hooks } => {
                let disks = disks.arguments();
                let mut occasion = hooks.occasion("checkpoint create", client, disks.as_deref())?;
                occasion.checkpoint = Some(name.clone());
                let arguments = Named { name: &name, disks };
                let (answer, held) = hooks.around(occasion, || {
                    Ok((client.execute("checkpoint-create", &arguments)?, None))
                })?;
                answers.show_held(&answer, held.as_ref(), show::checkpoint_created)
            }
            Self::List => {
                let answer = client.execute("query-checkpoints", &NONE)?;
                answers.show(&answer, |list: &Vec<_>| show::checkpoints(list))
            }
            Self::Show { name } => {
                let all = client.execute("query-checkpoints", &NONE)?;
                let found = pick(&all, |checkpoint: &CheckpointAnswer| {
                    checkpoint.name.as_str() == name || checkpoint.uuid.to_string() == name
                })?;
                let found = found.ok_or_else(|| {
                    Problem::new(
                        "unknown-checkpoint",
                        format!("there is no checkpoint '{name}'"),
                    )
                    .hint("see: stillpoint checkpoint list")
                })?;
                answers.show(&found, show::checkpoint)
            }
            Self::Delete { name, force } => {
                let arguments = Deletion { name: &name, force };
                let answer = client.execute("checkpoint-delete", &arguments)?;
                Ok(answers.confirm(&answer, &format!("checkpoint {name} is deleted\n")))
            }
            Self::Import(args) => args.run(client, answers),
            Self::Export(args) => args.run(Kind::Checkpoint, client, answers),
        }
    }
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    disks: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Deletion<'a> {
    name: &'a str,
    force: bool,
}
