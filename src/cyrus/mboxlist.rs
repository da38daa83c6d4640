//! Rows of mailboxes.db in all their shapes: text (2.3, 2.4), list text under the name (2.5 to 3.4), list text under
//! `N` + name and `I` + uniqueid (3.6 and later).
//!
//! Only a row under a name makes a mailbox exist: rows under uniqueids can be stale, and are used to follow names.
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

use super::FormatError;
use super::db::Map;
use super::header::{acl_text, acl_value, letters};
use crate::dlist::{self, Literals, Value};
use crate::model::{MailboxEntry, MboxName, MboxType, ModSeq, Partition, UniqueId};
use serde::Serialize;
use std::collections::BTreeMap;

/// One row that is about a mailbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Row {
    /// Stored under the name: what the mailbox is, or that it was (see [`Listed::standing`]).
    Name(Listed),
    /// Stored under the uniqueid (3.6 and later): the names it has and had. Proves no existence.
    Id(Listed, Vec<FormerName>),
}

/// A row's values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Uniqueid is empty in text rows: cyrus.header knows it.
    pub mailbox: MailboxEntry,
    /// Server the mailbox lives on, where the row says one.
    pub server: Option<Vec<u8>>,
    /// When the row was written; 0 where that is not kept.
    pub mtime: i64,
}

/// What a row under a name says about existence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Standing {
    /// Has data on this server.
    Present,
    /// Was deleted, or renamed away.
    Tombstone,
    /// Stands in for a parent that has no data.
    Placeholder,
    /// Remote, moving or reserved.
    Elsewhere,
}

/// A name that a mailbox had before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FormerName {
    pub name: MboxName,
    pub mtime: i64,
    pub uidvalidity: u32,
    pub foldermodseq: ModSeq,
}

impl Listed {
    /// `servername` is imapd.conf's; without one every server named in a row is another.
    pub fn standing(&self, servername: Option<&[u8]>) -> Standing {
        let mbtype = &self.mailbox.mbtype;
        let here = self.server.is_none() || self.server.as_deref() == servername;
        if mbtype.is_deleted() {
            Standing::Tombstone
        } else if mbtype.is_foreign() || !here {
            Standing::Elsewhere
        } else if mbtype.is_intermediate() || self.mailbox.partition.is_empty() {
            Standing::Placeholder
        } else {
            Standing::Present
        }
    }
}

/// The whole list.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MailboxList {
    /// Mailboxes with data on this server, those below the deleted prefix included; by raw order of their keys.
    pub mailboxes: Vec<MailboxEntry>,
    pub tombstones: Vec<Listed>,
    pub placeholders: Vec<MailboxEntry>,
    pub elsewhere: Vec<Listed>,
    /// Names that mailboxes had, newest first. Present for existing mailboxes only.
    pub history: BTreeMap<UniqueId, Vec<FormerName>>,
    /// Uniqueids whose row lost its mailbox (left behind by `cyr_expire` of 3.6 and 3.8).
    pub stale: Vec<UniqueId>,
    /// Rows that could not be understood, by key; their neighbours are in the lists above.
    #[serde(skip)]
    pub faults: Vec<(Vec<u8>, FormatError)>,
}

const PART: &str = "mailboxes.db row";

/// Reads the whole list; `servername` as for [`Listed::standing`].
pub fn parse(map: &Map, servername: Option<&[u8]>) -> MailboxList {
    let mut list = MailboxList::default();
    let mut by_id = Vec::new();
    for (key, value) in map {
        match row_for(key, value) {
            Ok(None) => {}
            Ok(Some(Row::Id(listed, former))) => by_id.push((listed, former)),
            Ok(Some(Row::Name(listed))) => match listed.standing(servername) {
                Standing::Present => list.mailboxes.push(listed.mailbox),
                Standing::Tombstone => list.tombstones.push(listed),
                Standing::Placeholder => list.placeholders.push(listed.mailbox),
                Standing::Elsewhere => list.elsewhere.push(listed),
            },
            Err(error) => list.faults.push((key.clone(), error)),
        }
    }
    let present: std::collections::BTreeSet<&UniqueId> =
        list.mailboxes.iter().chain(&list.placeholders).map(|mailbox| &mailbox.uniqueid).collect();
    for (listed, former) in by_id {
        if present.contains(&listed.mailbox.uniqueid) {
            list.history.insert(listed.mailbox.uniqueid, former);
        } else {
            list.stale.push(listed.mailbox.uniqueid);
        }
    }
    list
}

