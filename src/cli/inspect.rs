//! `inspect FILE`: any file of Cyrus, recognised by what it holds and by its name, as text or JSON.

mod shown;

use crate::cyrus::index::{IndexHeader, IndexRecord};
use crate::cyrus::mboxlist::{Listed, Row};
use crate::cyrus::{FormatError, bytes, db, header, index, mboxlist};
use crate::model::{FlagName, SystemFlags};
use anyhow::{Context, bail};
use shown::Shown;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// No file that Cyrus keeps for one mailbox or as one list comes near this.
const MAX_BYTES: u64 = 4 << 30;

/// A file in use can be caught in the middle of a write: that often it is read again, after this pause.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// Prints what is in the file.
pub fn inspect(path: &Path, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let shown = read(path)?;
    if json {
        serde_json::to_writer(&mut *out, &shown)?;
        writeln!(out)?;
    } else {
        shown.print(out)?;
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Shown> {
    let shown_path = path.display();
    let mut attempt = 1;
    loop {
        let about = std::fs::metadata(path).with_context(|| format!("cannot read {shown_path}"))?;
        if !about.is_file() {
            bail!("{shown_path} is not a file: name one, for example the cyrus.index in a mailbox directory");
        }
        if about.len() > MAX_BYTES {
            bail!("{shown_path} has {} bytes: no file of Cyrus that can be shown is that large", about.len());
        }
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {shown_path}"))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match describe(&name, &bytes) {
            Err(Trouble::Format(error, _)) if error.is_torn() && attempt < ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(PAUSE);
            }
            Err(Trouble::Format(error, _)) if error.is_unsupported() => {
                bail!("{shown_path}: {error}; it is not damaged, but this release of spooltap cannot read it")
            }
            Err(Trouble::Format(error, cure)) => bail!("{shown_path}: {error}; {cure}"),
            Err(Trouble::Unknown) => bail!(
                "{shown_path}: byte 0x0: not a file of Cyrus that is known here (known: cyrus.index, cyrus.expunge, \
                 cyrus.header, twoskip, skiplist and flat databases, quota files, compiled Sieve scripts, imapd.conf)"
            ),
            Ok(shown) => return Ok(shown),
        }
    }
}

