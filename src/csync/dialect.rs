//! What each release of `sync_server` takes. One row per generation; nothing else asks for a version.

use crate::model::{AnnotCrc, Capabilities, UserId};

/// Releases that behave alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    V24,
    V25,
    V30,
    V32,
    V34,
    V36,
    V38,
    V310,
    V312,
    /// `spooltap serve`.
    Spooltap,
}

/// How an annotation is taken from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unannotation {
    Command,
    /// UNANNOTATION kills the server process; the value `NIL` removes (2.4, whatever the case of its letters).
    Nil,
    /// A server of which one of both is true, and nobody knows which.
    Never,
}

/// How to speak to one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    pub generation: Generation,
    pub annot_crc: AnnotCrc,
    /// Message and mailbox annotations travel inside MAILBOX; else mailbox annotations by ANNOTATION commands.
    pub annotations_inside: bool,
    pub since: bool,
    pub savedate: bool,
    pub intermediates: bool,
    /// Updating an existing script may store an empty one: remove it first (3.6.0 to 3.6.5, 3.8.0 to 3.8.3).
    pub sieve_replace: bool,
    /// How it spells the LIMIT of a quota root without one.
    pub unlimited: u64,
    pub unannotation: Unannotation,
    /// Letters of mailboxes that may be sent to it; from 3.6 on an unknown one kills the process. Letters of what is no
    /// mailbox of the source's own (`r`, `m`, `z`) or none at all any more (`d`) are nobody's: 3.6.1 dies of the one and
    /// buries a live mailbox under the other.
    pub mbtypes: &'static str,
    /// A longer value ends the connection (`maxliteral` and its default, 3.4.8 and later).
    pub max_literal: usize,
    /// A longer value of an annotation that travels alone is written over the end of a buffer (2.4: 4096 bytes for value,
    /// content type and two numbers).
    pub max_annotation: usize,
    /// Can be asked for a mailbox by its uniqueid.
    pub uniqueids: bool,
    /// After a request it cannot parse it finds the beginning of the next one; others take the rest of a file for commands.
    pub skips_what_it_cannot_parse: bool,
    /// Makes the bytecode of a script itself; else it comes with the script.
    pub compiles_sieve: bool,
    /// Its own user ids have `^` for a dot, as its imapd calls the users' files (`jane^doe.sub`).
    pub carets: bool,
    /// GET USER lists deleted mailboxes even where it deletes at once, and what there is of a user without an INBOX.
    pub lists_all: bool,
    /// ANNOTATION may be of the server itself; 2.5 opens a mailbox of that name, which there is not.
    pub server_annotations: bool,
    /// Sieve scripts live in a mailbox below INBOX, whatever the commands are that bring them.
    pub sieve_in_mailbox: bool,
}

const fn row(generation: Generation) -> Dialect {
    Dialect {
        generation,
        annot_crc: AnnotCrc::New,
        annotations_inside: true,
        since: true,
        savedate: true,
        intermediates: true,
        sieve_replace: false,
        unlimited: u32::MAX as u64,
        unannotation: Unannotation::Command,
        max_annotation: usize::MAX,
        mbtypes: "acbspfin",
        max_literal: 131_072,
        uniqueids: true,
        skips_what_it_cannot_parse: true,
        compiles_sieve: true,
        carets: false,
        lists_all: true,
        server_annotations: true,
        sieve_in_mailbox: true,
    }
}

/// What 2.4 to 3.4 have in common.
const fn old(generation: Generation) -> Dialect {
    Dialect {
        max_literal: usize::MAX,
        skips_what_it_cannot_parse: false,
        sieve_in_mailbox: false,
        mbtypes: "acbspin",
        ..row(generation)
    }
}

/// What 2.4 to 3.0 have in common.
const fn oldest(generation: Generation) -> Dialect {
    Dialect {
        annot_crc: AnnotCrc::Old,
        since: false,
        savedate: false,
        intermediates: false,
        uniqueids: false,
        ..old(generation)
    }
}

/// What 2.4 and 2.5 have in common.
const fn two(generation: Generation) -> Dialect {
    Dialect { compiles_sieve: false, carets: true, lists_all: false, mbtypes: "acn", ..oldest(generation) }
}

const ROWS: [Dialect; 10] = [
    Dialect {
        annot_crc: AnnotCrc::None,
        annotations_inside: false,
        unlimited: u64::MAX,
        unannotation: Unannotation::Nil,
        max_annotation: 4000,
        mbtypes: "",
        ..two(Generation::V24)
    },
    Dialect { server_annotations: false, ..two(Generation::V25) },
    Dialect { mbtypes: "acbn", ..oldest(Generation::V30) },
    old(Generation::V32),
    // 3.4.8 and later read no longer value.
    Dialect { max_literal: 131_072, ..old(Generation::V34) },
    Dialect { sieve_replace: true, ..row(Generation::V36) },
    Dialect { sieve_replace: true, mbtypes: "acbspfjin", ..row(Generation::V38) },
    Dialect { mbtypes: "acbspfjin", ..row(Generation::V310) },
    Dialect { mbtypes: "acbspfjin", ..row(Generation::V312) },
    Dialect { mbtypes: "acbspfjin", max_literal: 32 << 20, sieve_in_mailbox: false, ..row(Generation::Spooltap) },
];

