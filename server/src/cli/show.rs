//! Answers of the server, for people.

use std::fmt::Write;

use super::table::Table;
use super::units::{microseconds, size};
use crate::control::answers::{
    BackupAnswer, BackupDisk, BackupState, CheckpointAnswer, CheckpointDisk, ConsumerAnswer,
    ExportUse, Mode, Status,
};

/// `status`.
pub(super) fn status(status: &Status) -> String {
    let mut text = format!(
        "stillpoint {}, pid {}, in {}\n\n",
        status.version, status.pid, status.run_dir
    );
    let mut disks = Table::new(["DISK", "SIZE", "CHUNK", "UNCERTAIN", "IMAGE", "LIVE"]);
    for disk in &status.disks {
        let read_only = if disk.read_only { " (read-only)" } else { "" };
        let durability = match disk.durability.as_str() {
            "power" => String::new(),
            weaker => format!(" (durability={weaker})"),
        };
        disks.push([
            disk.disk.to_string(),
            size(disk.size),
            size(disk.granularity),
            size(disk.uncertain_bytes),
            format!("{}{read_only}{durability}", disk.path),
            disk.live_uris.join(" "),
        ]);
    }
    text += &disks.render();
    for disk in &status.disks {
        if let Some(reason) = &disk.tracking_reason {
            let name = &disk.disk;
            say(
                &mut text,
                format_args!("{name}: changes are not tracked until the next checkpoint: {reason}"),
            );
        }
    }
    if !status.backups.is_empty() {
        text.push('\n');
        text += &backups(&status.backups);
    }
    text.push('\n');
    for (name, value) in [
        ("checkpoints", status.checkpoints.to_string()),
        (
            "scratch used",
            used_of(status.scratch_used_bytes, status.scratch_limit_bytes),
        ),
        (
            "longest guest stall",
            microseconds(status.longest_guest_stall_us),
        ),
        ("live sockets", status.sockets.live.join(" ")),
        ("backup sockets", status.sockets.backup.join(" ")),
        ("control socket", status.sockets.control.clone()),
    ] {
        say(&mut text, format_args!("{name:20} {value}"));
    }
    text
}

/// `checkpoint create`.
pub(super) fn checkpoint_created(checkpoint: &CheckpointAnswer) -> String {
    let disks: Vec<_> = checkpoint
        .disks
        .iter()
        .map(|disk| disk.disk.as_str())
        .collect();
    format!(
        "checkpoint {} of {} at {}\n",
        checkpoint.name,
        disks.join(", "),
        checkpoint.created_at
    )
}

/// `checkpoint list`.
pub(super) fn checkpoints(all: &[CheckpointAnswer]) -> String {
    if all.is_empty() {
        return "no checkpoints\n".to_owned();
    }
    let mut table = Table::new([
        "CHECKPOINT",
        "CREATED",
        "DISK",
        "DIRTY",
        "UNCERTAIN",
        "STATE",
    ]);
    for checkpoint in all {
        for disk in &checkpoint.disks {
            table.push([
                checkpoint.name.to_string(),
                checkpoint.created_at.clone(),
                disk.disk.to_string(),
                size(disk.dirty_bytes),
                size(disk.uncertain_bytes),
                checkpoint_state(checkpoint, disk),
            ]);
        }
    }
    table.render()
}

/// `checkpoint show`.
pub(super) fn checkpoint(checkpoint: &CheckpointAnswer) -> String {
    let mut text = String::new();
    for (name, value) in [
        ("checkpoint", checkpoint.name.to_string()),
        ("uuid", checkpoint.uuid.to_string()),
        ("created", checkpoint.created_at.clone()),
    ] {
        say(&mut text, format_args!("{name:11} {value}"));
    }
    let mut table = Table::new(["DISK", "DIRTY", "UNCERTAIN", "STATE"]);
    for disk in &checkpoint.disks {
        table.push([
            disk.disk.to_string(),
            size(disk.dirty_bytes),
            size(disk.uncertain_bytes),
            checkpoint_state(checkpoint, disk),
        ]);
    }
    text.push('\n');
    text + &table.render()
}

/// `consumer list`.
pub(super) fn consumers(all: &[ConsumerAnswer]) -> String {
    if all.is_empty() {
        return "no consumers\n".to_owned();
    }
    let mut table = Table::new([
        "CONSUMER",
        "DISK",
        "LAST CHECKPOINT",
        "CREATED",
        "DIRTY",
        "UNCERTAIN",
        "NEXT",
    ]);
    for consumer in all {
        for disk in &consumer.disks {
            let next = match &disk.reason {
                None => "incremental".to_owned(),
                Some(reason) => format!("full, because {reason}"),
            };
            table.push([
                consumer.name.to_string(),
                disk.disk.to_string(),
                disk.checkpoint.to_string(),
                disk.created_at.clone(),
                size(disk.dirty_bytes),
                size(disk.uncertain_bytes),
                next,
            ]);
        }
    }
    table.render()
}

