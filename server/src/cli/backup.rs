//! `stillpoint backup`: instants that are kept for as long as they are copied.

use clap::Subcommand;
use serde::Serialize;

use super::client::{self, Client};
use super::problem::{Problem, exit};
use super::show;
use super::{Answers, Disks, Done, NONE, pick};
use crate::control::answers::{BackupAnswer, BackupState, Mode};

#[derive(Debug, Subcommand)]
pub(super) enum BackupCommand {
    /// Freeze one instant of all disks, or of some, and show where to copy it from.
    Begin {
        /// What to call it; asked again for an open backup with the same arguments, it is that one
        /// [default: the next of b1, b2, ...].
        #[arg(long, value_name = "ID")]
        id: Option<String>,
        #[command(flatten)]
        disks: Disks,
        /// Show what changed since this checkpoint, given by name or uuid.
        #[arg(long, value_name = "CHECKPOINT")]
        since: Option<String>,
        /// Make this checkpoint of the instant; it exists when the backup is committed.
        #[arg(long, value_name = "NAME")]
        checkpoint: Option<String>,
        /// Serve this dirty bitmap as it is at the instant; may be given more than once.
        #[arg(long = "bitmap", value_name = "NAME")]
        bitmaps: Vec<String>,
    },
    /// Show all open backups.
    List,
    /// Show one open backup.
    Show {
        /// Its id.
        id: String,
    },
    /// The copy is complete: keep the checkpoint, let go of the instant.
    Commit {
        /// Its id.
        id: String,
    },
    /// The copy failed: as if the backup had never begun.
    Abort {
        /// Its id.
        id: String,
    },
}

impl BackupCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Begin { .. } => "backup begin",
            Self::List => "backup list",
            Self::Show { .. } => "backup show",
            Self::Commit { .. } => "backup commit",
            Self::Abort { .. } => "backup abort",
        }
    }
}

impl BackupCommand {
    pub(super) fn run(self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        match self {
            Self::Begin {
                id,
                disks,
                since,
                checkpoint,
                bitmaps,
            } => {
                let is_incremental_wanted = since.is_some();
                let disks = disks.arguments();
                let arguments = Beginning {
                    id,
                    disks,
                    since,
                    checkpoint,
                    bitmaps,
                };
                let answer = client.execute("backup-begin", &arguments)?;
                let mut done = answers.show(&answer, show::backup_begun)?;
                let backup: BackupAnswer = client::parse(&answer)?;
                let is_full = backup.disks.iter().any(|disk| disk.mode == Mode::Full);
                if is_incremental_wanted && is_full {
                    done.exit = exit::FULL;
                }
                Ok(done)
            }
            Self::List => {
                let answer = client.execute("query-backups", &NONE)?;
                answers.show(&answer, |list: &Vec<_>| show::backups(list))
            }
            Self::Show { id } => {
                let answer = client.execute("query-backups", &Identified { id: &id })?;
                let found = pick(&answer, |backup: &BackupAnswer| backup.id.as_str() == id)?;
                let found = found.ok_or_else(|| {
                    Problem::new("unknown-backup", format!("there is no open backup '{id}'"))
                })?;
                let mut done = answers.show(&found, show::backup)?;
                let backup: BackupAnswer = client::parse(&found)?;
                if backup.state == BackupState::Broken {
                    done.exit = exit::BROKEN;
                }
                Ok(done)
            }
            Self::Commit { id } => {
                let answer = client.execute("backup-commit", &Identified { id: &id })?;
                Ok(answers.confirm(&answer, &format!("backup {id} is committed\n")))
            }
            Self::Abort { id } => {
                let answer = client.execute("backup-abort", &Identified { id: &id })?;
                Ok(answers.confirm(&answer, &format!("backup {id} is aborted\n")))
            }
        }
    }
}

#[derive(Serialize)]
struct Identified<'a> {
    id: &'a str,
}

#[derive(Serialize)]
struct Beginning {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disks: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<String>,
}
