//! `stillpoint verify`: whether everything in a folder of backups is still what was written.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::against::Comparison;
use super::damage::{Event, Finder, damages};
use super::problem::{Problem, exit};
use super::units::size;
use super::{Answers, Done};
use crate::archive::{Archive, Scope, verify};
use crate::nbd_uri::NbdUri;

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// The folder of backups.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Only this disk.
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    /// Only this point and what it builds on: a number, a checkpoint, a time (the last point not after
    /// it), or `latest`.
    #[arg(long, value_name = "POINT")]
    at: Option<String>,
    /// Compare a point, the latest without --at, with this frozen export, such as
    /// `nbd+unix:///vda@b1?socket=/run/nbd.sock`.
    #[arg(long, value_name = "URI")]
    against: Option<NbdUri>,
    /// Believe servers whose certificates ca-cert.pem of this directory vouches for, and show
    /// client-cert.pem to those that ask.
    #[arg(long, value_name = "DIR", requires = "against")]
    tls_creds: Option<PathBuf>,
    /// Say nothing but what is wrong.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Serialize)]
struct Summary {
    outcome: &'static str,
    points: u64,
    files: u64,
    bytes: u64,
    damages: u64,
}

impl VerifyArgs {
    pub(super) fn run(self, answers: &Answers) -> Result<Done, Problem> {
        let archive = Archive::open(&self.folder)?;
        let disk = self.disk.as_deref();
        let point = match &self.at {
            Some(at) => Some(archive.find(at, disk)?.number),
            None => None,
        };
        if let Some(disk) = disk
            && archive.last_of(disk).is_none()
        {
            let folder = self.folder.display();
            let message = format!("'{folder}' has no disk '{disk}'");
            return Err(Problem::new("unknown-disk", message));
        }
        let finder = Finder::new(answers, self.quiet);
        if let Some(uri) = &self.against {
            return self.compare(&archive, uri, &finder);
        }
        finder.begin("verify", disk);
        let disk = self.disk;
        let verified = verify(&archive, &Scope { disk, point }, &finder)?;
        drop(finder);
        let is_sound = verified.damages == 0;
        let exit = if is_sound { 0 } else { exit::DAMAGED };
        if answers.is_json {
            let text = Event::result(Summary {
                outcome: if is_sound { "sound" } else { "damaged" },
                points: verified.points,
                files: verified.files,
                bytes: verified.bytes,
                damages: verified.damages,
            });
            return Ok(Done { text, exit });
        }
        if !is_sound {
            let message = format!("{} found", damages(verified.damages));
            let hint = "stillpoint restore --keep-going restores what there is";
            return Err(Problem::new("verification-failed", message).hint(hint));
        }
        if self.quiet {
            let text = String::new();
            return Ok(Done { text, exit });
        }
        let text = format!(
            "sound: {} points, {} files, {}\n",
            verified.points,
            verified.files,
            size(verified.bytes)
        );
        Ok(Done { text, exit })
    }

    fn compare(&self, archive: &Archive, uri: &NbdUri, finder: &Finder) -> Result<Done, Problem> {
        let at = self.at.as_deref().unwrap_or("latest");
        let point = archive.find(at, self.disk.as_deref())?;
        let disk = match (&self.disk, &point.disks[..]) {
            (Some(disk), _) => disk,
            (None, [only]) => &only.name,
            (None, several) => {
                let message = format!("point {} has {} disks", point.number, several.len());
                return Err(Problem::usage(message).hint("say which one with --disk"));
            }
        };
        let comparison = Comparison {
            archive,
            point: point.number,
            disk,
            uri,
            tls_creds: self.tls_creds.as_deref(),
            is_quiet: self.quiet,
        };
        comparison.run(finder)
    }
}
