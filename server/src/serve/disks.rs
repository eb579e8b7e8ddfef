//! The disks that a server starts with.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::signals::Signals;
use crate::failure::Failure;
use crate::served::{DiskSpec, Past, ServedDisk};
use crate::service::{Opening, refuse_copies, refuse_same_image};

/// Opens them in turn. Nothing is returned if the server is told to stop meanwhile.
pub(super) async fn open(
    specs: &[DiskSpec],
    opening: &Opening,
    signals: &mut Signals,
) -> Result<Option<Vec<(ServedDisk, Past)>>, Failure> {
    refuse_copies(specs)?;
    let mut disks = Vec::new();
    for spec in specs {
        let refuse_same = || refuse_same_image(spec, disks.iter().map(|(disk, _)| disk));
        if spec.remote.is_some() {
            // Nothing else would.
            refuse_same()?;
        }
        let opened = match open_when_there(spec, opening, signals).await {
            Ok(opened) => opened,
            Err(failure) => {
                if failure.code == "image-locked" {
                    // It may be we who have it, under another name.
                    refuse_same()?;
                }
                return Err(failure);
            }
        };
        let Some(opened) = opened else {
            return Ok(None);
        };
        disks.push(opened);
    }
    Ok(Some(disks))
}

/// Opens one. At the start of a machine the server that has the image may be about to listen, and is waited for
/// as long as a request would be.
async fn open_when_there(
    spec: &DiskSpec,
    opening: &Opening,
    signals: &mut Signals,
) -> Result<Option<(ServedDisk, Past)>, Failure> {
    let remote = spec.remote.as_ref();
    let patience = remote.map_or(Duration::ZERO, |remote| remote.patience);
    let begun = Instant::now();
    let mut waits = false;
    loop {
        let failure = match opening.open(spec).await {
            Ok(opened) => return Ok(Some(opened)),
            Err(failure) => failure,
        };
        if failure.code != "base-unreachable" || begun.elapsed() + PAUSE >= patience {
            return Err(failure);
        }
        if !waits {
            tracing::warn!(?patience, "waiting for the base: {failure}");
            waits = true;
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = signals.stop() => return Ok(None),
        }
    }
}

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);
