use std::fmt;
use std::ops::AddAssign;

use super::stage::Stage;

/// What happened in one schedule or in many.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Schedules played.
    pub schedules: u64,
    /// Writes, zeroes and trims.
    pub operations: u64,
    /// Those of them that failed.
    pub failed_operations: u64,
    /// Flushes.
    pub flushes: u64,
    /// Moments at which one disk or more were frozen.
    pub freezes: u64,
    /// Freezes that were given up because writes took too long.
    pub busy: u64,
    /// Instants that were kept.
    pub snapshots: u64,
    /// Instants that were lost, each because of a fault.
    pub breaks: u64,
    /// Times that scratch was given back.
    pub releases: u64,
    /// Writes that failed for the sake of an instant.
    pub refused: u64,
    /// Copies of more than a write was about to change.
    pub ahead: u64,
    /// Questions about the past.
    pub reads: u64,
    /// Checks of what holds at every moment.
    pub audits: u64,
    /// Things that failed on purpose.
    pub faults: u64,
    /// Times that another machine performed what was given up, or what it had performed.
    pub landings: u64,
}

impl Tally {
    /// Enters what is known when a schedule has ended.
    pub(super) fn end(&mut self, stage: &Stage) {
        self.schedules += 1;
        self.faults += stage.sim.fault_count();
        self.ahead += stage.sim.ahead_count();
        let snapshots = stage.snapshots.borrow();
        let broken = snapshots
            .iter()
            .filter(|kept| kept.snapshot().broken().is_some());
        self.breaks += broken.count() as u64;
    }

    fn rows(&self) -> [(&'static str, u64); 15] {
        [
            ("schedules", self.schedules),
            ("guest operations", self.operations),
            ("  that failed", self.failed_operations),
            ("flushes", self.flushes),
            ("freezes", self.freezes),
            ("  given up", self.busy),
            ("snapshots", self.snapshots),
            ("  that broke", self.breaks),
            ("  given back", self.releases),
            ("writes refused", self.refused),
            ("copies ahead", self.ahead),
            ("reads of the past", self.reads),
            ("audits", self.audits),
            ("faults", self.faults),
            ("landings", self.landings),
        ]
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.schedules += other.schedules;
        self.operations += other.operations;
        self.failed_operations += other.failed_operations;
        self.flushes += other.flushes;
        self.freezes += other.freezes;
        self.busy += other.busy;
        self.snapshots += other.snapshots;
        self.breaks += other.breaks;
        self.releases += other.releases;
        self.refused += other.refused;
        self.ahead += other.ahead;
        self.reads += other.reads;
        self.audits += other.audits;
        self.faults += other.faults;
        self.landings += other.landings;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in self.rows() {
            writeln!(formatter, "{name:<20} {count:>10}")?;
        }
        Ok(())
    }
}