enum Trouble {
    /// With what can be done about it.
    Format(FormatError, &'static str),
    Unknown,
}

const REBUILD: &str = "if the server is stopped or idle, let `reconstruct` rebuild the mailbox";
const RECOVER: &str = "if the server is stopped or idle, take the copy in db.backup1 or run `ctl_cyrusdb -r`";

fn describe(name: &str, bytes: &[u8]) -> Result<Shown, Trouble> {
    if bytes.starts_with(&header::MAGIC[..24]) || name == "cyrus.header" {
        return mailbox_header(bytes).map_err(|error| Trouble::Format(error, REBUILD));
    }
    if matches!(name, "cyrus.index" | "cyrus.expunge") || looks_like_index(bytes) {
        return mailbox_index(name, bytes).map_err(|error| Trouble::Format(error, REBUILD));
    }
    if let Some(rest) = bytes.strip_prefix(b"CyrSBytecode") {
        let version = bytes::u32_at(rest, 0).map_or(Shown::Nothing, Shown::number);
        return Ok(Shown::Fields(vec![
            ("format", Shown::text("sieve bytecode")),
            ("version", version),
            ("bytes", Shown::number(bytes.len() as u64)),
        ]));
    }
    if name.ends_with(".conf") {
        return Ok(configuration(bytes));
    }
    match db::sniff(bytes) {
        db::Kind::Unknown => Err(Trouble::Unknown),
        // Any text is a flat database; only a name makes it one.
        db::Kind::Flat if !is_database_name(name) => Err(Trouble::Unknown),
        kind => database(name, kind, bytes).map_err(|error| Trouble::Format(error, RECOVER)),
    }
}

fn is_database_name(name: &str) -> bool {
    [".db", ".sub", ".seen", ".mboxkey", "cyrus.annotations"].iter().any(|end| name.ends_with(end))
}

/// A header of a known version whose sizes are the version's own.
fn looks_like_index(bytes: &[u8]) -> bool {
    let word = |at| bytes::u32_at(bytes, at).and_then(|word| usize::try_from(word).ok());
    index::LAYOUTS.iter().any(|layout| {
        word(8) == usize::try_from(layout.minor_version).ok()
            && word(12) == Some(layout.header_bytes())
            && word(16) == Some(layout.record_bytes())
    })
}

fn mailbox_header(bytes: &[u8]) -> Result<Shown, FormatError> {
    let header = header::parse(bytes)?;
    let optional = |text: Option<String>| text.map_or(Shown::Nothing, Shown::Text);
    Ok(Shown::Fields(vec![
        ("format", Shown::text("cyrus.header")),
        ("name", optional(header.name.map(|name| name.to_string()))),
        ("uniqueid", Shown::text(header.uniqueid)),
        ("mbtype", optional(header.mbtype.map(|mbtype| mbtype.0))),
        ("quotaroot", optional(header.quotaroot.map(|root| root.to_string()))),
        ("acl", acl(&header.acl)),
        ("user_flags", flags(&header.user_flags)),
        ("file_crc", Shown::Text(format!("{:08x}", header.file_crc))),
    ]))
}

fn flags(flags: &[Option<FlagName>]) -> Shown {
    Shown::List(flags.iter().map(|flag| flag.as_ref().map_or(Shown::Nothing, Shown::text)).collect())
}

/// `ident rights ident rights`.
fn acl(acl: &[u8]) -> Shown {
    let text = acl.strip_suffix(b"\t").unwrap_or(acl);
    if text.is_empty() {
        return Shown::List(Vec::new());
    }
    Shown::List(text.split(|&byte| byte == b'\t').map(Shown::bytes).collect())
}

fn mailbox_index(name: &str, bytes: &[u8]) -> Result<Shown, FormatError> {
    let header = index::parse_header(bytes)?;
    let expunged_file = name == "cyrus.expunge";
    let records = if expunged_file {
        index::parse_unsorted(&header, bytes)?
    } else {
        index::parse_index_records(&header, bytes)?
    };
    let mut fields = vec![("format", Shown::text(if expunged_file { "cyrus.expunge" } else { "cyrus.index" }))];
    fields.extend(index_header(&header));
    fields.push(("records", Shown::List(records.iter().map(record).collect())));
    Ok(Shown::Fields(fields))
}

fn index_header(header: &IndexHeader) -> Vec<(&'static str, Shown)> {
    vec![
        ("minor_version", Shown::number(header.minor_version)),
        ("generation_no", Shown::number(header.generation_no)),
        ("start_offset", Shown::number(header.start_offset)),
        ("record_size", Shown::number(header.record_size)),
        ("num_records", Shown::number(header.num_records)),
        ("exists", Shown::number(header.exists)),
        ("uidvalidity", Shown::number(header.uidvalidity)),
        ("last_uid", Shown::number(header.last_uid.0)),
        ("highestmodseq", Shown::number(header.highestmodseq.0)),
        ("deletedmodseq", Shown::number(header.deletedmodseq.0)),
        ("createdmodseq", Shown::number(header.createdmodseq.0)),
        ("options", Shown::Text(format!("{:08x}", header.option_bits))),
        ("deleted", Shown::number(header.deleted)),
        ("answered", Shown::number(header.answered)),
        ("flagged", Shown::number(header.flagged)),
        ("unseen", Shown::number(header.unseen)),
        ("last_appenddate", Shown::Time(header.last_appenddate)),
        ("recentuid", Shown::number(header.recentuid.0)),
        ("recenttime", Shown::Time(header.recenttime)),
        ("pop3_last_login", Shown::Time(header.pop3_last_login)),
        ("pop3_show_after", Shown::Time(header.pop3_show_after)),
        ("first_expunged", Shown::Time(header.first_expunged)),
        ("last_repack_time", Shown::Time(header.last_repack_time)),
        ("changes_epoch", Shown::Time(header.changes_epoch)),
        ("leaked_cache_records", Shown::number(header.leaked_cache_records)),
        ("quota_mailbox_used", Shown::number(header.quota_mailbox_used)),
        ("quota_annot_used", Shown::number(header.quota_annot_used)),
        ("quota_deleted_used", Shown::number(header.quota_deleted_used)),
        ("quota_expunged_used", Shown::number(header.quota_expunged_used)),
        ("sync_crc_basic", Shown::number(header.sync_crcs.basic)),
        ("sync_crc_annot", Shown::number(header.sync_crcs.annot)),
        ("header_file_crc", Shown::Text(format!("{:08x}", header.header_file_crc))),
    ]
}

fn record(found: &IndexRecord) -> Shown {
    let record = &found.record;
    let user_flags = (0..128u32).filter(|bit| record.user_flags >> bit & 1 == 1).map(Shown::number).collect();
    Shown::Fields(vec![
        ("uid", Shown::number(record.uid.0)),
        ("modseq", Shown::number(record.modseq.0)),
        ("flags", Shown::List(system_flags(record.system_flags).into_iter().map(Shown::text).collect())),
        ("user_flags", Shown::List(user_flags)),
        ("internaldate", Shown::Time(record.internaldate)),
        ("size", Shown::number(record.size)),
        ("guid", Shown::text(record.guid)),
        ("last_updated", Shown::Time(record.last_updated)),
        ("savedate", Shown::Time(record.savedate)),
        ("createdmodseq", Shown::number(record.createdmodseq.0)),
        ("cid", Shown::Text(format!("{:016x}", record.cid))),
        ("sentdate", Shown::Time(found.sentdate)),
        ("gmtime", Shown::Time(found.gmtime)),
        ("header_size", Shown::number(found.header_size)),
        ("content_lines", Shown::number(found.content_lines)),
        ("cache_version", Shown::number(found.cache_version)),
        ("cache_offset", Shown::number(found.cache_offset)),
        ("cache_crc", Shown::Text(format!("{:08x}", found.cache_crc))),
    ])
}

fn system_flags(flags: SystemFlags) -> Vec<String> {
    const NAMES: [(u32, &str); 8] = [
        (SystemFlags::ANSWERED, "\\Answered"),
        (SystemFlags::FLAGGED, "\\Flagged"),
        (SystemFlags::DELETED, "\\Deleted"),
        (SystemFlags::DRAFT, "\\Draft"),
        (SystemFlags::SEEN, "\\Seen"),
        (SystemFlags::ARCHIVED, "archived"),
        (SystemFlags::UNLINKED, "unlinked"),
        (SystemFlags::EXPUNGED, "expunged"),
    ];
    let named = NAMES.iter().filter(|(bit, _)| flags.has(*bit)).map(|(_, name)| (*name).to_owned());
    let rest = flags.0 & !NAMES.iter().fold(0, |all, (bit, _)| all | bit);
    // Bits without a name here are shown as they are.
    named.chain((rest != 0).then(|| format!("{rest:#010x}"))).collect()
}

fn database(name: &str, kind: db::Kind, bytes: &[u8]) -> Result<Shown, FormatError> {
    let map = db::parse(bytes)?;
    let backend = db::BACKENDS.iter().find(|backend| backend.kind == kind).map_or("empty", |backend| backend.name);
    if kind == db::Kind::QuotaLegacy {
        let value = map.values().next().map(Vec::as_slice).unwrap_or_default();
        return Ok(Shown::Fields(vec![
            ("format", Shown::text("quota root")),
            ("backend", Shown::text(backend)),
            ("root", Shown::text(name)),
            ("value", Shown::bytes(value)),
        ]));
    }
    let is_list = name.starts_with("mailboxes.db");
    let rows = map.iter().map(|(key, value)| {
        let plain = || vec![("key", Shown::bytes(key)), ("value", Shown::bytes(value))];
        if !is_list {
            return Shown::Fields(plain());
        }
        Shown::Fields(match mboxlist::row_for(key, value) {
            Ok(Some(row)) => mailbox_row(row),
            Ok(None) => plain(),
            Err(error) => {
                let mut fields = plain();
                fields.push(("error", Shown::text(error)));
                fields
            }
        })
    });
    let rows = Shown::List(rows.collect());
    let format = if is_list { "mailbox list" } else { "database" };
    Ok(Shown::Fields(vec![("format", Shown::text(format)), ("backend", Shown::text(backend)), ("rows", rows)]))
}

fn mailbox_row(row: Row) -> Vec<(&'static str, Shown)> {
    let (kind, listed, former) = match row {
        Row::Name(listed) => ("name", listed, Vec::new()),
        Row::Id(listed, former) => ("id", listed, former),
    };
    let Listed { mailbox, server, mtime } = &listed;
    let standing = match kind {
        "id" => Shown::Nothing,
        _ => Shown::text(format!("{:?}", listed.standing(None)).to_lowercase()),
    };
    vec![
        ("row", Shown::text(kind)),
        ("name", Shown::text(&mailbox.name)),
        ("standing", standing),
        ("uniqueid", Shown::text(&mailbox.uniqueid)),
        ("mbtype", Shown::text(&mailbox.mbtype.0)),
        ("partition", Shown::text(&mailbox.partition)),
        ("server", server.as_ref().map_or(Shown::Nothing, Shown::bytes)),
        ("uidvalidity", Shown::number(mailbox.uidvalidity)),
        ("createdmodseq", Shown::number(mailbox.createdmodseq.0)),
        ("foldermodseq", Shown::number(mailbox.foldermodseq.0)),
        ("mtime", Shown::Time(*mtime)),
        ("by_name", Shown::Yes(mailbox.by_name)),
        ("acl", acl(&mailbox.acl)),
        ("former_names", Shown::List(former.iter().map(|former| Shown::text(&former.name)).collect())),
    ]
}

/// Options as they stand in one file; values that are secrets are not repeated.
fn configuration(bytes: &[u8]) -> Shown {
    let text = String::from_utf8_lossy(bytes);
    let options = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let options = options.map(|line| {
        let (key, value) = line.split_once(':').unwrap_or((line, ""));
        let secret = ["password", "secret", "passwd"].iter().any(|word| key.to_ascii_lowercase().contains(word));
        let value = if secret { "(hidden)" } else { value.trim() };
        Shown::Fields(vec![("option", Shown::bytes(key.trim())), ("value", Shown::bytes(value))])
    });
    Shown::Fields(vec![("format", Shown::text("imapd.conf")), ("options", Shown::List(options.collect()))])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, content: &[u8], json: bool) -> Result<String, String> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("writes");
        let mut out = Vec::new();
        let shown = inspect(&path, json, &mut out);
        let folder = folder.path().display().to_string();
        shown.map_err(|error| format!("{error:#}").replace(&folder, "DIR"))?;
        Ok(String::from_utf8(out).expect("is text"))
    }

    #[test]
    fn a_header_as_text_and_as_json() {
        let file = [header::MAGIC, b"%(T e N user.f I tm A %(f lrs) U (a NIL))\n"].concat();
        let text = run("whatever", &file, false).expect("shown");
        assert!(text.starts_with("format:     cyrus.header\nname:       user.f\nuniqueid:   tm\n"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&run("x", &file, true).expect("shown")).expect("is JSON");
        assert_eq!(json["user_flags"], serde_json::json!(["a", null]));
        assert_eq!(json["acl"], serde_json::json!(["f", "lrs"]));
    }

    #[test]
    fn databases_by_name_and_content() {
        let json = |name: &str, file: &[u8]| -> serde_json::Value {
            serde_json::from_str(&run(name, file, true).expect("shown")).expect("is JSON")
        };
        assert_eq!(json("u1.sub", b"user.u1.A\t\n")["rows"][0]["key"], "user.u1.A");
        assert_eq!(
            json("mailboxes.db", b"user.u1\t0 default u1\xff\x89lrs\xff\x89\n")["rows"][0]["standing"],
            "present"
        );
        assert_eq!(json("user.u1", b"17\n200\n")["value"], "17 200");
        assert_eq!(json("empty.db", b"")["rows"], serde_json::json!([]));
        assert_eq!(json("x.bc", b"CyrSBytecode\0\0\0\x1f")["version"], 31);
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = run("imapd.conf", b"# c\nsync_password: hush\nconfigdirectory: /x\n", false).expect("shown");
        assert!(!text.contains("hush") && text.contains("option=configdirectory value=/x"), "{text}");
    }

    #[test]
    fn errors_name_file_place_and_cure() {
        let check = |name: &str, file: &[u8], expected: &str| {
            let error = run(name, file, false).expect_err("not readable");
            assert!(error.starts_with(expected), "{error}");
        };
        check("x.txt", b"hello\n", "DIR/x.txt: byte 0x0: not a file of Cyrus that is known here");
        let mut version = vec![0; 200];
        version[11] = 11;
        check(
            "cyrus.index",
            &version,
            "DIR/cyrus.index: cyrus.index header at byte 0x8: minor version 11 is not known",
        );
        check("cyrus.header", b"nothing", "DIR/cyrus.header: cyrus.header at byte 0x0: magic bytes are not those");
        let mut berkeley = vec![0; 100];
        berkeley[12..16].copy_from_slice(&0x0005_3162u32.to_le_bytes());
        check(
            "deliver.db",
            &berkeley,
            "DIR/deliver.db: database at byte 0x0: Berkeley databases are not read: convert",
        );
        let folder = tempfile::tempdir().expect("temporary folder");
        let error = inspect(folder.path(), false, &mut Vec::new()).expect_err("a folder").to_string();
        assert!(error.contains("is not a file: name one"), "{error}");
        assert!(inspect(&folder.path().join("none"), false, &mut Vec::new()).is_err());
    }
}
