//! The Date header as Cyrus understands it (`lib/times.c` of 3.6): two fields of an index record follow from it, and its
//! own checks compare them.

/// What a record keeps of a Date header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Seconds since 1970 UTC; 0 where the header cannot be understood.
    pub gmtime: i64,
    /// The day as it stands there (year, month from 1, day); midnight of it is the server's local one.
    pub day: Option<(i32, u32, u32)>,
}

const MONTHS: [&[u8; 3]; 12] =
    [b"jan", b"feb", b"mar", b"apr", b"may", b"jun", b"jul", b"aug", b"sep", b"oct", b"nov", b"dec"];

struct Text<'a>(&'a [u8]);

impl<'a> Text<'a> {
    fn blanks(&mut self) {
        self.0 = self.0.trim_ascii_start();
    }

    fn token(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|byte| !byte.is_ascii_alphanumeric()).unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at_checked(end).unwrap_or((self.0, b""));
        self.0 = rest;
        token
    }

    fn next_is(&mut self, any: &[u8]) -> bool {
        match self.0.split_first() {
            Some((first, rest)) if any.contains(first) => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// One or two digits.
    fn short(&mut self) -> Option<i64> {
        let token = self.token();
        (token.len() <= 2).then(|| number(token)).flatten()
    }
}

fn number(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Reads the value of a Date header.
pub fn parse(value: &[u8]) -> Sent {
    let mut text = Text(value);
    let Some((year, month, day)) = date(&mut text) else { return Sent::default() };
    let day = Some((year as i32, month as u32 + 1, day as u32)).filter(|_| year < 10_000);
    let seconds = time(&mut text).and_then(|seconds| {
        let (year, month, day) = day?;
        seconds.checked_add(days_since_1970(year.into(), month.into(), day.into()).checked_mul(86_400)?)
    });
    Sent { gmtime: seconds.filter(|seconds| *seconds >= 0).unwrap_or(0), day }
}

fn date(text: &mut Text<'_>) -> Option<(i64, usize, i64)> {
    text.blanks();
    if text.0.first()?.is_ascii_alphabetic() {
        let weekday = text.token();
        if weekday.len() != 3 || !text.next_is(b",") {
            return None;
        }
        text.blanks();
    }
    let day = text.short()?;
    text.0 = text.0.get(1..)?;
    text.blanks();
    let name = text.token().to_ascii_lowercase();
    let month = MONTHS.iter().position(|month| month[..] == name[..])?;
    text.0 = text.0.get(1..)?;
    text.blanks();
    let token = text.token();
    let year = match (token.len(), number(token)?) {
        (2, year) if year < 70 => year.checked_add(2000)?,
        (2, year) => year.checked_add(1900)?,
        (_, year) if year >= 1900 => year,
        _ => return None,
    };
    Some((year, month, day))
}

/// Seconds after midnight UTC of that day.
fn time(text: &mut Text<'_>) -> Option<i64> {
    text.blanks();
    let hour = text.short()?;
    if !text.next_is(b":.") {
        return None;
    }
    let minute = text.short()?;
    let second = if text.next_is(b":.") { text.short()? } else { 0 };
    text.blanks();
    let minus = text.0.first() == Some(&b'-');
    text.next_is(b"+-");
    Some(hour * 3600 + minute * 60 + second - zone_minutes(text.token(), minus) * 60)
}

fn zone_minutes(zone: &[u8], minus: bool) -> i64 {
    let upper = zone.to_ascii_uppercase();
    match upper.as_slice() {
        [letter @ b'A'..=b'I'] => i64::from(letter - b'A' + 1) * 60,
        [letter @ b'K'..=b'M'] => i64::from(letter - b'A') * 60,
        [letter @ b'N'..=b'Y'] => (i64::from(b'M') - i64::from(*letter)) * 60,
        [first, summer @ (b'D' | b'S'), b'T'] => {
            let zones = b"AECMPYHB";
            match zones.iter().position(|zone| zone == first) {
                Some(at) => ((zones.len() - at) as i64 - 12) * 60 + if *summer == b'D' { 60 } else { 0 },
                None => 0,
            }
        }
        digits if digits.len() == 4 => match number(digits) {
            Some(number) => {
                let minutes = number / 100 * 60 + number % 100;
                if minus { -minutes } else { minutes }
            }
            None => 0,
        },
        _ => 0,
    }
}

/// Civil calendar to days; a day beyond its month counts on, as in `mktime`.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_a_server_keeps_them() {
        // As stored by 3.6.1 for the message of the reference (`docs/formats.md`).
        for (text, gmtime) in [
            ("Mon, 7 Feb 1994 21:52:25 -0800 (PST)", 760_686_745),
            ("7 Feb 94 21:52:25 -0800", 760_686_745),
            ("07-Feb-1994 21.52.25 PST", 760_686_745),
            ("Thu, 01 Jan 1970 00:00:01 GMT", 1),
            ("Mon, 7 Feb 1994 21:52 Z", 760_657_920),
        ] {
            let sent = parse(text.as_bytes());
            assert_eq!(sent.gmtime, gmtime, "{text}");
        }
        assert_eq!(parse(b"Mon, 7 Feb 1994").day, Some((1994, 2, 7)));
        for bad in ["", "yesterday", "Mon 7 Feb 1994 21:52", "7 Foo 1994 1:2:3 Z", "7 Feb 94x 1:2:3 Z"] {
            assert_eq!(parse(bad.as_bytes()), Sent::default(), "{bad}");
        }
    }
}
