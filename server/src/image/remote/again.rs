//! What a server that came back may have lost is performed once more.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use proto::client::Client;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connect::{Abilities, error_of};
use super::keeper::{SILENT, Side};
use super::perform;
use super::unsynced::Change;

/// Gives a server that came back what it may have lost.
pub(super) struct Again {
    pub(super) client: Client,
    pub(super) can: Abilities,
    pub(super) side: Arc<Side>,
    /// How long one run may take.
    pub(super) patience: Duration,
}

impl Again {
    /// Performs them run by run. Each change is recorded as under way until it is answered.
    pub(super) async fn give(self, runs: Vec<Vec<Change>>) -> io::Result<()> {
        for run in runs {
            let given = timeout(self.patience, self.give_run(run)).await;
            given.unwrap_or_else(|_| Err(io::Error::other(SILENT)))?;
        }
        Ok(())
    }

    /// Performs changes that do not touch each other once more.
    async fn give_run(&self, run: Vec<Change>) -> io::Result<()> {
        let mut given = JoinSet::new();
        for change in run {
            let slot = self.side.given_up.begin(&change.range)?;
            let (client, can) = (self.client.clone(), self.can);
            given.spawn_local(async move {
                let done = perform::change(&client, &can, change).await;
                done.map(|_| slot).map_err(error_of)
            });
        }
        while let Some(done) = given.join_next().await {
            self.side.given_up.end(done.map_err(io::Error::other)??);
        }
        Ok(())
    }
}
