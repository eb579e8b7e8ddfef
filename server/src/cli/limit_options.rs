//! What clients may take of the server, from the command line.

use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;

use super::units::{parse_duration, parse_size};
use crate::limits::Limits;

#[derive(Args, Debug)]
pub(super) struct LimitArgs {
    /// How long a client may take to choose an export.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_positive)]
    handshake_timeout: Duration,
    /// Serve at most so many clients at once of live exports, and as many of frozen ones.
    #[arg(long, value_name = "N", default_value_t = Limits::CONNECTIONS, value_parser = count())]
    connection_limit: usize,
    /// Serve at most so many of them from one user, or over TCP from one address.
    #[arg(long, value_name = "N", default_value_t = Limits::PEER_CONNECTIONS, value_parser = count())]
    peer_limit: usize,
    /// Perform at most so many requests of one connection at once.
    #[arg(long, value_name = "N", default_value_t = Limits::REQUESTS, value_parser = count())]
    request_limit: usize,
    /// Take in no more requests of a connection while it has this much in flight [default: 64M].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    request_bytes_limit: Option<u64>,
    /// Use at most this much memory for what clients send and receive [default: 512M].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    buffer_limit: Option<u64>,
    /// Hang up on clients of frozen exports that do nothing for so long [default: never].
    #[arg(long, value_name = "DURATION", value_parser = parse_positive)]
    idle_timeout: Option<Duration>,
    /// Hang up on clients that leave a request unfinished, or its reply untaken, for so long.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = parse_positive)]
    stall_timeout: Duration,
}

impl LimitArgs {
    pub(super) fn options(&self) -> Limits {
        let bytes = |given: Option<u64>, default| given.map_or(default, |bytes| bytes as usize);
        Limits {
            handshake: self.handshake_timeout,
            connections: self.connection_limit,
            peer_connections: self.peer_limit,
            requests: self.request_limit,
            request_bytes: bytes(self.request_bytes_limit, Limits::REQUEST_BYTES),
            buffers: bytes(self.buffer_limit, Limits::BUFFERS),
            idle: self.idle_timeout,
            stall: self.stall_timeout,
        }
    }
}

fn parse_positive(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("nobody is that fast".to_owned()),
        duration => Ok(duration),
    }
}

fn count() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=COUNT_MAX)
}

/// More descriptors than any system gives to a process.
const COUNT_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: LimitArgs,
    }

    fn parse(line: &str) -> Result<Limits, clap::Error> {
        let words = std::iter::once("serve").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args.options())
    }

    #[test]
    fn every_limit_has_a_default_that_fits_the_others() {
        let limits = parse("").unwrap();
        limits.check().unwrap();
        assert_eq!((limits.connections, limits.peer_connections), (256, 128));
        assert_eq!(
            (limits.idle, limits.stall),
            (None, Duration::from_secs(300))
        );
    }

    #[test]
    fn a_buffer_limit_that_cannot_be_kept_is_refused() {
        assert!(parse("--buffer-limit 256M").unwrap().check().is_err());
        let few = "--buffer-limit 256M --connection-limit 64";
        parse(few).unwrap().check().unwrap();
        assert!(parse("--connection-limit 0").is_err());
        assert!(parse("--stall-timeout 0s").is_err());
    }
}
