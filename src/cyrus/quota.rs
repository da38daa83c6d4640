//! Quota values: `used limit` up to 2.4 (blank or line end between), list text from 2.5 on. Only limits are read.

use super::FormatError;
use crate::dlist::{self, Literals, Value};
use crate::model::{QuotaLimits, QuotaResource};

const PART: &str = "quota value";

/// What is in use below a quota root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of messages.
    pub storage: u64,
    pub messages: u64,
    /// Bytes of annotations.
    pub annotations: u64,
    pub folders: u64,
}

/// Name in the value, resource; in the order servers write them.
const RESOURCES: [(&str, QuotaResource); 4] = [
    ("S", QuotaResource::Storage),
    ("M", QuotaResource::Message),
    ("AS", QuotaResource::AnnotationStorage),
    ("NF", QuotaResource::NumFolders),
];

/// The value as 3.0 and later write it, with the line end of a file of its own.
pub fn encode(usage: &Usage, limits: &QuotaLimits) -> Vec<u8> {
    let used = [usage.storage, usage.messages, usage.annotations, usage.folders];
    let mut fields: Vec<(Vec<u8>, Value)> = Vec::new();
    for ((name, resource), used) in RESOURCES.into_iter().zip(used) {
        let limit = limits.limits.get(&resource).map(Value::number);
        fields.push((name.into(), Value::List([Value::number(used)].into_iter().chain(limit).collect())));
    }
    if limits.modseq != 0 {
        fields.push((b"MODSEQ".to_vec(), Value::number(limits.modseq)));
    }
    let mut out = Vec::new();
    Value::Kv(fields).encode(&mut out, Literals::Plain);
    out.push(b'\n');
    out
}

/// Reads what the value says is in use; a resource it does not name counts as nothing.
pub fn parse_usage(value: &[u8]) -> Result<Usage, FormatError> {
    let value = dlist::parse(value.trim_ascii()).map_err(|error| FormatError::in_list(PART, 0, error))?;
    let used = |name: &str| {
        let numbers = value.field(name).and_then(Value::as_list);
        numbers.and_then(|numbers| numbers.first()?.as_number()).unwrap_or_default()
    };
    Ok(Usage { storage: used("S"), messages: used("M"), annotations: used("AS"), folders: used("NF") })
}

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
    fn as_3_6_writes_it() {
        let text = b"%(S (167 100000) M (1) AS (0) NF (2) MODSEQ 7)\n";
        let usage = Usage { storage: 167, messages: 1, annotations: 0, folders: 2 };
        assert_eq!(parse_usage(text).expect("parses"), usage);
        assert_eq!(encode(&usage, &parse(text).expect("parses")), text);
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