impl Dialect {
    /// The row of a generation.
    pub fn of(generation: Generation) -> Self {
        ROWS.into_iter().find(|row| row.generation == generation).unwrap_or(row(generation))
    }

    /// A user as this generation calls him.
    pub fn user_there(&self, user: &UserId) -> UserId {
        if self.carets { swap(user, b'.', b'^') } else { user.clone() }
    }

    /// A user as everybody else calls him.
    pub fn user_here(&self, user: &UserId) -> UserId {
        if self.carets { swap(user, b'^', b'.') } else { user.clone() }
    }

    /// What the engine may ask of such a replica; `sieve_mailboxes` was agreed on in this session.
    pub fn capabilities(&self, sieve_mailboxes: bool) -> Capabilities {
        Capabilities {
            annot_crc: self.annot_crc,
            checks_since: self.since,
            sieve_mailboxes,
            intermediates: self.intermediates,
            keeps_savedate: self.savedate,
            message_annotations: self.annotations_inside,
            quota_resources: self.generation >= Generation::V25,
            keeps_options: self.generation >= Generation::V25,
            lists_all: self.lists_all,
            server_annotations: self.server_annotations,
        }
    }
}

/// One letter for another, the domain left out.
fn swap(user: &UserId, from: u8, to: u8) -> UserId {
    let mut bytes = user.as_bytes().to_vec();
    let local = bytes.iter().position(|&byte| byte == b'@').unwrap_or(bytes.len());
    bytes.iter_mut().take(local).filter(|byte| **byte == from).for_each(|byte| *byte = to);
    bytes.into()
}

/// The generation out of a banner's last line, where it names a version: `… Cyrus sync server 3.6.1-Debian…`.
pub fn generation_of(banner: &str) -> Option<Generation> {
    if banner.contains("spooltap") {
        return Some(Generation::Spooltap);
    }
    let version = ["sync server ", "Cyrus IMAP "]
        .iter()
        .find_map(|words| banner.split(words).nth(1))?
        .trim_start_matches(['v', 'g', 'i', 't']);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(match (major, minor) {
        (2, 4) => Generation::V24,
        (2, 5) => Generation::V25,
        (3, 0) => Generation::V30,
        (3, 1..=3) => Generation::V32,
        (3, 4..=5) => Generation::V34,
        (3, 6..=7) => Generation::V36,
        (3, 8..=9) => Generation::V38,
        (3, 10..=11) => Generation::V310,
        (3, _) => Generation::V312,
        (4.., _) => Generation::V312,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners_of_real_servers() {
        let check = |text: &str| generation_of(text);
        assert_eq!(check("* OK b.example Cyrus sync server 3.6.1-Debian-3.6.1-4+deb12u5"), Some(Generation::V36));
        assert_eq!(
            check("* OK [CAPABILITY IMAP4rev1] b.example Cyrus IMAP 3.6.1-4 server ready"),
            Some(Generation::V36)
        );
        assert_eq!(check("* OK b.example Cyrus sync server git2.4.22+0"), Some(Generation::V24));
        assert_eq!(check("* OK b.example Cyrus sync server 2.5.11"), Some(Generation::V25));
        assert_eq!(check("* OK b.example Cyrus sync server 3.12.1"), Some(Generation::V312));
        assert_eq!(check("* OK b.example Cyrus sync server 3.12-spooltap-0.1.0"), Some(Generation::Spooltap));
        assert_eq!(check("* OK b.example Cyrus sync server unknown"), None);
        assert_eq!(check("* OK b.example Cyrus sync server v2.3.16"), None);
    }

    #[test]
    fn every_generation_has_its_row() {
        for row in ROWS {
            assert_eq!(Dialect::of(row.generation), row);
        }
        assert_eq!(Dialect::of(Generation::V24).unannotation, Unannotation::Nil);
        for version in ["2.4.22", "2.5.17", "3.0.18", "3.2.12", "3.4.9", "3.6.7", "3.8.6", "3.10.3", "3.12.3"] {
            let generation = generation_of(&format!("* OK b.example Cyrus sync server {version}")).expect("known");
            let row = Dialect::of(generation);
            let number = format!("{generation:?}").replacen('V', "", 1);
            assert_eq!(version.replace('.', "").get(..number.len()), Some(&*number));
            let two = generation <= Generation::V25;
            assert_eq!([row.carets, !row.compiles_sieve, !row.lists_all], [two; 3], "{version}");
            let new = generation >= Generation::V32;
            assert_eq!([row.since, row.savedate, row.intermediates, row.uniqueids], [new; 4], "{version}");
            assert_eq!(row.server_annotations, generation != Generation::V25, "{version}");
            assert!(!row.mbtypes.contains(['r', 'm', 'z', 'd']), "{version}");
        }
    }
}
