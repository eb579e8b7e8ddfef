//! The command line.
//!
//! `serve` is the server. Every other command is a client of its control socket, and of nothing
//! else; except that a disk can be resized or moved that no server has, that `pull` is a client of NBD servers
//! too, and that folders of backups are looked at, restored from and pruned without one.

mod add_arguments;
mod against;
mod backup;
mod bitmap;
mod carry;
mod checkpoint;
mod client;
mod consumer;
mod damage;
mod disk;
mod disk_option;
mod hooks;
mod limit_options;
mod list;
mod problem;
mod progress;
mod prune;
mod pull;
mod reading;
mod restore;
mod run_dir;
mod scratch_options;
mod serve;
mod show;
mod state;
mod table;
mod tls_options;
mod units;
mod verify;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use backup::BackupCommand;
use bitmap::BitmapCommand;
use checkpoint::CheckpointCommand;
use client::Client;
use consumer::ConsumerCommand;
use disk::DiskCommand;
use hooks::Held;
use problem::{Problem, exit};
use state::StateCommand;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            // What could not be parsed cannot be asked whether JSON is wanted.
            let is_json = std::env::args_os().any(|argument| argument == "--json");
            return Problem::usage_from(&error, &typed_command()).report("command line", is_json);
        }
        Err(help) => return print(&help.render().to_string()),
    };
    let (is_json, what) = (cli.json, cli.command.name());
    match cli.run() {
        Ok(Done { text, exit }) => {
            if print(&text) == ExitCode::SUCCESS {
                ExitCode::from(exit)
            } else {
                ExitCode::FAILURE
            }
        }
        Err(problem) => problem.report(what, is_json),
    }
}

/// The words that were typed, as far as they name a command.
fn typed_command() -> String {
    let mut command = Cli::command();
    let mut words = command.get_name().to_owned();
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--run-dir" {
            // Its value is no command, whatever it is called.
            arguments.next();
        } else if let Some(inner) = command.find_subcommand(&argument).cloned() {
            words = format!("{words} {}", inner.get_name());
            command = inner;
        }
    }
    words
}

/// Serves disks over NBD and freezes instants of them, for backups that are pulled while the disks
/// are being written.
#[derive(Debug, Parser)]
#[command(name = "stillpoint", version)]
struct Cli {
    /// Print JSON: the answer, or {"error":{"code","message","hint"}}.
    #[arg(long, global = true)]
    json: bool,
    /// Where the server's sockets are, if not in `$STILLPOINT_RUN_DIR`, nor in the default place:
    /// `/run/stillpoint` for root, `$XDG_RUNTIME_DIR/stillpoint` for anyone else.
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

impl Command {
    /// The words that it is typed with.
    fn name(&self) -> &'static str {
        match self {
            Self::Serve(_) => "serve",
            Self::Status { .. } => "status",
            Self::Checkpoint(command) => command.name(),
            Self::Backup(command) => command.name(),
            Self::Bitmap(command) => command.name(),
            Self::Consumer(command) => command.name(),
            Self::Disk(command) => command.name(),
            Self::State(command) => command.name(),
            Self::Pull(_) => "pull",
            Self::Push(_) => "push",
            Self::List(_) => "list",
            Self::Verify(_) => "verify",
            Self::Restore(_) => "restore",
            Self::Prune(_) => "prune",
            Self::Qmp { .. } => "qmp",
            Self::HookGuardian => hooks::guardian::COMMAND,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve disks until stopped.
    Serve(serve::ServeArgs),
    /// Show the server, its disks and its backups.
    Status {
        /// Wait until the server answers, for at most this long.
        #[arg(long, value_name = "SECONDS", value_parser = units::parse_seconds)]
        wait: Option<Duration>,
    },
    /// Points in time from which changes are known.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Instants that are kept for as long as they are copied.
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Dirty bitmaps, as QEMU has them.
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    /// Whoever pulls backups: each has its own last checkpoint.
    #[command(subcommand)]
    Consumer(ConsumerCommand),
    /// Disks themselves.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Disks that move to another machine, with all that is known of them.
    #[command(subcommand)]
    State(StateCommand),
    /// Copy what has changed into a folder of backups: begin, copy, verify, commit.
    Pull(pull::PullArgs),
    /// The same, done by the server: into a folder that it reaches.
    Push(pull::push::PushArgs),
    /// Show the points in a folder of backups.
    List(list::ListArgs),
    /// Read everything in a folder of backups, and tell what is not what was written.
    Verify(verify::VerifyArgs),
    /// Write disks as they were at a point of a folder of backups.
    Restore(restore::RestoreArgs),
    /// Remove points of a folder of backups that nobody wants to keep.
    Prune(prune::PruneArgs),
    /// Execute one control command and print what it returns.
    Qmp {
        /// The command, such as '{"execute":"query-status"}'.
        #[arg(value_name = "JSON")]
        command: String,
    },
    /// What runs around an instant, and what undoes it; started by other commands.
    #[command(hide = true)]
    HookGuardian,
}

#[derive(Args, Debug)]
struct Disks {
    /// Only this disk; may be given more than once.
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<String>,
}

/// A command that has done what it was asked.
#[derive(Default)]
struct Done {
    /// For stdout.
    text: String,
    exit: u8,
}

impl Cli {
    fn run(self) -> Result<Done, Problem> {
        let answers = Answers { is_json: self.json };
        // Not every command needs one.
        let run_dir = || run_dir::find(self.run_dir);
        match self.command {
            Command::Serve(args) => {
                serve::serve(args, run_dir()?)?;
                Ok(Done::default())
            }
            Command::Status { wait } => {
                let mut client = match wait {
                    None => Client::connect(&run_dir()?)?,
                    Some(patience) => Client::wait_for(&run_dir()?, patience)?,
                };
                answers.show(&client.execute("query-status", &NONE)?, show::status)
            }
            Command::Checkpoint(command) => {
                command.run(&mut Client::connect(&run_dir()?)?, &answers)
            }
            Command::Backup(command) => command.run(&mut Client::connect(&run_dir()?)?, &answers),
            Command::Bitmap(command) => command.run(&mut Client::connect(&run_dir()?)?, &answers),
            Command::Consumer(command) => command.run(&mut Client::connect(&run_dir()?)?, &answers),
            Command::Disk(command) => command.run(&run_dir()?, &answers),
            Command::State(command) => command.run(&answers),
            Command::Pull(args) => args.run(run_dir, &answers),
            Command::Push(args) => args.run(&run_dir()?, &answers),
            Command::Qmp { command } => {
                let command: Box<RawValue> = serde_json::from_str(&command)
                    .map_err(|error| Problem::usage(format!("the command is no JSON: {error}")))?;
                let answer = Client::connect(&run_dir()?)?.execute_raw(&command)?;
                Ok(Answers::raw(&answer))
            }
            Command::HookGuardian => {
                hooks::guardian::guard()?;
                Ok(Done::default())
            }
            Command::List(args) => args.run(&answers),
            Command::Verify(args) => args.run(&answers),
            Command::Restore(args) => args.run(&answers),
            Command::Prune(args) => args.run(&answers),
        }
    }
}

impl Disks {
    fn arguments(self) -> Option<Vec<String>> {
        Some(self.disks).filter(|disks| !disks.is_empty())
    }
}

/// How answers are printed.
struct Answers {
    is_json: bool,
}

impl Answers {
    fn show<T: DeserializeOwned>(
        &self,
        answer: &RawValue,
        human: impl FnOnce(&T) -> String,
    ) -> Result<Done, Problem> {
        if self.is_json {
            return Ok(Self::raw(answer));
        }
        let text = human(&client::parse(answer)?);
        Ok(Done { text, exit: 0 })
    }

