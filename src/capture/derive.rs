//! Path → `DirtyKey`: which part of the store a touched file belongs to. Pure: no path is opened.
//!
//! Two rules: what is certainly noise (delivery staging, caches, temporary files) gives nothing; of everything else
//! every doubt becomes a key, because a key too many costs one read and a key too few costs the truth.

use crate::model::{DirtyKey, MailboxRef, MboxName, QuotaRoot, UniqueId, UserId, UserPart, UserRef};
use crate::spool::Layout;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Where the files of one store are; plain data. Paths are written plainly: no `//`, no `.`, no `/` at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots {
    /// `partition-NAME` and `archivepartition-NAME`.
    pub spool: Vec<PathBuf>,
    /// `metapartition-NAME` and `metadir-FILE-NAME`.
    pub meta: Vec<PathBuf>,
    /// `configdirectory`.
    pub conf: PathBuf,
    pub sieve: Option<PathBuf>,
    /// A hash level above by-name mailboxes in `spool` and `meta` (user, quota and sieve files always have one).
    pub hashimapspool: bool,
    /// `mboxlist_db_path`; without it `<conf>/mailboxes.db`.
    pub mailboxes_db: Option<PathBuf>,
    /// `annotation_db_path`; without it `<conf>/annotations.db`.
    pub annotations_db: Option<PathBuf>,
    /// `quota_db_path`; without it `<conf>/quotas.db`.
    pub quotas_db: Option<PathBuf>,
}

/// How far a watch reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// The files in the directory itself.
    Flat,
    /// Everything below, apart from `is_noise_dir`.
    Tree,
}

impl From<&Layout> for Roots {
    fn from(layout: &Layout) -> Self {
        let plain = |path: &PathBuf| path.components().collect::<PathBuf>();
        Self {
            spool: layout.partitions.values().chain(layout.archive_partitions.values()).map(plain).collect(),
            meta: layout.meta_roots().iter().map(plain).collect(),
            conf: plain(&layout.configdirectory),
            sieve: (!layout.sieve_in_homes).then(|| plain(&layout.sievedir)),
            hashimapspool: layout.hashing.spool,
            mailboxes_db: Some(plain(&layout.mailboxes_db)),
            annotations_db: Some(plain(&layout.annotations_db)),
            quotas_db: layout.quotas_db.as_ref().map(plain),
        }
    }
}

/// Which tree a path is in; what follows the root decides the rest.
#[derive(Clone, Copy)]
enum Tree {
    Mailboxes,
    Conf,
    Sieve,
}

impl Roots {
    /// Everything to be watched, each directory once; a tree inside another tree is not named again.
    pub fn watched(&self) -> Vec<(PathBuf, Reach)> {
        let mut trees: BTreeSet<PathBuf> = self.spool.iter().chain(&self.meta).chain(&self.sieve).cloned().collect();
        trees.extend(["user", "domain", "quota"].map(|name| self.conf.join(name)));
        let all = trees.clone();
        trees.retain(|path| !path.ancestors().skip(1).any(|above| all.contains(above)));
        let dbs = self.databases().into_iter().filter_map(|(path, _)| path.parent().map(Path::to_owned));
        let mut flat: BTreeSet<PathBuf> = dbs.collect();
        flat.insert(self.conf.clone());
        flat.retain(|path| !path.ancestors().any(|above| trees.contains(above)));
        let flat = flat.into_iter().map(|path| (path, Reach::Flat));
        flat.chain(trees.into_iter().map(|path| (path, Reach::Tree))).collect()
    }

    fn databases(&self) -> [(PathBuf, DirtyKey); 3] {
        let path = |set: &Option<PathBuf>, name: &str| set.clone().unwrap_or_else(|| self.conf.join(name));
        [
            (path(&self.mailboxes_db, "mailboxes.db"), DirtyKey::MailboxList),
            (path(&self.annotations_db, "annotations.db"), DirtyKey::Annotations),
            (path(&self.quotas_db, "quotas.db"), DirtyKey::AllQuotas),
        ]
    }

