//! Where one JSON value ends and the next begins, in a stream that is cut anywhere.
//!
//! Only brackets and strings are looked at, each byte once. Whether what is between them is JSON is
//! for a parser to say, which therefore never sees half of anything.

use std::fmt;

/// Finds the end of each object or list in a stream.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// What has come of the value that has not ended yet.
    partial: Vec<u8>,
    /// The brackets that have to be closed, innermost last.
    open: Vec<u8>,
    state: State,
}

/// What cannot be part of JSON, and has been left out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Malformed {
    /// Something outside of any object.
    Stray,
    /// A bracket that closes what was not opened.
    Bracket,
    /// A byte that JSON does not have there.
    Byte(u8),
    /// More than [`DEPTH_MAX`] brackets in one another.
    Depth,
    /// More than [`VALUE_MAX`] bytes: where this one ends is not looked for.
    Length,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    /// Between values, or between the brackets of one.
    #[default]
    Plain,
    /// In a string.
    Text,
    /// In a string, after a backslash.
    Escape,
    /// After something malformed, before anything that could begin a value.
    Lost,
}

impl Decoder {
    /// Takes bytes from the front of `input` until a value is complete or something is wrong; `None`
    /// when there are no more.
    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Option<Result<Vec<u8>, Malformed>> {
        while let Some((&byte, rest)) = input.split_first() {
            if self.state == State::Lost {
                if !could_begin(byte) {
                    *input = rest;
                    continue;
                }
                self.state = State::Plain;
            }
            *input = rest;
            match self.take(byte) {
                Ok(false) => {}
                Ok(true) => return Some(Ok(std::mem::take(&mut self.partial))),
                Err(wrong) => {
                    *self = Self {
                        state: State::Lost,
                        ..Self::default()
                    };
                    return Some(Err(wrong));
                }
            }
        }
        None
    }

    /// Takes one byte; true if a value ends with it.
    fn take(&mut self, byte: u8) -> Result<bool, Malformed> {
        let is_outside = self.open.is_empty();
        if is_outside && SPACE.contains(&byte) {
            return Ok(false);
        }
        if self.partial.len() == VALUE_MAX {
            return Err(Malformed::Length);
        }
        // No byte of UTF-8; clients of QEMU send it to begin anew.
        if byte == 0xff || byte == 0xfe {
            return Err(Malformed::Byte(byte));
        }
        match self.state {
            State::Plain => self.take_plain(byte)?,
            State::Text if byte == b'"' => self.state = State::Plain,
            State::Text if byte == b'\\' => self.state = State::Escape,
            State::Text | State::Escape if byte < b' ' => return Err(Malformed::Byte(byte)),
            State::Text | State::Escape => self.state = State::Text,
            State::Lost => unreachable!("what could begin a value has ended this state"),
        }
        self.partial.push(byte);
        Ok(self.open.is_empty())
    }

    fn take_plain(&mut self, byte: u8) -> Result<(), Malformed> {
        match byte {
            b'{' | b'[' if self.open.len() == DEPTH_MAX => return Err(Malformed::Depth),
            b'{' => self.open.push(b'}'),
            b'[' => self.open.push(b']'),
            b'}' | b']' if self.open.last() == Some(&byte) => {
                self.open.pop();
            }
            b'}' | b']' => return Err(Malformed::Bracket),
            _ if self.open.is_empty() => return Err(Malformed::Stray),
            b'"' => self.state = State::Text,
            _ if byte < b' ' && !SPACE.contains(&byte) => return Err(Malformed::Byte(byte)),
            _ => {}
        }
        Ok(())
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stray => f.write_str("JSON parse error, expecting an object"),
            Self::Bracket => f.write_str("JSON parse error, a bracket closes what was not opened"),
            Self::Byte(byte) => write!(f, "JSON parse error, stray byte 0x{byte:02x}"),
            Self::Depth => write!(f, "JSON nesting depth exceeds {DEPTH_MAX}"),
            Self::Length => write!(f, "JSON object larger than {VALUE_MAX} bytes; hanging up"),
        }
    }
}

/// Nothing that is wrong goes past a line end, nor past the beginning of an object.
fn could_begin(byte: u8) -> bool {
    byte < b' ' || byte == b'{' || byte == b'['
}

