//! Where things are, by imapd.conf.

use crate::cyrus::imapd_conf::{ConfError, ImapdConf};
use crate::cyrus::names::{self, Era, Hashing};
use crate::model::{MailboxEntry, MboxName, Partition, UniqueId, UserId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files of a mailbox that may live apart from its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MetaFile {
    Header,
    Index,
    Cache,
    Annotations,
    /// 2.3 with delayed expunge.
    Expunge,
}

impl MetaFile {
    const ALL: [Self; 5] = [Self::Header, Self::Index, Self::Cache, Self::Annotations, Self::Expunge];

    fn name(self) -> &'static str {
        match self {
            Self::Header => "cyrus.header",
            Self::Index => "cyrus.index",
            Self::Cache => "cyrus.cache",
            Self::Annotations => "cyrus.annotations",
            Self::Expunge => "cyrus.expunge",
        }
    }

    /// Its word in `metapartition_files`.
    fn word(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Index => "index",
            Self::Cache => "cache",
            Self::Annotations => "annotations",
            Self::Expunge => "expunge",
        }
    }

    /// Its word in `metadir-WORD-PARTITION`; annotations follow the index there.
    fn metadir(self) -> &'static str {
        match self {
            Self::Annotations => "index",
            other => other.word(),
        }
    }
}

/// Roots and options of one store; plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub configdirectory: PathBuf,
    /// `partition-NAME`.
    pub partitions: BTreeMap<Partition, PathBuf>,
    /// `archivepartition-NAME`.
    pub archive_partitions: BTreeMap<Partition, PathBuf>,
    /// Root of a meta file by partition, where it is not the partition itself.
    pub meta: BTreeMap<(MetaFile, Partition), PathBuf>,
    pub sievedir: PathBuf,
    /// `mboxname_lockpath`; never opened by us.
    pub lock_root: PathBuf,
    pub mailboxes_db: PathBuf,
    pub annotations_db: PathBuf,
    pub user_deny_db: PathBuf,
    /// `quota_db_path`, where quotas are one database; the legacy directory is `<conf>/quota`.
    pub quotas_db: Option<PathBuf>,
    pub hashing: Hashing,
    pub servername: Option<Vec<u8>>,
    pub deletedprefix: Vec<u8>,
    pub sieve_in_homes: bool,
    /// `unixhierarchysep`: dots of user names are stored as `^`.
    pub carets: bool,
}

impl Layout {
    /// Whose mailbox it is, or was.
    pub fn owner(&self, name: &MboxName) -> Option<UserId> {
        name.account(&self.deletedprefix)
    }

    pub fn new(conf: &ImapdConf) -> Result<Self, ConfError> {
        let configdirectory = PathBuf::from(conf.get("configdirectory").ok_or(ConfError::Missing("configdirectory"))?);
        let named = |prefix: &str| -> BTreeMap<Partition, PathBuf> {
            conf.named(prefix).map(|(name, path)| (Partition::from(name), PathBuf::from(path))).collect()
        };
        let partitions = named("partition");
        if partitions.is_empty() {
            return Err(ConfError::Missing("partition-default"));
        }
        let metapartitions = named("metapartition");
        let words: Vec<&str> = conf.get("metapartition_files").unwrap_or_default().split_ascii_whitespace().collect();
        let mut meta = BTreeMap::new();
        for file in MetaFile::ALL {
            for (partition, path) in metapartitions.iter().filter(|_| words.contains(&file.word())) {
                meta.insert((file, partition.clone()), path.clone());
            }
            for (partition, path) in named(&format!("metadir-{}", file.metadir())) {
                meta.insert((file, partition), path);
            }
        }
        let db = |key: &str, name: &str| conf.path(key).map_or_else(|| configdirectory.join(name), PathBuf::from);
        let legacy = conf.get("quota_db").is_none_or(|kind| kind == "quotalegacy");
        Ok(Self {
            partitions,
            archive_partitions: named("archivepartition"),
            meta,
            sievedir: conf.path("sievedir").unwrap_or_else(|| "/usr/sieve".into()).into(),
            lock_root: db("mboxname_lockpath", "lock"),
            mailboxes_db: db("mboxlist_db_path", "mailboxes.db"),
            annotations_db: db("annotation_db_path", "annotations.db"),
            user_deny_db: db("userdeny_db_path", "user_deny.db"),
            quotas_db: (!legacy).then(|| db("quota_db_path", "quotas.db")),
            hashing: Hashing { spool: conf.switch("hashimapspool", false), full: conf.switch("fulldirhash", false) },
            servername: conf.get("servername").map(|name| name.as_bytes().to_vec()),
            deletedprefix: conf.get("deletedprefix").unwrap_or("DELETED").as_bytes().to_vec(),
            carets: conf.switch("unixhierarchysep", false),
            sieve_in_homes: conf.switch("sieveusehomedir", false),
            configdirectory,
        })
    }

