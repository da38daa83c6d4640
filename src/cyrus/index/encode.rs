//! The way back: header and records of any version that has checksums (v12 and later), for stores of our own.

use super::{FormatError, IndexHeader, IndexRecord, Layout, Slot, layout_of};
use crate::cyrus::bytes::crc32;
use crate::model::{SystemFlags, Uid};

/// The header with its checksum. `start_offset` and `record_size` are the version's, whatever `header` says.
pub fn encode_header(header: &IndexHeader) -> Result<Vec<u8>, FormatError> {
    let layout = layout_of(header.minor_version)?;
    let table = &layout.header;
    let mut out = vec![0; table.size];
    let fixed = [
        (0, header.generation_no),
        (4, header.format),
        (8, header.minor_version),
        (12, layout.header_bytes() as u32),
        (16, layout.record_bytes() as u32),
        (20, header.num_records),
    ];
    for (at, value) in fixed {
        Slot::U32(at).write(&mut out, value.into());
    }
    for (slot, value) in [
        (table.last_appenddate, header.last_appenddate as u64),
        (table.last_uid, header.last_uid.0.into()),
        (table.quota_mailbox_used, header.quota_mailbox_used),
        (table.pop3_last_login, header.pop3_last_login as u64),
        (table.uidvalidity, header.uidvalidity.into()),
        (table.deleted, header.deleted.into()),
        (table.answered, header.answered.into()),
        (table.flagged, header.flagged.into()),
        (table.options, header.option_bits.into()),
        (table.leaked_cache_records, header.leaked_cache_records.into()),
        (table.highestmodseq, header.highestmodseq.0),
        (table.deletedmodseq, header.deletedmodseq.0),
        (table.exists, header.exists.into()),
        (table.first_expunged, header.first_expunged as u64),
        (table.last_repack_time, header.last_repack_time as u64),
        (table.header_file_crc, header.header_file_crc.into()),
        (table.sync_basic, header.sync_crcs.basic.into()),
        (table.sync_annot, header.sync_crcs.annot.into()),
        (table.recentuid, header.recentuid.0.into()),
        (table.recenttime, header.recenttime as u64),
        (table.pop3_show_after, header.pop3_show_after as u64),
        (table.quota_annot_used, header.quota_annot_used),
        (table.unseen, header.unseen.into()),
        (table.createdmodseq, header.createdmodseq.0),
        (table.changes_epoch, header.changes_epoch as u64),
        (table.quota_deleted_used, header.quota_deleted_used),
        (table.quota_expunged_used, header.quota_expunged_used),
    ] {
        slot.write(&mut out, value);
    }
    seal(&mut out, table.crc);
    Ok(out)
}

/// One record with its checksum, appended to `out`. Annotations are elsewhere.
pub fn encode_record(layout: &Layout, found: &IndexRecord, out: &mut Vec<u8>) {
    let table = &layout.record;
    let record = &found.record;
    let mut bytes = vec![0; table.size];
    for (slot, value) in [
        (table.uid, record.uid.0.into()),
        (table.internaldate, record.internaldate as u64),
        (table.sentdate, found.sentdate as u64),
        (table.message_size, record.size),
        (table.header_size, found.header_size.into()),
        (table.gmtime, found.gmtime as u64),
        (table.content_offset, found.content_offset.into()),
        (table.cache_offset, found.cache_offset & 0xffff_ffff),
        (table.last_updated, record.last_updated as u64),
        (table.system_flags, record.system_flags.0.into()),
        (table.content_lines, found.content_lines.into()),
        (table.savedate, record.savedate as u64),
        (table.cache_version, u64::from(found.cache_version & 0xffff) | (found.cache_offset >> 32) << 16),
        (table.modseq, record.modseq.0),
        (table.cid, record.cid),
        (table.createdmodseq, record.createdmodseq.0),
        (table.basecid, found.basecid),
        (table.cache_crc, found.cache_crc.into()),
    ] {
        slot.write(&mut bytes, value);
    }
    for word in 0..4usize {
        let at = table.user_flags.saturating_add(word.saturating_mul(4));
        Slot::U32(at).write(&mut bytes, (record.user_flags >> (word.saturating_mul(32))) as u32 as u64);
    }
    let guid = table.guid.and_then(|at| bytes.get_mut(at..at.checked_add(20)?));
    if let Some(place) = guid {
        place.copy_from_slice(&record.guid.0);
    }
    seal(&mut bytes, table.crc);
    out.extend_from_slice(&bytes);
}

fn seal(bytes: &mut [u8], slot: Slot) {
    if let Slot::U32(at) = slot {
        let crc = crc32(bytes.get(..at).unwrap_or_default());
        slot.write(bytes, crc.into());
    }
}

