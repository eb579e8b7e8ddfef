//! `stillpoint backup`: instants that are kept for as long as they are copied.

use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::value::RawValue;

use super::client::{self, Client};
use super::hooks::{Held, HookArgs};
use super::problem::{Problem, exit};
use super::show;
use super::units::{parse_duration, parse_size};
use super::{Answers, Disks, Done, NONE, pick};
use crate::control::answers::{BackupAnswer, BackupDisk, BackupState, Mode};
use crate::service::FIRST_BACKUP;

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
        /// Show what changed since this checkpoint, given by name or uuid; or `last`: since the
        /// last backup that the consumer committed, of each disk.
        #[arg(long, value_name = "CHECKPOINT")]
        since: Option<String>,
        /// Make this checkpoint of the instant; it exists when the backup is committed.
        #[arg(long, value_name = "NAME")]
        checkpoint: Option<String>,
        /// Serve this dirty bitmap as it is at the instant; may be given more than once.
        #[arg(long = "bitmap", value_name = "NAME")]
        bitmaps: Vec<String>,
        /// Whose backup this is: its commit moves the consumer on, and `--since last` is where that
        /// was. Without --checkpoint one is made, and goes when the consumer has left it.
        #[arg(long, value_name = "NAME")]
        consumer: Option<String>,
        /// Abort the backup if nobody has ended it by then, such as 30m, 12h or 7d.
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        expires: Option<Duration>,
        /// Keep at most this much of overwritten blocks for it, such as 10G; it breaks before that is
        /// exceeded [default: `serve --backup-scratch-limit`].
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        scratch_limit: Option<u64>,
        #[command(flatten)]
        hooks: Box<HookArgs>,
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
                consumer,
                expires,
                scratch_limit,
                hooks,
            } => {
                if let Some(since @ ("last" | "latest")) = since.as_deref()
                    && consumer.is_none()
                {
                    let message = format!("--since {since} needs --consumer NAME");
                    return Err(Problem::usage(message).hint("whose last backup is meant?"));
                }
                let is_incremental_wanted = since.is_some();
                let disks = disks.arguments();
                let arguments = Beginning {
                    id,
                    disks,
                    since,
                    checkpoint,
                    bitmaps,
                    consumer,
                    // A part of a second is a second.
                    expires_s: expires.map(|time| time.as_millis().div_ceil(1000) as u64),
                    scratch_limit,
                };
                let (answer, held) = begin(client, &arguments, &hooks)?;
                let mut done = answers.show_held(&answer, held.as_ref(), show::backup_begun)?;
                let backup: BackupAnswer = client::parse(&answer)?;
                // That a first backup is full is no surprise.
                let is_surprise = |disk: &BackupDisk| {
                    disk.mode == Mode::Full && disk.reason.as_deref() != Some(FIRST_BACKUP)
                };
                if is_incremental_wanted && done.exit == 0 && backup.disks.iter().any(is_surprise) {
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

/// Begins a backup of a guest that is held meanwhile, if hooks say so.
fn begin(
    client: &mut Client,
    arguments: &Beginning,
    hooks: &HookArgs,
) -> Result<(Box<RawValue>, Option<Held>), Problem> {
    let mut occasion = hooks.occasion("backup begin", client, arguments.disks.as_deref())?;
    occasion.backup.clone_from(&arguments.id);
    occasion.checkpoint.clone_from(&arguments.checkpoint);
    hooks.around(occasion, || {
        let answer = client.execute("backup-begin", arguments)?;
        let backup: BackupAnswer = client::parse(&answer)?;
        Ok((answer, Some(backup.id.to_string())))
    })
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
    #[serde(skip_serializing_if = "Option::is_none")]
    consumer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_s: Option<u64>,
    scratch_limit: Option<u64>,
}
