//! Seeded randomness. Every message of a test that draws has the seed in it.

use std::env;

use rand::SeedableRng;
pub use rand_chacha::ChaCha8Rng as Rng;

/// The one seed in `STILLPOINT_SEED`, else those given.
pub fn seeds(otherwise: &[u64]) -> Vec<u64> {
    match env::var("STILLPOINT_SEED") {
        Ok(seed) => vec![seed.parse().expect("STILLPOINT_SEED is a number")],
        Err(_) => otherwise.to_vec(),
    }
}

/// The randomness of one seed.
pub fn rng(seed: u64) -> Rng {
    Rng::seed_from_u64(seed)
}

/// The number in `variable`, or another.
pub fn number(variable: &str, otherwise: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
        Err(_) => otherwise,
    }
}