/// `backup begin`.
pub(super) fn backup_begun(backup: &BackupAnswer) -> String {
    let mut text = heading(backup);
    for disk in &backup.disks {
        text.push('\n');
        describe_disk(&mut text, disk);
    }
    text.push('\n');
    if let Some(disk) = backup.disks.first() {
        let context = disk
            .contexts
            .last()
            .filter(|_| disk.mode == Mode::Incremental);
        let context = context.map_or("base:allocation", String::as_str);
        let uri = disk.uris.first().map_or("", String::as_str);
        say(
            &mut text,
            format_args!("hint: nbdinfo --map={context} '{uri}'"),
        );
    }
    let id = &backup.id;
    say(
        &mut text,
        format_args!("hint: stillpoint backup commit {id}, when all is copied; else: abort {id}"),
    );
    text
}

/// `backup list`.
pub(super) fn backups(all: &[BackupAnswer]) -> String {
    if all.is_empty() {
        return "no open backups\n".to_owned();
    }
    let mut table = Table::new([
        "BACKUP", "STATE", "FROZEN", "DISK", "MODE", "CHANGED", "READ", "CLIENTS", "SCRATCH",
    ]);
    for backup in all {
        for disk in &backup.disks {
            let uses = || disk.exports.iter().flatten();
            table.push([
                backup.id.to_string(),
                backup_state(backup).to_owned(),
                backup.frozen_at.clone(),
                disk.disk.to_string(),
                mode(disk).to_owned(),
                size(disk.changed_bytes),
                size(uses().map(|export| export.bytes_read).sum()),
                uses()
                    .map(|export| export.clients)
                    .sum::<usize>()
                    .to_string(),
                size(disk.scratch_used_bytes.unwrap_or(0)),
            ]);
        }
    }
    table.render()
}

/// `backup show`.
pub(super) fn backup(backup: &BackupAnswer) -> String {
    let mut text = heading(backup);
    if let Some(stall) = backup.guest_stall_us {
        say(
            &mut text,
            format_args!("guest stall {}", microseconds(stall)),
        );
    }
    if let Some(used) = backup.scratch_used_bytes {
        let used = used_of(used, backup.scratch_limit_bytes);
        say(&mut text, format_args!("scratch     {used}"));
    }
    for disk in &backup.disks {
        text.push('\n');
        describe_disk(&mut text, disk);
        for ExportUse {
            export,
            bytes_read,
            clients,
        } in disk.exports.iter().flatten()
        {
            let read = size(*bytes_read);
            say(
                &mut text,
                format_args!("  use         {export}: {read} read, {clients} connected"),
            );
        }
        if let Some(scratch) = disk.scratch_used_bytes {
            say(&mut text, format_args!("  scratch     {}", size(scratch)));
        }
    }
    text
}

fn heading(backup: &BackupAnswer) -> String {
    let mut text = String::new();
    let state = match &backup.broken_reason {
        None => backup_state(backup).to_owned(),
        Some(reason) => format!("broken: {reason}"),
    };
    say(&mut text, format_args!("backup      {}", backup.id));
    say(&mut text, format_args!("state       {state}"));
    say(&mut text, format_args!("frozen at   {}", backup.frozen_at));
    if let Some(consumer) = &backup.consumer {
        say(&mut text, format_args!("consumer    {consumer}"));
    }
    if let Some(expires_at) = &backup.expires_at {
        say(&mut text, format_args!("expires at  {expires_at}"));
    }
    if let Some(since) = &backup.since {
        say(&mut text, format_args!("since       {since}"));
    }
    if let Some(checkpoint) = &backup.checkpoint {
        say(
            &mut text,
            format_args!("checkpoint  {checkpoint}, once committed"),
        );
    }
    text
}

fn describe_disk(text: &mut String, disk: &BackupDisk) {
    let whole = size(disk.size);
    let what = match (&disk.mode, &disk.since, &disk.reason) {
        (Mode::Incremental, Some(since), _) => {
            format!(
                "{} of {whole} changed since {since}",
                size(disk.changed_bytes)
            )
        }
        (Mode::Incremental, None, _) => format!("{} of {whole} changed", size(disk.changed_bytes)),
        (Mode::Full, _, Some(reason)) => format!("{whole}, because {reason}"),
        (Mode::Full, _, None) => whole,
    };
    say(text, format_args!("{}  {}: {what}", disk.disk, mode(disk)));
    for uri in &disk.uris {
        say(text, format_args!("  frozen      {uri}"));
    }
    for uri in disk
        .difference
        .iter()
        .flat_map(|difference| &difference.uris)
    {
        say(text, format_args!("  difference  {uri}"));
    }
}

fn checkpoint_state(checkpoint: &CheckpointAnswer, disk: &CheckpointDisk) -> String {
    match (&disk.reason, &checkpoint.backup) {
        (Some(reason), _) => format!("full, because {reason}"),
        (None, Some(backup)) if checkpoint.pending => format!("made when {backup} is committed"),
        (None, _) => "usable".to_owned(),
    }
}

fn backup_state(backup: &BackupAnswer) -> &'static str {
    match backup.state {
        BackupState::Open => "open",
        BackupState::Broken => "broken",
    }
}

fn used_of(used: u64, limit: Option<u64>) -> String {
    match limit {
        None => size(used),
        Some(limit) => format!("{} of {}", size(used), size(limit)),
    }
}

fn mode(disk: &BackupDisk) -> &'static str {
    match disk.mode {
        Mode::Full => "full",
        Mode::Incremental => "incremental",
    }
}

fn say(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes everything");
}
