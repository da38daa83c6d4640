//! Compares what a `MailStore` holds with what IMAP showed at a mark.
//!
//! Both are brought to one shape, the recording's own: what the store holds is rendered as the server would show it
//! (`state_of`), and the truth loses what no replica is asked for (`reduce`). Then it is one walk over two JSON trees.

use crate::model::{
    Annotation, BodyRef, Disposition, MailStore, MailboxEntry, MailboxSnapshot, MboxName, MessageGuid, Options,
    QuotaResource, Record, StoreError, SystemFlags, Uid, UserId, UserMeta,
};
use serde_json::{Map, Value, json};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

/// The recordings' administrator, through whose eyes shared mailboxes are seen.
const ADMIN: &str = "cyrus";

/// Cyrus's own annotations; IMAP makes most of them up from other fields.
const VENDOR: &str = "/vendor/cmu/cyrus-imapd/";

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Size and SHA-1 as the records say.
    Records,
    /// Every message is read, counted and hashed.
    Bodies,
}

/// What differs between `store` and the truth of a mark; empty when nothing does.
pub fn compare(store: &dyn MailStore, truth: &Value, depth: Depth) -> Result<Vec<String>, StoreError> {
    compare_by(store, truth, depth, false)
}

/// The same for what was replicated: modseqs may be above the truth's, because the only way to take a surplus message
/// from a replica is to lift them (a record that vanished at the source without having been expunged).
pub fn compare_replica(store: &dyn MailStore, truth: &Value, depth: Depth) -> Result<Vec<String>, StoreError> {
    compare_by(store, truth, depth, true)
}

fn compare_by(
    store: &dyn MailStore,
    truth: &Value,
    depth: Depth,
    may_be_lifted: bool,
) -> Result<Vec<String>, StoreError> {
    let expected = reduce(truth, store.deleted_prefix());
    let logins: Vec<&str> = truth["users"].as_object().into_iter().flat_map(Map::keys).map(String::as_str).collect();
    let found = state_of(store, &logins, depth)?;
    let mut out = Vec::new();
    differences("", &expected, &found, may_be_lifted, &mut out);
    Ok(out)
}

