//! The order of things: freeze hook, agent's freeze, instant, agent's thaw, thaw hook.

use std::os::fd::BorrowedFd;
use std::path::Path;

use super::agent::{Agent, AgentError, Status, Thawed};
use super::command;
use super::guardian::Plan;
use super::wait::Limit;
use super::{Instance, Trouble};

/// A guest that is frozen and thawed, and how far that has come.
pub(super) struct Guest<'a> {
    plan: &'a Plan,
    agent: Option<Agent>,
    /// The agent has been asked to freeze, whether or not it answered.
    is_agent_asked: bool,
    /// How many file systems the agent says that it froze.
    filesystems: Option<u64>,
    /// Something has been done that a thaw hook may have to undo.
    is_begun: bool,
}

impl<'a> Guest<'a> {
    /// One to which nothing has been done.
    pub(super) fn of(plan: &'a Plan) -> Self {
        Self {
            plan,
            agent: plan.guest_agent.as_deref().map(Agent::at),
            is_agent_asked: false,
            filesystems: None,
            is_begun: false,
        }
    }

    /// Freezes it for as long as `client` is there, and returns how many file systems the agent froze.
    /// Whatever comes of it, [`thaw`](Self::thaw) is to follow.
    pub(super) fn freeze(
        &mut self,
        client: Option<BorrowedFd<'_>>,
    ) -> Result<Option<u64>, Trouble> {
        let limit = || Limit::within(self.plan.timeout()).unless(client);
        // An agent that cannot be asked costs no application its quiet.
        if let Some(agent) = &mut self.agent {
            let path = agent_path(self.plan);
            match agent.status(&limit()) {
                Ok(Status::Thawed) => {}
                Ok(Status::Frozen) => return Err(frozen_already(path)),
                Err(error) => return Err(agent_failed(path, &error)),
            }
        }
        self.is_begun = true;
        if let Some(line) = &self.plan.freeze_hook {
            let environment = environment(self.plan, None);
            command::run(line, &environment, &limit()).map_err(|error| Trouble {
                code: FREEZE_FAILED.to_owned(),
                message: format!("the freeze hook {error}"),
                hint: Some(NOTHING_BEGUN.to_owned()),
            })?;
        }
        if let Some(agent) = &mut self.agent {
            self.is_agent_asked = true;
            let path = agent_path(self.plan);
            let frozen = agent.freeze(&limit());
            let count = frozen.map_err(|error| agent_failed(path, &error))?;
            if count == 0 {
                return Err(nothing_frozen(path));
            }
            self.filesystems = Some(count);
        }
        Ok(self.filesystems)
    }

    /// Undoes whatever has been done to it: nothing of that is left out because something else
    /// fails.
    pub(super) fn thaw(&mut self, instance: &Instance) -> Result<(), Trouble> {
        let mut end = Ok(());
        if self.is_agent_asked
            && let Some(agent) = &mut self.agent
        {
            let thawed = agent.thaw(&Limit::within(self.plan.timeout()));
            end = judge(agent_path(self.plan), thawed, self.filesystems);
        }
        if self.is_begun
            && let Some(line) = &self.plan.thaw_hook
        {
            let environment = environment(self.plan, Some(instance));
            let limit = Limit::within(self.plan.timeout());
            if let Err(error) = command::run(line, &environment, &limit) {
                let trouble = Trouble {
                    code: THAW_FAILED.to_owned(),
                    message: format!("the thaw hook {error}"),
                    hint: Some("see whether the guest goes on".to_owned()),
                };
                end = Err(match end {
                    Ok(()) => trouble,
                    Err(first) => first.and(&trouble),
                });
            }
        }
        end
    }

    /// The same, where the process that froze it is gone and nobody knows how far it had come.
    pub(super) fn thaw_without_guardian(&mut self, instance: &Instance) -> Result<(), Trouble> {
        self.is_begun = true;
        self.is_agent_asked = true;
        self.thaw(instance)
    }
}