/// The mailbox that a row under a name shows to exist here; `None` for every other row. One changed key costs one call.
pub fn entry_for(key: &[u8], value: &[u8], servername: Option<&[u8]>) -> Result<Option<MailboxEntry>, FormatError> {
    Ok(match row_for(key, value)? {
        Some(Row::Name(listed)) if listed.standing(servername) == Standing::Present => Some(listed.mailbox),
        _ => None,
    })
}

/// Reads one row; `None` where it is about no mailbox (reverse ACLs and uniqueids).
pub fn row_for(key: &[u8], value: &[u8]) -> Result<Option<Row>, FormatError> {
    // `$RACL…` and `$RUNQ…` up to 3.4, `A…` with nothing in it from 3.6 on.
    if key.first() == Some(&b'$') || (key.first() == Some(&b'A') && value.is_empty()) {
        return Ok(None);
    }
    if !value.starts_with(b"%(") {
        return text_row(key, value).map(|listed| Some(Row::Name(listed)));
    }
    let value = dlist::parse(value).map_err(|error| FormatError::in_list(PART, 0, error))?;
    // From 3.6 on the type is always there and first; before that it is never first and mostly absent.
    let since_3_6 = value.as_kv().and_then(|fields| fields.first()).is_some_and(|(name, _)| name == b"T");
    match key.split_first() {
        Some((b'N', dbname)) if since_3_6 => {
            listed(&value, name_of_dbname(dbname), None, true).map(|listed| Some(Row::Name(listed)))
        }
        Some((b'I', id)) if since_3_6 && value.field("N").is_some() => {
            let name = value.field("N").and_then(Value::as_text).unwrap_or_default();
            let former = value.field("H").and_then(Value::as_list).unwrap_or_default();
            let former = former.iter().filter_map(former_name).collect();
            let listed = listed(&value, name_of_dbname(name), Some(UniqueId::new(id)), true)?;
            Ok(Some(Row::Id(listed, former)))
        }
        _ => listed(&value, MboxName::new(key), None, false).map(|listed| Some(Row::Name(listed))),
    }
}

fn listed(value: &Value, name: MboxName, id: Option<UniqueId>, since_3_6: bool) -> Result<Listed, FormatError> {
    let text = |key: &str| value.field(key).and_then(Value::as_text);
    // A number that is there has to be one.
    fn number<N: std::str::FromStr + Default>(value: &Value, key: &str) -> Result<N, FormatError> {
        let Some(field) = value.field(key) else { return Ok(N::default()) };
        field.as_number().ok_or_else(|| FormatError::value(PART, 0, format!("{key} is not a number that fits")))
    }
    let letters = text("T").unwrap_or_default();
    let mailbox = MailboxEntry {
        name,
        uniqueid: id.or_else(|| text("I").map(UniqueId::new)).unwrap_or_default(),
        mbtype: MboxType::parse(letters),
        partition: text("P").map(Partition::new).unwrap_or_default(),
        acl: value.field("A").map(acl_text).unwrap_or_default(),
        uidvalidity: number(value, "V")?,
        createdmodseq: ModSeq(number(value, "C")?),
        foldermodseq: ModSeq(number(value, "F")?),
        by_name: !since_3_6 || letters.contains(&b'l'),
    };
    Ok(Listed { mailbox, server: text("S").map(<[u8]>::to_vec), mtime: number(value, "M")? })
}

