//! Requests as bytes, answers as values. Field tables: `docs/csync.md`; source: Cyrus `imap/sync_support.c` and talks of
//! running servers.

use super::Dialect;
use crate::dlist::{Literals, Parser, Value, encode_text};
use crate::model::{
    Annotation, FlagName, MailboxHead, MailboxUpdate, MailboxView, MboxName, MboxType, MessageGuid, ModSeq, Options,
    Partition, QuotaLimits, QuotaResource, QuotaRoot, Record, SeenState, SystemFlags, Uid, UniqueId, UserId,
};
use std::collections::BTreeMap;
use std::io::Write;

const THRID: &[u8] = b"/vendor/cmu/cyrus-imapd/thrid";
const SAVEDATE: &[u8] = b"/vendor/cmu/cyrus-imapd/savedate";
const CREATEDMODSEQ: &[u8] = b"/vendor/cmu/cyrus-imapd/createdmodseq";

/// The IMAP flags in the order Cyrus prints them.
const FLAGS: [(u32, &str); 6] = [
    (SystemFlags::DELETED, "\\Deleted"),
    (SystemFlags::ANSWERED, "\\Answered"),
    (SystemFlags::FLAGGED, "\\Flagged"),
    (SystemFlags::DRAFT, "\\Draft"),
    (SystemFlags::EXPUNGED, "\\Expunged"),
    (SystemFlags::SEEN, "\\Seen"),
];

/// Quota resources with their names on the wire; 3.10 and later print new names beside the old ones and read either.
pub(super) const RESOURCES: [(QuotaResource, &str); 4] = [
    (QuotaResource::Storage, "STORAGE"),
    (QuotaResource::Message, "MESSAGE"),
    (QuotaResource::AnnotationStorage, "X-ANNOTATION-STORAGE"),
    (QuotaResource::NumFolders, "X-NUM-FOLDERS"),
];

/// A request being written. Text goes out as atom, quoted string or `{n+}` literal, as every server takes it.
pub(super) struct Request(pub(super) Vec<u8>, Literals);

impl Request {
    fn new(start: &str) -> Self {
        Self(start.as_bytes().to_vec(), Literals::NonSynchronizing)
    }

    /// What a server says: the newer clients read no `{n+}`.
    pub(super) fn answer(start: &str) -> Self {
        Self(start.as_bytes().to_vec(), Literals::Plain)
    }

