//! The protocol, rule by rule: what its document asks of a server, as tests on raw sockets.
//!
//! Each section has a list of rows. A row is held against our server as a test of its own, and
//! against other people's servers where it can be; where those do otherwise, [`deviations`] says
//! what. `docs/protocol.md` has the rows as a table.

mod rows;

mod handshake;
mod options;

mod information;

mod contexts;

mod selection;

mod transmission;

mod commands;

mod replies;

mod status;

mod errors;

mod withdrawal;

mod elsewhere;

mod deviations;
mod document;

mod peer;
mod talk;

use rows::Row;

/// All sections, by the names of their modules.
const SECTIONS: [(&str, &[Row]); 11] = [
    ("handshake", handshake::ROWS),
    ("options", options::ROWS),
    ("information", information::ROWS),
    ("contexts", contexts::ROWS),
    ("selection", selection::ROWS),
    ("transmission", transmission::ROWS),
    ("commands", commands::ROWS),
    ("replies", replies::ROWS),
    ("status", status::ROWS),
    ("errors", errors::ROWS),
    ("withdrawal", withdrawal::ROWS),
];
