//! `checkpoint` and `bitmap`, `import` and `export`: what has changed, brought from elsewhere and taken
//! elsewhere.
//!
//! What is imported is read by the server. What is exported is asked of it piece by piece, and written
//! here: the file is the user's business.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use block::qcow2::{Existing, NewBitmap, NotStored, Refusal, store_bitmap};
use clap::{Args, ValueEnum};
use serde::Serialize;
use uuid::Uuid;

use super::bitmap::NewBitmapArgs;
use super::client::{self, Client};
use super::problem::Problem;
use super::units::size;
use super::{Answers, Done};
use crate::carry::{NotWritten, Occupied, write_aside, write_extents};
use crate::control::answers::{ChangesAnswer, ExportAnswer, ImportAnswer};

#[derive(Args, Debug)]
pub(super) struct ImportArgs {
    /// The disk.
    disk: String,
    /// What to call it.
    name: String,
    /// A qcow2 image with the bitmap, or a list of extents as `nbdinfo --json
    /// --map=qemu:dirty-bitmap:NAME` prints it, or as `export` writes it. The server reads it.
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// The bitmap in the image that is meant, if it has another name there.
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,
    /// The file tells how the disk was at this checkpoint [default: when it was served for the first
    /// time]; what was written since has changed as well.
    #[arg(long, value_name = "CHECKPOINT")]
    as_of: Option<String>,
}

/// More of what a dirty bitmap is to be.
#[derive(Args, Debug)]
pub(super) struct ImportedBitmapArgs {
    #[command(flatten)]
    import: ImportArgs,
    #[command(flatten)]
    bitmap: NewBitmapArgs,
}

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    /// The disk.
    disk: String,
    /// What to export.
    name: String,
    /// Where to: a qcow2 image of the disk, which nobody uses and which gets a dirty bitmap; a new
    /// file for a list of extents; `-` for standard output.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// What FILE is [default: qcow2 if it is called so, else json].
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// What the bitmap in the image is to be called [default: as here].
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,
    /// Have nobody record in the bitmap before it is enabled.
    #[arg(long)]
    disabled: bool,
    /// Replace what is there: a list, or a bitmap of that name, or bitmaps that nobody can believe.
    #[arg(long)]
    force: bool,
}

/// What is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    /// A list of extents, as nbdinfo prints it.
    Json,
    /// A dirty bitmap in an image.
    Qcow2,
}

/// What of a disk is exported.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Checkpoint,
    Bitmap,
}

impl ImportArgs {
    /// Makes a checkpoint.
    pub(super) fn run(&self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        let answer = client.execute("checkpoint-import", &self.request()?)?;
        answers.show(&answer, |done| imported("checkpoint", done))
    }

    fn request(&self) -> Result<Import<'_>, Problem> {
        let from = absolute(&self.from)?;
        Ok(Import {
            disk: &self.disk,
            name: &self.name,
            from: text_of(from)?,
            bitmap: self.bitmap.as_deref(),
            as_of: self.as_of.as_deref(),
        })
    }
}

impl ImportedBitmapArgs {
    /// Makes a dirty bitmap.
    pub(super) fn run(&self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        let arguments = BitmapImport {
            import: self.import.request()?,
            granularity: self.bitmap.granularity,
            transient: self.bitmap.transient,
            disabled: self.bitmap.disabled,
        };
        let answer = client.execute("bitmap-import", &arguments)?;
        answers.show(&answer, |done| imported("bitmap", done))
    }
}

fn imported(what: &str, done: &ImportAnswer) -> String {
    let ImportAnswer {
        disk,
        name,
        told_bytes,
        dirty_bytes,
    } = done;
    let (told, dirty) = (size(*told_bytes), size(*dirty_bytes));
    format!("{what} {name} of {disk}: {told} from the file, {dirty} have changed in all\n")
}

impl ExportArgs {
    pub(super) fn run(
        &self,
        kind: Kind,
        client: &mut Client,
        answers: &Answers,
    ) -> Result<Done, Problem> {
        let to_stdout = self.to == Path::new("-");
        let is_qcow2 = self.to.extension().is_some_and(|name| name == "qcow2");
        let format = match self.format {
            Some(format) => format,
            None if is_qcow2 => Format::Qcow2,
            None => Format::Json,
        };
        if format == Format::Json && (self.disabled || self.bitmap.is_some()) {
            let message = "--disabled and --bitmap are about a bitmap in a qcow2 image";
            return Err(Problem::usage(message));
        }
        let changes = Changes::ask(client, self, kind)?;
        match format {
            Format::Json if to_stdout => {
                let mut text = Vec::new();
                changes.write_list(&mut text).expect("memory does not fail");
                let text = String::from_utf8(text).expect("it is JSON");
                return Ok(Done { text, exit: 0 });
            }
            Format::Json => self.write_list(&changes)?,
            Format::Qcow2 if to_stdout => {
                return Err(Problem::usage("a bitmap goes into an image, and not to -"));
            }
            Format::Qcow2 => self.store(&changes)?,
        }
        let answer = ExportAnswer {
            disk: self.disk.clone(),
            name: self.name.clone(),
            to: self.to.display().to_string(),
            size: changes.size,
            dirty_bytes: changes
                .dirty
                .iter()
                .map(|range| range.end - range.start)
                .sum(),
        };
        let answer = serde_json::value::to_raw_value(&answer).expect("names and numbers");
        answers.show(&answer, |done: &ExportAnswer| {
            let dirty = size(done.dirty_bytes);
            format!(
                "{dirty} that have changed on {} are in {}\n",
                done.disk, done.to
            )
        })
    }

