//! Quota values: `used limit` up to 2.4 (blank or line end between), list text from 2.5 on. Only limits are read.

use super::FormatError;
use crate::dlist::{self, Value};
use crate::model::{QuotaLimits, QuotaResource};

const PART: &str = "quota value";

/// Reads the limits.
pub fn parse(value: &[u8]) -> Result<QuotaLimits, FormatError> {
    let fault = |what: &str| FormatError::value(PART, 0, what);
    let text = value.trim_ascii();
    let mut quota = QuotaLimits::default();
    if !text.starts_with(b"%(") {
        let text = std::str::from_utf8(text).map_err(|_| fault("is neither numbers nor list text"))?;
        let mut words = text.split_ascii_whitespace();
        let used = words.next().and_then(|word| word.parse::<i64>().ok());
        let limit = words.next().and_then(|word| word.parse::<i64>().ok());
        let (Some(_), Some(limit)) = (used, limit) else { return Err(fault("needs usage and limit")) };
        if let Ok(limit) = u64::try_from(limit) {
            quota.limits.insert(QuotaResource::Storage, limit);
        }
        return Ok(quota);
    }
    let value = dlist::parse(text).map_err(|error| FormatError::in_list(PART, 0, error))?;
    for (key, value) in value.as_kv().unwrap_or_default() {
        let resource = match key.as_slice() {
            b"S" => QuotaResource::Storage,
            b"M" => QuotaResource::Message,
            b"AS" => QuotaResource::AnnotationStorage,
            b"NF" => QuotaResource::NumFolders,
            b"MODSEQ" => {
                quota.modseq = value.as_number().unwrap_or_default();
                continue;
            }
            _ => continue,
        };
        // One number is usage without a limit; -1 is none either.
        if let Some(limit) = value.as_list().and_then(|numbers| numbers.get(1)).and_then(Value::as_number::<i64>)
            && let Ok(limit) = u64::try_from(limit)
        {
            quota.limits.insert(resource, limit);
        }
    }
    Ok(quota)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(value: &str, expected: &[(QuotaResource, u64)]) {
        let limits: Vec<_> = parse(value.as_bytes()).expect("parses").limits.into_iter().collect();
        assert_eq!(limits, expected, "{value}");
    }

    #[test]
    fn values_of_all_releases() {
        use QuotaResource::{Message, Storage};
        check("167\n100000\n", &[(Storage, 100_000)]);
        check("167 -1", &[]);
        check("%(S (167 100000) M (1) AS (0) NF (2) MODSEQ 7)\n", &[(Storage, 100_000)]);
        check("%(S (167 -1) M (1 500))", &[(Message, 500)]);
        assert!(parse(b"").is_err());
        assert!(parse(b"%(S (1 2)").is_err());
        assert!(parse(b"x y").is_err());
    }
}
