//! `stillpoint serve`: from the command line to what the server needs to know.

use std::collections::BTreeSet;
use std::io;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use tracing_subscriber::EnvFilter;

use super::disk_option;
use super::limit_options::LimitArgs;
use super::problem::Problem;
use super::scratch_options::ScratchArgs;
use super::tls_options::TlsArgs;
use super::units::parse_duration;
use crate::address::Address;
use crate::disk::OnTrackingError;
use crate::io_engine::IoEngine;
use crate::serve::{ServeOptions, run};
use crate::served::DiskSpec;

#[derive(Args, Debug)]
pub(super) struct ServeArgs {
    /// Serve the image PATH as disk NAME; may be given more than once. Keys: format=raw or qcow2,
    /// granularity=64k (a power of two, 4k to 2M), state=DIR, durability=power, process or none,
    /// cache=writeback or none, read-only. A comma in PATH is doubled. PATH may be the URI of another
    /// server's export, which has the keys reconnect=DURATION and tls-creds=DIR too.
    #[arg(
        long = "disk",
        value_name = "NAME=PATH[,key=value]...",
        required = true,
        value_parser = OsStringValueParser::new().try_map(|text| disk_option::parse(&text))
    )]
    disks: Vec<DiskSpec>,
    /// Let images name backing and data files in this folder too, and below it; may be given more than
    /// once. Without it, only in the folder of the image itself.
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    /// Where to keep what backups need of overwritten blocks [default: with each disk's state].
    #[arg(long, value_name = "DIR")]
    scratch_dir: Option<PathBuf>,
    /// Offer live exports here too: unix:PATH or tcp:HOST[:PORT].
    #[arg(long, value_name = "ADDR")]
    live_listen: Vec<Address>,
    /// Offer frozen exports here too: unix:PATH or tcp:HOST[:PORT].
    #[arg(long, value_name = "ADDR")]
    backup_listen: Vec<Address>,
    /// Who may connect to the Unix sockets, in octal.
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = parse_mode)]
    socket_mode: u32,
    /// The group that the Unix sockets belong to.
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    #[command(flatten)]
    tls: TlsArgs,
    /// Let the disks' contents go over networks unencrypted.
    #[arg(long)]
    allow_plaintext: bool,
    /// How long an instant may wait for writes in flight, such as 500ms or 1s.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    freeze_timeout: Duration,
    #[command(flatten)]
    scratch: ScratchArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// When it cannot be recorded that a block changes: let the guest's write fail, or let it go on and
    /// have full backups until the next checkpoint.
    #[arg(long, value_name = "POLICY", default_value = "fail-write", value_parser = parse_policy)]
    on_tracking_error: OnTrackingError,
    /// What does what waits for a device: auto, `io_uring` or threads. By itself the server takes
    /// the ring where the kernel has it and lets it.
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = parse_engine)]
    io_engine: IoEngine,
}