/// Keeps of a recorded state what a replica has to agree on.
fn reduce(truth: &Value, deleted_prefix: &[u8]) -> Value {
    let names = truth["names"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut names: Vec<&str> =
        names.filter(|name| MboxName::from(*name).without_deleted(deleted_prefix).is_none()).collect();
    names.sort_unstable();
    let users = each(&truth["users"], |user| {
        let mut subscribed: Vec<&str> =
            user["subscribed"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        subscribed.sort_unstable();
        json!({
            "mailboxes": each(&user["mailboxes"], reduce_mailbox),
            "others": user["others"],
            "sieve": user["sieve"],
            "subscribed": subscribed,
        })
    });
    json!({
        "names": names,
        "server_annotations": truth["server_annotations"],
        "shared": each(&truth["shared"], reduce_mailbox),
        "users": users,
    })
}

/// Mailboxes of other releases lack some of these; what the truth does not say is not compared.
fn reduce_mailbox(mailbox: &Value) -> Value {
    const KEPT: [&str; 6] = ["acl", "annotations", "exists", "highestmodseq", "uidnext", "uidvalidity"];
    const VENDOR_KEPT: [&str; 5] = ["duplicatedeliver", "partition", "pop3newuidl", "sharedseen", "uniqueid"];
    let mut out = pick(mailbox, &KEPT);
    out.insert("messages".into(), mailbox["messages"].clone());
    for message in out["messages"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        if let Some(message) = message.as_object_mut() {
            message.entry("annotations").or_insert_with(|| json!({}));
        }
    }
    if mailbox.get("quota").is_some() {
        out.insert("quota".into(), each(&mailbox["quota"], |root| each(root, |resource| resource[1].clone())));
    }
    if let Some(vendor) = mailbox.get("vendor") {
        let vendor = pick(vendor, &VENDOR_KEPT);
        out.insert("vendor".into(), each(&Value::Object(vendor), |value| value["shared"].clone()));
    }
    Value::Object(out)
}

fn pick(value: &Value, keys: &[&str]) -> Map<String, Value> {
    keys.iter().filter_map(|key| value.get(key).map(|kept| ((*key).to_owned(), kept.clone()))).collect()
}

fn each(value: &Value, change: impl Fn(&Value) -> Value) -> Value {
    let members = value.as_object().into_iter().flatten();
    members.map(|(key, value)| (key.clone(), change(value))).collect::<Map<_, _>>().into()
}

/// What `store` holds, as IMAP would show it to these users, in the shape of a recorded state.
fn state_of(store: &dyn MailStore, logins: &[&str], depth: Depth) -> Result<Value, StoreError> {
    let listing = store.listing()?;
    let live = listing.entries().filter(|entry| entry.name.without_deleted(store.deleted_prefix()).is_none());
    let mut mailboxes = Vec::new();
    let mut names = Vec::new();
    for entry in live.filter(|entry| !entry.mbtype.is_intermediate() && !entry.mbtype.is_deleted()) {
        let Some(snapshot) = store.mailbox(entry)? else { continue };
        names.push(entry.name.to_string());
        mailboxes.push(Mailbox { entry, snapshot });
    }
    names.sort_unstable();
    let admin = store.user_meta(&ADMIN.into())?;
    let quotas = store.quotas()?;
    let view = View { store, depth, quotas: &quotas };
    let mut users = Map::new();
    for login in logins {
        let meta = store.user_meta(&UserId::from(*login))?;
        users.insert((*login).to_owned(), view.user(login, &meta, &mailboxes)?);
    }
    let mut shared = Map::new();
    for mailbox in mailboxes.iter().filter(|mailbox| !mailbox.is_a_users() && !mailbox.is_hidden()) {
        shared.insert(mailbox.entry.name.to_string(), view.mailbox(mailbox, &Eyes::of(ADMIN, &admin, false))?);
    }
    Ok(json!({
        "names": names,
        "server_annotations": annotations(&store.server_annotations()?, ADMIN, "shared", "priv"),
        "shared": shared,
        "users": users,
    }))
}

struct Mailbox<'a> {
    entry: &'a MailboxEntry,
    snapshot: MailboxSnapshot,
}

impl Mailbox<'_> {
    fn is_a_users(&self) -> bool {
        self.entry.name.domain_and_local().1.starts_with(b"user.")
    }

    /// IMAP does not show mailboxes of Sieve scripts to their owners.
    fn is_hidden(&self) -> bool {
        self.entry.mbtype.is_sieve()
    }

    fn shares_seen(&self) -> bool {
        self.snapshot.head.options.0 & Options::SHARED_SEEN != 0
    }

    fn shown(&self) -> impl Iterator<Item = &Record> {
        self.snapshot.records.iter().filter(|record| !record.is_expunged())
    }

    fn acl(&self) -> Map<String, Value> {
        let mut fields = self.snapshot.head.acl.split(|&byte| byte == b'\t').map(String::from_utf8_lossy);
        let mut out = Map::new();
        while let (Some(who), Some(rights)) = (fields.next(), fields.next()) {
            let mut rights: Vec<char> = rights.chars().collect();
            rights.sort_unstable();
            // Stored in internal form: with unixhierarchysep the dot of a login is a ^ there.
            out.insert(who.replace('^', "."), rights.into_iter().collect::<String>().into());
        }
        out
    }

    /// By the ACL alone; groups do not occur in the recordings.
    fn may_read(&self, login: &str) -> bool {
        let acl = self.acl();
        let has = |who: &str| acl.get(who).and_then(Value::as_str).is_some_and(|rights| rights.contains('r'));
        let granted = has(login) || has("anyone");
        granted && !has(&format!("-{login}")) && !has("-anyone")
    }
}

/// Who looks at a mailbox.
struct Eyes<'a> {
    login: &'a str,
    meta: &'a UserMeta,
    owner: bool,
}

impl<'a> Eyes<'a> {
    fn of(login: &'a str, meta: &'a UserMeta, owner: bool) -> Self {
        Self { login, meta, owner }
    }

    /// \Seen of the owner is in the index, that of everybody else in a database of their own.
    fn seen(&self, mailbox: &Mailbox) -> BTreeSet<u32> {
        let uids = mailbox.shown();
        if self.owner || mailbox.shares_seen() {
            return uids.filter(|r| r.system_flags.has(SystemFlags::SEEN)).map(|record| record.uid.0).collect();
        }
        let seen = self.meta.seen.get(&mailbox.entry.uniqueid).map(|seen| ranges(&seen.seenuids)).unwrap_or_default();
        let inside = |uid: u32| seen.iter().any(|(first, last)| (*first..=*last).contains(&uid));
        uids.map(|record| record.uid.0).filter(|uid| inside(*uid)).collect()
    }
}

