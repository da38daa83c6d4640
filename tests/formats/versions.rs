//! Every index version against the byte tables of the format reference, which were written down apart from
//! `cyrus::index`'s own: a value of its own goes into each field at the place the table names, and must come out there.

use spooltap::cyrus::index::{self, IndexHeader, IndexRecord};

/// Offsets of the checksums of header and record.
type Crcs = Option<(usize, usize)>;

/// minor, header size, record size, checksums.
const SIZES: &[(u32, usize, usize, Crcs)] = &[
    (6, 76, 60, None),
    (7, 76, 72, None),
    (8, 92, 80, None),
    (9, 96, 80, None),
    (10, 96, 88, None),
    (12, 128, 96, Some((124, 92))),
    (13, 128, 104, Some((124, 100))),
    (14, 160, 104, Some((156, 100))),
    (15, 160, 104, Some((156, 100))),
    (16, 160, 112, Some((156, 108))),
    (17, 160, 112, Some((156, 108))),
    (18, 160, 112, Some((156, 108))),
    (19, 160, 112, Some((156, 108))),
    (20, 192, 144, Some((188, 140))),
];

/// Columns as in the reference; `-` no such field, `q` 64 bits, `T` nanoseconds.
const HEADER_TABLE: &str = "
field                  v6-7 v8-10 v12 v13 v14-15 v16  v17  v18  v19  v20
last_appenddate        24   24    24  24  24     24   24   24   24   24T
last_uid               28   28    28  28  28     28   28   28   28   88
quota_mailbox_used     32q  32q   32q 32q 32q    32q  32q  32q  32q  32q
pop3_last_login        40   40    40  40  40     40   40   40   40   40T
uidvalidity            44   44    44  44  44     44   44   44   44   92
deleted                48   48    48  48  48     48   48   48   48   48
answered               52   52    52  52  52     52   52   52   52   52
flagged                56   56    56  56  56     56   56   56   56   56
options                60   60    60  60  60     60   60   60   64   64
leaked_cache_records   64   64    64  64  64     64   64   64   68   68
highestmodseq          -    68q   68q 68q 68q    68q  68q  68q  72q  72q
deletedmodseq          -    -     76q 76q 76q    76q  76q  76q  80q  80q
exists                 -    -     84  84  84     84   84   84   60   60
first_expunged         -    -     88  88  88     88   88   88   88   168T
last_repack_time       -    -     92  92  92     92   92   92   92   176T
header_file_crc        -    -     96  96  96     96   96   96   96   96
sync_basic             -    -     100 100 100    100  100  100  100  100
recentuid              -    -     104 104 104    104  104  104  104  184
recenttime             -    -     108 108 108    108  108  108  108  104T
pop3_show_after        -    -     -   112 112    112  112  112  112  112T
quota_annot_used       -    -     -   116 116    116  116  116  116  152q
sync_annot             -    -     -   120 120    120  120  120  120  120
unseen                 -    -     -   -   124    124  124  124  124  124
createdmodseq          -    -     -   -   -      128q 128q 128q 128q 128q
changes_epoch          -    -     -   -   -      -    136  136  152  160T
quota_deleted_used     -    -     -   -   -      -    -    140q 136q 136q
quota_expunged_used    -    -     -   -   -      -    -    148q 144q 144q
";

const RECORD_TABLE: &str = "
field          v6 v7 v8-9 v10 v12 v13-14 v15 v16-19 v20
uid            0  0  0    0   0   0      0   0      0
internaldate   4  4  4    4   4   4      4   4      8T
sentdate       8  8  8    8   8   8      8   8      16T
size           12 12 12   12  12  12     12  12     24q
header_size    16 16 16   16  16  16     16  16     32
content_offset 20 20 20   20  -   -      -   -      -
gmtime         -  -  -    -   20  20     20  20     104T
cache_offset   24 24 24   24  24  24     24  24     4
last_updated   28 28 28   28  28  28     28  28     112T
system_flags   32 32 32   32  32  32     32  32     36
user_flags_0   36 36 36   36  36  36     36  36     40
user_flags_1   40 40 40   40  40  40     40  40     44
user_flags_2   44 44 44   44  44  44     44  44     48
user_flags_3   48 48 48   48  48  48     48  48     52
content_lines  52 52 52   52  52  52     -   -      -
savedate       -  -  -    -   -   -      52  52     120T
cache_version  56 56 56   56  56  56     56  56     56
uuid           -  60 60   -   -   -      -   -      -
guid           -  -  -    60  60  60     60  60     60
modseq         -  -  72q  80q 80q 80q    80q 80q    80q
cid            -  -  -    -   -   88q    88q 88q    88q
createdmodseq  -  -  -    -   -   -      -   96q    96q
basecid        -  -  -    -   -   -      -   -      128q
cache_crc      -  -  -    -   88  96     96  104    136
";