fn former_name(value: &Value) -> Option<FormerName> {
    Some(FormerName {
        name: name_of_dbname(value.field("N")?.as_text()?),
        mtime: value.field("M").and_then(Value::as_number).unwrap_or_default(),
        uidvalidity: value.field("V").and_then(Value::as_number).unwrap_or_default(),
        foldermodseq: ModSeq(value.field("F").and_then(Value::as_number).unwrap_or_default()),
    })
}

/// `[(key value …) ]mbtype partition acl`, the parentheses only from some builds of 2.4 and 2.5.
fn text_row(key: &[u8], value: &[u8]) -> Result<Listed, FormatError> {
    let fault = |message: &str| FormatError::value(PART, 0, message);
    let mut text = value;
    let mut uniqueid = UniqueId::default();
    if text.starts_with(b"(") {
        let mut parser = dlist::Parser::new(text);
        let extra = parser.value().map_err(|error| FormatError::in_list(PART, 0, error))?;
        for pair in extra.as_list().unwrap_or_default().chunks_exact(2) {
            if let [name, id] = pair
                && name.as_text() == Some(b"uniqueid")
            {
                uniqueid = UniqueId::new(id.as_text().unwrap_or_default());
            }
        }
        text = text.get(parser.offset()..).unwrap_or_default();
        text = text.strip_prefix(b" ").unwrap_or(text);
    }
    let mut fields = text.splitn(3, |&byte| byte == b' ');
    let bits = fields.next().and_then(|bits| std::str::from_utf8(bits).ok()).and_then(|bits| bits.parse::<u32>().ok());
    let Some(bits) = bits else { return Err(fault("mailbox type is not a number")) };
    let Some(partition) = fields.next() else { return Err(fault("partition is missing")) };
    let letters = [(1, 'r'), (2, 'z'), (4, 'n'), (8, 'm'), (16, 'd')];
    let mbtype: String = letters.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, letter)| letter).collect();
    let mailbox = MailboxEntry {
        name: MboxName::new(key),
        uniqueid,
        mbtype: MboxType(mbtype),
        partition: Partition::new(partition),
        acl: fields.next().unwrap_or_default().to_vec(),
        uidvalidity: 0,
        createdmodseq: ModSeq(0),
        foldermodseq: ModSeq(0),
        by_name: true,
    };
    Ok(Listed { mailbox, server: None, mtime: 0 })
}

const DOMAIN_END: u8 = 0x1d;
const SEPARATOR: u8 = 0x1f;

/// The name that databases of 3.6 and later use, turned into the classic internal one:
/// `example.com 0x1D user 0x1F jane.doe` gives `example.com!user.jane^doe`.
pub fn name_of_dbname(dbname: &[u8]) -> MboxName {
    let (domain, local) = match dbname.iter().position(|&byte| byte == DOMAIN_END) {
        Some(at) => (dbname.get(..at).unwrap_or_default(), dbname.get(at..).unwrap_or_default()),
        None => (&b""[..], dbname),
    };
    let local = local.iter().map(|&byte| match byte {
        DOMAIN_END => b'!',
        SEPARATOR => b'.',
        b'.' => b'^',
        other => other,
    });
    MboxName::from(domain.iter().copied().chain(local).collect::<Vec<u8>>())
}

/// The way back.
pub fn dbname_of_name(name: &MboxName) -> Vec<u8> {
    let (domain, local) = name.domain_and_local();
    let mut out = Vec::new();
    if let Some(domain) = domain {
        out.extend_from_slice(domain);
        out.push(DOMAIN_END);
    }
    out.extend(local.iter().map(|&byte| match byte {
        b'.' => SEPARATOR,
        b'^' => b'.',
        other => other,
    }));
    out
}

/// Key and value of the row under the name, as 3.6 and later write it; 0 and nothing at all are left out.
pub fn encode_name_row(mailbox: &MailboxEntry, mtime: i64) -> (Vec<u8>, Vec<u8>) {
    let [_, key] = keys_for(&mailbox.name);
    (key, encode_row(mailbox, mtime, ("I", Value::text(&mailbox.uniqueid)), None))
}

