//! `stillpoint consumer`: whoever pulls, each with its own last checkpoint.

use clap::Subcommand;
use serde::Serialize;

use super::client::Client;
use super::problem::Problem;
use super::show;
use super::{Answers, Done, NONE};

#[derive(Debug, Subcommand)]
pub(super) enum ConsumerCommand {
    /// Show all consumers: where each of them is on each disk, and how much has changed since.
    List,
    /// Forget where a consumer is, and delete the checkpoints that were made for it: its next backup
    /// is a full one.
    Forget {
        /// Its name.
        name: String,
    },
}

impl ConsumerCommand {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::List => "consumer list",
            Self::Forget { .. } => "consumer forget",
        }
    }

    pub(super) fn run(self, client: &mut Client, answers: &Answers) -> Result<Done, Problem> {
        match self {
            Self::List => {
                let answer = client.execute("query-consumers", &NONE)?;
                answers.show(&answer, |list: &Vec<_>| show::consumers(list))
            }
            Self::Forget { name } => {
                let answer = client.execute("consumer-forget", &Forgetting { name: &name })?;
                Ok(answers.confirm(&answer, &format!("consumer {name} is forgotten\n")))
            }
        }
    }
}

#[derive(Serialize)]
struct Forgetting<'a> {
    name: &'a str,
}