/// A user of a virtual domain sees the mailboxes of that domain only.
fn same_domain(login: &str, name: &MboxName) -> bool {
    let domain = login.rsplit_once('@').map(|(_, domain)| domain.as_bytes());
    domain == name.domain_and_local().0
}

struct View<'a> {
    store: &'a dyn MailStore,
    depth: Depth,
    quotas: &'a BTreeMap<crate::model::QuotaRoot, crate::model::QuotaLimits>,
}

impl View<'_> {
    fn user(&self, login: &str, meta: &UserMeta, mailboxes: &[Mailbox]) -> Result<Value, StoreError> {
        let inbox = inbox(login);
        let below = format!("{inbox}.");
        let (mut own, mut others) = (Map::new(), Map::new());
        let mut sieve = sieve(meta);
        for mailbox in mailboxes {
            let name = mailbox.entry.name.to_string();
            let owner = name == inbox || name.starts_with(&below);
            let eyes = Eyes::of(login, meta, owner);
            if mailbox.is_hidden() {
                if owner && meta.sieve.is_empty() {
                    sieve = self.sieve_mailbox(mailbox)?;
                }
            } else if !mailbox.may_read(login) || !same_domain(login, &mailbox.entry.name) {
                continue;
            } else if owner {
                own.insert(name, self.mailbox(mailbox, &eyes)?);
            } else {
                let uidvalidity = mailbox.snapshot.head.uidvalidity;
                others.insert(name, json!({"uidvalidity": uidvalidity, "seen": eyes.seen(mailbox)}));
            }
        }
        // LSUB hides subscriptions to mailboxes that do not exist; both databases keep them.
        let exists = |name: &&MboxName| mailboxes.iter().any(|mailbox| mailbox.entry.name == **name);
        let subscribed: Vec<String> = meta.subs.iter().filter(exists).map(MboxName::to_string).collect();
        Ok(json!({"mailboxes": own, "others": others, "sieve": sieve, "subscribed": subscribed}))
    }

    fn mailbox(&self, mailbox: &Mailbox, eyes: &Eyes) -> Result<Value, StoreError> {
        let head = &mailbox.snapshot.head;
        let seen = eyes.seen(mailbox);
        let bodies = self.store.bodies(mailbox.entry)?;
        let mut messages = Map::new();
        for record in mailbox.shown() {
            let (size, guid) = match self.depth {
                Depth::Records => (record.size, record.guid),
                Depth::Bodies => hash(bodies.as_ref(), record)?,
            };
            let message = json!({
                "flags": flags(&mailbox.snapshot, record, seen.contains(&record.uid.0)),
                "internaldate": internaldate(record.internaldate),
                "size": size,
                "sha1": guid.to_string(),
                "modseq": record.modseq.0,
                "annotations": annotations(&record.annotations, eyes.login, "value.shared", "value.priv"),
            });
            messages.insert(record.uid.0.to_string(), message);
        }
        let option = |bit: u32| (head.options.0 & bit != 0).to_string();
        let quota = head.quotaroot.iter().map(|root| (root.to_string(), self.limits(root))).collect::<Map<_, _>>();
        Ok(json!({
            "acl": mailbox.acl(),
            "annotations": annotations(&mailbox.snapshot.annotations, eyes.login, "shared", "priv"),
            "exists": messages.len(),
            "highestmodseq": head.highestmodseq.0,
            "messages": messages,
            "quota": quota,
            "uidnext": u64::from(head.last_uid.0) + 1,
            "uidvalidity": head.uidvalidity,
            "vendor": {
                "duplicatedeliver": option(Options::DUP_DELIVER),
                "partition": head.partition.to_string(),
                "pop3newuidl": option(Options::POP3_NEW_UIDL),
                "sharedseen": option(Options::SHARED_SEEN),
                "uniqueid": head.uniqueid.to_string(),
            },
        }))
    }

    fn limits(&self, root: &crate::model::QuotaRoot) -> Value {
        let limits = self.quotas.get(root).into_iter().flat_map(|quota| &quota.limits);
        let shown = limits.map(|(resource, limit)| {
            let name = match resource {
                QuotaResource::Storage => "STORAGE",
                QuotaResource::Message => "MESSAGE",
                QuotaResource::AnnotationStorage => "X-ANNOTATION-STORAGE",
                QuotaResource::NumFolders => "X-NUM-FOLDERS",
            };
            (name.to_owned(), json!(limit))
        });
        shown.collect::<Map<_, _>>().into()
    }

    /// Scripts as messages (3.6 and later): the name is the subject, the text the body, the active one is \Flagged.
    fn sieve_mailbox(&self, mailbox: &Mailbox) -> Result<Map<String, Value>, StoreError> {
        let bodies = self.store.bodies(mailbox.entry)?;
        let mut out = Map::new();
        for record in mailbox.shown() {
            let mut message = Vec::new();
            let body = bodies.open(&body_ref(record))?;
            { body.reader }.read_to_end(&mut message).map_err(|error| unreadable(record, &error))?;
            let (head, text) = split_message(&message);
            let subject = head.lines().find_map(|line| line.strip_prefix("Subject: ")).unwrap_or_default();
            let active = record.system_flags.has(SystemFlags::FLAGGED);
            let sha1 = MessageGuid(Sha1::digest(text).into()).to_string();
            out.insert(subject.trim_end().to_owned(), json!({"active": active, "sha1": sha1}));
        }
        Ok(out)
    }
}

