//! The state file looked at from outside: what is in it, whether it is whole, and how to make it forget.

use super::store::{ENTRIES, FORMAT, HEADER, Kind, unpack};
use super::{MailboxReceipt, StateError, UserReceipt};
use crate::model::{Annotation, QuotaLimits};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file, locked for us. Opening it changes nothing that a daemon would miss.
pub struct StateFile {
    db: Database,
    path: PathBuf,
}

/// What `state check` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub format: String,
    /// The store these receipts are of.
    pub store: String,
    /// False after a death: every lane is looked at anew at the next start.
    pub closed: bool,
    /// All pages are what their checksums say.
    pub sound: bool,
    pub replicas: BTreeMap<String, Counts>,
    /// What a source of 2.3 wants remembered: one entry per thousand UIDs of a mailbox, and one for each mailbox.
    pub remembered: u64,
    /// Entries that count as absent, because they cannot be read.
    pub unreadable: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub mailboxes: u64,
    /// Of these, such whose comparison was not finished.
    pub unfinished: u64,
    pub users: u64,
    pub quota_roots: u64,
    pub lanes: u64,
}

impl Report {
    /// Nothing of it would be put aside at the next start on the store with this identity.
    pub fn is_usable(&self, store: &str) -> bool {
        self.sound && self.format == FORMAT && self.store == store
    }
}

/// One receipt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    pub replica: String,
    pub kind: &'static str,
    pub id: String,
    pub value: Value,
}

impl StateFile {
    /// `None` when there is none.
    pub fn open(dir: &Path) -> Result<Option<Self>, StateError> {
        let path = dir.join("state.redb");
        if !path.exists() {
            return Ok(None);
        }
        match Database::open(&path) {
            Ok(db) => Ok(Some(Self { db, path })),
            Err(DatabaseError::DatabaseAlreadyOpen) => Err(StateError::Busy { path }),
            Err(error) => Err(StateError::Io { path, cause: error.to_string() }),
        }
    }

    fn fault(&self, error: impl Into<redb::Error>) -> StateError {
        StateError::Io { path: self.path.clone(), cause: error.into().to_string() }
    }

    /// Reads all of it.
    pub fn check(&mut self) -> Result<Report, StateError> {
        let mut report = Report { sound: self.db.check_integrity().map_err(|e| self.fault(e))?, ..Report::default() };
        {
            let read = self.db.begin_read().map_err(|e| self.fault(e))?;
            let header = read.open_table(HEADER).map_err(|e| self.fault(e))?;
            let text = |key: &str| header.get(key).ok().flatten().map(|value| value.value().to_owned());
            report.format = text("format").unwrap_or_default();
            report.store = text("store").unwrap_or_default();
            report.closed = text("closed").as_deref() != Some("no");
        }
        self.each(&mut |replica, kind, _, value| {
            if kind == MEMORY {
                report.remembered += 1;
                return;
            }
            let counts = report.replicas.entry(replica.to_owned()).or_default();
            let read = match kind {
                b'm' => {
                    counts.mailboxes += 1;
                    let receipt = unpack::<MailboxReceipt>(value);
                    counts.unfinished +=
                        u64::from(receipt.as_ref().is_some_and(|receipt| receipt.fingerprint.is_none()));
                    receipt.is_some()
                }
                b'u' => {
                    counts.users += 1;
                    unpack::<UserReceipt>(value).is_some()
                }
                b'q' => {
                    counts.quota_roots += 1;
                    unpack::<QuotaLimits>(value).is_some()
                }
                b's' => unpack::<Vec<Annotation>>(value).is_some(),
                b'p' => {
                    counts.lanes += 1;
                    unpack::<bool>(value).is_some()
                }
                _ => false,
            };
            report.unreadable += u64::from(!read);
        })?;
        Ok(report)
    }

    /// Every receipt, in the order of the file.
    pub fn export(&self, call: &mut dyn FnMut(Entry)) -> Result<(), StateError> {
        self.each(&mut |replica, kind, id, value| {
            if kind == MEMORY {
                return;
            }
            let (kind, value) = match kind {
                b'm' => ("mailbox", shown::<MailboxReceipt>(value)),
                b'u' => ("user", shown::<UserReceipt>(value)),
                b'q' => ("quota", shown::<QuotaLimits>(value)),
                b's' => ("server-annotations", shown::<Vec<Annotation>>(value)),
                b'p' => ("lane", shown::<bool>(value)),
                _ => ("unknown", Value::Null),
            };
            call(Entry { replica: replica.to_owned(), kind, id: String::from_utf8_lossy(id).into_owned(), value });
        })
    }

