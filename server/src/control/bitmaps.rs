//! QEMU's commands for dirty bitmaps, with its names and its words.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answers::path_text;
use super::arguments::{Arguments, bad_argument, shortened};
use super::request::Refusal;
use crate::failure::Failure;
use crate::names::Name;
use crate::served::ServedDisk;
use crate::service::{Action, Addition, Bitmap, InImage, Service, Source};

/// The commands that end in one [`Action`], which are also what a transaction consists of.
pub(super) const COMMANDS: &[&str] = &[
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
];

/// What one command asks for; `None` if it is none of [`COMMANDS`].
pub(super) fn action(name: &str, arguments: &mut Arguments) -> Result<Option<Action>, Refusal> {
    let Some(verb) = name.strip_prefix("block-dirty-bitmap-") else {
        return Ok(None);
    };
    if !COMMANDS.contains(&name) {
        return Ok(None);
    }
    let node = arguments.required_text("node")?;
    Ok(Some(match verb {
        "add" => Action::Add(Addition {
            node,
            name: arguments.required_text("name")?,
            granularity: arguments.number("granularity", u32::MAX.into())?,
            persistent: arguments.flag("persistent")?,
            disabled: arguments.flag("disabled")?,
        }),
        "merge" => Action::Merge {
            node,
            target: arguments.required_text("target")?,
            sources: sources(arguments)?,
        },
        verb => {
            let name = arguments.required_text("name")?;
            match verb {
                "remove" => Action::Remove { node, name },
                "clear" => Action::Clear { node, name },
                "enable" => Action::Enable { node, name },
                _ => Action::Disable { node, name },
            }
        }
    }))
}

/// What a transaction asks for.
pub(super) fn transaction(arguments: &mut Arguments) -> Result<Vec<Action>, Refusal> {
    let mut actions = Vec::new();
    let mut first_kind = None;
    for mut member in arguments.required_objects("actions")? {
        let kind = member.required_text("type")?;
        if kind != "abort" && !COMMANDS.contains(&kind.as_str()) {
            return Err(not_accepted("type", &kind));
        }
        let mut data = member.required_object("data")?;
        actions.push(action(&kind, &mut data)?.unwrap_or(Action::Abort));
        data.finish()?;
        member.finish()?;
        first_kind.get_or_insert(kind);
    }
    let Some(mut properties) = arguments.object("properties")? else {
        return Ok(actions);
    };
    let mode = properties.text("completion-mode")?;
    properties.finish()?;
    match (mode.as_deref(), first_kind) {
        (None | Some("individual"), _) | (Some("grouped"), None) => Ok(actions),
        (Some("grouped"), Some(kind)) => Err(bad_argument(format!(
            "Action '{kind}' does not support transaction property completion-mode = grouped"
        ))),
        (Some(other), _) => Err(not_accepted("completion-mode", other)),
    }
}

fn sources(arguments: &mut Arguments) -> Result<Vec<Source>, Refusal> {
    let source = |(member, path): (Value, String)| match member {
        Value::String(name) => Ok(Source { node: None, name }),
        Value::Object(members) => {
            let mut arguments = Arguments::nested(members, path);
            let source = Source {
                node: Some(arguments.required_text("node")?),
                name: arguments.required_text("name")?,
            };
            arguments.finish()?;
            Ok(source)
        }
        _ => Err(bad_argument(
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        )),
    };
    arguments
        .required_array("bitmaps")?
        .into_iter()
        .map(source)
        .collect()
}

fn not_accepted(key: &str, value: &str) -> Refusal {
    let value = shortened(value);
    bad_argument(format!("Parameter '{key}' does not accept value '{value}'"))
}

/// A disk, as `query-named-block-nodes` has it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Node {
    /// The disk.
    #[serde(rename = "node-name")]
    pub(crate) disk: Name,
    /// The image's format.
    pub(crate) drv: String,
    /// Nobody may write it.
    pub(crate) ro: bool,
    /// The image.
    pub(crate) file: String,
    /// More of it.
    pub(crate) image: Image,
    /// The newest first, as in QEMU, which leaves this out where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) dirty_bitmaps: Vec<DirtyBitmap>,
}

/// An image, as QEMU describes it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Image {
    /// Where it is.
    pub(crate) filename: String,
    /// Its format.
    pub(crate) format: String,
    /// The size of the disk in bytes.
    pub(crate) virtual_size: u64,
}

/// A dirty bitmap, as QEMU describes it.
#[derive(Debug, Deserialize, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "it is QEMU's shape")]
pub(crate) struct DirtyBitmap {
    /// Its name.
    pub(crate) name: String,
    /// How much is dirty, in bytes; a last block that the disk cuts short counts whole.
    pub(crate) count: u64,
    /// In bytes.
    pub(crate) granularity: u64,
    /// Whether it takes in what changes.
    pub(crate) recording: bool,
    /// Nothing can be done to it: a backup serves it.
    pub(crate) busy: bool,
    /// It outlives the server.
    pub(crate) persistent: bool,
    /// It is of no use, and can only be removed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) inconsistent: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// Describes all disks. Counting what is dirty on a large one takes a while, which the other clients
/// do not feel.
pub(super) async fn nodes(service: Arc<Service>) -> Result<Vec<Node>, Failure> {
    tokio::task::spawn_blocking(move || {
        let disks = service.disks();
        let nodes = disks.values().map(|disk| node(&service, disk));
        nodes.collect()
    })
    .await
    .map_err(|error| {
        Failure::new(
            "internal",
            format!("counting what is dirty failed: {error}"),
        )
    })
}

fn node(service: &Service, disk: &ServedDisk) -> Node {
    let busy = service.busy_bitmaps();
    let bitmaps = service.book().bitmaps.of(disk.name.as_str()).to_vec();
    let describe = |bitmap: &Bitmap| {
        let dirty = bitmap.dirty(disk);
        let granularity = bitmap.granularity.bytes();
        let (count, recording) = match &dirty {
            Ok(dirty) => (dirty.dirty_bytes(disk.disk.map()), dirty.since.is_some()),
            Err(_) => (0, false),
        };
        let recording = recording || bitmap.in_image == Some(InImage::Recording);
        DirtyBitmap {
            name: bitmap.name.clone(),
            count,
            granularity,
            recording,
            busy: busy.contains(&bitmap.uuid),
            persistent: bitmap.persistent || bitmap.in_image.is_some(),
            inconsistent: dirty.is_err(),
        }
    };
    let format = disk.disk.image().format();
    let filename = path_text(&disk.path);
    Node {
        disk: disk.name.clone(),
        drv: format.to_owned(),
        ro: disk.read_only,
        file: filename.clone(),
        image: Image {
            filename,
            format: format.to_owned(),
            virtual_size: disk.disk.size(),
        },
        dirty_bitmaps: bitmaps.iter().rev().map(describe).collect(),
    }
}
