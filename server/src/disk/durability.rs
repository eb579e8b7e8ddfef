use super::Ending;

/// What the tracking of a disk survives: the weaker, the fewer syncs.
///
/// Whatever it is, a mark is stored before its write, and everything is durable after a clean end.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum Durability {
    /// Nothing but a clean end.
    None,
    /// The end of the process: no write waits for a sync.
    Process,
    /// The end of the machine: that a region is being written is durable before it is.
    #[default]
    Power,
}

impl Durability {
    /// Why nothing that is known can be used after a server that was this durable and ended like
    /// `ending`, in words; `None` if all of it can.
    pub fn why_lost(self, ending: Ending) -> Option<&'static str> {
        match (self, ending) {
            (_, Ending::Clean) | (Self::Power, _) | (Self::Process, Ending::Killed) => None,
            (Self::Process, Ending::PowerCut) => Some(
                "the machine, or a file system, stopped while changes were tracked with \
                 durability=process",
            ),
            (Self::None, Ending::Killed | Ending::PowerCut) => {
                Some("the server did not end in good order, and had durability=none")
            }
        }
    }

    /// As the command line and the answers have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Power => "power",
            Self::Process => "process",
            Self::None => "none",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Power, Self::Process, Self::None]
            .into_iter()
            .find(|durability| durability.name() == name)
    }
}