/// Field names with the cell of that version.
fn column(table: &'static str, minor: u32) -> Vec<(&'static str, &'static str)> {
    let mut lines = table.lines().filter(|line| !line.is_empty()).map(|line| line.split_whitespace());
    let covers = |heading: &str| {
        let (first, last) = heading[1..].split_once('-').unwrap_or((&heading[1..], &heading[1..]));
        (first.parse().expect("number")..=last.parse::<u32>().expect("number")).contains(&minor)
    };
    let at = lines.next().expect("heading").skip(1).position(covers).expect("version has a column");
    lines.map(|mut line| (line.next().expect("name"), line.nth(at).expect("cell"))).collect()
}

/// Writes `value` where the cell says; gives what a reader has to find.
fn put(bytes: &mut [u8], cell: &str, value: u64) -> Option<u64> {
    let at = |digits: &str| digits.parse::<usize>().expect("offset");
    if cell == "-" {
        return None;
    }
    if let Some(digits) = cell.strip_suffix('T') {
        bytes[at(digits)..][..8].copy_from_slice(&(value * 1_000_000_000 + 123_456_789).to_be_bytes());
    } else if let Some(digits) = cell.strip_suffix('q') {
        bytes[at(digits)..][..8].copy_from_slice(&(value | 7 << 40).to_be_bytes());
        return Some(value | 7 << 40);
    } else {
        bytes[at(cell)..][..4].copy_from_slice(&(value as u32).to_be_bytes());
    }
    Some(value)
}

fn seal(bytes: &mut [u8], at: Option<usize>) {
    if let Some(at) = at {
        let crc = crc32fast::hash(&bytes[..at]);
        bytes[at..at + 4].copy_from_slice(&crc.to_be_bytes());
    }
}

fn header_field(header: &IndexHeader, field: &str) -> u64 {
    match field {
        "last_appenddate" => header.last_appenddate as u64,
        "last_uid" => header.last_uid.0.into(),
        "quota_mailbox_used" => header.quota_mailbox_used,
        "pop3_last_login" => header.pop3_last_login as u64,
        "uidvalidity" => header.uidvalidity.into(),
        "deleted" => header.deleted.into(),
        "answered" => header.answered.into(),
        "flagged" => header.flagged.into(),
        "options" => header.option_bits.into(),
        "leaked_cache_records" => header.leaked_cache_records.into(),
        "highestmodseq" => header.highestmodseq.0,
        "deletedmodseq" => header.deletedmodseq.0,
        "exists" => header.exists.into(),
        "first_expunged" => header.first_expunged as u64,
        "last_repack_time" => header.last_repack_time as u64,
        "header_file_crc" => header.header_file_crc.into(),
        "sync_basic" => header.sync_crcs.basic.into(),
        "sync_annot" => header.sync_crcs.annot.into(),
        "recentuid" => header.recentuid.0.into(),
        "recenttime" => header.recenttime as u64,
        "pop3_show_after" => header.pop3_show_after as u64,
        "quota_annot_used" => header.quota_annot_used,
        "unseen" => header.unseen.into(),
        "createdmodseq" => header.createdmodseq.0,
        "changes_epoch" => header.changes_epoch as u64,
        "quota_deleted_used" => header.quota_deleted_used,
        "quota_expunged_used" => header.quota_expunged_used,
        other => panic!("{other}"),
    }
}

fn record_field(found: &IndexRecord, field: &str) -> u64 {
    let record = &found.record;
    match field {
        "uid" => record.uid.0.into(),
        "internaldate" => record.internaldate as u64,
        "sentdate" => found.sentdate as u64,
        "size" => record.size,
        "header_size" => found.header_size.into(),
        "content_offset" => found.content_offset.into(),
        "gmtime" => found.gmtime as u64,
        "cache_offset" => found.cache_offset,
        "last_updated" => record.last_updated as u64,
        "system_flags" => record.system_flags.0.into(),
        "user_flags_0" => u64::from(record.user_flags as u32),
        "user_flags_1" => u64::from((record.user_flags >> 32) as u32),
        "user_flags_2" => u64::from((record.user_flags >> 64) as u32),
        "user_flags_3" => u64::from((record.user_flags >> 96) as u32),
        "content_lines" => found.content_lines.into(),
        "savedate" => record.savedate as u64,
        "cache_version" => found.cache_version.into(),
        "uuid" => u32::from_be_bytes(found.uuid[..4].try_into().expect("four bytes")).into(),
        "guid" => u32::from_be_bytes(record.guid.0[..4].try_into().expect("four bytes")).into(),
        "modseq" => record.modseq.0,
        "cid" => record.cid,
        "createdmodseq" => record.createdmodseq.0,
        "basecid" => found.basecid,
        "cache_crc" => found.cache_crc.into(),
        other => panic!("{other}"),
    }
}

