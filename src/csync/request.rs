//! What a client asks for, as values. Field tables: `docs/csync.md`.

use super::command::{annotation_view, mailbox_view, quota_view, seconds, seen_view};
use super::intake::Line;
use crate::dlist::{DlistError, Parser, Value};
use crate::model::{
    Annotation, MailboxView, MboxName, MessageGuid, Partition, QuotaLimits, QuotaRoot, SeenState, Since, SyncCrcs, Uid,
    UniqueId, UserId,
};

/// One request of a client that is logged in.
#[derive(Debug)]
pub enum Request {
    GetUser(UserId),
    GetMeta(UserId),
    GetMailboxes(Vec<MboxName>),
    GetUniqueIds(Vec<UniqueId>),
    GetFullMailbox(MboxName),
    GetQuota(QuotaRoot),
    GetAnnotation(MboxName),
    Fetch {
        name: MboxName,
        guid: MessageGuid,
    },
    FetchSieve {
        user: UserId,
        file: Vec<u8>,
    },
    /// The files are taken already.
    Message,
    Reserve {
        names: Vec<MboxName>,
        guids: Vec<MessageGuid>,
    },
    Mailbox(Box<Update>),
    Expunge {
        name: MboxName,
        uniqueid: UniqueId,
        uids: Vec<Uid>,
    },
    Rename {
        from: MboxName,
        to: MboxName,
        partition: Partition,
        uidvalidity: Option<u32>,
    },
    Unmailbox(MboxName),
    Unuser(UserId),
    Sub {
        user: UserId,
        name: MboxName,
    },
    Unsub {
        user: UserId,
        name: MboxName,
    },
    Seen {
        user: UserId,
        uniqueid: UniqueId,
        seen: SeenState,
    },
    Quota {
        root: QuotaRoot,
        limits: QuotaLimits,
    },
    Unquota(QuotaRoot),
    Annotation {
        name: MboxName,
        annotation: Annotation,
    },
    Unannotation {
        name: MboxName,
        entry: Vec<u8>,
        userid: UserId,
    },
    Sieve {
        user: UserId,
        file: Vec<u8>,
        last_update: i64,
        content: Vec<u8>,
    },
    Unsieve {
        user: UserId,
        file: Vec<u8>,
    },
    ActivateSieve {
        user: UserId,
        file: Vec<u8>,
    },
    UnactivateSieve(UserId),
    Force,
    Capabilities(Vec<Vec<u8>>),
}

/// Which releases send a mailbox in this form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Era {
    /// 2.4: one checksum, no annotations inside.
    Two4,
    /// 2.5 and 3.0: an annotation checksum by rules of their own.
    Two5,
    /// 3.2 and later.
    Three2,
}

/// `APPLY MAILBOX`.
#[derive(Debug)]
pub struct Update {
    pub view: MailboxView,
    pub since: Option<Since>,
    pub era: Era,
}

/// Why a request is no request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No list text.
    #[error("{0}")]
    Parse(String),
    /// A field is missing or of another kind.
    #[error("near {0}")]
    Near(&'static str),
    /// No such command.
    #[error("unknown request {0}")]
    Unknown(String),
    /// It takes more memory than it was given.
    #[error("takes too much memory")]
    Heavy,
}

/// Fields without which a mailbox cannot be made; 2.4 names no others.
const MAILBOX: [&str; 10] = [
    "LAST_UID",
    "HIGHESTMODSEQ",
    "RECENTUID",
    "RECENTTIME",
    "LAST_APPENDDATE",
    "POP3_LAST_LOGIN",
    "UIDVALIDITY",
    "PARTITION",
    "ACL",
    "OPTIONS",
];

/// Reads a `GET` or `APPLY` line.
pub fn parse(line: &Line) -> Result<Request, Fault> {
    parse_within(line, usize::MAX)
}

/// The same; its values may take so much memory, in bytes.
pub fn parse_within(line: &Line, memory: usize) -> Result<Request, Fault> {
    let mut words = line.bytes.splitn(3, |&byte| byte == b' ');
    let upper = |word: Option<&[u8]>| String::from_utf8_lossy(word.unwrap_or_default()).to_ascii_uppercase();
    let (verb, what) = (upper(words.next()), upper(words.next()));
    let what = what.strip_prefix("LOCAL_").map_or(what.clone(), str::to_owned);
    if line.files > 0 {
        return match (verb.as_str(), what.as_str()) {
            ("APPLY", "MESSAGE") => Ok(Request::Message),
            _ => Err(Fault::Parse("file in a request that takes none".into())),
        };
    }
    let mut parser = Parser::within(words.next().unwrap_or_default(), memory);
    let fault = |error: DlistError| if error.is_heavy() { Fault::Heavy } else { Fault::Parse(error.to_string()) };
    let value = parser.value().map_err(fault)?;
    parser.end().map_err(fault)?;
    match verb.as_str() {
        "GET" => get(&what, &value),
        "APPLY" => apply(&what, &value),
        _ => Err(Fault::Unknown(verb)),
    }
}