/// Fills in what follows from the records: counts, sums, the oldest expunged one.
pub fn recount(header: &mut IndexHeader, records: &[IndexRecord]) {
    let live = || records.iter().map(|found| &found.record).filter(|record| !record.is_expunged());
    let with = |bit: u32| live().filter(|record| record.system_flags.has(bit)).count() as u32;
    let expunged = || records.iter().map(|found| &found.record).filter(|record| record.is_expunged());
    header.num_records = records.len() as u32;
    header.exists = live().count() as u32;
    header.answered = with(SystemFlags::ANSWERED);
    header.flagged = with(SystemFlags::FLAGGED);
    header.deleted = with(SystemFlags::DELETED);
    header.unseen = header.exists.saturating_sub(with(SystemFlags::SEEN));
    header.quota_mailbox_used = live().map(|record| record.size).fold(0, u64::saturating_add);
    let deleted = live().filter(|record| record.system_flags.has(SystemFlags::DELETED));
    header.quota_deleted_used = deleted.map(|record| record.size).fold(0, u64::saturating_add);
    let kept = expunged().filter(|record| !record.is_unlinked());
    header.quota_expunged_used = kept.map(|record| record.size).fold(0, u64::saturating_add);
    header.first_expunged = expunged().map(|record| record.last_updated).min().unwrap_or(0);
    let highest = records.last().map_or(Uid(0), |found| found.record.uid);
    header.last_uid = header.last_uid.max(highest);
}

#[cfg(test)]
mod tests {
    use super::super::{LAYOUTS, parse_header, parse_index_records};
    use super::*;
    use crate::model::{MessageGuid, ModSeq, Record, SyncCrcs};
    use proptest::prelude::*;

    fn header(minor_version: u32, words: &[u32], long: u64) -> IndexHeader {
        let word = |at: usize| words[at % words.len()];
        let layout = layout_of(minor_version).expect("known");
        IndexHeader {
            generation_no: word(0),
            format: 0,
            minor_version,
            start_offset: layout.header_bytes() as u32,
            record_size: layout.record_bytes() as u32,
            num_records: 0,
            last_appenddate: word(1).into(),
            last_uid: Uid(u32::MAX),
            quota_mailbox_used: long,
            pop3_last_login: word(2).into(),
            uidvalidity: word(3),
            deleted: word(4),
            answered: word(5),
            flagged: word(6),
            option_bits: word(7),
            leaked_cache_records: word(8),
            highestmodseq: ModSeq(long | 1),
            deletedmodseq: ModSeq(long >> 3),
            exists: word(9),
            first_expunged: word(10).into(),
            last_repack_time: word(11).into(),
            header_file_crc: word(12),
            sync_crcs: SyncCrcs { basic: word(13), annot: word(14) },
            recentuid: Uid(word(15)),
            recenttime: word(16).into(),
            pop3_show_after: word(17).into(),
            quota_annot_used: word(18).into(),
            unseen: word(19),
            createdmodseq: ModSeq(long >> 1),
            changes_epoch: word(20).into(),
            quota_deleted_used: long >> 2,
            quota_expunged_used: long >> 4,
        }
    }

    proptest! {
        /// Versions that hold every field; the older ones lack some.
        #[test]
        fn what_is_encoded_is_read_back(
            version in prop::sample::select(vec![18u32, 19, 20]),
            words in prop::collection::vec(any::<u32>(), 21),
            long in any::<u64>(),
            bits in any::<u128>(),
            guid in any::<[u8; 20]>(),
        ) {
            let layout = layout_of(version).expect("known");
            let mut head = header(version, &words, long);
            head.num_records = 1;
            let record = Record {
                uid: Uid(words[0].max(1)),
                modseq: ModSeq(long),
                last_updated: words[1].into(),
                internaldate: words[2].into(),
                size: words[3].into(),
                guid: MessageGuid(guid),
                system_flags: SystemFlags(words[4]),
                user_flags: bits,
                cid: long ^ 7,
                savedate: words[5].into(),
                createdmodseq: ModSeq(long >> 5),
                annotations: Vec::new(),
            };
            let found = IndexRecord {
                record,
                sentdate: words[6].into(),
                header_size: words[7],
                gmtime: words[8].into(),
                content_offset: 0,
                content_lines: 0,
                cache_version: words[9] & 0xffff,
                cache_offset: long & 0xffff_ffff_ffff,
                cache_crc: words[10],
                basecid: if version == 20 { long } else { 0 },
                uuid: [0; 12],
            };
            let mut file = encode_header(&head).expect("known version");
            encode_record(layout, &found, &mut file);
            let parsed = parse_header(&file).expect("parses");
            prop_assert_eq!(&parsed, &head);
            prop_assert_eq!(parse_index_records(&parsed, &file).expect("parses"), [found]);
        }
    }

    #[test]
    fn every_version_with_checksums_can_be_written() {
        for layout in LAYOUTS.iter().filter(|layout| layout.has_crc()) {
            let mut head = header(layout.minor_version, &[1, 2, 3], 5);
            head.num_records = 0;
            let file = encode_header(&head).expect("known version");
            assert_eq!(parse_header(&file).expect("parses").uidvalidity, head.uidvalidity);
        }
    }
}
