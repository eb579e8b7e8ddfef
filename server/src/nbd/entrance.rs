//! What all share who come to the sockets of one role.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Arc;

use proto::Denied;

use super::budget::Budget;
use super::handshakes::{Handshake, Handshakes};
use super::peer::Peer;
use super::places::{Place, Places};
use super::vigil::Waiting;
use crate::export::Role;
use crate::limits::{HANDSHAKES_MAX, Limits};

/// The way in to the exports of one role, and how many and how much may be inside.
pub(crate) struct Entrance {
    /// What is offered behind it.
    pub(crate) role: Role,
    /// What clients may take.
    pub(crate) limits: Limits,
    /// Those that have not chosen an export yet.
    pub(crate) handshakes: Arc<Handshakes>,
    /// Those that have.
    pub(super) places: Arc<Places>,
    /// What their requests take.
    pub(super) budget: Arc<Budget>,
    /// Those of them that wait, and those of the other roles'.
    pub(super) waiting: Arc<Waiting>,
}

/// Someone who has come in.
pub(crate) struct Visitor {
    /// By which way.
    pub(crate) entrance: Arc<Entrance>,
    /// Who it is.
    pub(crate) peer: Peer,
    /// Until an export has been chosen.
    handshake: RefCell<Option<Handshake>>,
    /// Taken with the first look at an export.
    place: OnceCell<Place>,
    /// It has been told in the log that something was refused.
    told: Cell<bool>,
}

impl Entrance {
    pub(crate) fn new(role: Role, limits: &Limits, waiting: &Arc<Waiting>) -> Arc<Self> {
        Arc::new(Self {
            role,
            handshakes: Handshakes::new(HANDSHAKES_MAX),
            places: Places::new(limits.connections, limits.peer_connections),
            budget: Budget::new(limits.common()),
            limits: limits.clone(),
            waiting: Arc::clone(waiting),
        })
    }

    /// Lets someone in, to choose an export.
    pub(crate) fn enter(self: &Arc<Self>, peer: Peer) -> Visitor {
        Visitor {
            entrance: Arc::clone(self),
            handshake: RefCell::new(Some(self.handshakes.begin(peer.origin()))),
            peer,
            place: OnceCell::new(),
            told: Cell::new(false),
        }
    }
}

impl Visitor {
    /// Takes a place among those that are served, unless it has one.
    pub(super) fn take_place(&self) -> Result<(), Denied> {
        if self.place.get().is_some() {
            return Ok(());
        }
        let place = self.entrance.places.take(self.peer.origin());
        let _ = self.place.set(place.map_err(Denied::Policy)?);
        Ok(())
    }

    /// Tells in the log what it is refused: once, since it may ask a thousand times.
    pub(super) fn is_refused(&self, denied: &Denied) {
        if !self.told.replace(true) {
            let (peer, role) = (self.peer, self.entrance.role);
            tracing::info!(%peer, ?role, reason = %denied, "refused an export");
        }
    }

    /// Waits until it has to make room for another that wants to choose an export.
    pub(super) async fn displaced(&self) {
        let displaced = self.handshake.borrow().as_ref().map(Handshake::displaced);
        match displaced {
            Some(displaced) => displaced.await,
            None => std::future::pending().await,
        }
    }

    /// It has chosen an export.
    pub(super) fn is_served(&self) {
        self.handshake.take();
    }
}