fn get(what: &str, value: &Value) -> Result<Request, Fault> {
    let word = || value.as_text().ok_or(Fault::Near("name"));
    Ok(match what {
        "USER" => Request::GetUser(UserId::new(word()?)),
        "META" => Request::GetMeta(UserId::new(word()?)),
        "MAILBOXES" => Request::GetMailboxes(names(value, MboxName::new)?),
        "UNIQUEIDS" => Request::GetUniqueIds(names(value, UniqueId::new)?),
        "FULLMAILBOX" => Request::GetFullMailbox(MboxName::new(word()?)),
        "QUOTA" => Request::GetQuota(QuotaRoot::new(word()?)),
        "ANNOTATION" => Request::GetAnnotation(MboxName::new(word()?)),
        "FETCH" => Request::Fetch { name: MboxName::new(text(value, "MBOXNAME")?), guid: guid(value)? },
        "FETCH_SIEVE" => Request::FetchSieve { user: user(value)?, file: text(value, "FILENAME")?.to_vec() },
        _ => return Err(Fault::Unknown(format!("GET {what}"))),
    })
}

fn apply(what: &str, value: &Value) -> Result<Request, Fault> {
    let word = || value.as_text().ok_or(Fault::Near("name"));
    let name = || text(value, "MBOXNAME").map(MboxName::new);
    let file = || text(value, "FILENAME").map(<[u8]>::to_vec);
    Ok(match what {
        "MESSAGE" => Request::Message,
        "RESERVE" => {
            text(value, "PARTITION")?;
            let guids = field(value, "GUID")?.as_list().ok_or(Fault::Near("GUID"))?;
            let guids = guids.iter().map(|guid| guid.as_text().and_then(MessageGuid::parse_hex));
            Request::Reserve {
                names: names(field(value, "MBOXNAME")?, MboxName::new)?,
                guids: guids.collect::<Option<_>>().ok_or(Fault::Near("GUID"))?,
            }
        }
        "MAILBOX" => Request::Mailbox(Box::new(update(value)?)),
        "EXPUNGE" => {
            let uids = field(value, "UID")?.as_list().ok_or(Fault::Near("UID"))?;
            let uids = uids.iter().map(|uid| uid.as_number().map(Uid)).collect::<Option<_>>();
            let uniqueid = UniqueId::new(text(value, "UNIQUEID")?);
            Request::Expunge { name: name()?, uniqueid, uids: uids.ok_or(Fault::Near("UID"))? }
        }
        "RENAME" => Request::Rename {
            from: MboxName::new(text(value, "OLDMBOXNAME")?),
            to: MboxName::new(text(value, "NEWMBOXNAME")?),
            partition: Partition::new(text(value, "PARTITION")?),
            uidvalidity: value.field("UIDVALIDITY").and_then(Value::as_number),
        },
        "UNMAILBOX" => Request::Unmailbox(MboxName::new(word()?)),
        "UNUSER" => Request::Unuser(UserId::new(word()?)),
        "SUB" => Request::Sub { user: user(value)?, name: name()? },
        "UNSUB" => Request::Unsub { user: user(value)?, name: name()? },
        "SEEN" => {
            for key in ["LASTREAD", "LASTUID", "LASTCHANGE", "SEENUIDS"] {
                field(value, key)?;
            }
            let (uniqueid, seen) = seen_view(value).ok_or(Fault::Near("UNIQUEID"))?;
            Request::Seen { user: user(value)?, uniqueid, seen }
        }
        "QUOTA" => {
            let (root, limits) = quota_view(value).ok_or(Fault::Near("ROOT"))?;
            Request::Quota { root, limits }
        }
        "UNQUOTA" => Request::Unquota(QuotaRoot::new(word()?)),
        "ANNOTATION" => {
            for key in ["USERID", "VALUE"] {
                field(value, key)?;
            }
            Request::Annotation { name: name()?, annotation: annotation_view(value).ok_or(Fault::Near("ENTRY"))? }
        }
        "UNANNOTATION" => {
            let userid = field(value, "USERID")?.as_text().map(UserId::new).unwrap_or_default();
            Request::Unannotation { name: name()?, entry: text(value, "ENTRY")?.to_vec(), userid }
        }
        "SIEVE" => Request::Sieve {
            user: user(value)?,
            file: file()?,
            last_update: seconds(value, "LAST_UPDATE").ok_or(Fault::Near("LAST_UPDATE"))?,
            content: text(value, "CONTENT")?.to_vec(),
        },
        "UNSIEVE" => Request::Unsieve { user: user(value)?, file: file()? },
        "ACTIVATE_SIEVE" => Request::ActivateSieve { user: user(value)?, file: file()? },
        "UNACTIVATE_SIEVE" => Request::UnactivateSieve(user(value)?),
        "FORCE" => Request::Force,
        "CAPABILITIES" => Request::Capabilities(names(value, |name| name)?),
        _ => return Err(Fault::Unknown(format!("APPLY {what}"))),
    })
}

