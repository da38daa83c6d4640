//! What a server says: untagged lines, each with its line end.

use super::command::{RESOURCES, Request, annotation_entry, record_entry};
use super::{Dialect, Generation};
use crate::model::{
    Annotation, MailboxView, MboxName, MessageGuid, ModSeq, Partition, QuotaLimits, QuotaResource, QuotaRoot,
    SeenState, UniqueId,
};

/// `* MAILBOX`, with `RECORD` where the view has records. Where `annot` is false the annotation checksum counts as any.
pub fn mailbox(view: &MailboxView, annot: bool) -> Vec<u8> {
    let head = &view.head;
    let mut line = Request::answer("* MAILBOX %(");
    line.field("UNIQUEID", head.uniqueid.as_bytes()).field("MBOXNAME", head.name.as_bytes());
    if head.mbtype.is_intermediate() {
        line.field("MBOXTYPE", format!("e{}", head.mbtype.0).as_bytes());
    } else if !head.mbtype.0.is_empty() {
        line.field("MBOXTYPE", head.mbtype.0.as_bytes());
    }
    line.count("SYNC_CRC", view.crc_basic.unwrap_or_default());
    line.count("SYNC_CRC_ANNOT", view.crc_annot.filter(|_| annot).unwrap_or_default());
    line.count("LAST_UID", head.last_uid.0).count("HIGHESTMODSEQ", head.highestmodseq.0);
    line.count("RECENTUID", head.recentuid.0).time("RECENTTIME", head.recenttime);
    line.time("LAST_APPENDDATE", head.last_appenddate).time("POP3_LAST_LOGIN", head.pop3_last_login);
    line.time("POP3_SHOW_AFTER", head.pop3_show_after);
    for (key, modseq) in [("XCONVMODSEQ", head.xconvmodseq), ("RACLMODSEQ", head.raclmodseq)] {
        if modseq > ModSeq(0) {
            line.count(key, modseq.0);
        }
    }
    line.count("UIDVALIDITY", head.uidvalidity).field("PARTITION", head.partition.as_bytes()).field("ACL", &head.acl);
    line.field("OPTIONS", head.options.letters().as_bytes());
    if let Some(root) = &head.quotaroot {
        line.field("QUOTAROOT", root.as_bytes());
    }
    for (key, modseq) in [("CREATEDMODSEQ", head.createdmodseq), ("FOLDERMODSEQ", head.foldermodseq)] {
        if modseq > ModSeq(0) {
            line.count(key, modseq.0);
        }
    }
    if !view.annotations.is_empty() {
        line.raw(" ANNOTATIONS (");
        view.annotations.iter().for_each(|annotation| annotation_entry(&mut line, annotation));
        line.raw(")");
    }
    if let Some(records) = &view.records {
        let dialect = Dialect::of(Generation::Spooltap);
        line.raw(" RECORD (");
        records.iter().for_each(|record| record_entry(&mut line, record, &view.user_flags, &dialect));
        line.raw(")");
    }
    line.raw(")").end()
}

/// `* QUOTA`.
pub fn quota(root: &QuotaRoot, limits: &QuotaLimits) -> Vec<u8> {
    let mut line = Request::answer("* QUOTA %(");
    line.field("ROOT", root.as_bytes());
    let storage = limits.limits.get(&QuotaResource::Storage).copied().unwrap_or(u64::from(u32::MAX));
    line.count("LIMIT", storage);
    for (resource, name) in RESOURCES {
        if let Some(limit) = limits.limits.get(&resource) {
            line.count(name, limit);
        }
    }
    line.count("MODSEQ", limits.modseq).raw(")").end()
}

/// `* SEEN`.
pub fn seen(uniqueid: &UniqueId, seen: &SeenState) -> Vec<u8> {
    let mut line = Request::answer("* SEEN %(");
    line.field("UNIQUEID", uniqueid.as_bytes()).time("LASTREAD", seen.lastread).count("LASTUID", seen.lastuid.0);
    line.time("LASTCHANGE", seen.lastchange).field("SEENUIDS", &seen.seenuids).raw(")").end()
}

/// `* LSUB`.
pub fn subscriptions<'a>(names: impl Iterator<Item = &'a MboxName>) -> Vec<u8> {
    let mut line = Request::answer("* LSUB (");
    for name in names {
        line.separate().text(name.as_bytes());
    }
    line.raw(")").end()
}

/// `* SIEVE`, one line of a list.
pub fn sieve(file: &[u8], last_update: i64, guid: &MessageGuid, active: bool) -> Vec<u8> {
    let mut line = Request::answer("* SIEVE %(");
    line.field("FILENAME", file).time("LAST_UPDATE", last_update).count("GUID", guid);
    line.count("ISACTIVE", u8::from(active)).raw(")").end()
}

