//! Whether options may be asked in plain text, and when TLS begins.

use crate::option::{Declined, invalid};
use crate::wire::{answer, option};

/// What TLS is to a connection: one of the three modes that `proto.md` has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TlsMode {
    /// There is none: `NOTLS`.
    #[default]
    Off,
    /// For whoever asks for it: `SELECTIVETLS`, without an export that insists.
    On,
    /// Nothing else is spoken of without it: `FORCEDTLS`.
    Require,
}

/// Whether TLS has begun.
#[derive(Clone, Copy)]
pub(crate) enum Tls {
    Plain(TlsMode),
    Begun,
}

impl Tls {
    /// Declines what may not be asked in plain text, whether or not it makes sense.
    pub(crate) fn admit(self, code: u32) -> Result<(), Declined> {
        match (self, code) {
            (Self::Plain(TlsMode::Require), option::STARTTLS | option::ABORT) => Ok(()),
            (Self::Plain(TlsMode::Require), _) => Err(Declined {
                answer: answer::ERR_TLS_REQD,
                text: "this server wants TLS first".into(),
            }),
            _ => Ok(()),
        }
    }

    /// The state after the client's wish for TLS.
    pub(crate) fn start(self) -> Result<Self, Declined> {
        match self {
            Self::Plain(TlsMode::On | TlsMode::Require) => Ok(Self::Begun),
            Self::Plain(TlsMode::Off) => Err(Declined {
                answer: answer::ERR_POLICY,
                text: "there is no TLS on this socket".into(),
            }),
            Self::Begun => Err(invalid("TLS has begun already")),
        }
    }
}