/// Field names with the value that must be found; `None` where the version has no such field.
type Values = Vec<(&'static str, Option<u64>)>;

fn file(minor: u32, records: u32) -> (Vec<u8>, Values, Values) {
    let &(_, header_size, record_size, crcs) = SIZES.iter().find(|row| row.0 == minor).expect("known version");
    let mut header = vec![0; header_size];
    for (at, word) in [(8, minor), (12, header_size as u32), (16, record_size as u32), (20, records)] {
        header[at..at + 4].copy_from_slice(&word.to_be_bytes());
    }
    let mut number = 1000;
    let mut fill = |bytes: &mut [u8], table| -> Values {
        let mut put_next = |(field, cell)| {
            number += 1;
            (field, put(bytes, cell, number))
        };
        column(table, minor).into_iter().map(&mut put_next).collect()
    };
    let in_header = fill(&mut header, HEADER_TABLE);
    let mut record = vec![0; record_size];
    let in_record = fill(&mut record, RECORD_TABLE);
    // UIDs ascend and stay below last_uid.
    let mut file = header;
    for uid in 1..=records {
        record[..4].copy_from_slice(&uid.to_be_bytes());
        seal(&mut record, crcs.map(|(_, at)| at));
        file.extend_from_slice(&record);
    }
    seal(&mut file[..header_size], crcs.map(|(at, _)| at));
    (file, in_header, in_record)
}

#[test]
fn every_field_of_every_version_is_where_the_tables_say() {
    for &(minor, header_size, record_size, _) in SIZES {
        let (bytes, in_header, in_record) = file(minor, 3);
        let header = index::parse_header(&bytes[..header_size]).unwrap_or_else(|error| panic!("v{minor}: {error}"));
        assert_eq!((header.minor_version, header.num_records), (minor, 3));
        for (field, value) in in_header {
            let expected = value.unwrap_or(match field {
                "exists" => 3,
                "highestmodseq" => 1,
                "deletedmodseq" => header.highestmodseq.0,
                _ => 0,
            });
            assert_eq!(header_field(&header, field), expected, "v{minor} header {field}");
        }
        let records = index::parse_index_records(&header, &bytes).unwrap_or_else(|error| panic!("v{minor}: {error}"));
        assert_eq!(records.iter().map(|found| found.record.uid.0).collect::<Vec<_>>(), [1, 2, 3]);
        for (field, value) in in_record.into_iter().skip(1) {
            let expected = value.unwrap_or(u64::from(field == "modseq"));
            assert_eq!(record_field(&records[1], field), expected, "v{minor} record {field}");
        }
        let second = &bytes[header_size + record_size..][..record_size];
        assert_eq!(index::parse_record(&header, 2, second).as_ref(), Ok(&records[1]));
    }
    assert_eq!(SIZES.len(), index::LAYOUTS.len());
}

#[test]
fn large_cache_offsets_borrow_bits_of_the_version() {
    let (mut bytes, _, _) = file(19, 1);
    bytes[160 + 56..160 + 60].copy_from_slice(&0x0003_000du32.to_be_bytes());
    bytes[160 + 24..160 + 28].copy_from_slice(&5u32.to_be_bytes());
    seal(&mut bytes[160..], Some(108));
    let header = index::parse_header(&bytes).expect("parses");
    let records = index::parse_index_records(&header, &bytes).expect("parses");
    assert_eq!((records[0].cache_version, records[0].cache_offset), (13, 3 << 32 | 5));
}

#[test]
fn every_truncation_is_an_error() {
    for &(minor, ..) in SIZES {
        let (bytes, _, _) = file(minor, 2);
        for end in 0..bytes.len() {
            let cut = &bytes[..end];
            let parsed = index::parse_header(cut).and_then(|header| index::parse_records(&header, cut));
            assert!(parsed.is_err(), "v{minor} cut at {end}");
        }
    }
}

#[test]
fn faults_are_named() {
    let check = |change: &dyn Fn(&mut Vec<u8>), crc: bool, expected: &str| {
        let (mut bytes, _, _) = file(17, 2);
        change(&mut bytes);
        if crc {
            seal(&mut bytes[..160], Some(156));
        }
        let parsed = index::parse_header(&bytes).and_then(|header| index::parse_records(&header, &bytes));
        let error = parsed.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&|bytes| bytes[11] = 21, true, "cyrus.index header at byte 0x8: minor version 21 is not known");
    check(&|bytes| bytes[11] = 11, true, "minor version 11 is not known");
    check(&|bytes| bytes[30] ^= 1, false, "cyrus.index header at byte 0x9c: crc is");
    check(&|bytes| bytes[15] = 161, true, "start_offset is 161, expected 160");
    check(&|bytes| bytes[19] = 104, true, "record_size is 104, expected 112");
    check(&|bytes| bytes[20] = 0xff, true, "file ends before its last record");
    check(&|bytes| bytes[160 + 112 + 9] ^= 4, false, "cyrus.index record at byte 0x17c: crc is");
    check(&|bytes| bytes[28..32].fill(0), true, "uid is above last_uid");
    let twice = |bytes: &mut Vec<u8>| bytes.copy_within(160..272, 272);
    check(
        &twice,
        false,
        "cyrus.index record at byte 0x110: changed while it was read (damaged if this stays): uid does",
    );
}

/// The worked example of the reference: a mailbox of a running 3.6.1 with one message.
#[test]
fn a_mailbox_of_a_real_server() {
    let words = "
        00000000 00000000 00000011 000000a0 00000070 00000001 6b0508f1 00000001 00000000 000000a7 00000000 6b0508f2
        00000000 00000000 00000001 00000001 00000000 00000000 00000008 00000000 00000000 00000001 00000000 00000000
        a49cd409 d3255e35 00000001 6b0508f1 00000000 00000000 50c6a7cf 00000000 00000000 00000001 6b0508f1 00000000
        00000000 00000000 00000000 54bb21c0 00000001 2d572899 2d558480 000000a7 0000009a 2d572899 00000004 6b0508f1
        00000012 00000003 00000000 00000000 00000000 6b0508f1 0000000b 8238e8b5 867a9bbf 70eee998 b1cb93b3 d4900933
        00000000 00000008 13cb3154 8d1390ad 00000000 00000007 986b13fd 6c865c2e";
    let words = words.split_whitespace().map(|word| u32::from_str_radix(word, 16).expect("hex"));
    let bytes: Vec<u8> = words.flat_map(u32::to_be_bytes).collect();
    let header = index::parse_header(&bytes).expect("parses");
    assert_eq!((header.uidvalidity, header.highestmodseq.0, header.exists), (1_795_492_082, 8, 1));
    assert_eq!((header.sync_crcs.basic, header.sync_crcs.annot), (0xd325_5e35, 0x50c6_a7cf));
    assert_eq!(header.options().letters(), "P");
    // Every release puts the P on what it reads of a mailbox without messages.
    let options = |option_bits, exists| index::IndexHeader { option_bits, exists, ..header.clone() }.options();
    assert_eq!([options(4, 1).letters(), options(4, 0).letters(), options(0, 0).letters()], ["S", "PS", "P"]);
    let records = index::parse_records(&header, &bytes).expect("parses");
    let record = &records[0];
    assert_eq!((record.internaldate, record.size, record.user_flags), (760_686_745, 167, 3));
    assert_eq!(record.guid.to_string(), "8238e8b5867a9bbf70eee998b1cb93b3d4900933");
    assert_eq!((record.cid, record.createdmodseq.0), (0x13cb_3154_8d13_90ad, 7));
}

#[test]
fn the_page_about_formats_names_every_version_as_it_is_read() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats.md");
    let page = std::fs::read_to_string(page).expect("is there");
    let told: Vec<[u32; 4]> = page
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix("| ")?.split('|').map(str::trim).collect();
            let [minor, _, header, record, crc, ..] = cells.as_slice() else { return None };
            Some([minor.parse().ok()?, header.parse().ok()?, record.parse().ok()?, u32::from(*crc == "yes")])
        })
        .collect();
    let read: Vec<[u32; 4]> = index::LAYOUTS
        .iter()
        .map(|l| [l.minor_version, l.header_bytes() as u32, l.record_bytes() as u32, u32::from(l.has_crc())])
        .collect();
    assert_eq!(told, read);
}