/// `* SIEVE`, the answer to FETCH_SIEVE.
pub fn sieve_text(user: &[u8], file: &[u8], content: &[u8]) -> Vec<u8> {
    let mut line = Request::answer("* SIEVE %(");
    line.field("USERID", user).field("FILENAME", file).field("CONTENT", content).raw(")").end()
}

/// `* ANNOTATION`.
pub fn annotation(name: &MboxName, annotation: &Annotation) -> Vec<u8> {
    let mut line = Request::answer("* ANNOTATION %(");
    line.field("MBOXNAME", name.as_bytes()).field("ENTRY", &annotation.entry);
    line.field("USERID", annotation.userid.as_bytes()).field("VALUE", &annotation.value).raw(")").end()
}

/// `* MISSING`.
pub fn missing<'a>(guids: impl Iterator<Item = &'a MessageGuid>) -> Vec<u8> {
    let mut line = Request::answer("* MISSING (");
    for guid in guids {
        line.separate().number(guid);
    }
    line.raw(")").end()
}

/// `* ENABLED`.
pub fn enabled(names: &[&str]) -> Vec<u8> {
    Request::answer("* ENABLED (").raw(&names.join(" ")).raw(")").end()
}

/// Head of `* MESSAGE`; the bytes follow, then a line end.
pub fn message_head(partition: &Partition, guid: &MessageGuid, size: u64) -> Vec<u8> {
    let mut line = Request::answer("* MESSAGE %{");
    line.text(partition.as_bytes()).raw(" ").number(guid).raw(" ").number(size).raw("}\r\n");
    line.0
}

#[cfg(test)]
mod tests {
    use super::super::command::{Untagged, untagged};
    use super::*;

    /// A line of a running 3.6.1, read and said again.
    #[test]
    fn a_mailbox_is_said_as_3_6_says_it() {
        let line = "* MAILBOX %(UNIQUEID mzb3mw031vhl89h0chmwnole MBOXNAME user.alice SYNC_CRC 359225777 SYNC_CRC_ANNOT 1694169520 LAST_UID 3 HIGHESTMODSEQ 8 RECENTUID 3 RECENTTIME 1795493750 LAST_APPENDDATE 1795493660 POP3_LAST_LOGIN 0 POP3_SHOW_AFTER 0 UIDVALIDITY 1795493661 PARTITION default ACL \"alice\tlrswipkxtecdan\tbob\tlrs\t\" OPTIONS P QUOTAROOT user.alice CREATEDMODSEQ 1 FOLDERMODSEQ 3)\r\n";
        let Ok(Untagged::Mailbox(view)) = untagged(line.trim_end().trim_start_matches("* ").as_bytes()) else {
            panic!("not a mailbox")
        };
        assert_eq!(String::from_utf8_lossy(&mailbox(&view, true)), line);
    }

    #[test]
    fn lines_of_the_reference() {
        let text = |line: Vec<u8>| String::from_utf8(line).expect("text");
        let guid = MessageGuid::parse_hex(b"82dbaed68fa9c05a45c365689fba3fb7f32f823a").expect("guid");
        assert_eq!(text(missing([guid].iter())), "* MISSING (82dbaed68fa9c05a45c365689fba3fb7f32f823a)\r\n");
        assert_eq!(text(enabled(&["SIEVE-MAILBOX"])), "* ENABLED (SIEVE-MAILBOX)\r\n");
        let names = ["user.alice".into(), "user.alice.Gone".into()];
        assert_eq!(text(subscriptions(names.iter())), "* LSUB (user.alice user.alice.Gone)\r\n");
        let mut limits = QuotaLimits { modseq: 8, ..QuotaLimits::default() };
        limits.limits.insert(QuotaResource::Storage, 100_000);
        assert_eq!(
            text(quota(&"user.alice".into(), &limits)),
            "* QUOTA %(ROOT user.alice LIMIT 100000 STORAGE 100000 MODSEQ 8)\r\n"
        );
        let state = SeenState {
            lastread: 1_795_493_753,
            lastuid: crate::model::Uid(4),
            lastchange: 1_795_493_752,
            seenuids: b"1:3,7".to_vec(),
        };
        assert_eq!(
            text(seen(&"221cc15c6b050f33".into(), &state)),
            "* SEEN %(UNIQUEID 221cc15c6b050f33 LASTREAD 1795493753 LASTUID 4 LASTCHANGE 1795493752 SEENUIDS 1:3,7)\r\n"
        );
        // `{n+}` is what newer clients cannot read.
        assert!(text(sieve_text(b"a", b"m.script", b"keep;\n")).contains("CONTENT {6}\r\nkeep;\n)"));
    }
}
