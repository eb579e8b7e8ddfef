//! What a client asks for, from JSON that nobody believes yet.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::arguments::{Arguments, bad_request, shortened};
use super::messages::Reply;
use super::{bitmaps, carry, disk_arguments};
use crate::failure::Failure;
use crate::names::Name;
use crate::push::PushRequest;
use crate::served::DiskSpec;
use crate::service::{Action, BeginRequest, ChangesOf, Import, ImportedBitmap};

/// Something to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Command {
    /// `qmp_capabilities`.
    Capabilities,
    /// `query-version`.
    Version,
    /// `query-commands`.
    Commands,
    /// `query-status`.
    Status,
    /// `query-disks`.
    Disks,
    /// `disk-add`.
    AddDisk(Box<DiskSpec>),
    /// `disk-remove`.
    RemoveDisk {
        /// Which.
        disk: Name,
        /// Even if clients have it open.
        force: bool,
    },
    /// `disk-resize`.
    ResizeDisk {
        /// Which.
        disk: Name,
        /// In bytes.
        size: u64,
    },
    /// `disk-settle`.
    SettleDisk {
        /// Which.
        disk: Name,
    },
    /// `query-checkpoints`.
    Checkpoints {
        /// Only those of this disk.
        disk: Option<Name>,
    },
    /// `query-backups`.
    Backups {
        /// Only this one.
        id: Option<Name>,
    },
    /// `checkpoint-create`.
    CreateCheckpoint {
        /// What it is to be called.
        name: Name,
        /// Of which disks; of all without.
        disks: Option<Vec<Name>>,
    },
    /// `checkpoint-delete`.
    DeleteCheckpoint {
        /// Which.
        name: Name,
        /// On which disks; on all without.
        disks: Option<Vec<Name>>,
        /// Even if it is the last one of a consumer.
        force: bool,
    },
    /// `checkpoint-import`.
    ImportCheckpoint {
        /// Of what.
        import: Import,
        /// What it is to be called.
        name: Name,
    },
    /// `bitmap-import`.
    ImportBitmap {
        /// Of what.
        import: Import,
        /// What it is to be.
        bitmap: ImportedBitmap,
    },
    /// `query-changes`.
    Changes {
        /// On which disk.
        disk: Name,
        /// Since what.
        of: ChangesOf,
        /// From where on, in bytes.
        offset: u64,
    },
    /// `backup-begin`.
    Begin(BeginRequest),
    /// `backup-commit`.
    Commit {
        /// Which.
        id: Name,
    },
    /// `backup-abort`.
    Abort {
        /// Which.
        id: Name,
    },
    /// `block-dirty-bitmap-*` and `transaction`: all of it or nothing.
    Bitmaps(Vec<Action>),
    /// `query-named-block-nodes`.
    Nodes,
    /// `query-consumers`.
    Consumers,
    /// `consumer-forget`.
    ForgetConsumer {
        /// Which.
        name: Name,
    },
    /// `query-push-target`.
    PushTarget {
        /// The folder.
        to: PathBuf,
    },
    /// `query-push-points`.
    PushPoints {
        /// The folder.
        to: PathBuf,
    },
    /// `push`.
    Push(PushRequest),
    /// `query-jobs`.
    Jobs,
    /// `job-cancel`.
    CancelJob {
        /// Which.
        id: Name,
        /// What is there stays, and another job can go on with it.
        keep: bool,
    },
    /// `job-dismiss`.
    DismissJob {
        /// Which.
        id: Name,
    },
    /// `quit`.
    Quit,
}

/// A request that can be answered, whether or not it can be carried out.
#[derive(Debug)]
pub(crate) struct Request {
    /// What the client calls it.
    pub(crate) id: Option<Value>,
    /// What it is, or why it is nothing.
    pub(crate) command: Result<Command, Refusal>,
}

/// Why something is not even tried.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// There is no such command, or not yet, or not any more.
    NotFound(String),
    /// It makes no sense.
    Failure(Failure),
}

impl Request {
    /// Reads one JSON value.
    pub(crate) fn parse(text: &[u8]) -> Self {
        let nameless = |reason: String| Self {
            id: None,
            command: Err(bad_request(reason)),
        };
        let mut members = match serde_json::from_slice(text) {
            Ok(Value::Object(members)) => members,
            Ok(_) => return nameless("QMP input must be a JSON object".to_owned()),
            Err(error) => return nameless(format!("JSON parse error, {error}")),
        };
        Self {
            id: members.remove("id"),
            command: command(members),
        }
    }
}