/// Serves until stopped.
pub(super) fn serve(args: ServeArgs, run_dir: PathBuf) -> Result<(), Problem> {
    let options = options(args, run_dir)?;
    let filter = EnvFilter::try_from_env("STILLPOINT_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    Ok(run(options)?)
}

fn options(args: ServeArgs, run_dir: PathBuf) -> Result<ServeOptions, Problem> {
    let mut names = BTreeSet::new();
    if let Some(twice) = args.disks.iter().find(|disk| !names.insert(&disk.name)) {
        let message = format!("two disks are called '{}'", twice.name);
        return Err(Problem::usage(message).hint("each --disk needs a name of its own"));
    }
    Ok(ServeOptions {
        disks: args.disks,
        allow_backing: args.allow_backing,
        run_dir,
        scratch_dir: args.scratch_dir,
        live_listen: absolute(args.live_listen)?,
        backup_listen: absolute(args.backup_listen)?,
        socket_mode: args.socket_mode,
        socket_group: args.socket_group,
        tls: args.tls.options()?,
        allow_plaintext: args.allow_plaintext,
        freeze_timeout: args.freeze_timeout,
        scratch: args.scratch.options(),
        on_tracking_error: args.on_tracking_error,
        io_engine: args.io_engine,
        limits: args.limits.options(),
    })
}

/// URIs name sockets for programs that run elsewhere.
fn absolute(addresses: Vec<Address>) -> Result<Vec<Address>, Problem> {
    let absolute = |address| match address {
        Address::Unix(path) => match std::path::absolute(&path) {
            Ok(path) => Ok(Address::Unix(path)),
            Err(error) => {
                let message = format!("the socket '{}': {error}", path.display());
                Err(Problem::new("cannot-listen", message))
            }
        },
        tcp @ Address::Tcp { .. } => Ok(tcp),
    };
    addresses.into_iter().map(absolute).collect()
}

fn parse_policy(text: &str) -> Result<OnTrackingError, String> {
    match text {
        "fail-write" => Ok(OnTrackingError::FailWrite),
        "stop-tracking" => Ok(OnTrackingError::StopTracking),
        _ => Err("not fail-write or stop-tracking".to_owned()),
    }
}

fn parse_engine(text: &str) -> Result<IoEngine, String> {
    match text {
        "auto" => Ok(IoEngine::Auto),
        "io_uring" => Ok(IoEngine::IoUring),
        "threads" => Ok(IoEngine::Threads),
        _ => Err("not auto, io_uring or threads".to_owned()),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode such as 0660".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use proto::TlsMode::{Off, On, Require};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn parse(line: &str) -> Result<ServeOptions, String> {
        let words = std::iter::once("serve").chain(line.split(' '));
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        options(line.args, "/run/x".into()).map_err(|problem| format!("{problem:?}"))
    }

    #[test]
    fn options_have_sensible_defaults() {
        let options = parse("--disk vda=/a").unwrap();
        assert_eq!(options.socket_mode, 0o600);
        assert_eq!(options.freeze_timeout, Duration::from_secs(1));
        assert!(options.live_listen.is_empty() && options.scratch_dir.is_none());
        let options = parse(
            "--disk vda=/a --disk vdb=/b --socket-mode 660 --freeze-timeout 500ms \
             --live-listen tcp:[::1]:0 --live-listen unix:/x",
        )
        .unwrap();
        assert_eq!((options.disks.len(), options.live_listen.len()), (2, 2));
        assert_eq!(options.socket_mode, 0o660);
        assert_eq!(options.freeze_timeout, Duration::from_millis(500));
    }

    #[test]
    fn two_disks_of_one_name_and_no_disk_are_refused() {
        assert!(parse("--disk vda=/a --disk vda=/b").is_err());
        assert!(parse("--socket-mode 600").is_err());
        assert!(parse("--disk vda=/a --socket-mode 1777").is_err());
        assert!(parse("--disk vda=/a --live-listen nowhere").is_err());
    }

    #[test]
    fn tls_is_required_on_networks_once_there_is_a_certificate() {
        let tls = |more: &str| {
            let tls = parse(&format!("--disk vda=/a{more}"))?.tls;
            Ok::<_, String>(tls.map(|tls| (tls.tcp, tls.unix, tls.verify_peer)))
        };
        assert_eq!(tls(""), Ok(None));
        assert_eq!(tls(" --tls off"), Ok(None));
        assert_eq!(tls(" --tls-creds /c"), Ok(Some((Require, Off, false))));
        assert_eq!(
            tls(" --tls-certificates /c --tls=on --tls-unix=require --tls-verify-peer"),
            Ok(Some((On, Require, true)))
        );
        for without in ["--tls on", "--tls-unix require", "--tls-verify-peer"] {
            let why = tls(&format!(" {without}")).unwrap_err();
            assert!(why.contains("--tls-creds"), "{why}");
        }
        assert!(tls(" --tls-creds /c --tls maybe").is_err());
    }
}
