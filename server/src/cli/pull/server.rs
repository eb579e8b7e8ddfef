//! What a pull asks of the server whose disks it pulls.

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use crate::cli::client::{self, Client};
use crate::cli::hooks::{Held, HookArgs};
use crate::cli::problem::Problem;
use crate::cli::{NONE, pick};
use crate::control::answers::{BackupAnswer, CheckpointAnswer, DiskAnswer};
use crate::control::bitmaps::Node;

/// A server in its run directory.
pub(super) struct Server {
    client: Client,
    run_dir: PathBuf,
}

/// What a backup is begun with.
#[derive(Debug, Serialize)]
pub(super) struct Beginning<'a> {
    pub(super) id: &'a str,
    pub(super) disks: &'a [String],
    /// A checkpoint's uuid, or `last`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) since: Option<String>,
    pub(super) consumer: &'a str,
    /// Dirty bitmaps to freeze.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(super) bitmaps: &'a [&'a str],
}

impl Server {
    pub(super) fn connect(run_dir: &Path) -> Result<Self, Problem> {
        Ok(Self {
            client: Client::connect(run_dir)?,
            run_dir: run_dir.to_owned(),
        })
    }

    pub(super) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The disks of these names, in the server's order; all without any.
    pub(super) fn disks(&mut self, wanted: &[String]) -> Result<Vec<DiskAnswer>, Problem> {
        let answer = self.client.execute("query-disks", &NONE)?;
        self::wanted(client::parse(&answer)?, wanted)
    }

    pub(super) fn checkpoints(&mut self) -> Result<Vec<CheckpointAnswer>, Problem> {
        client::parse(&self.client.execute("query-checkpoints", &NONE)?)
    }

    /// The disks as QEMU would describe them, with their dirty bitmaps.
    pub(super) fn nodes(&mut self) -> Result<Vec<Node>, Problem> {
        client::parse(&self.client.execute("query-named-block-nodes", &NONE)?)
    }

    /// The open backups, broken ones too.
    pub(super) fn backups(&mut self) -> Result<Vec<BackupAnswer>, Problem> {
        client::parse(&self.client.execute("query-backups", &NONE)?)
    }

    /// The open backup of this uuid, if there still is one.
    pub(super) fn backup(&mut self, uuid: Uuid) -> Result<Option<BackupAnswer>, Problem> {
        let all = self.client.execute("query-backups", &NONE)?;
        let found = pick(&all, |backup: &BackupAnswer| backup.uuid == uuid)?;
        found.map(|backup| client::parse(&backup)).transpose()
    }

    /// Begins a backup of a guest that is held meanwhile, if hooks say so. What is wrong about the
    /// thaw costs nobody the instant.
    pub(super) fn begin(
        &mut self,
        beginning: &Beginning<'_>,
        hooks: &HookArgs,
    ) -> Result<(BackupAnswer, Option<Held>), Problem> {
        let disks = Some(beginning.disks);
        let mut occasion = hooks.occasion("pull", &mut self.client, disks)?;
        occasion.backup = Some(beginning.id.to_owned());
        let (answer, held) = hooks.around(occasion, || {
            let answer = self.client.execute("backup-begin", beginning)?;
            Ok((answer, Some(beginning.id.to_owned())))
        })?;
        Ok((client::parse(&answer)?, held))
    }

    pub(super) fn commit(&mut self, id: &str) -> Result<(), Problem> {
        self.client.execute("backup-commit", &Id { id }).map(drop)
    }

    pub(super) fn abort(&mut self, id: &str) -> Result<(), Problem> {
        self.client.execute("backup-abort", &Id { id }).map(drop)
    }
}

/// Those of the disks that have these names, in their order; all without any.
pub(super) fn wanted(
    mut disks: Vec<DiskAnswer>,
    names: &[String],
) -> Result<Vec<DiskAnswer>, Problem> {
    let is_there = |name: &&String| disks.iter().any(|disk| disk.disk.as_str() == *name);
    if let Some(unknown) = names.iter().find(|name| !is_there(name)) {
        let message = format!("there is no disk '{unknown}'");
        return Err(Problem::new("unknown-disk", message).hint("see: stillpoint status"));
    }
    disks.retain(|disk| names.is_empty() || names.iter().any(|name| name == disk.disk.as_str()));
    Ok(disks)
}

#[derive(Serialize)]
struct Id<'a> {
    id: &'a str,
}
