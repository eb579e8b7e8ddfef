//! What the protocol calls a string: UTF-8 without NUL, and not too long.

/// The longest string, in bytes: `proto.md` forbids longer ones.
pub const STRING_MAX: usize = 4096;

/// Reads a string, or returns `None` for bytes that are none.
pub(crate) fn parse(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Shortens `text` to what may be sent as one string.
pub(crate) fn clip(text: &str) -> &str {
    let mut end = text.len().min(STRING_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::{STRING_MAX, clip, parse};

    #[test]
    fn a_string_is_utf8_without_nul_of_at_most_4096_bytes() {
        assert_eq!(parse(b""), Some(""));
        assert_eq!(parse("h\u{e9}".as_bytes()), Some("h\u{e9}"));
        assert_eq!(parse(b"a\0b"), None);
        assert_eq!(parse(b"\xff"), None);
        assert!(parse(&[b'x'; STRING_MAX]).is_some());
        assert!(parse(&[b'x'; STRING_MAX + 1]).is_none());
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = "x".to_owned() + &"\u{e9}".repeat(STRING_MAX);
        assert_eq!(clip(&text).len(), STRING_MAX - 1);
        assert_eq!(clip("short"), "short");
    }
}
