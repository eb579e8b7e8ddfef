use super::storage::{Contents, SimStorage};

/// Copies the disks of a freeze at the moment when all their gates are closed.
///
/// No write is half done then, so what is in the images is the instant.
#[derive(Default)]
pub(super) struct Capture {
    seed: u64,
    /// The disks that are frozen together, and the era that then begins on each.
    frozen: Vec<(SimStorage, u32)>,
    copies: Vec<Contents>,
}

impl Capture {
    /// Waits for the moment at which `frozen` are frozen.
    pub(super) fn arm(&mut self, seed: u64, frozen: Vec<(SimStorage, u32)>) {
        *self = Self {
            seed,
            frozen,
            copies: Vec::new(),
        };
    }

    /// Copies the disks if that has not been done; nothing may change until the last swap.
    pub(super) fn take(&mut self) {
        let seed = self.seed;
        for (image, _) in &self.frozen {
            let half_done = image.contents().in_flight;
            assert_eq!(
                half_done, 0,
                "seed {seed}: a write is half done while gates are closed"
            );
        }
        if self.copies.is_empty() {
            for (image, era) in &self.frozen {
                self.copies.push(image.contents().clone());
                image.begin_era(*era);
            }
            return;
        }
        for ((image, _), copy) in self.frozen.iter().zip(&self.copies) {
            let same = image.contents().bytes == copy.bytes;
            assert!(
                same,
                "seed {seed}: a disk changed between the first swap and the last"
            );
        }
    }

    /// Whether it is between the first swap and the last.
    pub(super) fn is_taking(&self) -> bool {
        !self.copies.is_empty()
    }

    /// The copies, in the order of the disks, if they were taken.
    pub(super) fn disarm(&mut self) -> Vec<Contents> {
        self.frozen.clear();
        std::mem::take(&mut self.copies)
    }
}