    fn database(&self, path: &Path) -> Option<DirtyKey> {
        let is = |set: &Option<PathBuf>, name: &str| match set {
            Some(set) => set.as_os_str() == path.as_os_str(),
            None => below(path, &self.conf).is_some_and(|rest| rest == name.as_bytes()),
        };
        if is(&self.mailboxes_db, "mailboxes.db") {
            return Some(DirtyKey::MailboxList);
        }
        if is(&self.annotations_db, "annotations.db") {
            return Some(DirtyKey::Annotations);
        }
        is(&self.quotas_db, "quotas.db").then_some(DirtyKey::AllQuotas)
    }

    /// The innermost tree that holds `path`, and the components below its root.
    fn locate<'p>(&self, path: &'p Path) -> Option<(Tree, Vec<&'p [u8]>)> {
        let roots = self.spool.iter().chain(&self.meta).map(|root| (Tree::Mailboxes, root));
        let roots = roots.chain(self.sieve.iter().map(|root| (Tree::Sieve, root)));
        let roots = roots.chain([(Tree::Conf, &self.conf)]);
        let (tree, rest) = roots
            .filter_map(|(tree, root)| below(path, root).map(|rest| (tree, rest)))
            .min_by_key(|(_, rest)| rest.len())?;
        let mut parts = Vec::with_capacity(8);
        parts.extend(rest.split(|&byte| byte == b'/').filter(|part| !part.is_empty()));
        Some((tree, parts))
    }

    /// What may differ now that `path` was touched; `None` for noise.
    pub fn derive(&self, path: &Path, is_dir: bool) -> Option<DirtyKey> {
        if !is_plain(path) {
            return self.derive(&plainly(path), is_dir);
        }
        if !is_dir && let Some(key) = self.database(path) {
            return Some(key);
        }
        let (tree, parts) = self.locate(path)?;
        let (dirs, file) = match (is_dir, parts.split_last()) {
            (false, Some((file, dirs))) => (dirs, Some(*file)),
            (false, None) => return None,
            (true, _) => (parts.as_slice(), None),
        };
        if file.is_some_and(is_temporary) {
            return None;
        }
        match tree {
            Tree::Mailboxes => mailbox(dirs, file, self.hashimapspool).map(DirtyKey::Mailbox),
            Tree::Conf => conf_file(dirs, file),
            Tree::Sieve => sieve_dir(dirs).map(|user| DirtyKey::User(user, UserPart::Sieve)),
        }
    }

    /// What is watched beside the mailboxes: what no lock of a mailbox stands for.
    pub fn beside_mailboxes(&self) -> Vec<(PathBuf, Reach)> {
        Self { spool: Vec::new(), meta: Vec::new(), ..self.clone() }.watched()
    }

    /// The mailbox that a lock file stands for, by its path below the directory of locks (3.6 and later): named after the
    /// uniqueid, or after the mailbox where that one lives by its name. At the top it may be either, so both are told.
    pub fn derive_lock(&self, below: &Path) -> Vec<DirtyKey> {
        let mut parts: Vec<&[u8]> = below.iter().map(OsStrExt::as_bytes).collect();
        let Some(name) = parts.pop().and_then(|file| file.strip_suffix(b".lock")) else { return Vec::new() };
        parts.push(name);
        // `*U*` + user, `*D*` …, of 3.12 with a directory in between: locks of other things.
        if parts.iter().any(|part| part.first() == Some(&b'*')) {
            return Vec::new();
        }
        let Some(MailboxRef::Name(name)) = mailbox(&parts, Some(b"cyrus.index"), self.hashimapspool) else {
            return Vec::new();
        };
        let id = UniqueId::new(name.as_bytes());
        let is_plain = !name.as_bytes().iter().any(|byte| matches!(byte, b'.' | b'!'));
        let id = is_plain.then_some(DirtyKey::Accessed(MailboxRef::Id(id)));
        id.into_iter().chain([DirtyKey::Accessed(MailboxRef::Name(name))]).collect()
    }

    /// A directory whose content never matters: staging areas at the top of a partition.
    pub fn is_noise_dir(&self, path: &Path) -> bool {
        if !is_plain(path) {
            return self.is_noise_dir(&plainly(path));
        }
        match self.locate(path) {
            Some((Tree::Mailboxes, parts)) => matches!(parts.first(), Some(&(b"stage." | b"sync."))),
            _ => false,
        }
    }
}

