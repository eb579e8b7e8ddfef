//! How much scratch backups may take, from the command line.

use clap::Args;
use clap::builder::PossibleValue;
use scratch::OnError;

use super::units::parse_size;
use crate::service::{Reserve, ScratchOptions};

#[derive(Args, Debug)]
pub(super) struct ScratchArgs {
    /// Keep at most this much of overwritten blocks, for all backups together, such as 100G.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    scratch_limit: Option<u64>,
    /// Keep at most this much for each backup that is begun without a limit of its own.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    backup_scratch_limit: Option<u64>,
    /// Leave this much of scratch's file system free: a size, or a part of it such as 10%
    /// [default: 5%, at least 1G].
    #[arg(long, value_name = "SIZE|N%", value_parser = parse_reserve)]
    scratch_reserve: Option<Reserve>,
    /// What gives way when an overwritten block cannot be kept.
    #[arg(long, value_name = "WHAT", default_value = "break-backup")]
    on_scratch_error: Policy,
}

impl ScratchArgs {
    pub(super) fn options(&self) -> ScratchOptions {
        ScratchOptions {
            limit: self.scratch_limit,
            backup_limit: self.backup_scratch_limit,
            reserve: self.scratch_reserve.unwrap_or_default(),
            on_error: self.on_scratch_error.0,
        }
    }
}

/// As it is typed: in our words, or in QEMU's.
#[derive(Clone, Copy, Debug)]
struct Policy(OnError);

impl clap::ValueEnum for Policy {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self(OnError::BreakBackup), Self(OnError::FailGuestWrite)]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self.0 {
            OnError::BreakBackup => PossibleValue::new("break-backup")
                .alias("break-snapshot")
                .help("the backup is broken, and the guest does not notice"),
            OnError::FailGuestWrite => PossibleValue::new("fail-guest-write")
                .alias("break-guest-write")
                .help("the guest's write fails, and the backup stays whole"),
        })
    }
}

fn parse_reserve(text: &str) -> Result<Reserve, String> {
    let Some(percent) = text.strip_suffix('%') else {
        return parse_size(text).map(Reserve::Bytes);
    };
    match percent.parse() {
        Ok(percent @ 0..100) => Ok(Reserve::Percent(percent)),
        _ => Err(format!("'{text}' is not a part from 0% to 99%")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ScratchArgs,
    }

    fn parse(line: &str) -> Result<ScratchOptions, String> {
        let words = std::iter::once("serve").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        Ok(line.args.options())
    }

    #[test]
    fn limits_are_sizes_and_a_reserve_may_be_a_part() {
        assert_eq!(parse(""), Ok(ScratchOptions::default()));
        let all = "--scratch-limit 2G --backup-scratch-limit 1M --scratch-reserve 10% \
                   --on-scratch-error fail-guest-write";
        let expected = ScratchOptions {
            limit: Some(2 << 30),
            backup_limit: Some(1 << 20),
            reserve: Reserve::Percent(10),
            on_error: OnError::FailGuestWrite,
        };
        assert_eq!(parse(all), Ok(expected));
        let zero = parse("--scratch-reserve 0").unwrap();
        assert_eq!(zero.reserve, Reserve::Bytes(0));
        for wrong in ["-1", "x", "100%", "%", "1.5%", "-1%"] {
            assert!(
                parse(&format!("--scratch-reserve={wrong}")).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn qemus_words_for_what_gives_way_are_understood() {
        for (word, meaning) in [
            ("break-backup", OnError::BreakBackup),
            ("break-snapshot", OnError::BreakBackup),
            ("fail-guest-write", OnError::FailGuestWrite),
            ("break-guest-write", OnError::FailGuestWrite),
        ] {
            let options = parse(&format!("--on-scratch-error {word}")).unwrap();
            assert_eq!(options.on_error, meaning, "{word}");
        }
        assert!(parse("--on-scratch-error nothing").is_err());
    }
}
