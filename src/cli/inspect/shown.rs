//! A value with named parts in a fixed order: printed as indented text for people, or as JSON with the same names.

use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use std::io::{self, Write};

/// What is shown. Bytes that are not printable ASCII appear as `\xNN` in both forms.
#[derive(Clone, Debug, PartialEq)]
pub enum Shown {
    Nothing,
    Yes(bool),
    Number(i128),
    /// Seconds since 1970 UTC; JSON keeps the number.
    Time(i64),
    Text(String),
    List(Vec<Shown>),
    Fields(Vec<(&'static str, Shown)>),
}

impl Shown {
    /// Any bytes, escaped the way all identifiers of ours are.
    pub fn bytes(bytes: impl AsRef<[u8]>) -> Self {
        Self::Text(crate::model::UserId::new(bytes).to_string())
    }

    pub fn text(text: impl ToString) -> Self {
        Self::Text(text.to_string())
    }

    pub fn number(number: impl Into<i128>) -> Self {
        Self::Number(number.into())
    }

    /// Named parts first, each on its own line; then every list of named parts, one line per item.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        self.print_at(0, out)
    }

    fn print_at(&self, depth: usize, out: &mut dyn Write) -> io::Result<()> {
        let Self::Fields(fields) = self else { return writeln!(out, "{:1$}{2}", "", depth * 2, self.in_line()) };
        let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in fields {
            write!(out, "{:1$}", "", depth * 2)?;
            match value {
                Self::Fields(_) => {
                    writeln!(out, "{name}:")?;
                    value.print_at(depth + 1, out)?;
                }
                Self::List(items) if items.iter().any(|item| matches!(item, Self::Fields(_))) => {
                    writeln!(out, "{name}: {}", items.len())?;
                    for item in items {
                        writeln!(out, "{:1$}{2}", "", depth * 2 + 2, item.in_line())?;
                    }
                }
                _ => writeln!(out, "{:<1$} {2}", format!("{name}:"), width + 1, value.in_line())?,
            }
        }
        Ok(())
    }

    fn in_line(&self) -> String {
        match self {
            Self::Nothing => "-".into(),
            Self::Yes(yes) => if *yes { "yes" } else { "no" }.into(),
            Self::Number(number) => number.to_string(),
            Self::Time(0) => "0".into(),
            Self::Time(seconds) => format!("{seconds} ({})", utc(*seconds)),
            Self::Text(text) => text.clone(),
            Self::List(items) => items.iter().map(Self::in_line).collect::<Vec<_>>().join(" "),
            Self::Fields(fields) => {
                let said = fields.iter().filter(|(_, value)| *value != Self::Nothing);
                let short = |value: &Self| match value {
                    Self::Time(seconds) => seconds.to_string(),
                    other => other.in_line(),
                };
                said.map(|(name, value)| format!("{name}={}", short(value))).collect::<Vec<_>>().join(" ")
            }
        }
    }
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nothing => serializer.serialize_none(),
            Self::Yes(yes) => serializer.serialize_bool(*yes),
            Self::Number(number) => serializer.serialize_i128(*number),
            Self::Time(seconds) => serializer.serialize_i64(*seconds),
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                items.iter().try_for_each(|item| list.serialize_element(item))?;
                list.end()
            }
            Self::Fields(fields) => {
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                fields.iter().try_for_each(|(name, value)| map.serialize_entry(name, value))?;
                map.end()
            }
        }
    }
}

/// `2026-11-24 03:55:48 UTC`.
fn utc(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years are counted from March, so that the leap day comes last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(1_795_492_548), "2026-11-24 03:55:48 UTC");
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_868_799), "2000-02-29 23:59:59 UTC");
        assert_eq!(utc(-1), "1969-12-31 23:59:59 UTC");
        // Whatever a damaged file may hold.
        utc(i64::from(u32::MAX));
        utc(18_446_744_073);
    }

    #[test]
    fn both_forms_have_the_same_names() {
        let shown = Shown::Fields(vec![
            ("format", Shown::text("x")),
            ("when", Shown::Time(0)),
            (
                "rows",
                Shown::List(vec![Shown::Fields(vec![("key", Shown::bytes(b"a\x1fb")), ("none", Shown::Nothing)])]),
            ),
        ]);
        let mut text = Vec::new();
        shown.print(&mut text).expect("prints");
        assert_eq!(String::from_utf8_lossy(&text), "format: x\nwhen:   0\nrows: 1\n  key=a\\x1fb\n");
        let json = serde_json::to_string(&shown).expect("serialises");
        assert_eq!(json, r#"{"format":"x","when":0,"rows":[{"key":"a\\x1fb","none":null}]}"#);
    }
}