const SPACE: &[u8] = b" \t\r\n";

/// Far beyond what any command holds: they are names and numbers.
pub(crate) const VALUE_MAX: usize = 1 << 20;

/// Commands nest three deep; the parser behind this stops at 128.
const DEPTH_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    type Found = Vec<Result<String, Malformed>>;

    fn feed(decoder: &mut Decoder, mut input: &[u8], found: &mut Found) {
        while let Some(next) = decoder.next(&mut input) {
            found.push(next.map(|value| String::from_utf8_lossy(&value).into_owned()));
        }
        assert!(input.is_empty());
    }

    fn decode(input: &[u8]) -> Found {
        let mut found = Found::new();
        feed(&mut Decoder::default(), input, &mut found);
        found
    }

    const STREAM: &str = concat!(
        r#"{"execute":"a"}{"b":[{"}":"\"]}\\"}, 1 ]}"#,
        "\r\n [ 1 ]\n{\"unterminated\n{\"é\":{}} stray words {\"c\":1]\n{}"
    );

    fn expected() -> Found {
        vec![
            Ok(r#"{"execute":"a"}"#.to_owned()),
            Ok(r#"{"b":[{"}":"\"]}\\"}, 1 ]}"#.to_owned()),
            Ok("[ 1 ]".to_owned()),
            Err(Malformed::Byte(b'\n')),
            Ok("{\"é\":{}}".to_owned()),
            Err(Malformed::Stray),
            Err(Malformed::Bracket),
            Ok("{}".to_owned()),
        ]
    }

    #[test]
    fn values_are_found_and_what_is_wrong_between_them_is_told_once() {
        assert_eq!(decode(STREAM.as_bytes()), expected());
    }

    #[test]
    fn it_does_not_matter_where_the_stream_is_cut() {
        for at in 0..=STREAM.len() {
            let (head, tail) = STREAM.as_bytes().split_at(at);
            let (mut decoder, mut found) = (Decoder::default(), Found::new());
            feed(&mut decoder, head, &mut found);
            feed(&mut decoder, tail, &mut found);
            assert_eq!(found, expected(), "cut at {at}");
        }
        let (mut decoder, mut found) = (Decoder::default(), Found::new());
        for byte in STREAM.bytes() {
            feed(&mut decoder, &[byte], &mut found);
        }
        assert_eq!(found, expected(), "cut everywhere");
    }

    #[test]
    fn a_byte_that_is_no_text_begins_anew() {
        assert_eq!(
            decode(b"{\"a\xff{}"),
            [Err(Malformed::Byte(0xff)), Ok("{}".to_owned())]
        );
    }

    #[test]
    fn depth_and_length_are_limited() {
        let deep = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert_eq!(decode(deep(DEPTH_MAX).as_bytes()), [Ok(deep(DEPTH_MAX))]);
        let found = decode(deep(DEPTH_MAX + 1).as_bytes());
        assert_eq!(found[0], Err(Malformed::Depth));

        let long = |length: usize| format!("{{\"{}\"}}", "x".repeat(length - 4));
        assert_eq!(decode(long(VALUE_MAX).as_bytes()).len(), 1);
        assert!(decode(long(VALUE_MAX).as_bytes())[0].is_ok());
        let found = decode(long(VALUE_MAX + 1).as_bytes());
        assert_eq!(found[0], Err(Malformed::Length));
    }

    #[test]
    fn random_bytes_do_nothing_worse_than_being_refused() {
        // A xorshift is random enough to find a forgotten case.
        for seed in 1..200u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut decoder = Decoder::default();
            for _ in 0..2_000 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let likely = b"{}[]\"\\ \n:,a\xff\0";
                let byte = match random % 4 {
                    0 => (random >> 32) as u8,
                    _ => likely[(random >> 32) as usize % likely.len()],
                };
                let mut input = &[byte][..];
                while let Some(found) = decoder.next(&mut input) {
                    if let Ok(value) = found {
                        let ends = (value[0], value[value.len() - 1]);
                        assert!(
                            ends == (b'{', b'}') || ends == (b'[', b']'),
                            "seed {seed}: {value:?}"
                        );
                    }
                }
                assert!(decoder.open.len() <= DEPTH_MAX, "seed {seed}");
            }
        }
    }
}