    pub(super) fn raw(&mut self, text: &str) -> &mut Self {
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    pub(super) fn text(&mut self, bytes: &[u8]) -> &mut Self {
        encode_text(bytes, &mut self.0, self.1);
        self
    }

    pub(super) fn number(&mut self, number: impl std::fmt::Display) -> &mut Self {
        // Writing into a Vec cannot fail.
        let _ = write!(self.0, "{number}");
        self
    }

    /// ` KEY text`.
    pub(super) fn field(&mut self, key: &str, bytes: &[u8]) -> &mut Self {
        self.separate().raw(key).raw(" ").text(bytes)
    }

    /// ` KEY seconds`. Before 1970 as 64-bit complement: no release reads a minus sign.
    pub(super) fn time(&mut self, key: &str, seconds: i64) -> &mut Self {
        self.count(key, seconds.cast_unsigned())
    }

    /// ` KEY number`.
    pub(super) fn count(&mut self, key: &str, number: impl std::fmt::Display) -> &mut Self {
        self.separate().raw(key).raw(" ").number(number)
    }

    pub(super) fn separate(&mut self) -> &mut Self {
        if !matches!(self.0.last(), Some(b'(' | b' ')) {
            self.0.push(b' ');
        }
        self
    }

    pub(super) fn end(&mut self) -> Vec<u8> {
        self.raw("\r\n");
        std::mem::take(&mut self.0)
    }
}

/// `GET WHAT name`.
pub fn get(what: &str, name: &[u8]) -> Vec<u8> {
    Request::new("GET ").raw(what).raw(" ").text(name).end()
}

/// `GET MAILBOXES (names)`.
pub fn get_mailboxes(names: &[MboxName]) -> Vec<u8> {
    let mut request = Request::new("GET MAILBOXES (");
    for name in names {
        request.separate().text(name.as_bytes());
    }
    request.raw(")").end()
}

/// `GET UNIQUEIDS (id)`; 3.2 and later.
pub fn get_uniqueid(id: &UniqueId) -> Vec<u8> {
    Request::new("GET UNIQUEIDS (").text(id.as_bytes()).raw(")").end()
}

/// `APPLY WHAT name`.
pub fn apply(what: &str, name: &[u8]) -> Vec<u8> {
    Request::new("APPLY ").raw(what).raw(" ").text(name).end()
}

/// `APPLY WHAT %(KEY value …)` with text values.
pub fn apply_fields(what: &str, fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut request = Request::new("APPLY ");
    request.raw(what).raw(" %(");
    for (key, value) in fields {
        request.field(key, value);
    }
    request.raw(")").end()
}

/// `APPLY RESERVE`.
pub fn reserve(partition: &Partition, names: &[MboxName], guids: &[MessageGuid]) -> Vec<u8> {
    let mut request = Request::new("APPLY RESERVE %(");
    request.field("PARTITION", partition.as_bytes()).raw(" MBOXNAME (");
    for name in names {
        request.separate().text(name.as_bytes());
    }
    request.raw(") GUID (");
    for guid in guids {
        request.separate().number(guid);
    }
    request.raw("))").end()
}

/// Head of one file value: `%{partition guid size}CRLF`.
pub fn file_head(partition: &Partition, guid: &MessageGuid, size: u64) -> Vec<u8> {
    let mut request = Request::new("%{");
    request.text(partition.as_bytes()).raw(" ").number(guid).raw(" ").number(size).raw("}\r\n");
    request.0
}

/// `APPLY QUOTA`.
pub fn quota(root: &QuotaRoot, limits: &QuotaLimits, dialect: &Dialect) -> Vec<u8> {
    let mut request = Request::new("APPLY QUOTA %(");
    request.field("ROOT", root.as_bytes());
    let storage = limits.limits.get(&QuotaResource::Storage).copied().unwrap_or(dialect.unlimited);
    request.count("LIMIT", storage);
    for (resource, name) in RESOURCES {
        if let Some(limit) = limits.limits.get(&resource) {
            request.count(name, limit);
        }
    }
    if limits.modseq > 0 {
        request.count("MODSEQ", limits.modseq);
    }
    request.raw(")").end()
}

/// `APPLY SEEN`.
pub fn seen(user: &UserId, uniqueid: &UniqueId, seen: &SeenState) -> Vec<u8> {
    let mut request = Request::new("APPLY SEEN %(");
    request.field("USERID", user.as_bytes()).field("UNIQUEID", uniqueid.as_bytes());
    request.time("LASTREAD", seen.lastread).count("LASTUID", seen.lastuid.0).time("LASTCHANGE", seen.lastchange);
    request.field("SEENUIDS", &seen.seenuids).raw(")").end()
}

/// `APPLY SIEVE`; the content always as a literal, because 2.4 stores nothing else.
/// The file name with its suffix.
pub fn sieve(user: &UserId, file: &[u8], last_update: i64, content: &[u8]) -> Vec<u8> {
    let mut request = Request::new("APPLY SIEVE %(");
    request.field("USERID", user.as_bytes()).field("FILENAME", file).time("LAST_UPDATE", last_update);
    request.raw(" CONTENT {").number(content.len()).raw("+}\r\n");
    request.0.extend_from_slice(content);
    request.raw(")").end()
}

/// `GET FETCH_SIEVE`; the file name with its suffix.
pub fn fetch_sieve(user: &UserId, file: &[u8]) -> Vec<u8> {
    let mut request = Request::new("GET FETCH_SIEVE %(");
    request.field("USERID", user.as_bytes()).field("FILENAME", file).raw(")").end()
}

/// `GET FETCH`: the file of one message. Releases before 3.0 pass over UNIQUEID.
pub fn fetch(name: &MboxName, partition: &Partition, id: &UniqueId, guid: &MessageGuid, uid: Uid) -> Vec<u8> {
    let mut request = Request::new("GET FETCH %(");
    request.field("MBOXNAME", name.as_bytes()).field("PARTITION", partition.as_bytes());
    request.field("UNIQUEID", id.as_bytes()).field("GUID", guid.to_string().as_bytes());
    request.raw(" UID ").number(uid.0).raw(")").end()
}

/// `APPLY EXPUNGE`.
pub fn expunge(name: &MboxName, uniqueid: &UniqueId, uids: &[Uid]) -> Vec<u8> {
    let mut request = Request::new("APPLY EXPUNGE %(");
    request.field("MBOXNAME", name.as_bytes()).field("UNIQUEID", uniqueid.as_bytes()).raw(" UID (");
    for uid in uids {
        request.separate().number(uid.0);
    }
    request.raw("))").end()
}

/// `APPLY RENAME`.
pub fn rename(from: &MboxName, to: &MboxName, partition: &Partition, uidvalidity: u32) -> Vec<u8> {
    let mut request = Request::new("APPLY RENAME %(");
    request.field("OLDMBOXNAME", from.as_bytes()).field("NEWMBOXNAME", to.as_bytes());
    request.field("PARTITION", partition.as_bytes());
    if uidvalidity > 0 {
        request.count("UIDVALIDITY", uidvalidity);
    }
    request.raw(")").end()
}

/// `APPLY MAILBOX`; `partition` is the replica's name for it.
pub fn mailbox(update: &MailboxUpdate, partition: &Partition, dialect: &Dialect) -> Vec<u8> {
    let head = &update.head;
    let mut request = Request::new("APPLY MAILBOX %(");
    request.0.reserve(update.records.len().saturating_mul(256).saturating_add(512));
    request.field("UNIQUEID", head.uniqueid.as_bytes()).field("MBOXNAME", head.name.as_bytes());
    if head.mbtype.is_intermediate() {
        request.field("MBOXTYPE", format!("e{}", head.mbtype.0).as_bytes());
        request.count("HIGHESTMODSEQ", head.highestmodseq.0).count("CREATEDMODSEQ", head.createdmodseq.0);
        return request.count("FOLDERMODSEQ", head.foldermodseq.0).raw(")").end();
    }
    if !head.mbtype.0.is_empty() {
        request.field("MBOXTYPE", head.mbtype.0.as_bytes());
    }
    request.count("SYNC_CRC", update.crcs.basic);
    if update.crcs.annot != 0 {
        request.count("SYNC_CRC_ANNOT", update.crcs.annot);
    }
    request.count("LAST_UID", head.last_uid.0).count("HIGHESTMODSEQ", head.highestmodseq.0);
    request.count("RECENTUID", head.recentuid.0).time("RECENTTIME", head.recenttime);
    request.time("LAST_APPENDDATE", head.last_appenddate).time("POP3_LAST_LOGIN", head.pop3_last_login);
    request.time("POP3_SHOW_AFTER", head.pop3_show_after).count("UIDVALIDITY", head.uidvalidity);
    request.field("PARTITION", partition.as_bytes()).field("ACL", &head.acl);
    request.field("OPTIONS", head.options.letters().as_bytes());
    if let Some(root) = &head.quotaroot {
        request.field("QUOTAROOT", root.as_bytes());
    }
    if head.createdmodseq > ModSeq(0) {
        request.count("CREATEDMODSEQ", head.createdmodseq.0);
    }
    if head.foldermodseq > ModSeq(0) {
        request.count("FOLDERMODSEQ", head.foldermodseq.0);
    }
    if dialect.annotations_inside && !update.annotations.is_empty() {
        request.raw(" ANNOTATIONS (");
        for annotation in &update.annotations {
            annotation_entry(&mut request, annotation);
        }
        request.raw(")");
    }
    if let Some(since) = update.since.filter(|_| dialect.since) {
        request.count("SINCE_MODSEQ", since.modseq.0).count("SINCE_CRC", since.crcs.basic);
        request.count("SINCE_CRC_ANNOT", since.crcs.annot);
    }
    request.raw(" RECORD (");
    // A server dies of a message without a byte. An expunged one does not have to be told: nobody will see it.
    for record in update.records.iter().filter(|record| record.size > 0 || !record.is_expunged()) {
        record_entry(&mut request, record, &update.user_flags, dialect);
    }
    request.raw("))").end()
}

pub(super) fn annotation_entry(request: &mut Request, annotation: &Annotation) {
    request.separate().raw("%(");
    request.field("ENTRY", &annotation.entry).field("USERID", annotation.userid.as_bytes());
    request.count("MODSEQ", annotation.modseq.0).field("VALUE", &annotation.value).raw(")");
}

pub(super) fn record_entry(request: &mut Request, record: &Record, names: &[Option<FlagName>], dialect: &Dialect) {
    request.separate().raw("%(").count("UID", record.uid.0).count("MODSEQ", record.modseq.0);
    request.time("LAST_UPDATED", record.last_updated).raw(" FLAGS (");
    for (bit, flag) in FLAGS {
        if record.system_flags.has(bit) {
            request.separate().raw(flag);
        }
    }
    for (bit, name) in names.iter().enumerate().take(128) {
        if let Some(name) = name.as_ref().filter(|_| record.user_flags >> bit & 1 == 1) {
            // As text: a name with odd bytes in it must not become part of the list around it.
            request.separate().text(name.as_bytes());
        }
    }
    request.raw(")").time("INTERNALDATE", record.internaldate).count("SIZE", record.size).count("GUID", record.guid);
    if !dialect.annotations_inside {
        request.raw(")");
        return;
    }
    let mut annotations = record.annotations.clone();
    let mut add = |entry: &[u8], value: String| {
        let (userid, value) = (UserId::default(), value.into_bytes());
        annotations.push(Annotation { entry: entry.to_vec(), userid, value, modseq: ModSeq(0) });
    };
    if record.cid != 0 {
        add(THRID, format!("{:016x}", record.cid));
    }
    if dialect.savedate && record.savedate != 0 {
        add(SAVEDATE, record.savedate.to_string());
    }
    if dialect.savedate && record.createdmodseq != ModSeq(0) {
        add(CREATEDMODSEQ, record.createdmodseq.0.to_string());
    }
    if !annotations.is_empty() {
        request.raw(" ANNOTATIONS (");
        annotations.iter().for_each(|annotation| annotation_entry(request, annotation));
        request.raw(")");
    }
    request.raw(")");
}

/// One untagged answer.
#[derive(Debug)]
pub enum Untagged {
    Mailbox(Box<MailboxView>),
    Quota(QuotaRoot, QuotaLimits),
    Seen(UniqueId, SeenState),
    Subs(Vec<MboxName>),
    Sieve {
        file: Vec<u8>,
        last_update: i64,
        guid: MessageGuid,
        active: bool,
    },
    /// Answer to `fetch_sieve`.
    SieveText(Vec<u8>),
    Annotation(Annotation),
    Missing(Vec<MessageGuid>),
    Enabled(Vec<String>),
    /// The file of a message; empty where the server finds it to be another one.
    Message(Vec<u8>),
    Other,
}

/// An answer that does not have the form it must have.
#[derive(Debug, thiserror::Error)]
#[error("answer {line:?}: {fault}")]
pub struct AnswerError {
    line: String,
    fault: String,
}

/// Reads the text after `* `.
pub fn untagged(line: &[u8]) -> Result<Untagged, AnswerError> {
    let fault = |fault: String| AnswerError {
        line: String::from_utf8_lossy(line.get(..line.len().min(80)).unwrap_or_default()).into_owned(),
        fault,
    };
    let mut parser = Parser::new(line);
    let (key, value) = parser.item().map_err(|error| fault(error.to_string()))?;
    let missing = |field: &str| fault(format!("{field} is missing or of another kind"));
    let list = || value.as_list().ok_or_else(|| missing("list"));
    Ok(match key.as_slice() {
        b"MAILBOX" => Untagged::Mailbox(Box::new(mailbox_view(&value).map_err(missing)?)),
        b"QUOTA" => {
            let (root, limits) = quota_view(&value).ok_or_else(|| missing("ROOT"))?;
            Untagged::Quota(root, limits)
        }
        b"SEEN" => {
            let (id, seen) = seen_view(&value).ok_or_else(|| missing("UNIQUEID"))?;
            Untagged::Seen(id, seen)
        }
        b"LSUB" => Untagged::Subs(list()?.iter().filter_map(Value::as_text).map(MboxName::new).collect()),
        b"SIEVE" if value.field("CONTENT").is_some() => {
            Untagged::SieveText(value.field("CONTENT").and_then(Value::as_text).unwrap_or_default().to_vec())
        }
        b"SIEVE" => Untagged::Sieve {
            file: value.field("FILENAME").and_then(Value::as_text).ok_or_else(|| missing("FILENAME"))?.to_vec(),
            last_update: value.field("LAST_UPDATE").and_then(Value::as_number).unwrap_or_default(),
            guid: value.field("GUID").and_then(Value::as_text).and_then(MessageGuid::parse_hex).unwrap_or_default(),
            active: value.field("ISACTIVE").and_then(Value::as_number::<u32>) == Some(1),
        },
        b"MESSAGE" => match value {
            Value::File(file) => Untagged::Message(file.data),
            // It hashes the file itself, and says so where that is another message.
            Value::Nil => Untagged::Message(Vec::new()),
            _ => return Err(missing("file")),
        },
        b"ANNOTATION" => Untagged::Annotation(annotation_view(&value).ok_or_else(|| missing("ENTRY"))?),
        b"MISSING" => {
            Untagged::Missing(list()?.iter().filter_map(Value::as_text).filter_map(MessageGuid::parse_hex).collect())
        }
        b"ENABLED" => Untagged::Enabled(
            list()?.iter().filter_map(Value::as_text).map(|name| String::from_utf8_lossy(name).into_owned()).collect(),
        ),
        _ => Untagged::Other,
    })
}

pub(super) fn quota_view(value: &Value) -> Option<(QuotaRoot, QuotaLimits)> {
    let root = QuotaRoot::new(value.field("ROOT")?.as_text()?);
    let mut quota = QuotaLimits::default();
    for (resource, name) in RESOURCES {
        if let Some(limit) = value.field(name).and_then(Value::as_number::<u64>) {
            quota.limits.insert(resource, limit);
        }
    }
    // 2.4 names no resources; the limit of storage is always there, all ones for none.
    let storage = value.field("LIMIT").and_then(Value::as_number::<u64>);
    if let Some(limit) = storage.filter(|limit| *limit != u64::from(u32::MAX) && *limit < u64::MAX / 2) {
        quota.limits.entry(QuotaResource::Storage).or_insert(limit);
    }
    quota.modseq = value.field("MODSEQ").and_then(Value::as_number).unwrap_or_default();
    Some((root, quota))
}

pub(super) fn seen_view(value: &Value) -> Option<(UniqueId, SeenState)> {
    let number = |key: &str| seconds(value, key).unwrap_or_default();
    let seen = SeenState {
        lastread: number("LASTREAD"),
        lastuid: Uid(u32::try_from(number("LASTUID")).unwrap_or_default()),
        lastchange: number("LASTCHANGE"),
        seenuids: value.field("SEENUIDS").and_then(Value::as_text).unwrap_or_default().to_vec(),
    };
    Some((UniqueId::new(value.field("UNIQUEID")?.as_text()?), seen))
}

pub(super) fn annotation_view(value: &Value) -> Option<Annotation> {
    let text = |key: &str| value.field(key).and_then(Value::as_text);
    Some(Annotation {
        entry: text("ENTRY")?.to_vec(),
        userid: UserId::new(text("USERID").unwrap_or_default()),
        value: text("VALUE").unwrap_or_default().to_vec(),
        modseq: ModSeq(value.field("MODSEQ").and_then(Value::as_number).unwrap_or_default()),
    })
}

fn annotations_view(value: &Value, key: &str) -> Vec<Annotation> {
    let list = value.field(key).and_then(Value::as_list).unwrap_or_default();
    let mut out: Vec<Annotation> = list.iter().filter_map(annotation_view).collect();
    out.sort_by(|a, b| a.content().cmp(&b.content()));
    out
}

/// Where a mailbox with others below it was deleted, 3.12 keeps a place holder without a uniqueid (`UNIQUEID NIL`). It gets
/// one that tells it from all others, the same each time.
fn id_of_nobody(name: &MboxName) -> UniqueId {
    UniqueId::new(format!("nobody-{}", blake3::hash(name.as_bytes()).to_hex()))
}

pub(super) fn mailbox_view(value: &Value) -> Result<MailboxView, &'static str> {
    fn number<N: std::str::FromStr + Default>(value: &Value, key: &str) -> N {
        value.field(key).and_then(Value::as_number).unwrap_or_default()
    }
    let text = |key: &str| value.field(key).and_then(Value::as_text);
    let name = MboxName::new(text("MBOXNAME").ok_or("MBOXNAME")?);
    let mbtype = MboxType::parse(text("MBOXTYPE").unwrap_or_default());
    let uniqueid = match text("UNIQUEID") {
        Some(id) => UniqueId::new(id),
        None if mbtype.is_intermediate() && value.field("UNIQUEID").is_some() => id_of_nobody(&name),
        None => return Err("UNIQUEID"),
    };
    let head = MailboxHead {
        uniqueid,
        name,
        mbtype,
        partition: Partition::new(text("PARTITION").unwrap_or_default()),
        acl: text("ACL").unwrap_or_default().to_vec(),
        options: Options::from_letters(text("OPTIONS").unwrap_or_default()),
        uidvalidity: number(value, "UIDVALIDITY"),
        last_uid: Uid(number(value, "LAST_UID")),
        highestmodseq: ModSeq(number(value, "HIGHESTMODSEQ")),
        recentuid: Uid(number(value, "RECENTUID")),
        recenttime: seconds(value, "RECENTTIME").unwrap_or_default(),
        last_appenddate: seconds(value, "LAST_APPENDDATE").unwrap_or_default(),
        pop3_last_login: seconds(value, "POP3_LAST_LOGIN").unwrap_or_default(),
        pop3_show_after: seconds(value, "POP3_SHOW_AFTER").unwrap_or_default(),
        createdmodseq: ModSeq(number(value, "CREATEDMODSEQ")),
        foldermodseq: ModSeq(number(value, "FOLDERMODSEQ")),
        xconvmodseq: ModSeq(number(value, "XCONVMODSEQ")),
        raclmodseq: ModSeq(number(value, "RACLMODSEQ")),
        quotaroot: text("QUOTAROOT").map(QuotaRoot::new),
    };
    let mut flags = FlagTable::default();
    let records = match value.field("RECORD") {
        None => None,
        Some(list) => {
            let list = list.as_list().ok_or("RECORD")?;
            Some(list.iter().map(|record| record_view(record, &mut flags)).collect::<Result<_, _>>()?)
        }
    };
    Ok(MailboxView {
        head,
        crc_basic: value.field("SYNC_CRC").and_then(Value::as_number),
        crc_annot: value.field("SYNC_CRC_ANNOT").and_then(Value::as_number),
        annotations: annotations_view(value, "ANNOTATIONS"),
        user_flags: flags.names,
        records,
    })
}

