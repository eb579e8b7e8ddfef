//! Where clients find TLS, from the command line.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValue;
use proto::TlsMode;

use super::problem::Problem;
use crate::tls::TlsOptions;

#[derive(Args, Debug)]
pub(super) struct TlsArgs {
    /// Offer TLS with server-cert.pem and server-key.pem of this directory. SIGHUP reads them again.
    #[arg(long, value_name = "DIR", visible_alias = "tls-certificates")]
    tls_creds: Option<PathBuf>,
    /// Whether clients on TCP may use TLS (on) or must (require) [default: require with --tls-creds,
    /// else off].
    #[arg(long, value_name = "MODE")]
    tls: Option<Mode>,
    /// The same for clients on Unix sockets [default: off].
    #[arg(long, value_name = "MODE")]
    tls_unix: Option<Mode>,
    /// Serve over TLS only clients with a certificate of the authority in ca-cert.pem, and not in
    /// ca-crl.pem.
    #[arg(long)]
    tls_verify_peer: bool,
}

impl TlsArgs {
    pub(super) fn options(self) -> Result<Option<TlsOptions>, Problem> {
        let Some(creds) = self.tls_creds else {
            let is_wanted = |mode: &Option<Mode>| mode.is_some_and(|mode| mode.0 != TlsMode::Off);
            let (option, wants) = [
                ("--tls", is_wanted(&self.tls)),
                ("--tls-unix", is_wanted(&self.tls_unix)),
                ("--tls-verify-peer", self.tls_verify_peer),
            ]
            .into_iter()
            .find(|(_, wants)| *wants)
            .unwrap_or_default();
            if !wants {
                return Ok(None);
            }
            let hint =
                "give the directory with server-cert.pem and server-key.pem: --tls-creds DIR";
            return Err(Problem::usage(format!("{option} needs a certificate")).hint(hint));
        };
        Ok(Some(TlsOptions {
            creds,
            verify_peer: self.tls_verify_peer,
            tcp: self.tls.map_or(TlsMode::Require, |mode| mode.0),
            unix: self.tls_unix.map_or(TlsMode::Off, |mode| mode.0),
        }))
    }
}

/// As it is typed, in nbdkit's words.
#[derive(Clone, Copy, Debug)]
struct Mode(TlsMode);

impl clap::ValueEnum for Mode {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self(TlsMode::Off),
            Self(TlsMode::On),
            Self(TlsMode::Require),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self.0 {
            TlsMode::Off => PossibleValue::new("off").help("there is no TLS"),
            TlsMode::On => PossibleValue::new("on").help("whoever asks for TLS gets it"),
            TlsMode::Require => PossibleValue::new("require").help("nobody is served without TLS"),
        })
    }
}
