//! Databases that are recognised in order to be refused with a cure.

use super::{Backend, Fault, FormatError, Kind, Loaded, MAGIC};

macro_rules! foreign {
    ($constant:ident, $kind:ident, $name:literal, $shown:literal, $recognise:expr) => {
        pub(super) const $constant: Backend = Backend {
            kind: Kind::$kind,
            name: $name,
            recognise: $recognise,
            load: |_| {
                refuse(concat!(
                    $shown,
                    " databases are not read: convert the file with cvt_cyrusdb to twoskip or skiplist"
                ))
            },
            tail: None,
        };
    };
}

foreign!(TWOM, Twom, "twom", "twom", |bytes| after_magic(bytes).is_some_and(|rest| rest.starts_with(b"twom")));
foreign!(ZEROSKIP, Zeroskip, "zeroskip", "zeroskip", |bytes| {
    bytes.starts_with(b"ZEROSKIP") || after_magic(bytes).is_some_and(|rest| rest.starts_with(b"zeroskip"))
});
foreign!(SQLITE, Sqlite, "sql", "sqlite", |bytes| bytes.starts_with(b"SQLite format 3\0"));
foreign!(BERKELEY, Berkeley, "berkeley", "Berkeley", |bytes| {
    // btree and hash, in the byte order of the machine that wrote them.
    let magic = super::super::bytes::array_at::<4>(bytes, 12);
    [0x0005_3162u32, 0x0005_3161]
        .iter()
        .any(|number| magic == Some(number.to_be_bytes()) || magic == Some(number.to_le_bytes()))
});

fn after_magic(bytes: &[u8]) -> Option<&[u8]> {
    bytes.strip_prefix(&MAGIC)
}

fn refuse(message: &str) -> Result<Loaded, FormatError> {
    Err(super::fault(Fault::Unsupported(message.into())))
}