fn update(value: &Value) -> Result<Update, Fault> {
    let view = mailbox_view(value).map_err(Fault::Near)?;
    if !view.head.mbtype.is_intermediate() && !view.head.mbtype.is_deleted() {
        for key in MAILBOX {
            field(value, key)?;
        }
        if view.records.is_none() {
            return Err(Fault::Near("RECORD"));
        }
    }
    if view.user_flags.len() > 128 {
        return Err(Fault::Near("FLAGS"));
    }
    let has = |key: &str| value.field(key).is_some();
    let number = |key: &str| value.field(key).and_then(Value::as_number).unwrap_or_default();
    let since = value.field("SINCE_MODSEQ").and_then(Value::as_number::<u64>).filter(|modseq| *modseq > 0);
    let since = since.map(|modseq| Since {
        modseq: crate::model::ModSeq(modseq),
        crcs: SyncCrcs { basic: number("SINCE_CRC"), annot: number("SINCE_CRC_ANNOT") },
    });
    let era = if has("FOLDERMODSEQ") || has("CREATEDMODSEQ") || has("SINCE_MODSEQ") {
        Era::Three2
    } else if has("POP3_SHOW_AFTER") {
        Era::Two5
    } else {
        Era::Two4
    };
    Ok(Update { view, since, era })
}

fn field<'a>(value: &'a Value, key: &'static str) -> Result<&'a Value, Fault> {
    value.field(key).ok_or(Fault::Near(key))
}

fn text<'a>(value: &'a Value, key: &'static str) -> Result<&'a [u8], Fault> {
    field(value, key)?.as_text().ok_or(Fault::Near(key))
}

fn user(value: &Value) -> Result<UserId, Fault> {
    text(value, "USERID").map(UserId::new)
}

fn guid(value: &Value) -> Result<MessageGuid, Fault> {
    MessageGuid::parse_hex(text(value, "GUID")?).ok_or(Fault::Near("GUID"))
}

fn names<T>(value: &Value, make: impl Fn(Vec<u8>) -> T) -> Result<Vec<T>, Fault> {
    let list = value.as_list().ok_or(Fault::Near("list"))?;
    list.iter().map(|name| name.as_text().map(|name| make(name.to_vec())).ok_or(Fault::Near("list"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Request, Fault> {
        parse(&Line { bytes: text.as_bytes().to_vec(), files: 0 })
    }

    #[test]
    fn requests_of_the_reference() {
        let shown = |text: &str| format!("{:?}", read(text).unwrap_or_else(|fault| panic!("{text}: {fault}")));
        assert!(shown("GET USER alice").starts_with("GetUser"));
        assert!(shown("get user NIL2").starts_with("GetUser"));
        assert!(shown("GET MAILBOXES (user.alice \"user.alice.Old Stuff\")").contains("Old Stuff"));
        assert!(shown("GET ANNOTATION \"\"").starts_with("GetAnnotation"));
        assert!(
            shown("APPLY RESERVE %(PARTITION default MBOXNAME () GUID (82dbaed68fa9c05a45c365689fba3fb7f32f823a))")
                .contains("82dbaed6")
        );
        assert!(shown("APPLY RENAME %(OLDMBOXNAME user.alice.Sent NEWMBOXNAME user.alice.Gone PARTITION default UIDVALIDITY 1795493661)").contains("Some(1795493661)"));
        assert!(shown("APPLY LOCAL_UNMAILBOX user.x").starts_with("Unmailbox"));
        assert!(
            shown("APPLY QUOTA %(ROOT user.alice LIMIT 100000 STORAGE 100000 MODSEQ 8)").contains("Storage: 100000")
        );
        assert!(
            shown("APPLY SIEVE %(USERID a FILENAME m.script LAST_UPDATE 5 CONTENT {6+}\r\nkeep;\n)")
                .contains("last_update: 5")
        );
        assert!(shown("APPLY FORCE %()").starts_with("Force"));
        assert!(shown("APPLY CAPABILITIES (SIEVE-MAILBOX)").starts_with("Capabilities"));
        assert!(
            shown("APPLY MAILBOX %(UNIQUEID x MBOXNAME user.x MBOXTYPE ei HIGHESTMODSEQ 3 FOLDERMODSEQ 3)")
                .contains("Three2")
        );
    }

    #[test]
    fn faults_are_told_apart() {
        for (text, fault) in [
            ("GET USER", "list text"),
            ("GET USER a b", "list text"),
            ("GET MAILBOXES a", "near list"),
            ("GET SEEN a", "unknown"),
            ("APPLY SUB %(USERID a)", "near MBOXNAME"),
            ("APPLY MAILBOX %(UNIQUEID x MBOXNAME y)", "near LAST_UID"),
            ("APPLY EXPUNGE %(MBOXNAME a UNIQUEID b UID (1 x))", "near UID"),
        ] {
            let error = read(text).expect_err(text).to_string();
            assert!(error.contains(fault), "{text}: {error}");
        }
        let line = Line { bytes: b"APPLY SIEVE (%{default".to_vec(), files: 1 };
        assert!(matches!(parse(&line), Err(Fault::Parse(_))));
    }
}
