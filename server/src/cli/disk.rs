//! `stillpoint disk`: disks themselves, whether or not a server has them.

use std::path::Path;

use clap::Subcommand;
use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::Serialize;
use tokio::runtime;
use tokio::task::LocalSet;

use super::add_arguments::AddArguments;
use super::client::{self, Client};
use super::disk_option;
use super::problem::Problem;
use super::units::{parse_size, size};
use super::{Answers, Done, NONE};
use crate::control::answers::{DiskAnswer, ResizeAnswer};
use crate::new_size::NewSize;
use crate::served::DiskSpec;
use crate::service::resize_alone;

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Serve one disk more, until the server stops: what it is to have at its next start is what its own
    /// --disk say.
    Add {
        /// The disk, as --disk of serve has it.
        #[arg(
            value_name = "NAME=PATH[,KEY=VALUE]...",
            value_parser = OsStringValueParser::new().try_map(|text| disk_option::parse(&text).map(Box::new))
        )]
        disk: Box<DiskSpec>,
    },
    /// Serve a disk no more. What is known of it stays with it, for whoever serves it next.
    Remove {
        /// The disk.
        disk: String,
        /// Also if clients have it open: they are disconnected.
        #[arg(long)]
        force: bool,
    },
    /// Make a disk larger. Without --disk it is one that the server has.
    Resize {
        /// The disk is this image, which no server has; as for serve.
        #[arg(
            long = "disk",
            value_name = "NAME=PATH[,KEY=VALUE]...",
            value_parser = OsStringValueParser::new().try_map(|text| disk_option::parse(&text).map(Box::new))
        )]
        image: Option<Box<DiskSpec>>,
        /// The disk.
        disk: String,
        /// How large it is to be, or with a '+' how much larger.
        #[arg(value_name = "[+]SIZE", value_parser = parse_new_size, allow_hyphen_values = true)]
        size: NewSize,
    },
    /// Say that the server which has the image has ended everything that was given up: it was started
    /// anew, say, and so was what it writes to. Else that is in every backup.
    Settle {
        /// The disk.
        disk: String,
    },
}

impl DiskCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "disk add",
            Self::Remove { .. } => "disk remove",
            Self::Resize { .. } => "disk resize",
            Self::Settle { .. } => "disk settle",
        }
    }

    pub(super) fn run(self, run_dir: &Path, answers: &Answers) -> Result<Done, Problem> {
        match self {
            Self::Add { disk } => {
                let arguments = AddArguments::of(&disk)?;
                let answer = Client::connect(run_dir)?.execute("disk-add", &arguments)?;
                answers.show(&answer, added)
            }
            Self::Remove { disk, force } => {
                let arguments = Remove { disk: &disk, force };
                let answer = Client::connect(run_dir)?.execute("disk-remove", &arguments)?;
                Ok(answers.confirm(&answer, &format!("{disk} is removed\n")))
            }
            Self::Resize { image, disk, size } => {
                let answer = match image {
                    Some(image) => resize_image(&image, &disk, size)?,
                    None => resize_served(&mut Client::connect(run_dir)?, &disk, size)?,
                };
                answers.show(&answer, resized)
            }
            Self::Settle { disk } => {
                let mut client = Client::connect(run_dir)?;
                let answer = client.execute("disk-settle", &Settle { disk: &disk })?;
                Ok(answers.confirm(&answer, &format!("{disk} is settled\n")))
            }
        }
    }
}

fn resize_served(
    client: &mut Client,
    disk: &str,
    size: NewSize,
) -> Result<Box<serde_json::value::RawValue>, Problem> {
    let size = match size {
        NewSize::Exactly(size) => size,
        relative => {
            let disks: Vec<DiskAnswer> = client::parse(&client.execute("query-disks", &NONE)?)?;
            let now = disks.iter().find(|known| known.disk.as_str() == disk);
            // The server says best what it knows.
            now.map_or(Some(0), |known| relative.from(known.size))
                .ok_or_else(|| Problem::usage("no disk can have that size"))?
        }
    };
    client.execute("disk-resize", &Resize { disk, size })
}

fn resize_image(
    image: &DiskSpec,
    disk: &str,
    size: NewSize,
) -> Result<Box<serde_json::value::RawValue>, Problem> {
    if image.name.as_str() != disk {
        let message = format!("--disk says what '{}' is, and not '{disk}'", image.name);
        return Err(Problem::usage(message));
    }
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Problem::new("cannot-start", format!("cannot start a runtime: {error}"))
    })?;
    let resized = LocalSet::new().block_on(&runtime, resize_alone(image, size))?;
    let answer = ResizeAnswer::new(image.name.clone(), resized);
    Ok(serde_json::value::to_raw_value(&answer).expect("names and numbers can be JSON"))
}

fn added(disk: &DiskAnswer) -> String {
    let first = format!("{}  {}  {}\n", disk.disk, size(disk.size), disk.path);
    disk.live_uris
        .iter()
        .fold(first, |text, uri| text + "  live  " + uri + "\n")
}

fn resized(answer: &ResizeAnswer) -> String {
    let ResizeAnswer {
        disk,
        size_before,
        size: now,
    } = answer;
    if size_before == now {
        return format!("{disk} has {} already\n", size(*now));
    }
    format!(
        "{disk} has {} now, and had {}\n",
        size(*now),
        size(*size_before)
    )
}

/// As `qemu-img resize` reads it.
fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(more) = text.strip_prefix('+') {
        return parse_size(more).map(NewSize::Larger);
    }
    match text.strip_prefix('-') {
        Some(less) => parse_size(less).map(NewSize::Smaller),
        None => parse_size(text).map(NewSize::Exactly),
    }
}

#[derive(Serialize)]
struct Resize<'a> {
    disk: &'a str,
    size: u64,
}

#[derive(Serialize)]
struct Remove<'a> {
    disk: &'a str,
    force: bool,
}

#[derive(Serialize)]
struct Settle<'a> {
    disk: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative_as_in_qemu_img() {
        assert_eq!(parse_new_size("1M"), Ok(NewSize::Exactly(1 << 20)));
        assert_eq!(parse_new_size("+4096"), Ok(NewSize::Larger(4096)));
        assert_eq!(parse_new_size("-1k"), Ok(NewSize::Smaller(1024)));
        for bad in ["", "+", "-", "++1", "1 M", "+-1"] {
            assert!(parse_new_size(bad).is_err(), "{bad}");
        }
    }
}
