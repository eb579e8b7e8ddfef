//! Sizes and times as people write and read them.

use std::time::Duration;

/// Reads a size as qemu-img does: bytes, or with a binary suffix such as `64k` or `1.5M`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size such as 4096, 64k or 1M");
    let (number, shift) = match text.char_indices().last() {
        Some((at, letter)) if letter.is_ascii_alphabetic() => {
            let shift = SUFFIXES
                .find(letter.to_ascii_lowercase())
                .ok_or_else(wrong)?;
            (&text[..at], 10 * shift)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) || (shift == 0 && number.contains('.')) {
        return Err(wrong());
    }
    if fraction.len() > FRACTION_DIGITS_MAX {
        return Err(wrong());
    }
    let shifted = |part: &str| part.parse::<u64>().map(|n| u128::from(n) << shift);
    let whole = shifted(whole).map_err(|_| wrong())?;
    let scale = 10u128.pow(fraction.len() as u32);
    let fraction = shifted(fraction).map_err(|_| wrong())? / scale;
    u64::try_from(whole + fraction).map_err(|_| wrong())
}

/// Reads a time with its unit: `500ms`, `1s`, `2m`, `1h`, `7d`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("'{text}' is no time such as 500ms or 1s: a whole number of ms, s, m, h or d");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u32 = text[..digits].parse().map_err(|_| wrong())?;
    match &text[digits..] {
        "ms" => Ok(Duration::from_millis(number.into())),
        "s" => Ok(Duration::from_secs(number.into())),
        "m" => Ok(Duration::from_secs(60 * u64::from(number))),
        "h" => Ok(Duration::from_secs(3600 * u64::from(number))),
        "d" => Ok(Duration::from_secs(86_400 * u64::from(number))),
        _ => Err(wrong()),
    }
}

/// Reads how many of something are meant.
pub(super) fn parse_count(text: &str) -> Result<u64, String> {
    let number = text.parse();
    number.map_err(|_| "not a whole number from 0 on".to_owned())
}

/// Reads seconds, whole or not.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    if (0.0..=SECONDS_MAX).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("not from 0 to {SECONDS_MAX} seconds"))
    }
}

/// Writes a size with an IEC unit and at most three digits: `192 KiB`, `4.0 GiB`.
pub(super) fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = (bytes.ilog2() / 10) as usize;
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    let mut value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    if value >= 1023.5 && unit < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 9.95);
    format!("{value:.digits$} {}iB", UNITS[unit - 1])
}

/// Writes a time that is short.
pub(super) fn microseconds(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us / 100 % 10),
        _ => format!("{}.{} s", us / 1_000_000, us / 100_000 % 10),
    }
}

/// The place of each is the power of 1024.
const SUFFIXES: &str = "bkmgtpe";

const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];

/// Enough for anything that a person writes, and no number overflows on the way.
const FRACTION_DIGITS_MAX: usize = 9;

/// A day; whoever waits longer waits in vain.
const SECONDS_MAX: f64 = 86_400.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512b", 512),
            ("64k", 65536),
            ("64K", 65536),
            ("1.5M", 3 << 19),
            ("2G", 2 << 30),
            ("15T", 15 << 40),
            ("15.99E", (15 << 60) + 1_141_392_289_560_778_506),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1.5",
            "1kb",
            "64KiB",
            "1x",
            ".5k",
            "16E",
            "1.0000000001M",
            "99999999999999999999",
            "1 k",
            "1.k",
            "é",
        ] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(604_800)));
        for text in ["", "5", "s", "1.5s", "-1s", "1w", "9999999999s", "1é"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "-1", "nan", "inf", "1e9", "x"] {
            assert!(parse_seconds(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (196_608, "192 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (4 << 30, "4.0 GiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
        assert_eq!(microseconds(1_234), "1.2 ms");
        assert_eq!(microseconds(2_500_000), "2.5 s");
    }
}