    fn write_list(&self, changes: &Changes) -> Result<(), Problem> {
        let occupied = if self.force {
            Occupied::Goes
        } else {
            Occupied::Stays
        };
        let written = write_aside(&self.to, occupied, |list| changes.write_list(list));
        written.map_err(|error| match error {
            NotWritten::Exists => {
                let message = format!("'{}' exists", self.to.display());
                let hint = "with --force it is replaced; an image is written with --format qcow2";
                Problem::new("output-exists", message).hint(hint)
            }
            other => cannot_write(&self.to, &other),
        })
    }

    fn store(&self, changes: &Changes) -> Result<(), Problem> {
        let mut options = File::options();
        let file = options.read(true).write(true).open(&self.to);
        let file = file.map_err(|error| cannot_write(&self.to, &error))?;
        let name = self.bitmap.as_ref().unwrap_or(&self.name);
        let bitmap = NewBitmap {
            name,
            granularity: changes.granularity,
            recording: !self.disabled,
            dirty: &changes.dirty,
        };
        let existing = if self.force {
            Existing::Goes
        } else {
            Existing::Stays
        };
        let stored = store_bitmap(&file, changes.size, &bitmap, existing);
        stored.map_err(|error| not_stored(&self.to, name, &error))
    }
}

/// What has changed, as the server has told it.
struct Changes {
    uuid: Uuid,
    revision: Option<u64>,
    size: u64,
    granularity: u64,
    dirty: Vec<Range<u64>>,
}

impl Changes {
    /// Asks for all of it. What guests write meanwhile may be in it.
    fn ask(client: &mut Client, args: &ExportArgs, kind: Kind) -> Result<Self, Problem> {
        let mut ask = |offset| -> Result<ChangesAnswer, Problem> {
            let name = Some(args.name.as_str());
            let arguments = Query {
                disk: &args.disk,
                checkpoint: name.filter(|_| matches!(kind, Kind::Checkpoint)),
                bitmap: name.filter(|_| matches!(kind, Kind::Bitmap)),
                offset,
            };
            client::parse(&client.execute("query-changes", &arguments)?)
        };
        let first = ask(0)?;
        let mut next = first.next;
        let mut all = Self::of(first);
        while let Some(offset) = next {
            let more = ask(offset)?;
            next = more.next;
            let more = Self::of(more);
            if (more.uuid, more.revision, more.size) != (all.uuid, all.revision, all.size) {
                let message = format!("'{}' was changed while it was exported", args.name);
                return Err(Problem::new("changed-meanwhile", message).hint("try again"));
            }
            for range in more.dirty {
                match all.dirty.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => all.dirty.push(range),
                }
            }
        }
        Ok(all)
    }

    fn of(answer: ChangesAnswer) -> Self {
        let dirty = answer.dirty.into_iter();
        Self {
            uuid: answer.uuid,
            revision: answer.revision,
            size: answer.size,
            granularity: answer.granularity,
            dirty: dirty
                .map(|(offset, length)| offset..offset + length)
                .collect(),
        }
    }

    fn write_list(&self, list: &mut impl Write) -> io::Result<()> {
        write_extents(list, self.size, self.dirty.iter().cloned())
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path)
        .map_err(|error| Problem::usage(format!("the path '{}': {error}", path.display())))
}

fn text_of(path: PathBuf) -> Result<String, Problem> {
    path.into_os_string().into_string().map_err(|path| {
        let path = path.display().to_string();
        Problem::usage(format!("the path '{path}' is no text"))
    })
}

fn cannot_write(path: &Path, error: &dyn std::error::Error) -> Problem {
    let message = format!("cannot write '{}': {error}", path.display());
    Problem::new("not-writable", message)
}

fn not_stored(path: &Path, bitmap: &str, error: &NotStored) -> Problem {
    let (code, hint) = match error {
        NotStored::Lock(_) => ("image-locked", Some("stop whoever uses it")),
        NotStored::Refused(Refusal::Encrypted(_)) => ("image-encrypted", None),
        NotStored::Refused(Refusal::UnknownFeatures(_)) => ("image-features", None),
        NotStored::Refused(Refusal::Corrupt) => ("image-corrupt", Some(REPAIR)),
        NotStored::Refused(Refusal::Dirty) => ("image-dirty", Some(REPAIR)),
        NotStored::Version2 => (
            "image-version",
            Some("qemu-img amend -o compat=1.1 makes one of version 3 of it"),
        ),
        NotStored::OtherSize { .. } => ("other-size", None),
        NotStored::Exists => ("bitmap-exists", Some("with --force it is replaced")),
        NotStored::Stale => (
            "bitmap-inconsistent",
            Some("with --force they go; qemu-img check -r leaks gives their space back"),
        ),
        NotStored::Bitmap(_) => ("bad-argument", None),
        NotStored::Io(_) => ("not-writable", None),
        _ => ("bad-image", None),
    };
    let message = format!("cannot store '{bitmap}' in '{}': {error}", path.display());
    let problem = Problem::new(code, message);
    match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

const REPAIR: &str = "qemu-img check -r all repairs what can be";

#[derive(Serialize)]
struct Import<'a> {
    disk: &'a str,
    name: &'a str,
    from: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    as_of: Option<&'a str>,
}

#[derive(Serialize)]
struct BitmapImport<'a> {
    #[serde(flatten)]
    import: Import<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    granularity: Option<u64>,
    transient: bool,
    disabled: bool,
}

#[derive(Serialize)]
struct Query<'a> {
    disk: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<&'a str>,
    offset: u64,
}
