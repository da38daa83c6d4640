//! cyrus.index, cyrus.header and mailboxes.db against `mbexamine`: every mailbox, every record, every field it prints.

use super::store::{self, Store};
use spooltap::cyrus::{db, header, index, mboxlist};
use spooltap::model::{FlagName, MailboxEntry};
use std::collections::{BTreeMap, BTreeSet};

/// The text after `label`, up to white space; `None` where this release prints no such label.
fn word<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(label)?;
    Some(rest.split_whitespace().next().unwrap_or_default())
}

/// The rest of the line after `label`.
fn line<'a>(text: &'a str, label: &str) -> &'a str {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no {label} in {text}"));
    rest.lines().next().unwrap_or_default().trim_start_matches(' ')
}

/// Labels that were found and compared at least once.
type Compared = BTreeSet<&'static str>;

fn check(compared: &mut Compared, at: &str, text: &str, fields: &[(&'static str, String)]) {
    for (label, ours) in fields {
        if let Some(theirs) = word(text, label) {
            compared.insert(label);
            assert!(theirs.eq_ignore_ascii_case(ours), "{at}: {label} {theirs}, found {ours} in {text}");
        }
    }
}

/// The bytes of a meta file of the mailbox at that spool path, wherever this store keeps it.
fn meta_file<'a>(store: &'a Store, path: &str, name: &str) -> &'a [u8] {
    let path = path.strip_prefix("@BASE@/").expect("path is below the base");
    let (root, below) = path.split_once('/').expect("path is below a partition");
    ["meta", root]
        .iter()
        .find_map(|root| store.files.get(&format!("{root}/{below}/{name}")))
        .unwrap_or_else(|| panic!("{}: no {path}/{name}", store.name))
}

fn check_mailbox(compared: &mut Compared, store: &Store, name: &str, text: &str, entry: &MailboxEntry) -> usize {
    let at = format!("{} {name}", store.name);
    let path = line(text, "Path to mailbox:").to_owned();
    let header_file = header::parse(meta_file(store, &path, "cyrus.header")).unwrap_or_else(|e| panic!("{at}: {e}"));
    assert_eq!(header_file.acl, line(text, "Mailbox ACL:").as_bytes(), "{at}");
    assert_eq!(header_file.uniqueid.to_string(), line(text, "Unique ID:"), "{at}");
    assert_eq!(entry.acl, header_file.acl, "{at}: mailboxes.db and cyrus.header");
    assert!(entry.uniqueid.is_empty() || entry.uniqueid == header_file.uniqueid, "{at}: mailboxes.db and cyrus.header");
    if let Some(name) = &header_file.name {
        assert_eq!(*name, entry.name, "{at}");
    }
    let flags: Vec<String> = header_file.user_flags.iter().flatten().map(FlagName::to_string).collect();
    let flags = if flags.is_empty() { "[none]".into() } else { flags.join(" ") + " " };
    assert_eq!(flags, line(text, "User Flags:"), "{at}");

    let file = meta_file(store, &path, "cyrus.index");
    let head = index::parse_header(file).unwrap_or_else(|error| panic!("{at}: {error}"));
    let (top, messages) = text.split_once(" Message Info:\n").expect("messages follow the header");
    check(
        compared,
        &at,
        top,
        &[
            ("Generation Number:", head.generation_no.to_string()),
            ("Minor Version:", head.minor_version.to_string()),
            ("Header Size:", head.start_offset.to_string()),
            ("Record Size:", head.record_size.to_string()),
            ("Number of Messages:", head.exists.to_string()),
            ("Mailbox Size:", head.quota_mailbox_used.to_string()),
            ("Annotations Size:", head.quota_annot_used.to_string()),
            ("Last Append Date:", format!("({})", head.last_appenddate)),
            ("UIDValidity:", head.uidvalidity.to_string()),
            ("Last UID:", head.last_uid.0.to_string()),
            ("Deleted:", head.deleted.to_string()),
            ("Answered:", head.answered.to_string()),
            ("Flagged:", head.flagged.to_string()),
            ("Last POP3 Login:", format!("({})", head.pop3_last_login)),
            ("Highest Mod Sequence:", head.highestmodseq.0.to_string()),
        ],
    );
    assert_eq!(line(top, "Mailbox Options:").contains("POP3_NEW_UIDL"), head.options().0 & 1 != 0, "{at}");
    if head.minor_version >= 12 {
        assert_eq!(head.header_file_crc, header_file.file_crc, "{at}");
    }

    let records = index::parse_index_records(&head, file).unwrap_or_else(|error| panic!("{at}: {error}"));
    let plain = index::parse_records(&head, file).expect("parsed a moment ago");
    assert_eq!(index::uncommitted(&head, &plain), None, "{at}");
    let live = records.iter().filter(|record| !record.record.is_expunged());
    let mut shown = printed_records(messages);
    for found in live {
        let record = &found.record;
        let text = shown.remove(&record.uid.0).unwrap_or_else(|| panic!("{at}: uid {} is not printed", record.uid.0));
        // Printed from the highest flag down.
        let words = (0..4).rev().map(|word| format!("{:08x}", (record.user_flags >> (32 * word)) as u32));
        let words: Vec<String> = words.collect();
        assert!(
            line(&text, "USERFLAGS:").trim_end().eq_ignore_ascii_case(&words.join(" ")),
            "{at}: {words:?} in {text}"
        );
        check(
            compared,
            &format!("{at} uid {}", record.uid.0),
            &text,
            &[
                ("INT_DATE:", record.internaldate.to_string()),
                ("SENTDATE:", found.sentdate.to_string()),
                ("SAVEDATE:", record.savedate.to_string()),
                (" SIZE:", record.size.to_string()),
                ("HDRSIZE:", found.header_size.to_string()),
                ("LASTUPD :", record.last_updated.to_string()),
                ("SYSFLAGS:", format!("{:08x}", record.system_flags.0)),
                ("LINES:", found.content_lines.to_string()),
                ("CACHEVER:", found.cache_version.to_string()),
                ("GUID:", record.guid.to_string()),
                ("MODSEQ:", record.modseq.0.to_string()),
                ("THIRD:", format!("{:x}", record.cid)),
                ("THRID:", format!("{:x}", record.cid)),
            ],
        );
    }
    assert!(shown.is_empty(), "{at}: printed by Cyrus and not found: {shown:?}");
    records.len()
}