/// What follows `root` in a path; both are plain. Comparing bytes is several times quicker than comparing components, and
/// this is asked of every event for every root.
fn below<'p>(path: &'p Path, root: &Path) -> Option<&'p [u8]> {
    let root = root.as_os_str().as_bytes();
    let rest = path.as_os_str().as_bytes().strip_prefix(root)?;
    match rest.first() {
        None => Some(rest),
        Some(b'/') => rest.get(1..),
        // The root of everything ends in the separator itself.
        Some(_) => (root == b"/").then_some(rest),
    }
}

/// Written as `Roots` are.
fn is_plain(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let (mut before, mut first) = (0u8, 0u8);
    for &byte in bytes {
        if byte == b'/' && (before == b'/' || (before == b'.' && first == b'/')) {
            return false;
        }
        (first, before) = (before, byte);
    }
    !(before == b'/' && bytes.len() > 1 || before == b'.' && first == b'/')
}

fn plainly(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}

/// Written beside its target and renamed over it; the rename names the target.
fn is_temporary(file: &[u8]) -> bool {
    file.ends_with(b".NEW")
}

/// Files of a mailbox directory that can be made anew from the others, or hold locks.
fn is_mailbox_noise(file: &[u8]) -> bool {
    matches!(
        file,
        b"cyrus.cache" | b"cyrus.squat" | b"cyrus.squat.tmp" | b"cyrus.lock" | b"cyrus.dav" | b"cyrus.conversations"
    )
}

/// `uuid/a/b/abc…`: the id, where the two fan-out levels agree with it.
fn uuid<'p>(dirs: &[&'p [u8]]) -> Option<&'p [u8]> {
    let [first, a, b, id, ..] = dirs else { return None };
    let fits = *first == b"uuid" && id.get(0..1) == Some(*a) && id.get(1..2) == Some(*b);
    fits.then_some(*id)
}

/// The fan-out above the directories that `uuid` finds: `uuid`, `uuid/a`, `uuid/a/b`.
fn is_uuid_fan(dirs: &[&[u8]]) -> bool {
    match dirs {
        [first, fan @ ..] => *first == b"uuid" && fan.len() <= 2 && fan.iter().all(|part| part.len() == 1),
        [] => false,
    }
}

fn mailbox(dirs: &[&[u8]], file: Option<&[u8]>, hashed: bool) -> Option<MailboxRef> {
    if file.is_some_and(is_mailbox_noise) || matches!(dirs.first(), Some(&(b"stage." | b"sync."))) {
        return None;
    }
    if let Some(id) = uuid(dirs) {
        return Some(MailboxRef::Id(UniqueId::new(id)));
    }
    if file.is_none() && is_uuid_fan(dirs) {
        return None;
    }
    // A shared mailbox may itself be called `domain`: without a name below the domain it is taken for that.
    let levels = if hashed { 3 } else { 2 };
    let is_domain =
        dirs.first() == Some(&b"domain".as_slice()) && (!hashed || dirs.get(1).is_some_and(|h| h.len() == 1));
    let (domain, names) = match (is_domain, dirs.get(levels..)) {
        (true, Some(names)) if !names.is_empty() => (dirs.get(levels.saturating_sub(1)), names),
        (true, _) if file.is_none() => return None,
        _ => (None, dirs),
    };
    let names = match (hashed, names) {
        (true, [hash, names @ ..]) if hash.len() == 1 => names,
        _ => names,
    };
    // `user` holds the users' mailboxes and is none itself.
    if names.is_empty() || (names == [b"user"] && file.is_none()) {
        return None;
    }
    let len = domain.map_or(0, |domain| domain.len() + 1) + names.iter().map(|name| name.len() + 1).sum::<usize>() - 1;
    // As long as it will be: the name keeps this allocation.
    let mut name = Vec::with_capacity(len);
    if let Some(domain) = domain {
        name.extend_from_slice(domain);
        name.push(b'!');
    }
    for (at, part) in names.iter().enumerate() {
        if at > 0 {
            name.push(b'.');
        }
        name.extend_from_slice(part);
    }
    Some(MailboxRef::Name(MboxName::from(name)))
}