fn split_message(message: &[u8]) -> (String, &[u8]) {
    let end = message.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(message.len());
    let (head, text) = message.split_at(end);
    (String::from_utf8_lossy(head).into_owned(), text.get(4..).unwrap_or_default())
}

fn sieve(meta: &UserMeta) -> Map<String, Value> {
    let scripts = meta.sieve.iter().map(|(name, script)| {
        let sha1 = match script.content.is_empty() {
            true => script.guid,
            false => MessageGuid(Sha1::digest(&script.content).into()),
        };
        (name.to_string(), json!({"active": meta.active.as_ref() == Some(name), "sha1": sha1.to_string()}))
    });
    scripts.collect()
}

fn body_ref(record: &Record) -> BodyRef {
    BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false }
}

fn unreadable(record: &Record, error: &std::io::Error) -> StoreError {
    StoreError::new(Disposition::Quarantine, format!("message {} cannot be read: {error}", record.uid.0))
}

fn hash(bodies: &dyn crate::model::BodySource, record: &Record) -> Result<(u64, MessageGuid), StoreError> {
    let mut reader = bodies.open(&body_ref(record))?.reader;
    let (mut sha1, mut size, mut buffer) = (Sha1::new(), 0u64, vec![0; 65536]);
    loop {
        let count = reader.read(&mut buffer).map_err(|error| unreadable(record, &error))?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        sha1.update(bytes);
        size += bytes.len() as u64;
    }
    Ok((size, MessageGuid(sha1.finalize().into())))
}

fn flags(snapshot: &MailboxSnapshot, record: &Record, seen: bool) -> Vec<String> {
    let system = [
        (SystemFlags::ANSWERED, "\\Answered"),
        (SystemFlags::FLAGGED, "\\Flagged"),
        (SystemFlags::DELETED, "\\Deleted"),
        (SystemFlags::DRAFT, "\\Draft"),
    ];
    let system = system.into_iter().filter(|(bit, _)| record.system_flags.has(*bit)).map(|(_, name)| name.to_owned());
    let user = snapshot.user_flags.iter().enumerate().filter(|(bit, _)| record.user_flags >> bit & 1 == 1);
    let user = user.filter_map(|(_, name)| name.as_ref()).map(|name| name.to_string().replace("\\x5c", "\\"));
    let mut out: Vec<String> = system.chain(user).chain(seen.then(|| "\\Seen".to_owned())).collect();
    out.sort_unstable();
    out
}

/// `{entry: {shared: value, private: value}}` as this user sees it.
fn annotations(list: &[Annotation], login: &str, shared: &str, private: &str) -> Value {
    let mut out = Map::new();
    for annotation in list {
        let entry = String::from_utf8_lossy(&annotation.entry).into_owned();
        let scope = match annotation.userid.as_bytes() {
            b"" => shared,
            user if user == login.as_bytes() => private,
            _ => continue,
        };
        if !entry.starts_with(VENDOR) {
            let values = out.entry(entry).or_insert_with(|| json!({}));
            values[scope] = String::from_utf8_lossy(&annotation.value).into();
        }
    }
    out.into()
}

/// `u3@dom.test` → `dom.test!user.u3`; a dot in the local part is `^` inside.
fn inbox(login: &str) -> String {
    match login.split_once('@') {
        Some((local, domain)) => format!("{domain}!user.{}", local.replace('.', "^")),
        None => format!("user.{}", login.replace('.', "^")),
    }
}