impl Refusal {
    /// What the client is told.
    pub(crate) fn reply(&self, id: Option<Value>) -> Reply {
        match self {
            Self::NotFound(reason) => Reply::not_found(reason, id),
            Self::Failure(failure) => Reply::failure(failure, id),
        }
    }
}

/// The commands, by the names that clients use.
pub(crate) const COMMANDS: &[&str] = &[
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "query-status",
    "query-disks",
    "disk-add",
    "disk-remove",
    "disk-resize",
    "disk-settle",
    "query-checkpoints",
    "query-backups",
    "checkpoint-create",
    "checkpoint-delete",
    "checkpoint-import",
    "bitmap-import",
    "query-changes",
    "backup-begin",
    "backup-commit",
    "backup-abort",
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
    "transaction",
    "query-named-block-nodes",
    "query-consumers",
    "consumer-forget",
    "query-push-target",
    "query-push-points",
    "push",
    "query-jobs",
    "job-cancel",
    "job-dismiss",
    "quit",
];

fn command(mut members: Map<String, Value>) -> Result<Command, Refusal> {
    let name = match members.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(bad_request("QMP input member 'execute' must be a string")),
        None => return Err(bad_request("QMP input lacks member 'execute'")),
    };
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => {
            return Err(bad_request(
                "QMP input member 'arguments' must be an object",
            ));
        }
    };
    if let Some(member) = members.keys().next() {
        let member = shortened(member);
        return Err(bad_request(format!(
            "QMP input member '{member}' is unexpected"
        )));
    }
    let mut arguments = Arguments::nested(arguments, String::new());
    let command = named_command(&name, &mut arguments)?;
    arguments.finish()?;
    Ok(command)
}

/// What is done to a disk that is served.
fn disk_command(name: &str, arguments: &mut Arguments) -> Result<Command, Refusal> {
    let disk = arguments.required_name("disk")?;
    Ok(match name {
        "disk-remove" => Command::RemoveDisk {
            disk,
            force: arguments.flag("force")?,
        },
        "disk-resize" => Command::ResizeDisk {
            disk,
            size: arguments.required_number("size", u64::MAX)?,
        },
        _ => Command::SettleDisk { disk },
    })
}

