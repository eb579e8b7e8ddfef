//! What clients may take of the server: how many, how much, how long.

use std::time::Duration;

use crate::failure::Failure;

/// The limits that an administrator can set. Those of the protocol's messages are in `proto`.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// How long a client may take to choose an export.
    pub(crate) handshake: Duration,
    /// How many clients of each role are served at once.
    pub(crate) connections: usize,
    /// How many of them may come from one user, or from one address.
    pub(crate) peer_connections: usize,
    /// How many requests of a connection are under way at once.
    pub(crate) requests: usize,
    /// From how many bytes on a connection has no more taken in. One request always is.
    pub(crate) request_bytes: usize,
    /// What the buffers of all clients take together.
    pub(crate) buffers: usize,
    /// How long a client of a frozen export may do nothing; for ever without.
    pub(crate) idle: Option<Duration>,
    /// How long a client may leave a request unfinished, or its replies untaken.
    pub(crate) stall: Duration,
}

impl Limits {
    /// Some times what any tool opens, and so few that with the usual 1,024 descriptors those of
    /// both roles leave enough for control and for backups.
    pub(crate) const CONNECTIONS: usize = 256;

    /// Half of all, so that nobody alone keeps out everyone else.
    pub(crate) const PEER_CONNECTIONS: usize = 128;

    /// More than any client keeps in flight.
    pub(crate) const REQUESTS: usize = 256;

    /// Two of the longest requests.
    pub(crate) const REQUEST_BYTES: usize = 64 << 20;

    /// What the connections are sure of, and for each role more than two clients that pull as fast
    /// as they can have in flight.
    pub(crate) const BUFFERS: usize = 512 << 20;

    /// Fails unless what is promised to each connection is there, and a part that they share.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let least = ROLES * (self.promised() + COMMON_MIN);
        if self.buffers >= least {
            return Ok(());
        }
        let message = format!(
            "--buffer-limit {} is too little for {} connections",
            self.buffers, self.connections
        );
        let hint = format!("at least {least}, or fewer connections with --connection-limit");
        Err(Failure::new("limits", message).hint(&hint))
    }

    /// What all connections of a role share beyond what is promised to each.
    pub(crate) fn common(&self) -> usize {
        (self.buffers / ROLES).saturating_sub(self.promised())
    }

    /// What is set aside for the connections of one role.
    fn promised(&self) -> usize {
        let served = self.connections.saturating_mul(CONNECTION_BYTES);
        served.saturating_add(HANDSHAKES_MAX * HANDSHAKE_BYTES)
    }
}

/// Live and frozen. Each has its own share, so that no backup takes a guest's.
const ROLES: usize = 2;

/// What each connection may hold whatever the others do: what it reads at once from its socket, and
/// requests of [`OWN_BYTES`].
const CONNECTION_BYTES: usize = 512 << 10;

/// What the requests of a connection may hold whatever the others do: the largest that most tools
/// make.
pub(crate) const OWN_BYTES: usize = 256 << 10;

/// How many clients of a role choose an export at once. It takes a tool milliseconds.
pub(crate) const HANDSHAKES_MAX: usize = 64;

/// What one of them holds at most: an option, what it means, and answers to it.
const HANDSHAKE_BYTES: usize = 256 << 10;

/// Two of the longest requests.
const COMMON_MIN: usize = 64 << 20;