/// First and last UID of each range of a sequence set; what is no number is no range.
fn ranges(set: &[u8]) -> Vec<(u32, u32)> {
    let text = String::from_utf8_lossy(set).into_owned();
    let ranges = text.split(',').filter_map(|range| {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        let first = first.trim().parse().ok()?;
        Some((first, if last == "*" { Uid(u32::MAX).0 } else { last.trim().parse().ok()? }))
    });
    ranges.collect()
}

/// As FETCH prints it on a server whose zone is UTC.
fn internaldate(seconds: i64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Days are counted from 1 March of year 0, so that a leap day ends its year; eras have 400 years.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = year + era * 400 + i64::from(month >= 10);
    let name = MONTHS.get(((month + 2) % 12) as usize).copied().unwrap_or_default();
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{day:2}-{name}-{year:04} {hour:02}:{minute:02}:{second:02} +0000")
}

/// What the truth does not say about a mailbox or message (its release has none) is not compared; what it says must
/// be there, and nothing else may be in a collection.
fn differences(path: &str, expected: &Value, found: &Value, may_be_lifted: bool, out: &mut Vec<String>) {
    let (Value::Object(expected), Value::Object(found)) = (expected, found) else {
        let lifted = may_be_lifted && path.ends_with("modseq") && found.as_u64() > expected.as_u64();
        if expected != found && !lifted {
            out.push(format!("{path}: expected {expected}, found {found}"));
        }
        return;
    };
    let is_record = found.contains_key("uidvalidity") || found.contains_key("internaldate") || path.ends_with("vendor");
    for (key, expected) in expected {
        let path = if path.is_empty() { key.clone() } else { format!("{path} / {key}") };
        match found.get(key) {
            Some(found) => differences(&path, expected, found, may_be_lifted, out),
            None => out.push(format!("{path}: missing")),
        }
    }
    for key in found.keys().filter(|key| !is_record && !expected.contains_key(*key)) {
        out.push(format!("{path} / {key}: not expected"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_imap_prints_them() {
        let cases = [
            (0, " 1-Jan-1970 00:00:00 +0000"),
            (951_782_400, "29-Feb-2000 00:00:00 +0000"),
            (1_009_870_199, " 1-Jan-2002 07:29:59 +0000"),
            (1_551_773_472, " 5-Mar-2019 08:11:12 +0000"),
            (1_795_495_977, "24-Nov-2026 04:52:57 +0000"),
            (4_107_542_399, "28-Feb-2100 23:59:59 +0000"),
            (-1, "31-Dec-1969 23:59:59 +0000"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(internaldate(seconds), expected);
        }
    }

    #[test]
    fn inboxes_and_sets() {
        assert_eq!(inbox("u1"), "user.u1");
        assert_eq!(inbox("jane.doe"), "user.jane^doe");
        assert_eq!(inbox("u3@dom.test"), "dom.test!user.u3");
        assert_eq!(ranges(b"1:3,5"), [(1, 3), (5, 5)]);
        assert_eq!(ranges(b""), []);
        assert_eq!(ranges(b"7:*"), [(7, u32::MAX)]);
    }

    #[test]
    fn differences_name_what_differs() {
        let check = |expected: Value, found: Value, says: &[&str]| {
            let mut out = Vec::new();
            differences("", &expected, &found, false, &mut out);
            assert_eq!(out, says);
        };
        check(json!({"a": {"1": 2}}), json!({"a": {"1": 2}}), &[]);
        check(json!({"a": {"1": 2}}), json!({"a": {"1": 3}}), &["a / 1: expected 2, found 3"]);
        check(json!({"a": {"1": 2}}), json!({"a": {"2": 2}}), &["a / 1: missing", "a / 2: not expected"]);
        check(json!({"a": {"uidnext": 2}}), json!({"a": {"uidvalidity": 1, "uidnext": 2, "more": 1}}), &[]);
        check(json!({"modseq": 2}), json!({"modseq": 3}), &["modseq: expected 2, found 3"]);
        let (mut lifted, mut lowered) = (Vec::new(), Vec::new());
        differences("", &json!({"modseq": 2}), &json!({"modseq": 3}), true, &mut lifted);
        differences("", &json!({"modseq": 2}), &json!({"modseq": 1}), true, &mut lowered);
        assert_eq!((lifted.len(), lowered.len()), (0, 1));
    }
}