/// `NAME... text`; the name is external where the store uses `/`.
fn printed_mailbox(text: &str) -> (String, &str) {
    let (name, text) = text.split_once("...").expect("name ends in dots");
    if !name.contains('/') {
        return (name.to_owned(), text);
    }
    let (local, domain) = name.split_once('@').unwrap_or((name, ""));
    let local = local.replace('.', "^").replace('/', ".");
    (if domain.is_empty() { local } else { format!("{domain}!{local}") }, text)
}

/// The lines `NNNNNN> UID:…` and `      > …` of each message, by UID.
fn printed_records(text: &str) -> BTreeMap<u32, String> {
    let mut found: BTreeMap<u32, String> = BTreeMap::new();
    let mut uid = 0;
    for line in text.lines() {
        if line.get(6..12) == Some("> UID:") {
            uid = word(line, "UID:").and_then(|uid| uid.parse().ok()).expect("uid is a number");
            assert!(found.insert(uid, format!("{line}\n")).is_none(), "uid {uid} is printed twice");
        } else if line.starts_with("      > ") {
            let record = found.get_mut(&uid).expect("a first line came before");
            record.push_str(line);
            record.push('\n');
        }
    }
    found
}

#[test]
fn every_mailbox_and_record_reads_as_mbexamine_prints_it() {
    let (mut mailboxes, mut records, mut compared) = (0, 0, Compared::new());
    store::each(|store| {
        let map = db::parse(store.file("conf/mailboxes.db")).expect("mailboxes.db parses");
        let list = mboxlist::parse(&map, None);
        assert!(list.faults.is_empty(), "{}: {:?}", store.name, list.faults);
        let listed: BTreeMap<String, &MailboxEntry> =
            list.mailboxes.iter().map(|entry| (entry.name.to_string(), entry)).collect();
        let sections = store.dump("mbexamine.txt");
        // A name without anything to show is a tombstone.
        for (name, text) in &sections {
            let dead = list.tombstones.iter().any(|tombstone| tombstone.mailbox.name.to_string() == *name);
            assert_eq!(
                (listed.contains_key(name), dead),
                (!text.is_empty(), text.is_empty()),
                "{}: {name}",
                store.name
            );
        }
        // A section named for an INBOX shows its folders too.
        let mut seen = BTreeSet::new();
        for (_, text) in &sections {
            for (name, text) in String::from_utf8_lossy(text).split("Examining ").skip(1).map(printed_mailbox) {
                records += check_mailbox(&mut compared, store, &name, text, listed[&name]);
                seen.insert(name);
            }
        }
        mailboxes += seen.len();
        let missing: Vec<_> = listed.keys().filter(|name| !seen.contains(*name)).collect();
        assert!(missing.is_empty(), "{}: not printed: {missing:?}", store.name);
    });
    assert!(mailboxes > 50 && records > 100, "only {mailboxes} mailboxes, {records} records compared");
    // 2.5 and 3.6 print the conversation id under different names.
    assert_eq!(compared.len(), 15 + 12 + 1, "{compared:?}");
}
