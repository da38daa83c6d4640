//! The pair of checksums over a mailbox's records, as `cyrus.index` keeps it and `sync_server` compares it.
//!
//! Everything hashed is text, so no byte order enters. Each value is the XOR of CRC-32 (zlib's) over live records, so the
//! order of records does not matter either. Source: Cyrus `imap/mailbox.c`; vectors seen on the wire of 2.4.22, 2.5.11 and
//! 3.6.1.

use crate::model::{FlagName, Record, SystemFlags};
use std::io::Write;

/// Which parts count in the annotation checksum; differs by release and index version of the *receiver*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnotRule {
    /// 0 in 2.5 and 3.0, 12345678 from 3.2 on.
    pub start: u32,
    /// Conversation id counts (index version 13 and later).
    pub thrid: bool,
    /// Save time counts (3.2 and later, index version 15 and later).
    pub savedate: bool,
    /// Creation modseq counts (3.2 and later, index version 16 and later).
    pub createdmodseq: bool,
}

const SYSTEM: [(u32, &[u8]); 5] = [
    (SystemFlags::DELETED, b"\\deleted"),
    (SystemFlags::ANSWERED, b"\\answered"),
    (SystemFlags::FLAGGED, b"\\flagged"),
    (SystemFlags::DRAFT, b"\\draft"),
    (SystemFlags::SEEN, b"\\seen"),
];

/// The basic checksum: UID, modseq, last_updated, flags, internaldate and GUID of every record that is not expunged.
pub fn basic(records: &[Record], user_flags: &[Option<FlagName>]) -> u32 {
    let flags = FlagCrcs::new(user_flags);
    records.iter().filter(|record| !record.is_expunged()).fold(0, |crc, record| crc ^ flags.record(record))
}

/// The share of one record, whether expunged or not.
pub fn basic_of(record: &Record, user_flags: &[Option<FlagName>]) -> u32 {
    FlagCrcs::new(user_flags).record(record)
}

struct FlagCrcs {
    system: [(u32, u32); 5],
    user: Vec<u32>,
}

impl FlagCrcs {
    fn new(user_flags: &[Option<FlagName>]) -> Self {
        let user = user_flags
            .iter()
            .take(128)
            .map(|name| name.as_ref().map_or(0, |name| crc32fast::hash(&name.as_bytes().to_ascii_lowercase())));
        Self { system: SYSTEM.map(|(bit, name)| (bit, crc32fast::hash(name))), user: user.collect() }
    }

    fn record(&self, record: &Record) -> u32 {
        let system = self.system.iter().filter(|(bit, _)| record.system_flags.has(*bit));
        let mut flags = system.fold(0, |crc, (_, flag)| crc ^ flag);
        for (bit, crc) in self.user.iter().enumerate() {
            if record.user_flags >> bit & 1 == 1 {
                flags ^= crc;
            }
        }
        let mut text = Vec::with_capacity(128);
        // Writing into a Vec cannot fail.
        let _ = write!(
            text,
            "{} {} {} ({flags}) {} {}",
            record.uid.0, record.modseq.0, record.last_updated, record.internaldate, record.guid
        );
        crc32fast::hash(&text)
    }
}

/// The annotation checksum over per-message annotations of live records, virtual ones included.
pub fn annot(records: &[Record], rule: AnnotRule) -> u32 {
    let mut text = Vec::new();
    let mut one = |uid: u32, entry: &[u8], userid: &[u8], value: &[u8]| {
        text.clear();
        let _ = write!(text, "{uid} ");
        text.extend_from_slice(entry);
        text.push(b' ');
        text.extend_from_slice(userid);
        text.push(b' ');
        text.extend_from_slice(value);
        crc32fast::hash(&text)
    };
    let mut crc = rule.start;
    for record in records.iter().filter(|record| !record.is_expunged()) {
        let uid = record.uid.0;
        for annotation in &record.annotations {
            crc ^= one(uid, &annotation.entry, annotation.userid.as_bytes(), &annotation.value);
        }
        if rule.thrid && record.cid != 0 {
            crc ^= one(uid, b"/vendor/cmu/cyrus-imapd/thrid", b"", format!("{:x}", record.cid).as_bytes());
        }
        if rule.savedate && record.savedate != 0 {
            crc ^= one(uid, b"/vendor/cmu/cyrus-imapd/savedate", b"", record.savedate.to_string().as_bytes());
        }
        if rule.createdmodseq && record.createdmodseq.0 != 0 {
            let value = record.createdmodseq.0.to_string();
            crc ^= one(uid, b"/vendor/cmu/cyrus-imapd/createdmodseq", b"", value.as_bytes());
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Annotation, MessageGuid, ModSeq, Uid};

    const NEW: AnnotRule = AnnotRule { start: 12_345_678, thrid: true, savedate: true, createdmodseq: true };
    const NONE: AnnotRule = AnnotRule { start: 0, thrid: true, savedate: true, createdmodseq: true };

    fn record(uid: u32, modseq: u64, internaldate: i64, guid: &str) -> Record {
        Record {
            uid: Uid(uid),
            modseq: ModSeq(modseq),
            last_updated: 1_795_493_660,
            internaldate,
            guid: MessageGuid::parse_hex(guid.as_bytes()).expect("guid"),
            ..Record::default()
        }
    }

    /// Vectors 10 to 12 of the protocol reference.
    #[test]
    fn records_as_real_servers_hash_them() {
        let names = ["$Work", "NonJunk"].map(|name| Some(FlagName::from(name)));
        let mut first = record(1, 2, 1_583_056_800, "de1a24f844ec1fb8728748225d649c3655d68214");
        first.system_flags = SystemFlags(SystemFlags::SEEN);
        first.user_flags = 0b11;
        let third = record(3, 4, 1_583_229_600, "46ea946521e8049ed83605a5a127bb99bd607686");
        assert_eq!(basic_of(&first, &names), 4_093_901_057);
        assert_eq!(basic_of(&third, &names), 1_140_205_804);
        assert_eq!(basic(&[first.clone(), third.clone()], &names), 4_093_901_057 ^ 1_140_205_804);
        let expunged = Record { system_flags: SystemFlags(SystemFlags::EXPUNGED), ..third };
        assert_eq!(basic(&[first, expunged], &names), 4_093_901_057);
        assert_eq!(basic(&[], &names), 0);
    }

    /// Vectors 18 to 25; 22 was seen on the wire of 3.6.1.
    #[test]
    fn annotations_as_real_servers_hash_them() {
        let guid = "de1a24f844ec1fb8728748225d649c3655d68214";
        let saved = Record { savedate: 1_795_493_660, ..record(1, 2, 0, guid) };
        let both = Record { createdmodseq: ModSeq(2), ..saved.clone() };
        assert_eq!(annot(&[], NEW), 12_345_678);
        assert_eq!(annot(&[saved], NONE), 824_159_485);
        assert_eq!(annot(&[both], NEW), 611_218_286);
        let comment = Annotation {
            entry: b"/comment".to_vec(),
            userid: "bob".into(),
            value: b"hi \x00 there".to_vec(),
            modseq: ModSeq(0),
        };
        assert_eq!(annot(&[Record { annotations: vec![comment], ..record(7, 1, 0, guid) }], NONE), 812_794_143);
        assert_eq!(annot(&[Record { cid: 0x00ab_00cd_1234_5678, ..record(9, 1, 0, guid) }], NONE), 3_086_126_209);
    }
}
