//! cyrus.header: names of the user flags, quota root, uniqueid, a copy of the ACL. Always replaced as a whole.
//!
//! Up to 3.4 three lines of text, from 3.6 on list text with the mailbox's name; a text header stays text in any later
//! release until something changes it. The CRC-32 of the whole file stands in the header of cyrus.index (v12 and later).
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use super::bytes::crc32;
use super::{Fault, FormatError};
use crate::dlist::{self, Literals, Value};
use crate::model::{FlagName, MboxName, MboxType, QuotaRoot, UniqueId};
use serde::Serialize;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MailboxHeader {
    pub quotaroot: Option<QuotaRoot>,
    /// Empty in files older than uniqueids.
    pub uniqueid: UniqueId,
    /// Name of user flag *n*; `None` is a free slot.
    pub user_flags: Vec<Option<FlagName>>,
    /// `ident TAB rights TAB …`; the mailbox list has the authority.
    pub acl: Vec<u8>,
    /// 3.6 and later.
    pub name: Option<MboxName>,
    /// 3.6 and later.
    pub mbtype: Option<MboxType>,
    /// CRC-32 of the file, to be compared with `IndexHeader::header_file_crc`.
    pub file_crc: u32,
}

/// The file begins with this, in every release.
pub const MAGIC: &[u8] = b"\xa1\x02\x8b\x0dCyrus mailbox header\n\
    \"The best thing about this system was that it had lots of goals.\"\n\
    \t--Jim Morris on Andrew\n";

const PART: &str = "cyrus.header";

/// As many as a record has bits for.
const MAX_USER_FLAGS: usize = 128;

/// Reads the whole file.
pub fn parse(bytes: &[u8]) -> Result<MailboxHeader, FormatError> {
    let have = bytes.len() as u64;
    let truncated = || FormatError { part: PART, offset: have, fault: Fault::Truncated { need: 1, have: 0 } };
    let Some(text) = bytes.strip_prefix(MAGIC) else {
        let cut = MAGIC.starts_with(bytes);
        return Err(if cut { truncated() } else { FormatError { part: PART, offset: 0, fault: Fault::Magic } });
    };
    // The line end is the last byte written.
    let text = text.strip_suffix(b"\n").ok_or_else(truncated)?;
    let mut header =
        if text.starts_with(b"%") { parse_list(text)? } else { parse_lines(text).ok_or_else(truncated)? };
    if header.user_flags.len() > MAX_USER_FLAGS {
        let message = format!("{} user flags, at most {MAX_USER_FLAGS} are possible", header.user_flags.len());
        return Err(FormatError::value(PART, MAGIC.len() as u64, message));
    }
    header.file_crc = crc32(bytes);
    Ok(header)
}

fn parse_lines(text: &[u8]) -> Option<MailboxHeader> {
    let mut lines = text.split(|&byte| byte == b'\n');
    let (first, flags, acl) = (lines.next()?, lines.next()?, lines.next()?);
    let mut fields = first.split(|&byte| byte == b'\t');
    let quotaroot = fields.next().filter(|root| !root.is_empty()).map(QuotaRoot::new);
    let uniqueid = UniqueId::new(fields.next().unwrap_or_default());
    // Each name is followed by a blank; two blanks in a row leave a slot free.
    let flags = flags.strip_suffix(b" ").unwrap_or(flags);
    let user_flags = if flags.is_empty() {
        Vec::new()
    } else {
        let name = |name: &[u8]| (!name.is_empty()).then(|| FlagName::new(name));
        flags.split(|&byte| byte == b' ').map(name).collect()
    };
    Some(MailboxHeader { quotaroot, uniqueid, user_flags, acl: acl.to_vec(), ..Default::default() })
}

fn parse_list(text: &[u8]) -> Result<MailboxHeader, FormatError> {
    let base = MAGIC.len() as u64;
    let value = dlist::parse(text).map_err(|error| FormatError::in_list(PART, base, error))?;
    let missing = |key: &str| FormatError::value(PART, base, format!("{key} is missing"));
    let text_of = |key: &str| value.field(key).and_then(Value::as_text);
    let flags = value.field("U").and_then(Value::as_list).unwrap_or_default();
    Ok(MailboxHeader {
        quotaroot: text_of("Q").filter(|root| !root.is_empty()).map(QuotaRoot::new),
        uniqueid: UniqueId::new(text_of("I").ok_or_else(|| missing("uniqueid (I)"))?),
        user_flags: flags.iter().map(|flag| flag.as_text().map(FlagName::new)).collect(),
        acl: value.field("A").map(acl_text).unwrap_or_default(),
        name: text_of("N").map(MboxName::new),
        mbtype: text_of("T").map(MboxType::parse),
        file_crc: 0,
    })
}

/// The file as 3.6 and later write it; `file_crc` is that of the bytes that come back, not of `header`.
pub fn encode(header: &MailboxHeader) -> Vec<u8> {
    let mut fields = vec![
        (b"T".to_vec(), Value::text(letters(header.mbtype.as_ref().unwrap_or(&MboxType::default()), false))),
        (b"N".to_vec(), Value::text(header.name.clone().unwrap_or_default())),
        (b"I".to_vec(), Value::text(&header.uniqueid)),
    ];
    if let Some(root) = &header.quotaroot {
        fields.push((b"Q".to_vec(), Value::text(root)));
    }
    fields.push((b"A".to_vec(), acl_value(&header.acl)));
    if header.user_flags.iter().any(Option::is_some) {
        let flags = header.user_flags.iter().map(|flag| flag.as_ref().map_or(Value::Nil, Value::text));
        fields.push((b"U".to_vec(), Value::List(flags.collect())));
    }
    let mut out = MAGIC.to_vec();
    Value::Kv(fields).encode(&mut out, Literals::Plain);
    out.push(b'\n');
    out
}