/// A user id as a file is named after it: `^` stands for `.` in 2.x.
fn user(local: &[u8], domain: Option<&[u8]>) -> UserRef {
    let mut id: Vec<u8> = local.iter().map(|&byte| if byte == b'^' { b'.' } else { byte }).collect();
    if let Some(domain) = domain {
        id.push(b'@');
        id.extend_from_slice(domain);
    }
    UserRef::Name(UserId::from(id))
}

/// Below `configdirectory`: user files and quota roots, each also below `domain/h/D`.
fn conf_file(dirs: &[&[u8]], file: Option<&[u8]>) -> Option<DirtyKey> {
    let (domain, dirs) = match dirs {
        [first, _, domain, rest @ ..] if *first == b"domain" => (Some(*domain), rest),
        _ => (None, dirs),
    };
    let file = file?;
    match dirs {
        [first, rest @ ..] if *first == b"user" && domain.is_none() && uuid(rest).is_some() => {
            let inbox = UserRef::Inbox(UniqueId::new(uuid(rest)?));
            Some(DirtyKey::User(inbox, user_part(file.strip_suffix(b".db").unwrap_or(file))?))
        }
        [first, _] if *first == b"user" => {
            let dot = file.iter().rposition(|&byte| byte == b'.')?;
            let (local, suffix) = file.split_at_checked(dot)?;
            Some(DirtyKey::User(user(local, domain), user_part(suffix.get(1..)?)?))
        }
        [first, ..] if *first == b"quota" => {
            let mut root = Vec::new();
            if let Some(domain) = domain {
                root.extend_from_slice(domain);
                root.push(b'!');
            }
            let whole_domain = domain.is_some() && dirs.len() == 1 && file == b"root";
            if !whole_domain {
                root.extend_from_slice(file);
            }
            Some(DirtyKey::Quota(QuotaRoot::from(root)))
        }
        _ => None,
    }
}

fn user_part(suffix: &[u8]) -> Option<UserPart> {
    match suffix {
        b"seen" => Some(UserPart::Seen),
        b"sub" => Some(UserPart::Subs),
        _ => None,
    }
}