    fn dirs(&self, root: &Path, entry: &MailboxEntry) -> Vec<PathBuf> {
        if !entry.by_name {
            return vec![names::uuid_dir(root, &entry.uniqueid)];
        }
        let mut dirs: Vec<PathBuf> =
            [Era::Three, Era::Two].map(|era| names::mailbox_dir(root, &entry.name, self.hashing, era)).into();
        dirs.dedup();
        dirs
    }

    /// Where a meta file of a mailbox may be, most likely first; empty for an unknown partition.
    pub fn meta_files(&self, entry: &MailboxEntry, file: MetaFile) -> Vec<PathBuf> {
        let partition = option_name(&entry.partition);
        let root = self.meta.get(&(file, partition.clone())).or_else(|| self.partitions.get(&partition));
        let Some(root) = root else { return Vec::new() };
        self.dirs(root, entry).into_iter().map(|dir| dir.join(file.name())).collect()
    }

    /// Directories where message files of a mailbox may be, most likely first.
    pub fn message_dirs(&self, entry: &MailboxEntry) -> Vec<PathBuf> {
        let partition = option_name(&entry.partition);
        let roots = [self.partitions.get(&partition), self.archive_partitions.get(&partition)];
        roots.into_iter().flatten().flat_map(|root| self.dirs(root, entry)).collect()
    }

    /// Directory of a user's files in the uniqueid layout.
    pub fn user_dir(&self, inbox: &UniqueId) -> PathBuf {
        names::uuid_dir(&self.configdirectory.join("user"), inbox)
    }

    /// All roots below which mailboxes' meta files live.
    pub fn meta_roots(&self) -> Vec<PathBuf> {
        let mut roots: Vec<PathBuf> = self.meta.values().cloned().collect();
        roots.sort();
        roots.dedup();
        roots
    }
}

/// Servers look for `partition-NAME` in lower case, however the mailbox list spells NAME.
fn option_name(partition: &Partition) -> Partition {
    partition.as_bytes().to_ascii_lowercase().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> MailboxEntry {
        MailboxEntry {
            name: "user.a".into(),
            uniqueid: "x".into(),
            mbtype: Default::default(),
            partition: "default".into(),
            acl: Vec::new(),
            uidvalidity: 1,
            createdmodseq: Default::default(),
            foldermodseq: Default::default(),
            by_name: true,
        }
    }

    #[test]
    fn metapartitions_move_only_the_files_they_name() {
        let text = "configdirectory: /c\npartition-default: /s\nmetapartition-default: /m\n\
                    metapartition_files: header index cache\n";
        let conf = ImapdConf::parse(text, &mut |_| Err(String::new())).expect("parses");
        let layout = Layout::new(&conf).expect("is complete");
        let entry = entry();
        assert_eq!(layout.meta_files(&entry, MetaFile::Index), [Path::new("/m/user/a/cyrus.index")]);
        assert_eq!(layout.meta_files(&entry, MetaFile::Annotations), [Path::new("/s/user/a/cyrus.annotations")]);
        assert_eq!(layout.message_dirs(&entry), [Path::new("/s/user/a")]);
    }

    #[test]
    fn a_partition_is_found_in_any_case() {
        let conf = ImapdConf::parse("configdirectory: /c\npartition-P2: /p2\n", &mut |_| Err(String::new()));
        let layout = Layout::new(&conf.expect("parses")).expect("is complete");
        let entry = |partition: &str| MailboxEntry { partition: partition.into(), ..entry() };
        assert_eq!(layout.message_dirs(&entry("P2")), [Path::new("/p2/user/a")]);
        assert_eq!(layout.message_dirs(&entry("p2")), [Path::new("/p2/user/a")]);
        assert!(layout.meta_files(&entry("p3"), MetaFile::Index).is_empty());
    }

    #[test]
    fn a_store_without_partitions_is_refused() {
        let conf = ImapdConf::parse("configdirectory: /c\n", &mut |_| Err(String::new())).expect("parses");
        assert!(Layout::new(&conf).is_err());
    }
}