/// Key and value of the row under the uniqueid; `history` as [`history_of`] gives it, newest first.
pub fn encode_id_row(mailbox: &MailboxEntry, mtime: i64, history: Vec<Value>) -> (Vec<u8>, Vec<u8>) {
    let name = Value::text(dbname_of_name(&mailbox.name));
    (id_key(&mailbox.uniqueid), encode_row(mailbox, mtime, ("N", name), Some(history)))
}

/// Key of the row under a uniqueid.
pub fn id_key(id: &UniqueId) -> Vec<u8> {
    [b"I", id.as_bytes()].concat()
}

/// The former names in a row under a uniqueid, as they stand there.
pub fn history_of(row: &[u8]) -> Vec<Value> {
    let value = dlist::parse(row).ok();
    value.as_ref().and_then(|value| value.field("H")?.as_list()).unwrap_or_default().to_vec()
}

/// A name that a mailbox has had until now, for its history.
pub fn former_value(mailbox: &MailboxEntry, mtime: i64) -> Value {
    let mut fields = vec![("N", Value::text(dbname_of_name(&mailbox.name)))];
    fields.extend(numbers(mailbox, mtime));
    fields.push(("T", Value::text(letters(&mailbox.mbtype, mailbox.by_name))));
    if !mailbox.partition.is_empty() {
        fields.push(("P", Value::text(&mailbox.partition)));
    }
    kv(fields)
}