#[derive(Default)]
struct FlagTable {
    names: Vec<Option<FlagName>>,
    bits: BTreeMap<Vec<u8>, usize>,
}

impl FlagTable {
    fn bit(&mut self, name: &[u8]) -> Option<usize> {
        let next = self.names.len();
        let bit = *self.bits.entry(name.to_ascii_lowercase()).or_insert(next);
        if bit == next {
            self.names.push(Some(FlagName::new(name)));
        }
        (bit < 128).then_some(bit)
    }
}

/// Seconds since 1970; times before may come as 64-bit complement.
pub(super) fn seconds(value: &Value, key: &str) -> Option<i64> {
    let value = value.field(key)?;
    value.as_number::<i64>().or_else(|| value.as_number::<u64>().map(u64::cast_signed))
}

fn record_view(value: &Value, flags: &mut FlagTable) -> Result<Record, &'static str> {
    fn number<N: std::str::FromStr>(value: &Value, key: &'static str) -> Result<N, &'static str> {
        value.field(key).and_then(Value::as_number).ok_or(key)
    }
    let mut record = Record {
        uid: Uid(number(value, "UID")?),
        modseq: ModSeq(number(value, "MODSEQ")?),
        last_updated: seconds(value, "LAST_UPDATED").ok_or("LAST_UPDATED")?,
        internaldate: seconds(value, "INTERNALDATE").ok_or("INTERNALDATE")?,
        size: number(value, "SIZE")?,
        guid: value.field("GUID").and_then(Value::as_text).and_then(MessageGuid::parse_hex).ok_or("GUID")?,
        ..Record::default()
    };
    for flag in value.field("FLAGS").and_then(Value::as_list).ok_or("FLAGS")? {
        // Flags are printed raw: one of that name looks like no value.
        let name = if *flag == Value::Nil { Some(&b"NIL"[..]) } else { flag.as_text() };
        let Some(name) = name else { continue };
        match FLAGS.iter().find(|(_, known)| known.as_bytes().eq_ignore_ascii_case(name)) {
            Some((bit, _)) => record.system_flags.0 |= bit,
            None if name.starts_with(b"\\") => {}
            None => {
                if let Some(bit) = flags.bit(name) {
                    record.user_flags |= 1 << bit;
                }
            }
        }
    }
    for annotation in annotations_view(value, "ANNOTATIONS") {
        let text = std::str::from_utf8(&annotation.value).unwrap_or_default();
        match annotation.entry.as_slice() {
            THRID => record.cid = u64::from_str_radix(text, 16).unwrap_or_default(),
            SAVEDATE => record.savedate = text.parse().unwrap_or_default(),
            CREATEDMODSEQ => record.createdmodseq = ModSeq(text.parse().unwrap_or_default()),
            _ => record.annotations.push(annotation),
        }
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::super::Generation;
    use super::*;

    /// A line of a running 3.6.1.
    const LINE: &[u8] = b"MAILBOX %(UNIQUEID mzb3mw031vhl89h0chmwnole MBOXNAME user.alice SYNC_CRC 353521578 SYNC_CRC_ANNOT 853596895 LAST_UID 4 HIGHESTMODSEQ 10 RECENTUID 4 RECENTTIME 1795493750 LAST_APPENDDATE 1795493750 POP3_LAST_LOGIN 0 POP3_SHOW_AFTER 0 UIDVALIDITY 1795493661 PARTITION default ACL \"alice\tlrswipkxtecdan\tbob\tlrs\t\" OPTIONS P QUOTAROOT user.alice CREATEDMODSEQ 1 FOLDERMODSEQ 9 RECORD (%(UID 1 MODSEQ 10 LAST_UPDATED 1795493751 FLAGS (\\Answered \\Seen $Work NonJunk Foo) INTERNALDATE 1583056800 SIZE 125 GUID de1a24f844ec1fb8728748225d649c3655d68214 ANNOTATIONS (%(ENTRY /vendor/cmu/cyrus-imapd/savedate USERID \"\" MODSEQ 0 VALUE 1795493660) %(ENTRY /vendor/cmu/cyrus-imapd/createdmodseq USERID \"\" MODSEQ 0 VALUE 2)))))";

    fn view() -> MailboxView {
        match untagged(LINE).expect("parses") {
            Untagged::Mailbox(view) => *view,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_mailbox_line_of_3_6() {
        let view = view();
        assert_eq!(view.head.acl, b"alice\tlrswipkxtecdan\tbob\tlrs\t");
        let record = &view.records.expect("records")[0];
        assert_eq!((record.savedate, record.createdmodseq, record.user_flags), (1_795_493_660, ModSeq(2), 0b111));
        assert_eq!(view.user_flags[2], Some("Foo".into()));
    }

    /// What a real client sent for that mailbox, made again from the parsed values.
    #[test]
    fn an_update_is_printed_as_3_6_prints_it() {
        let view = view();
        let update = MailboxUpdate {
            head: view.head.clone(),
            crcs: crate::model::SyncCrcs { basic: 353_521_578, annot: 853_596_895 },
            since: None,
            user_flags: view.user_flags.clone(),
            annotations: Vec::new(),
            records: view.records.clone().expect("records"),
            bodies: Vec::new(),
            reserve_from: Vec::new(),
            create: false,
        };
        let request = mailbox(&update, &view.head.partition, &Dialect::of(Generation::V36));
        let expected = [b"APPLY ".as_slice(), LINE, b"\r\n"].concat();
        assert_eq!(String::from_utf8_lossy(&request), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn requests_of_the_reference() {
        let text = |request: Vec<u8>| String::from_utf8(request).expect("text");
        assert_eq!(
            text(get_mailboxes(&["user.alice".into(), "user.alice.Old Stuff".into()])),
            "GET MAILBOXES (user.alice \"user.alice.Old Stuff\")\r\n"
        );
        assert_eq!(text(get("ANNOTATION", b"")), "GET ANNOTATION \"\"\r\n");
        assert_eq!(
            text(get_uniqueid(&"mzb3mw031vhl89h0chmwnole".into())),
            "GET UNIQUEIDS (mzb3mw031vhl89h0chmwnole)\r\n"
        );
        let guid = MessageGuid::parse_hex(b"82dbaed68fa9c05a45c365689fba3fb7f32f823a").expect("guid");
        assert_eq!(
            text(reserve(&"default".into(), &["user.alice".into()], &[guid])),
            "APPLY RESERVE %(PARTITION default MBOXNAME (user.alice) GUID (82dbaed68fa9c05a45c365689fba3fb7f32f823a))\r\n"
        );
        assert_eq!(
            text(sieve(&"alice".into(), b"main.script", 1_583_056_800, b"keep;\n")),
            "APPLY SIEVE %(USERID alice FILENAME main.script LAST_UPDATE 1583056800 CONTENT {6+}\r\nkeep;\n)\r\n"
        );
        let mut limits = QuotaLimits { modseq: 8, ..QuotaLimits::default() };
        limits.limits.insert(QuotaResource::Storage, 100_000);
        // As 2.4.22 and 3.6.1 say it.
        let none = |generation| text(quota(&"user.u1".into(), &QuotaLimits::default(), &Dialect::of(generation)));
        assert_eq!(none(Generation::V24), "APPLY QUOTA %(ROOT user.u1 LIMIT 18446744073709551615)\r\n");
        assert_eq!(none(Generation::V36), "APPLY QUOTA %(ROOT user.u1 LIMIT 4294967295)\r\n");
        assert_eq!(
            text(quota(&"user.alice".into(), &limits, &Dialect::of(Generation::V36))),
            "APPLY QUOTA %(ROOT user.alice LIMIT 100000 STORAGE 100000 MODSEQ 8)\r\n"
        );
    }

    #[test]
    fn quotas_of_old_and_new_servers() {
        let limits = |line: &[u8]| match untagged(line).expect("parses") {
            Untagged::Quota(_, quota) => quota.limits.into_iter().collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(limits(b"QUOTA %(ROOT user.alice LIMIT 100000)"), [(QuotaResource::Storage, 100_000)]);
        assert_eq!(limits(b"QUOTA %(ROOT user.alice LIMIT 4294967295 MESSAGE 500)"), [(QuotaResource::Message, 500)]);
    }

    #[test]
    fn odd_flags_and_times_stay_inside_their_fields() {
        let mut view = view();
        view.user_flags = vec![Some("x)y\"".into()), Some("NIL".into())];
        let records = view.records.as_mut().expect("records");
        records[0].user_flags = 0b11;
        records[0].internaldate = -5;
        let update = MailboxUpdate {
            head: view.head.clone(),
            crcs: crate::model::SyncCrcs::default(),
            since: None,
            user_flags: view.user_flags.clone(),
            annotations: Vec::new(),
            records: records.clone(),
            bodies: Vec::new(),
            reserve_from: Vec::new(),
            create: false,
        };
        let request = mailbox(&update, &view.head.partition, &Dialect::of(Generation::V36));
        let line = request.strip_prefix(b"APPLY ").expect("a request");
        let Untagged::Mailbox(again) = untagged(line).expect("parses") else { panic!("not a mailbox") };
        assert_eq!((again.records, again.user_flags), (view.records, view.user_flags));
    }

    /// As 3.12.3 said it after `user.u3` was deleted, with `user.u3.Archive` still there.
    #[test]
    fn a_place_holder_without_uniqueid_is_one_of_its_own() {
        let said = |name: &str| {
            let line = format!(
                "MAILBOX %(UNIQUEID NIL MBOXNAME {name} MBOXTYPE ei SYNC_CRC 0 LAST_UID 0 HIGHESTMODSEQ 0 RECENTUID 0 \
                 RECENTTIME 0 LAST_APPENDDATE 0 POP3_LAST_LOGIN 0 POP3_SHOW_AFTER 0 UIDVALIDITY 0 PARTITION NIL ACL NIL \
                 OPTIONS \"\" CREATEDMODSEQ 0 FOLDERMODSEQ 0)"
            );
            let Untagged::Mailbox(view) = untagged(line.as_bytes()).expect("parses") else { panic!("not a mailbox") };
            assert!(view.head.mbtype.is_intermediate() && view.head.name.as_bytes() == name.as_bytes());
            view.head.uniqueid
        };
        assert_eq!(said("user.u3"), said("user.u3"));
        assert_ne!(said("user.u3"), said("user.u4"));
    }

    #[test]
    fn answers_without_what_they_must_have_are_refused() {
        for line in [
            b"MAILBOX %(UNIQUEID x)".as_slice(),
            b"MAILBOX %(UNIQUEID NIL MBOXNAME user.u3 MBOXTYPE e LAST_UID 0)",
            b"MAILBOX (",
            b"SEEN %()",
            b"MAILBOX %(UNIQUEID x MBOXNAME y RECORD (%(UID 1)))",
        ] {
            assert!(untagged(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
    }
}