/// Below `sievedir`: `[domain/h/D/]h/U` or `uuid/a/b/ID`; `global` scripts belong to no user.
fn sieve_dir(dirs: &[&[u8]]) -> Option<UserRef> {
    if let Some(id) = uuid(dirs) {
        return Some(UserRef::Inbox(UniqueId::new(id)));
    }
    if is_uuid_fan(dirs) {
        return None;
    }
    match dirs {
        [first, _, domain, hash, name, ..] if *first == b"domain" && hash.len() == 1 => Some(user(name, Some(domain))),
        [hash, name, ..] if hash.len() == 1 => Some(user(name, None)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roots(hashimapspool: bool) -> Roots {
        Roots {
            spool: vec!["/spool".into(), "/fast/spool2".into()],
            meta: vec!["/meta".into()],
            conf: "/conf".into(),
            sieve: Some("/conf/sieve".into()),
            hashimapspool,
            ..Roots::default()
        }
    }

    /// `case`: a word for the event, then a path; a path that ends in `/` is a directory.
    fn check_with(roots: &Roots, case: &str, expected: &str) {
        let (_, path) = case.split_once(' ').expect("an event word and a path");
        let key = roots.derive(Path::new(path.trim_end_matches('/')), path.ends_with('/'));
        assert_eq!(key.map_or_else(|| "-".to_owned(), |key| key.to_string()), expected, "{case}");
    }

    fn check(case: &str, expected: &str) {
        check_with(&roots(false), case, expected);
    }

    fn check_hashed(case: &str, expected: &str) {
        check_with(&roots(true), case, expected);
    }

    #[test]
    fn a_path_means_the_same_however_it_is_written() {
        for path in
            ["/spool/user/jane/12.", "/fast/spool2/a.b/c/cyrus.index", "/conf/mailboxes.db", "/conf/user/j/j.sub"]
        {
            let expected = roots(false).derive(Path::new(path), false);
            assert!(expected.is_some() && is_plain(Path::new(path)), "{path}");
            for odd in
                [format!("/{path}"), path.replacen('/', "/./", 1), format!("{path}/"), path.replacen("/", "//", 3)]
            {
                assert!(!is_plain(Path::new(&odd)), "{odd}");
                assert_eq!(roots(false).derive(Path::new(&odd), false), expected, "{odd}");
            }
        }
        assert_eq!(below(Path::new("/spoolish/x"), Path::new("/spool")), None);
        assert_eq!(below(Path::new("/x/y"), Path::new("/")), Some(&b"x/y"[..]));
        assert_eq!(below(Path::new("/spool"), Path::new("/spool")), Some(&b""[..]));
    }

    #[test]
    fn delivery_dirties_its_mailbox() {
        check_hashed("create /spool/j/user/jane/12.", "mailbox user.jane");
        check("create /spool/user/jane/12.", "mailbox user.jane");
        check("create /spool/user/jane/Sent/12.", "mailbox user.jane.Sent");
        check("create /fast/spool2/user/jane/12.", "mailbox user.jane");
        check("create /spool/uuid/c/y/cyep0qmotfa5j0f7pundy3wj/5.", "mailbox-id cyep0qmotfa5j0f7pundy3wj");
        check_hashed("create /spool/uuid/c/y/cyep0qmotfa5j0f7pundy3wj/5.", "mailbox-id cyep0qmotfa5j0f7pundy3wj");
    }

    #[test]
    fn meta_files_dirty_their_mailbox_wherever_they_live() {
        for file in ["cyrus.index", "cyrus.header", "cyrus.annotations", "cyrus.expunge", "a-file-of-the-future"] {
            check(&format!("modify /meta/user/joe^bloggs/Sub/{file}"), "mailbox user.joe^bloggs.Sub");
            check_hashed(&format!("modify /meta/j/user/joe^bloggs/Sub/{file}"), "mailbox user.joe^bloggs.Sub");
        }
        check("modify /spool/news/cyrus.index", "mailbox news");
        check("moved-to /spool/user/a/cyrus.index", "mailbox user.a");
    }

    #[test]
    fn domains_are_part_of_the_name() {
        check("modify /spool/domain/example.com/user/fred/cyrus.index", "mailbox example.com!user.fred");
        check_hashed("modify /spool/domain/e/example.com/f/user/fred/cyrus.index", "mailbox example.com!user.fred");
        check_hashed("create /spool/domain/e/example.com/f/", "-");
        check_hashed("create /spool/domain/e/example.com/", "-");
        check_hashed("create /spool/domain/e/", "-");
        check("modify /spool/domain/cyrus.index", "mailbox domain");
        check_hashed("modify /spool/d/domain/cyrus.index", "mailbox domain");
    }

    #[test]
    fn deleted_mailboxes_are_mailboxes() {
        check_hashed("create /spool/u/DELETED/user/fred/5F0C1A2B/cyrus.index", "mailbox DELETED.user.fred.5F0C1A2B");
        check("delete /spool/DELETED/user/fred/5F0C1A2B/", "mailbox DELETED.user.fred.5F0C1A2B");
    }

    #[test]
    fn directories_are_mailboxes_too() {
        check("create /spool/user/jane/", "mailbox user.jane");
        check("delete /spool/user/jane/Sent/", "mailbox user.jane.Sent");
        check("delete /spool/uuid/0/d/0dpd1uduofgfr384vn87twug/", "mailbox-id 0dpd1uduofgfr384vn87twug");
        for dir in ["uuid", "uuid/0", "uuid/0/d", "user", "stage.", "sync.", "sync./123"] {
            check(&format!("create /spool/{dir}/"), "-");
        }
        check("delete /spool/", "-");
    }

    #[test]
    fn a_uuid_path_that_does_not_fit_is_a_name() {
        check("create /spool/uuid/x/y/cyep0q/5.", "mailbox uuid.x.y.cyep0q");
        check("create /spool/uuid/5.", "mailbox uuid");
    }

    #[test]
    fn user_files_dirty_their_user() {
        check("moved-to /conf/user/j/jane.sub", "subs jane");
        check("modify /conf/user/j/jane.seen", "seen jane");
        check("modify /conf/user/j/joe^bloggs.seen", "seen joe.bloggs");
        check("modify /conf/user/B/joe.bloggs.seen", "seen joe.bloggs");
        check("modify /conf/user/a/a@b.seen", "seen a@b");
        check("modify /conf/domain/d/dom.test/user/u/u3.sub", "subs u3@dom.test");
        check("modify /conf/domain/d/dom.test/user/j/joe^b.seen", "seen joe.b@dom.test");
        check("modify /conf/user/uuid/f/v/fvqulwulrhrl54z8hj9eo7qg/seen.db", "seen-id fvqulwulrhrl54z8hj9eo7qg");
        check("moved-to /conf/user/uuid/c/y/cyep0q/sub.db", "subs-id cyep0q");
    }

    #[test]
    fn quota_roots_have_domains_too() {
        check("moved-to /conf/quota/u/user.u1", "quota user.u1");
        check("moved-to /conf/quota/j/user.joe^bloggs", "quota user.joe^bloggs");
        check("moved-to /conf/domain/d/dom.test/quota/u/user.u3", "quota dom.test!user.u3");
        check("moved-to /conf/domain/d/dom.test/quota/root", "quota dom.test!");
        check("modify /conf/quotas.db", "quotas");
    }

    #[test]
    fn sieve_directories_dirty_their_user() {
        check("moved-to /conf/sieve/u/u1/main.script", "sieve u1");
        check("moved-to /conf/sieve/j/joe^b/defaultbc", "sieve joe.b");
        check("moved-to /conf/sieve/J/joe.b/defaultbc", "sieve joe.b");
        check("delete /conf/sieve/u/u1/", "sieve u1");
        check("moved-to /conf/sieve/domain/d/dom.test/u/u3/x.bc", "sieve u3@dom.test");
        check("moved-to /conf/sieve/uuid/c/y/cyep0q/defaultbc", "sieve-id cyep0q");
        for noise in ["u/u1/main.script.NEW", "global/x.script", "domain/d/dom.test/global/x.script", "uuid/c/"] {
            check(&format!("create /conf/sieve/{noise}"), "-");
        }
    }

    #[test]
    fn databases_are_found_where_they_are_configured() {
        check("modify /conf/mailboxes.db", "mailbox-list");
        check("moved-to /conf/annotations.db", "annotations");
        let roots = Roots {
            mailboxes_db: Some("/db/mb.db".into()),
            annotations_db: Some("/db/an.db".into()),
            quotas_db: Some("/db/q.db".into()),
            ..roots(false)
        };
        check_with(&roots, "modify /db/mb.db", "mailbox-list");
        check_with(&roots, "modify /db/an.db", "annotations");
        check_with(&roots, "modify /db/q.db", "quotas");
        check_with(&roots, "modify /conf/mailboxes.db", "-");
        assert!(roots.watched().contains(&("/db".into(), Reach::Flat)));
    }

    #[test]
    fn noise_gives_nothing() {
        for path in [
            "/spool/stage./30656-1795493167-1",
            "/spool/sync./30638/f2abb29d6a724c5ccf4651e588712309ab9e04c6",
            "/spool/user/a/cyrus.cache",
            "/spool/user/a/cyrus.squat",
            "/spool/user/a/cyrus.index.NEW",
            "/spool/user/a/cyrus.header.NEW",
            "/spool/cyrus.header",
            "/conf/mailboxes.db.NEW",
            "/conf/proc/4711",
            "/conf/lock/user/j/jane.lock",
            "/conf/socket/lmtp",
            "/conf/sync/log",
            "/conf/log/jane/12",
            "/conf/msg/motd",
            "/conf/ptclient/ptscache.db",
            "/conf/deliver.db",
            "/conf/statuscache.db",
            "/conf/tls_sessions.db",
            "/conf/user_deny.db",
            "/conf/db/skipstamp",
            "/conf/db.backup1/mailboxes.db",
            "/conf/user/j/jane.sub.NEW",
            "/conf/user/j/jane.mboxkey",
            "/conf/user/j/jane.counters",
            "/conf/user/j/jane.conversations",
            "/conf/user/j/jane.dav",
            "/conf/user/j/jane.xapianactive",
            "/conf/user/uuid/c/y/cyep0q/conversations.db",
            "/conf/user/uuid/c/y/cyep0q/dav.db-journal",
            "/conf/quota/u/user.u1.NEW",
            "/elsewhere/cyrus.index",
        ] {
            check(&format!("modify {path}"), "-");
        }
    }

    #[test]
    fn a_lock_names_its_mailbox() {
        let check = |hashed: bool, path: &str, expected: &str| {
            let keys = roots(hashed).derive_lock(Path::new(path));
            let keys: Vec<String> = keys.iter().map(DirtyKey::to_string).collect();
            assert_eq!(keys.join(", "), expected, "{path}");
        };
        // As 3.6.1 makes them, and 3.12 by its sources.
        let id = "cyep0qmotfa5j0f7pundy3wj";
        let both = format!("accessed-id {id}, accessed {id}");
        check(false, &format!("{id}.lock"), &both);
        check(true, &format!("c/{id}.lock"), &both);
        check(false, "user/u1/Foo.lock", "accessed user.u1.Foo");
        check(true, "j/user/joe^bloggs/Sub.lock", "accessed user.joe^bloggs.Sub");
        check(false, "domain/example.com/user/u1.lock", "accessed example.com!user.u1");
        check(false, "DELETED/user/u1/Foo/64AB12CD.lock", "accessed DELETED.user.u1.Foo.64AB12CD");
        check(false, "board.lock", "accessed-id board, accessed board");
        for noise in ["*U*u1.lock", "f/*U*user/fred.lock", "user/u1", "", "user/u1/Foo.lock.tmp"] {
            check(noise.starts_with("f/"), noise, "");
        }
    }

    #[test]
    fn each_directory_is_watched_once() {
        let watched = roots(false).watched();
        let flat: Vec<_> = watched.iter().filter(|(_, reach)| *reach == Reach::Flat).collect();
        assert_eq!(flat, [&(PathBuf::from("/conf"), Reach::Flat)]);
        let inside = Roots { meta: vec!["/spool/meta".into()], ..roots(false) };
        assert!(!inside.watched().iter().any(|(path, _)| path == Path::new("/spool/meta")));
        assert_eq!(
            inside.derive(Path::new("/spool/meta/user/a/cyrus.index"), false).map(|key| key.to_string()),
            Some("mailbox user.a".into())
        );
    }
}