/// The letters of a type as 3.6 and later write them: one that says what it is comes first.
pub(super) fn letters(mbtype: &MboxType, by_name: bool) -> String {
    let is_mail = !mbtype.0.contains(['n', 'b', 'c', 'a', 's', 'p', 'j', 'f']);
    format!("{}{}{}", if is_mail { "e" } else { "" }, mbtype.0, if by_name { "l" } else { "" })
}

/// `%(ident rights …)` out of the form all other places use.
pub(super) fn acl_value(acl: &[u8]) -> Value {
    let parts: Vec<&[u8]> = acl.split(|&byte| byte == b'\t').collect();
    let pairs = parts.chunks_exact(2).filter_map(|pair| match pair {
        [ident, rights] if !ident.is_empty() => Some((ident.to_vec(), Value::text(rights))),
        _ => None,
    });
    Value::Kv(pairs.collect())
}

/// `%(ident rights …)` in the form all other places use.
pub(super) fn acl_text(acl: &Value) -> Vec<u8> {
    let pairs = acl.as_kv().unwrap_or_default();
    pairs.iter().flat_map(|(ident, rights)| [ident, rights.as_text().unwrap_or_default(), b""].join(&b'\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(text: &str) -> Vec<u8> {
        [MAGIC, text.as_bytes()].concat()
    }

    fn check(text: &str, expected: &str) {
        let header = parse(&file(text)).expect("parses");
        let root = header.quotaroot.map(|root| root.to_string());
        let name = header.name.map(|name| name.to_string());
        let flags: Vec<_> = header.user_flags.iter().map(|flag| flag.as_ref().map(FlagName::to_string)).collect();
        let acl = String::from_utf8_lossy(&header.acl).into_owned();
        assert_eq!(format!("{root:?} {} {name:?} {flags:?} {acl:?}", header.uniqueid), expected);
    }

    #[test]
    fn both_forms_as_servers_wrote_them() {
        assert_eq!(MAGIC.len(), 0x73);
        check(
            "\t2943170c6b050ac1\n$Label1 work \nu1\tlrswipkxtecda\tcyrus\tlrs\t\n",
            r#"None 2943170c6b050ac1 None [Some("$Label1"), Some("work")] "u1\tlrswipkxtecda\tcyrus\tlrs\t""#,
        );
        check("user.fred\tid\tmore\na  b \n\n", r#"Some("user.fred") id None [Some("a"), None, Some("b")] """#);
        check("user.fred\n\n\n", r#"Some("user.fred")  None [] """#);
        check(
            "%(T e N user.fred I tm Q user.fred A %(fred lrs cyrus lr) U ($Foo NIL Bar))\n",
            r#"Some("user.fred") tm Some("user.fred") [Some("$Foo"), None, Some("Bar")] "fred\tlrs\tcyrus\tlr\t""#,
        );
        check("%(T e N user.f I tm A %())\n", r#"None tm Some("user.f") [] """#);
    }

    #[test]
    fn every_truncation_is_an_error() {
        for text in ["user.fred\tid\na b \nfred\tlrs\t\n", "%(T e N user.f I tm A %(f lrs))\n"] {
            let whole = file(text);
            parse(&whole).expect("the whole parses");
            for end in 0..whole.len() {
                // A text header cut at a line end is two lines short of a header.
                assert!(parse(&whole[..end]).is_err(), "cut at {end}");
            }
        }
    }

    #[test]
    fn too_many_flags_are_refused() {
        assert!(parse(&file(&format!("\tid\n{}\n\n", "f ".repeat(129)))).is_err());
        assert!(parse(&file(&format!("\tid\n{}\n\n", "f ".repeat(128)))).is_ok());
    }

    #[test]
    fn as_3_6_writes_it() {
        let text = "%(T e N user.fred I tm Q user.fred A %(fred lrs cyrus lr) U ($Foo NIL Bar))\n";
        let bytes = file(text);
        assert_eq!(encode(&parse(&bytes).expect("parses")), bytes);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(
            quotaroot in prop::option::of("[a-z]{1,8}"),
            id in "[a-z0-9]{1,24}",
            flags in prop::collection::vec(prop::option::of("[!-~]{1,9}"), 0..9),
            acl in prop::collection::vec(("[!-~\u{e9} ]{1,9}", "[a-z]{0,9}"), 0..5),
            name in "[a-z.^& ]{1,20}",
        ) {
            let mut user_flags: Vec<_> = flags.iter().map(|flag| flag.as_deref().map(FlagName::from)).collect();
            if user_flags.iter().all(Option::is_none) {
                user_flags.clear();
            }
            let header = MailboxHeader {
                quotaroot: quotaroot.map(QuotaRoot::new),
                uniqueid: UniqueId::new(id),
                user_flags,
                acl: acl.iter().flat_map(|(ident, rights)| format!("{ident}\t{rights}\t").into_bytes()).collect(),
                name: Some(MboxName::new(name)),
                mbtype: Some(MboxType("f".into())),
                file_crc: 0,
            };
            let bytes = encode(&header);
            prop_assert_eq!(parse(&bytes).expect("parses"), MailboxHeader { file_crc: crc32(&bytes), ..header });
        }

        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = parse(&[MAGIC, &bytes].concat());
            let _ = parse(&[MAGIC, b"%(", &bytes, b")\n"].concat());
        }
    }
}