fn named_command(name: &str, arguments: &mut Arguments) -> Result<Command, Refusal> {
    Ok(match name {
        "qmp_capabilities" => {
            arguments.no_capability()?;
            Command::Capabilities
        }
        "query-version" => Command::Version,
        "query-commands" => Command::Commands,
        "query-status" => Command::Status,
        "query-disks" => Command::Disks,
        "disk-add" => Command::AddDisk(Box::new(disk_arguments::spec(arguments)?)),
        "disk-remove" | "disk-resize" | "disk-settle" => disk_command(name, arguments)?,
        "query-checkpoints" => Command::Checkpoints {
            disk: arguments.name("disk")?,
        },
        "query-backups" => Command::Backups {
            id: arguments.name("id")?,
        },
        "checkpoint-create" => Command::CreateCheckpoint {
            name: arguments.required_name("name")?,
            disks: arguments.names("disks")?,
        },
        "checkpoint-delete" => Command::DeleteCheckpoint {
            name: arguments.required_name("name")?,
            disks: arguments.names("disks")?,
            force: arguments.flag("force")?,
        },
        "backup-begin" => Command::Begin(BeginRequest {
            id: arguments.name("id")?,
            disks: arguments.names("disks")?,
            since: arguments.text("since")?,
            checkpoint: arguments.name("checkpoint")?,
            bitmaps: arguments.texts("bitmaps")?,
            consumer: arguments.name("consumer")?,
            expires_s: arguments.number("expires_s", u64::MAX)?,
            scratch_limit: arguments.number("scratch_limit", u64::MAX)?,
        }),
        "backup-commit" => Command::Commit {
            id: arguments.required_name("id")?,
        },
        "backup-abort" => Command::Abort {
            id: arguments.required_name("id")?,
        },
        "transaction" => Command::Bitmaps(bitmaps::transaction(arguments)?),
        "query-named-block-nodes" => {
            // Ours have nothing below them that could be left out.
            arguments.flag("flat")?;
            Command::Nodes
        }
        "query-consumers" => Command::Consumers,
        "consumer-forget" => Command::ForgetConsumer {
            name: arguments.required_name("name")?,
        },
        "query-push-target" => Command::PushTarget {
            to: arguments.required_text("to")?.into(),
        },
        "query-push-points" => Command::PushPoints {
            to: arguments.required_text("to")?.into(),
        },
        "push" => Command::Push(PushRequest {
            id: arguments.required_name("id")?,
            to: arguments.required_text("to")?.into(),
            full: arguments.flag("full")?,
            held_us: arguments.number("held_us", u64::MAX)?,
        }),
        "query-jobs" => Command::Jobs,
        "job-cancel" => Command::CancelJob {
            id: arguments.required_name("id")?,
            keep: arguments.flag("keep")?,
        },
        "job-dismiss" => Command::DismissJob {
            id: arguments.required_name("id")?,
        },
        "quit" => Command::Quit,
        _ => {
            if let Some(action) = bitmaps::action(name, arguments)? {
                return Ok(Command::Bitmaps(vec![action]));
            }
            if let Some(command) = carry::command(name, arguments)? {
                return Ok(command);
            }
            let name = shortened(name);
            return Err(Refusal::NotFound(format!(
                "The command {name} has not been found"
            )));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Command, String> {
        Request::parse(text.as_bytes())
            .command
            .map_err(|refusal| match refusal {
                Refusal::NotFound(reason) => reason,
                Refusal::Failure(failure) => failure.message,
            })
    }

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn a_request_keeps_its_id_even_when_it_makes_no_sense() {
        let request = Request::parse(br#"{"execute":"nonsense","id":{"a":[1]}}"#);
        assert_eq!(request.id, Some(serde_json::json!({"a": [1]})));
        assert!(matches!(request.command, Err(Refusal::NotFound(_))));
    }

    #[test]
    fn arguments_become_a_command() {
        let begin = r#"{"execute":"backup-begin",
            "arguments":{"id":"b1","disks":["vda"],"since":"cp1","checkpoint":"cp2",
                "consumer":"nightly","expires_s":60,"scratch_limit":4096}}"#;
        let expected = BeginRequest {
            id: Some(name("b1")),
            disks: Some(vec![name("vda")]),
            since: Some("cp1".to_owned()),
            checkpoint: Some(name("cp2")),
            bitmaps: None,
            consumer: Some(name("nightly")),
            expires_s: Some(60),
            scratch_limit: Some(4096),
        };
        assert_eq!(parse(begin), Ok(Command::Begin(expected)));
        let capabilities = r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#;
        assert_eq!(parse(capabilities), Ok(Command::Capabilities));
    }

    #[test]
    fn refusals_say_what_is_wrong_as_qemu_does() {
        for (text, expected) in [
            ("[]", "QMP input must be a JSON object"),
            ("{}", "QMP input lacks member 'execute'"),
            (
                r#"{"execute":1}"#,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute":"quit","x":1}"#,
                "QMP input member 'x' is unexpected",
            ),
            (
                r#"{"execute":"quit","arguments":[]}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute":"quit","arguments":{"x":1}}"#,
                "Parameter 'x' is unexpected",
            ),
            (
                r#"{"execute":"backup-commit"}"#,
                "Parameter 'id' is missing",
            ),
            (
                r#"{"execute":"backup-commit","arguments":{"id":1}}"#,
                "Invalid parameter type for 'id', expected: string",
            ),
            (
                r#"{"execute":"nonsense"}"#,
                "The command nonsense has not been found",
            ),
            (
                r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#,
                "Capability 'oob' is not available",
            ),
        ] {
            assert_eq!(parse(text), Err(expected.to_owned()), "{text}");
        }
        assert!(
            parse("{nonsense}")
                .unwrap_err()
                .starts_with("JSON parse error")
        );
    }

    #[test]
    fn every_command_that_is_listed_exists() {
        for command in COMMANDS {
            let request = Request::parse(format!(r#"{{"execute":"{command}"}}"#).as_bytes());
            assert!(
                !matches!(request.command, Err(Refusal::NotFound(_))),
                "{command}"
            );
        }
    }
}