/// What a thaw says of the time before it.
fn judge(
    path: &Path,
    thawed: Result<Thawed, AgentError>,
    frozen: Option<u64>,
) -> Result<(), Trouble> {
    let early = |why: String| Trouble {
        code: "thawed-early".to_owned(),
        message: format!(
            "the guest had been thawed before the guest agent at '{}' was asked to: {why}",
            path.display()
        ),
        hint: Some(
            "what the instant has may be what a power cut would leave: try again".to_owned(),
        ),
    };
    match (thawed, frozen) {
        // What was not frozen cannot have been thawed too early.
        (Ok(Thawed::Before(why)), Some(_)) => Err(early(why)),
        (Ok(Thawed::Now(Some(thawed))), Some(frozen)) if thawed < frozen => Err(early(format!(
            "of {frozen} file systems it still had {thawed} to thaw"
        ))),
        (Ok(_), _) => Ok(()),
        (Err(error), _) => Err(Trouble {
            code: THAW_FAILED.to_owned(),
            message: format!(
                "the guest agent at '{}' {error}: the file systems of the guest may still be frozen",
                path.display()
            ),
            hint: Some(
                "thaw them: virsh domfsthaw, or guest-fsfreeze-thaw on that socket".to_owned(),
            ),
        }),
    }
}

impl Trouble {
    /// Both.
    pub(super) fn and(mut self, other: &Self) -> Self {
        self.message = format!("{}; and {}", self.message, other.message);
        if other.code == THAW_FAILED {
            self.hint.clone_from(&other.hint);
        }
        self
    }
}

fn environment(plan: &Plan, instance: Option<&Instance>) -> Vec<(&'static str, String)> {
    let mut variables = plan.occasion.environment();
    let hook = if instance.is_some() { "thaw" } else { "freeze" };
    variables.push(("STILLPOINT_HOOK", hook.to_owned()));
    if let Some(instance) = instance {
        let word = match instance {
            Instance::Taken(_) => "taken",
            Instance::Failed => "failed",
            Instance::Unknown => "unknown",
        };
        variables.push(("STILLPOINT_INSTANT", word.to_owned()));
    }
    if let Some(Instance::Taken(Some(backup))) = instance {
        variables.push(("STILLPOINT_BACKUP", backup.clone()));
    }
    variables
}

fn agent_path(plan: &Plan) -> &Path {
    plan.guest_agent.as_deref().unwrap_or(Path::new(""))
}

fn agent_failed(path: &Path, error: &AgentError) -> Trouble {
    let hint = match error {
        AgentError::Late | AgentError::HungUp => Some(
            "does the agent run in the guest, and is its socket nobody else's? libvirt keeps it for itself: \
             with it use --freeze-hook 'virsh domfsfreeze VM' --thaw-hook 'virsh domfsthaw VM'",
        ),
        AgentError::Unreachable(_) => {
            Some("nothing was begun: is this the socket of the guest agent?")
        }
        _ => Some(NOTHING_BEGUN),
    };
    Trouble {
        code: FREEZE_FAILED.to_owned(),
        message: format!("the guest agent at '{}' {error}", path.display()),
        hint: hint.map(str::to_owned),
    }
}

fn frozen_already(path: &Path) -> Trouble {
    Trouble {
        code: FREEZE_FAILED.to_owned(),
        message: format!(
            "the guest agent at '{}' says that file systems are frozen already",
            path.display()
        ),
        hint: Some("who froze them is to thaw them; or do it for them: virsh domfsthaw".to_owned()),
    }
}

fn nothing_frozen(path: &Path) -> Trouble {
    Trouble {
        code: FREEZE_FAILED.to_owned(),
        message: format!(
            "the guest agent at '{}' froze no file system at all",
            path.display()
        ),
        hint: Some(
            "a guest without any that can be frozen is backed up without --guest-agent".to_owned(),
        ),
    }
}

const FREEZE_FAILED: &str = "freeze-failed";
const THAW_FAILED: &str = "thaw-failed";
const NOTHING_BEGUN: &str = "nothing was begun";