    /// The same for an answer around whose instant the guest was held, or was not.
    fn show_held<T: DeserializeOwned>(
        &self,
        answer: &RawValue,
        held: Option<&Held>,
        human: impl FnOnce(&T) -> String,
    ) -> Result<Done, Problem> {
        let Some(held) = held else {
            return self.show(answer, human);
        };
        let mut done = if self.is_json {
            Self::raw(&with_member(answer, "hooks", held)?)
        } else {
            let mut done = self.show(answer, human)?;
            done.text += &held.text();
            done
        };
        if held.error.is_some() {
            done.exit = exit::FAILED;
        }
        Ok(done)
    }

    fn confirm(&self, answer: &RawValue, text: &str) -> Done {
        if self.is_json {
            return Self::raw(answer);
        }
        let text = text.to_owned();
        Done { text, exit: 0 }
    }

    fn raw(answer: &RawValue) -> Done {
        let text = format!("{answer}\n");
        Done { text, exit: 0 }
    }
}

/// The member of a list that `is_wanted`, as it came.
fn pick<T: DeserializeOwned>(
    list: &RawValue,
    is_wanted: impl Fn(&T) -> bool,
) -> Result<Option<Box<RawValue>>, Problem> {
    let members: Vec<Box<RawValue>> = client::parse(list)?;
    for member in members {
        if is_wanted(&client::parse(&member)?) {
            return Ok(Some(member));
        }
    }
    Ok(None)
}

/// An object with one more member behind what it has.
fn with_member(
    object: &RawValue,
    name: &str,
    value: &impl Serialize,
) -> Result<Box<RawValue>, Problem> {
    let value = serde_json::to_string(value).expect("texts and numbers");
    let more = match object.get().trim_end().strip_suffix('}') {
        None => None,
        Some(first) if first.trim_end().ends_with('{') => {
            Some(format!("{first}\"{name}\":{value}}}"))
        }
        Some(first) => Some(format!("{first},\"{name}\":{value}}}")),
    };
    let more = more.and_then(|text| RawValue::from_string(text).ok());
    more.ok_or_else(|| Problem::new("bad-server", "the answer is no JSON object"))
}

fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever closed the pipe has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            Problem::new("cannot-print", format!("cannot print: {error}")).report("output", false)
        }
    }
}

/// The arguments of a command that has none.
const NONE: NoArguments = NoArguments {};

#[derive(Serialize)]
struct NoArguments {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_put_together_well() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_and_the_run_directory_stand_anywhere() {
        for line in [
            "stillpoint --json --run-dir /x backup show b1",
            "stillpoint backup --json show --run-dir=/x b1",
            "stillpoint backup show b1 --run-dir /x --json",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert!(cli.json, "{line}");
            assert_eq!(cli.run_dir, Some("/x".into()), "{line}");
        }
    }
}