fn encode_row(
    mailbox: &MailboxEntry,
    mtime: i64,
    other: (&'static str, Value),
    history: Option<Vec<Value>>,
) -> Vec<u8> {
    let mut fields = vec![("T", Value::text(letters(&mailbox.mbtype, mailbox.by_name))), other];
    if !mailbox.partition.is_empty() {
        fields.push(("P", Value::text(&mailbox.partition)));
    }
    fields.extend(numbers(mailbox, mtime));
    if !mailbox.mbtype.is_deleted() && !mailbox.acl.is_empty() {
        fields.push(("A", acl_value(&mailbox.acl)));
    }
    if let Some(history) = history {
        fields.push(("H", Value::List(history)));
    }
    let mut out = Vec::new();
    kv(fields).encode(&mut out, Literals::Plain);
    out
}

fn numbers(mailbox: &MailboxEntry, mtime: i64) -> impl Iterator<Item = (&'static str, Value)> {
    let all = [
        ("V", u64::from(mailbox.uidvalidity)),
        ("C", mailbox.createdmodseq.0),
        ("F", mailbox.foldermodseq.0),
        ("M", mtime.unsigned_abs()),
    ];
    all.into_iter().filter(|(_, number)| *number != 0).map(|(key, number)| (key, Value::number(number)))
}

fn kv(fields: Vec<(&str, Value)>) -> Value {
    Value::Kv(fields.into_iter().map(|(key, value)| (key.as_bytes().to_vec(), value)).collect())
}

/// Key of the row that shows whether this mailbox exists: the name itself up to 3.4, `N` + dbname from 3.6 on.
pub fn keys_for(name: &MboxName) -> [Vec<u8>; 2] {
    let mut key = vec![b'N'];
    key.extend(dbname_of_name(name));
    [name.as_bytes().to_vec(), key]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(key: &[u8], value: &[u8], expected: &str) {
        let shown = match row_for(key, value) {
            Ok(None) => "none".to_owned(),
            Err(error) => format!("error {error}"),
            Ok(Some(Row::Name(listed))) => show(&listed),
            Ok(Some(Row::Id(listed, former))) => {
                let names: Vec<_> = former.iter().map(|former| former.name.to_string()).collect();
                format!("id {} were {names:?}", show(&listed))
            }
        };
        assert_eq!(shown, expected, "{}", String::from_utf8_lossy(key));
    }

    fn show(listed: &Listed) -> String {
        let MailboxEntry { name, uniqueid, mbtype, partition, acl, uidvalidity, by_name, .. } = &listed.mailbox;
        let acl = String::from_utf8_lossy(acl).replace('\t', ",");
        let (c, f) = (listed.mailbox.createdmodseq.0, listed.mailbox.foldermodseq.0);
        let standing = listed.standing(None);
        format!(
            "{standing:?} {name} id={uniqueid} T={} P={partition} V={uidvalidity} C={c} F={f} {acl} {by_name}",
            mbtype.0
        )
    }

    #[test]
    fn text_rows() {
        check(
            b"user.u1",
            b"0 default u1\tlrs\tcyrus\tl\t",
            "Present user.u1 id= T= P=default V=0 C=0 F=0 u1,lrs,cyrus,l, true",
        );
        check(b"user.u1", b"0 default ", "Present user.u1 id= T= P=default V=0 C=0 F=0  true");
        check(b"user.u1", b"0 default", "Present user.u1 id= T= P=default V=0 C=0 F=0  true");
        check(b"a.b", b"1 host!default x\tl\t", "Elsewhere a.b id= T=r P=host!default V=0 C=0 F=0 x,l, true");
        check(b"a.b", b"2 default x\tl\t", "Elsewhere a.b id= T=z P=default V=0 C=0 F=0 x,l, true");
        check(b"a.b", b"16 default ", "Tombstone a.b id= T=d P=default V=0 C=0 F=0  true");
        check(b"a.b", b"(uniqueid X specialuse Y) 0 p2 x\tl\t", "Present a.b id=X T= P=p2 V=0 C=0 F=0 x,l, true");
        check(b"a.b", b"default x", "error mailboxes.db row at byte 0x0: mailbox type is not a number");
        check(b"a.b", b"", "error mailboxes.db row at byte 0x0: mailbox type is not a number");
    }

    #[test]
    fn rows_of_2_5_to_3_4() {
        check(
            b"user.fred",
            b"%(A %(fred lrs) I 3e9d P default V 1415 F 8 M 1420)",
            "Present user.fred id=3e9d T= P=default V=1415 C=0 F=8 fred,lrs, true",
        );
        check(b"Nova", b"%(A %(f lrs) I 3e P default V 1)", "Present Nova id=3e T= P=default V=1 C=0 F=0 f,lrs, true");
        check(b"user.u3.2019", b"%(I 731e T d V 17 M 18)", "Tombstone user.u3.2019 id=731e T=d P= V=17 C=0 F=0  true");
        check(
            b"x",
            b"%(A %(f lrs) I 3e P default S other V 1)",
            "Elsewhere x id=3e T= P=default V=1 C=0 F=0 f,lrs, true",
        );
        check(b"$RACL", b"", "none");
        check(b"$RACL$U$fred$user.x", b"", "none");
        check(b"$RUNQ$3e9d$user.x", b"", "none");
        check(b"x", b"%(V 99999999999)", "error mailboxes.db row at byte 0x0: V is not a number that fits");
    }

    #[test]
    fn rows_of_3_6() {
        check(
            b"Nuser\x1fjane.doe\x1fT1",
            b"%(T el I 4m1n P default V 17 C 9 F 23 M 18 A %(jane.doe lrs))",
            "Present user.jane^doe.T1 id=4m1n T= P=default V=17 C=9 F=23 jane.doe,lrs, true",
        );
        check(b"Nd.net\x1duser\x1ff", b"%(T e I 4m P p V 1)", "Present d.net!user.f id=4m T= P=p V=1 C=0 F=0  false");
        check(b"Nuser\x1ff", b"%(T ed I 4m V 1)", "Tombstone user.f id=4m T=d P= V=1 C=0 F=0  false");
        check(b"Nuser", b"%(T ei I 4m)", "Placeholder user id=4m T=i P= V=0 C=0 F=0  false");
        check(
            b"I4m",
            b"%(T e N DELETED\x1fuser\x1ff\x1fT2\x1f6B P p V 1 H (%(N \"user\x1ff\x1fT2\" M 1 T ed) %(N user\x1ff\x1fT1 T ed)))",
            r#"id Present DELETED.user.f.T2.6B id=4m T= P=p V=1 C=0 F=0  false were ["user.f.T2", "user.f.T1"]"#,
        );
        check(b"AU\x1efred\x1euser\x1fx", b"", "none");
        check(b"AS\x1e", b"", "none");
    }

    #[test]
    fn only_a_name_makes_a_mailbox_exist() {
        let map = Map::from([
            (b"I1".to_vec(), b"%(T e N a P p V 1 H (%(N b T ed)))".to_vec()),
            (b"I2".to_vec(), b"%(T e N gone P p V 1 H ())".to_vec()),
            (b"Na".to_vec(), b"%(T e I 1 P p V 1)".to_vec()),
            (b"Nb".to_vec(), b"%(T ed I 1 V 1)".to_vec()),
            (b"Nbad".to_vec(), b"%(T e".to_vec()),
        ]);
        let list = parse(&map, None);
        assert_eq!(list.mailboxes.iter().map(|entry| entry.name.to_string()).collect::<Vec<_>>(), ["a"]);
        assert_eq!(list.tombstones.len(), 1);
        assert_eq!(list.history.len(), 1);
        assert_eq!(list.stale, [UniqueId::from("2")]);
        assert_eq!(list.faults.len(), 1);
    }

    #[test]
    fn names_there_and_back() {
        for name in ["user.jane^doe.Sub^one", "d.net!user.f.x", "d.net!shared", "a"] {
            let name = MboxName::from(name);
            assert_eq!(name_of_dbname(&dbname_of_name(&name)), name);
        }
        assert_eq!(keys_for(&"d.net!user.j^d".into())[1], b"Nd.net\x1duser\x1fj.d");
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(
            name in "[a-z]{1,5}(\\.[a-zA-Z0-9&^ ()%\u{e9}]{1,9}){1,3}",
            id in "[a-z0-9]{1,24}",
            kind in prop::sample::select(vec!["", "f", "i", "d", "c"]),
            acl in prop::collection::vec(("[!-~ ]{1,9}", "[a-z]{0,9}"), 1..5),
            numbers in any::<(u32, u64, u64)>(),
            by_name in any::<bool>(),
        ) {
            let mbtype = MboxType(kind.into());
            let acl = acl.iter().flat_map(|(ident, rights)| format!("{ident}\t{rights}\t").into_bytes()).collect();
            let mailbox = MailboxEntry {
                name: MboxName::new(name),
                uniqueid: UniqueId::new(id),
                acl: if mbtype.is_deleted() { Vec::new() } else { acl },
                mbtype,
                partition: "default".into(),
                uidvalidity: numbers.0,
                createdmodseq: ModSeq(numbers.1),
                foldermodseq: ModSeq(numbers.2),
                by_name,
            };
            let (key, value) = encode_name_row(&mailbox, 17);
            let Ok(Some(Row::Name(listed))) = row_for(&key, &value) else { panic!("{value:?}") };
            prop_assert_eq!((&listed.mailbox, listed.mtime), (&mailbox, 17));
            let former = vec![former_value(&mailbox, 18)];
            let (key, value) = encode_id_row(&mailbox, 17, former.clone());
            let Ok(Some(Row::Id(listed, names))) = row_for(&key, &value) else { panic!("{value:?}") };
            prop_assert_eq!(&listed.mailbox, &mailbox);
            prop_assert_eq!((&names[0].name, names[0].mtime), (&mailbox.name, 18));
            prop_assert_eq!(history_of(&value), former);
        }

        #[test]
        fn any_row_gives_a_value_or_an_error(
            key in prop::collection::vec(any::<u8>(), 0..20),
            value in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let _ = row_for(&key, &value);
            let _ = row_for(&key, &[b"%(T e ", &value[..], b")"].concat());
            let _ = row_for(&key, &[b"(", &value[..]].concat());
        }
    }
}