    fn each(&self, call: &mut Each<'_>) -> Result<(), StateError> {
        let read = self.db.begin_read().map_err(|e| self.fault(e))?;
        let table = read.open_table(ENTRIES).map_err(|e| self.fault(e))?;
        for entry in table.iter().map_err(|e| self.fault(e))? {
            let (key, value) = entry.map_err(|e| self.fault(e))?;
            let Some((kind, rest)) = key.value().split_first() else { continue };
            let mut parts = rest.splitn(2, |&byte| byte == 0);
            let replica = String::from_utf8_lossy(parts.next().unwrap_or_default());
            call(&replica, *kind, parts.next().unwrap_or_default(), value.value());
        }
        Ok(())
    }

    /// Forgets all receipts of this replica, or of all; gives how many. What the source wants remembered stays.
    pub fn drop_receipts(&self, replica: Option<&str>) -> Result<u64, StateError> {
        let write = self.db.begin_write().map_err(|e| self.fault(e))?;
        let mut count = 0;
        {
            let mut table = write.open_table(ENTRIES).map_err(|e| self.fault(e))?;
            let is_meant = |key: &[u8]| {
                let rest = key.get(1..).unwrap_or_default();
                replica.is_none_or(|name| rest.strip_prefix(name.as_bytes()).is_some_and(|id| id.first() == Some(&0)))
            };
            let keep = |key: &[u8], _: &[u8]| {
                let keep = key.first() == Some(&MEMORY) || !is_meant(key);
                count += u64::from(!keep);
                keep
            };
            table.retain(keep).map_err(|e| self.fault(e))?;
        }
        write.commit().map_err(|e| self.fault(e))?;
        Ok(count)
    }
}

const MEMORY: u8 = Kind::Memory as isize as u8;

/// Takes replica, kind, id and value.
type Each<'a> = dyn FnMut(&str, u8, &[u8], &[u8]) + 'a;

fn shown<T: DeserializeOwned + Serialize>(value: &[u8]) -> Value {
    unpack::<T>(value).map_or(json!("unreadable"), |value| serde_json::to_value(value).unwrap_or(json!("unreadable")))
}

/// The kinds above are those of the store.
const _: () = assert!(Kind::Mailbox as isize == b'm' as isize && Kind::Primed as isize == b'p' as isize);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;

    #[test]
    fn what_is_in_it_is_told_and_forgotten_by_replica() {
        let dir = tempfile::tempdir().expect("directory");
        assert!(StateFile::open(dir.path()).expect("nothing there").is_none());
        {
            let state = State::open(dir.path(), "store one").expect("opens");
            for replica in ["a", "b"] {
                let replica = state.replica(replica);
                replica.put_mailbox(&"id1".into(), &MailboxReceipt::default());
                replica.put_user(&"jane".into(), &UserReceipt::default());
                replica.set_primed("user jane");
            }
            state.memory().put(vec![(b"id1\0".to_vec(), Some(vec![1])), (b"id1\x01".to_vec(), Some(vec![1]))]);
            assert!(matches!(StateFile::open(dir.path()), Err(StateError::Busy { .. })));
        }
        let mut file = StateFile::open(dir.path()).expect("opens").expect("is there");
        let report = file.check().expect("reads");
        assert!(report.is_usable("store one") && !report.is_usable("store two") && report.closed);
        assert_eq!((report.remembered, report.unreadable), (2, 0));
        let counts = Counts { mailboxes: 1, unfinished: 1, users: 1, quota_roots: 0, lanes: 1 };
        assert_eq!(report.replicas, BTreeMap::from([("a".to_owned(), counts.clone()), ("b".to_owned(), counts)]));
        let mut entries = Vec::new();
        file.export(&mut |entry| entries.push((entry.replica, entry.kind, entry.id))).expect("reads");
        assert_eq!(entries.len(), 6);
        assert!(entries.contains(&("a".to_owned(), "mailbox", "id1".to_owned())));
        assert_eq!(file.drop_receipts(Some("a")).expect("forgets"), 3);
        assert_eq!(file.check().expect("reads").replicas.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(file.drop_receipts(None).expect("forgets"), 3);
        drop(file);
        let state = State::open(dir.path(), "store one").expect("opens as before");
        assert_eq!(state.replica("b").mailboxes(), []);
        assert_eq!(state.memory().keys().len(), 2, "it belongs to no replica");
    }
}
