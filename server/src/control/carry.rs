//! Commands about what has changed, told by a file or to be told.

use super::arguments::{Arguments, bad_argument};
use super::request::{Command, Refusal};
use crate::service::{ChangesOf, Import, ImportedBitmap};

/// What one of them asks for; `None` if it is another command.
pub(super) fn command(name: &str, arguments: &mut Arguments) -> Result<Option<Command>, Refusal> {
    Ok(Some(match name {
        "checkpoint-import" => Command::ImportCheckpoint {
            import: import(arguments)?,
            name: arguments.required_name("name")?,
        },
        "bitmap-import" => Command::ImportBitmap {
            import: import(arguments)?,
            bitmap: ImportedBitmap {
                name: arguments.required_text("name")?,
                granularity: arguments.number("granularity", u32::MAX.into())?,
                transient: arguments.flag("transient")?,
                disabled: arguments.flag("disabled")?,
            },
        },
        "query-changes" => Command::Changes {
            disk: arguments.required_name("disk")?,
            of: changes_of(arguments)?,
            offset: arguments.number("offset", u64::MAX)?.unwrap_or(0),
        },
        _ => return Ok(None),
    }))
}

fn import(arguments: &mut Arguments) -> Result<Import, Refusal> {
    Ok(Import {
        disk: arguments.required_name("disk")?,
        from: arguments.required_text("from")?.into(),
        bitmap: arguments.text("bitmap")?,
        as_of: arguments.text("as_of")?,
    })
}

fn changes_of(arguments: &mut Arguments) -> Result<ChangesOf, Refusal> {
    match (arguments.text("checkpoint")?, arguments.text("bitmap")?) {
        (Some(name), None) => Ok(ChangesOf::Checkpoint(name)),
        (None, Some(name)) => Ok(ChangesOf::Bitmap(name)),
        _ => Err(bad_argument(
            "either 'checkpoint' or 'bitmap' says what is meant, and one of them has to",
        )),
    }
}
