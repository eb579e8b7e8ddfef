//! What a row of the table is, and how it is held against a server.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::peer::Peer;

/// One rule of the protocol, and the test that a server keeps it.
pub(crate) struct Row {
    /// What the row is called by, never given to another.
    pub(crate) id: &'static str,
    /// Where the rule stands in the protocol's document.
    pub(crate) section: &'static str,
    /// The rule in our words.
    pub(crate) rule: &'static str,
    /// The test's name, in the module of its section.
    pub(crate) test: &'static str,
    /// The test.
    pub(crate) check: Check,
}

/// Whom a test can be held against.
pub(crate) enum Check {
    /// Any server. The test panics where the rule is broken, and says how.
    Any(fn(Peer)),
    /// Ours alone: other servers cannot be brought into the situation from outside.
    Ours(fn()),
}

impl Check {
    /// Holds it against our own server.
    pub(crate) fn against_ours(&self) {
        match self {
            Self::Any(check) => check(Peer::Stillpoint),
            Self::Ours(check) => check(),
        }
    }

    /// Holds it against somebody else's; returns how the rule is broken there, if it is.
    pub(crate) fn against(&self, peer: Peer) -> Option<String> {
        let Self::Any(check) = self else { return None };
        let panic = catch_unwind(AssertUnwindSafe(|| check(peer))).err()?;
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        Some(text.unwrap_or_else(|| "a panic without words".to_owned()))
    }
}

/// The rows of a section: as a list, and each as a test of our own server.
macro_rules! rows {
    ($(($id:literal, $section:literal, $rule:literal, $kind:ident($test:ident)),)*) => {
        /// The rules of this section.
        pub(crate) const ROWS: &[crate::rows::Row] = &[$(crate::rows::Row {
            id: $id,
            section: $section,
            rule: $rule,
            test: stringify!($test),
            check: crate::rows::Check::$kind($test),
        }),*];

        mod ours {
            $(
                #[test]
                fn $test() {
                    crate::rows::Check::$kind(super::$test).against_ours();
                }
            )*
        }
    };
}
pub(crate) use rows;
