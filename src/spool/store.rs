//! The live spool as a `MailStore`.

use super::changed;
use super::history::{History, LAST_WITHOUT};
use super::layout::Layout;
use super::list::Names;
use super::mailbox::{self, SpoolBodies};
use super::quota_roots::QuotaRoots;
use super::read::{self, Followed};
use super::{format_error, users};
use crate::cyrus::annotations::{self, Userids};
use crate::cyrus::imapd_conf::ImapdConf;
use crate::cyrus::mboxlist::{self, Row, Standing};
use crate::cyrus::user_deny;
use crate::model::{
    Annotation, BodySource, ChangedAnnotations, DirtyKey, Disposition, Fingerprint, LeftOut, Listing, MailStore,
    MailboxEntry, MailboxRef, MailboxSnapshot, MboxName, Memory, QuotaLimits, QuotaRoot, StoreError, UniqueId, UserId,
    UserMeta, UserPart, UserRef,
};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tracing::warn;

/// A Cyrus store on this machine's disks.
pub struct LiveSpool {
    conf: ImapdConf,
    layout: Layout,
    /// Inode of configdirectory when it was opened.
    home: Option<u64>,
    list: Mutex<List>,
    annotations: Mutex<Annotations>,
    history: History,
    quota_roots: QuotaRoots,
}

#[derive(Default)]
struct List {
    db: Followed,
    names: Names,
    /// By key: rows that could not be understood.
    unreadable: BTreeMap<Vec<u8>, LeftOut>,
    /// Mailboxes with the uniqueid of another one that were told.
    clashes: Vec<LeftOut>,
    /// What was given out last.
    listing: Option<Arc<Listing>>,
    /// There are rows of mailboxes that other servers have.
    elsewhere: bool,
    /// Rows are stored as of 3.6 (`N` and `I` keys).
    modern: bool,
    /// Mailboxes whose cyrus.header has another uniqueid; told once.
    doubted: BTreeSet<UniqueId>,
}

#[derive(Default)]
struct Annotations {
    db: Followed,
    /// Scopes that nobody has been told of.
    changed: BTreeSet<Vec<u8>>,
}

/// Options that say where files are: all services have to agree on them.
const SHAPE: [&str; 6] =
    ["configdirectory", "hashimapspool", "fulldirhash", "mboxlist_db_path", "annotation_db_path", "sievedir"];

/// Reads an imapd.conf with all that it includes.
pub fn read_conf(conf_path: &Path) -> Result<ImapdConf, StoreError> {
    let fault = |text: String| StoreError::new(Disposition::Stop, text);
    // Old files have comments in any character set.
    let read = |path: &Path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text =
        read(conf_path).map_err(|error| fault(format!("{}: {error}; name the file with -C", conf_path.display())))?;
    ImapdConf::parse(&text, &mut |path| read(Path::new(path)).map_err(|error| error.to_string()))
        .map_err(|error| fault(format!("{}: {error}", conf_path.display())))
}

/// Opens the store that an imapd.conf describes.
pub fn open_store(conf_path: &Path) -> Result<LiveSpool, StoreError> {
    let fault = |text: String| StoreError::new(Disposition::Stop, text);
    let conf = read_conf(conf_path)?;
    if let Some(server) = conf.get("mupdate_server")
        && conf.get("mupdate_config").is_none_or(|kind| kind == "standard")
        && conf.named("partition").next().is_none()
    {
        return Err(fault(format!(
            "{}: this is a front end of a Murder (mupdate_server {server}): it has no mail of its own; run spooltap on the back ends",
            conf_path.display()
        )));
    }
    let layout = Layout::new(&conf).map_err(|error| fault(format!("{}: {error}", conf_path.display())))?;
    for key in
        SHAPE.into_iter().map(str::to_owned).chain(conf.named("partition").map(|(p, _)| format!("partition-{p}")))
    {
        for (service, value) in conf.overrides(&key).filter(|(_, value)| Some(*value) != conf.get(&key)) {
            warn!(service, key, value, "imapd.conf sets this for one service only; it is not followed");
        }
    }
    for kind in ["mboxlist_db", "annotation_db", "seenstate_db", "subscription_db"] {
        if let Some(db) = conf.get(kind).filter(|db| db.starts_with("berkeley") || *db == "sql") {
            return Err(fault(format!(
                "{}: {kind} is {db}, which cannot be read beside a running server; convert it with cvt_cyrusdb",
                conf_path.display()
            )));
        }
    }
    let home = inode(&layout.configdirectory).ok();
    Ok(LiveSpool {
        conf,
        layout,
        home,
        list: Mutex::default(),
        annotations: Mutex::default(),
        history: History::default(),
        quota_roots: QuotaRoots::default(),
    })
}

fn inode(path: &Path) -> Result<u64, StoreError> {
    std::fs::metadata(path).map(|meta| meta.ino()).map_err(|error| super::io_error(path, &error))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LiveSpool {
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn conf(&self) -> &ImapdConf {
        &self.conf
    }

    /// The store is still the one that was opened.
    fn is_at_home(&self) -> Result<(), StoreError> {
        let path = &self.layout.configdirectory;
        let here = inode(path)?;
        if self.home.is_some_and(|home| home != here) {
            let text = format!(
                "{}: another directory than the one that was opened (inode {here}); nothing is concluded from it. If it is \
                 to be the source from now on, restart spooltap",
                path.display()
            );
            return Err(StoreError::new(Disposition::RetrySoon, text));
        }
        Ok(())
    }

    fn updated_list(&self) -> Result<MutexGuard<'_, List>, StoreError> {
        self.is_at_home()?;
        let mut list = lock(&self.list);
        let path = &self.layout.mailboxes_db;
        let changes = list.db.update(path).map_err(|error| {
            // Without the list nothing can be concluded: least of all that everything was deleted.
            let cure = "; without mailboxes.db nothing is replicated";
            let disposition = match error.disposition {
                Disposition::Quarantine => Disposition::Stop,
                other => other,
            };
            StoreError::new(disposition, format!("{}{cure}", error.message))
        })?;
        if list.db.map().is_empty() {
            return Err(StoreError::new(
                Disposition::RetrySoon,
                format!("{}: holds no mailbox at all; is this the right store, is it mounted?", path.display()),
            ));
        }
        if changes.is_empty() && list.listing.is_some() {
            return Ok(list);
        }
        // Rows that went come first: a list converted by 3.6 has every name under another key.
        let (gone, there): (Vec<_>, Vec<_>) = changes.iter().partition(|change| change.new.is_none());
        for change in gone.into_iter().chain(there) {
            self.apply(&mut list, &change.key, change.new.as_deref());
        }
        if list.names.is_empty() {
            list.listing = None;
            if list.elsewhere {
                return Err(StoreError::new(
                    Disposition::Stop,
                    format!(
                        "{}: all mailboxes in it are on other servers: this is a front end of a Murder, or its mupdate \
                         master; run spooltap on the back ends, where the mail is",
                        path.display()
                    ),
                ));
            }
            return Err(StoreError::new(
                Disposition::RetrySoon,
                format!("{}: no row of it is about a mailbox; is this the right file?", path.display()),
            ));
        }
        let clashes = list.names.clashes();
        for clash in clashes.iter().filter(|clash| !list.clashes.contains(clash)) {
            warn!(mailbox = %clash.name, reason = clash.reason, "mailbox is left out");
        }
        if !list.unreadable.is_empty() || !clashes.is_empty() || !list.names.listing.unreadable.is_empty() {
            list.names.listing.unreadable = list.unreadable.values().chain(&clashes).cloned().collect();
        }
        list.clashes = clashes;
        list.listing = Some(Arc::new(list.names.listing.clone()));
        Ok(list)
    }

    /// One changed row.
    fn apply(&self, list: &mut List, key: &[u8], value: Option<&[u8]>) {
        list.unreadable.remove(key);
        let modern_key = key.first() == Some(&b'N') && value.is_some_and(|value| value.starts_with(b"%(T "));
        list.modern |= modern_key;
        let Some(value) = value else {
            // The row is gone; which name it had depends on the kind of list.
            let name = match key.strip_prefix(b"N") {
                Some(dbname) if list.modern => mboxlist::name_of_dbname(dbname),
                _ => MboxName::new(key),
            };
            list.names.forget(&name);
            return;
        };
        let listed = match mboxlist::row_for(key, value) {
            Ok(Some(Row::Name(listed))) => listed,
            Ok(_) => return,
            Err(error) => {
                // What was known of the mailbox stays.
                warn!(mailbox = %String::from_utf8_lossy(key), %error, "row of mailboxes.db cannot be read");
                let name = if key.starts_with(b"N") && list.modern {
                    mboxlist::name_of_dbname(key.get(1..).unwrap_or_default())
                } else {
                    MboxName::new(key)
                };
                let reason = format!("its row in mailboxes.db cannot be read: {error}; run reconstruct on it");
                list.unreadable.insert(key.to_vec(), LeftOut { name, reason });
                return;
            }
        };
        let standing = listed.standing(self.layout.servername.as_deref());
        let mut entry = listed.mailbox;
        let name = entry.name.clone();
        list.names.forget(&name);
        match standing {
            Standing::Present | Standing::Placeholder => {
                // What 3.12 leaves of a deleted mailbox with others below it: no identity, no files, nothing to replicate.
                if standing == Standing::Placeholder && entry.uniqueid.is_empty() {
                    return;
                }
                if entry.uniqueid.is_empty() {
                    match mailbox::uniqueid_of(&self.layout, &entry) {
                        Ok(id) => entry.uniqueid = id,
                        Err(error) => {
                            warn!(mailbox = %name, %error, "mailbox is left out");
                            list.unreadable.insert(key.to_vec(), LeftOut { name, reason: error.to_string() });
                            return;
                        }
                    }
                }
                if standing == Standing::Placeholder && !entry.mbtype.is_intermediate() {
                    return;
                }
                list.names.set(Arc::new(entry));
            }
            Standing::Tombstone if !entry.uniqueid.is_empty() => {
                list.names.bury(name, entry.uniqueid);
            }
            Standing::Elsewhere => list.elsewhere = true,
            Standing::Tombstone => {}
        }
    }

    fn entry(&self, name: &MboxName) -> Result<Option<Arc<MailboxEntry>>, StoreError> {
        Ok(self.updated_list()?.names.get(name).cloned())
    }

    /// cyrus.header goes on to name another uniqueid than this entry. From 2.5 on the list is the authority, when it has
    /// this very row still; before, its rows have no uniqueid, and the header is.
    fn list_is_right(&self, entry: &MailboxEntry, found: &str) -> Result<bool, StoreError> {
        let mut list = self.updated_list()?;
        let Some(row) = list.names.get(&entry.name).cloned() else { return Ok(false) };
        if row.uidvalidity == 0 {
            let uniqueid = mailbox::uniqueid_of(&self.layout, &row)?;
            list.names.set(Arc::new(MailboxEntry { uniqueid, ..(*row).clone() }));
            list.listing = None;
            return Ok(false);
        }
        if row.uniqueid != entry.uniqueid || row.partition != entry.partition {
            return Ok(false);
        }
        if list.doubted.insert(entry.uniqueid.clone()) {
            warn!(mailbox = %entry.name, "{found}; the list is taken to be right; run reconstruct");
        }
        Ok(true)
    }

    /// The scopes under which the global annotation database may keep a mailbox's annotations.
    fn annotation_scope<'a>(&self, entry: &'a MailboxEntry, modern: bool) -> &'a [u8] {
        if modern { entry.uniqueid.as_bytes() } else { entry.name.as_bytes() }
    }

    fn userids<'a>(&self, owner: Option<&'a UserId>) -> Userids<'a> {
        Userids { owner, carets: self.layout.carets }
    }

    fn updated_annotations(&self) -> Result<MutexGuard<'_, Annotations>, StoreError> {
        let mut annotations = lock(&self.annotations);
        let path = &self.layout.annotations_db;
        match annotations.db.update(path) {
            Ok(changes) => {
                let scopes = changes.iter().filter_map(|change| annotations::parse_key(&change.key));
                annotations.changed.extend(scopes.map(|(scope, _, _)| scope.to_vec()));
                Ok(annotations)
            }
            // A store that never had an annotation has no file; one that had some does not lose it.
            Err(_) if !path.exists() && annotations.db.map().is_empty() => Ok(annotations),
            Err(error) => Err(error),
        }
    }

    /// One mailbox as its files have it.
    fn read(&self, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
        let list_is_right = |found: &str| self.list_is_right(entry, found);
        let (modern, doubted) = {
            let list = lock(&self.list);
            (list.modern, list.doubted.contains(&entry.uniqueid))
        };
        let snapshot = mailbox::read_mailbox(&self.layout, entry, doubted, &list_is_right)?;
        let Some(mut snapshot) = snapshot else { return Ok(None) };
        let annotations = self.updated_annotations()?;
        snapshot.annotations = annotations::of_scope(
            annotations.db.map(),
            self.annotation_scope(entry, modern),
            self.userids(self.layout.owner(&entry.name).as_ref()),
        )
        .map_err(|error| format_error(&self.layout.annotations_db, &error))?;
        Ok(Some(snapshot))
    }

    fn user_mark(&self, user: &UserId, inbox: Option<&MailboxEntry>) -> Result<Fingerprint, StoreError> {
        let flags = match self.history.is_empty() {
            true => Vec::new(),
            false => self.history.flag_mark(&self.layout, user, &self.own_mailboxes(user)?)?,
        };
        Ok(users::fingerprint(&users::places(&self.layout, user, inbox), &flags))
    }

    /// A user's mailboxes, deleted ones included.
    fn own_mailboxes(&self, user: &UserId) -> Result<Vec<UniqueId>, StoreError> {
        let list = self.updated_list()?;
        let inbox = user.inbox();
        let deleted = inbox.with_deleted(&self.layout.deletedprefix);
        let all = list.names.below(&inbox).chain(list.names.below(&deleted));
        Ok(all.map(|entry| entry.uniqueid.clone()).collect())
    }

    /// When the files of a key that names its object were changed last; `None` where there are none.
    pub fn changed_at(&self, key: &DirtyKey) -> Option<SystemTime> {
        changed::changed_at(&self.layout, key, &|name| self.entry(name).ok().flatten().map(|entry| (*entry).clone()))
    }

    /// Bytes of messages that were read because the index does not say their GUIDs (before 2.4).
    pub fn hashed_bytes(&self) -> u64 {
        self.history.hashed_bytes()
    }

    /// The list is one of 3.6 or later.
    pub fn is_modern(&self) -> bool {
        // Asked before the list was read once? Then it is read now.
        self.updated_list().map_or_else(|_| lock(&self.list).modern, |list| list.modern)
    }
}

impl MailStore for LiveSpool {
    fn identity(&self) -> Result<String, StoreError> {
        let path = &self.layout.configdirectory;
        Ok(format!("spool {} inode {}", path.display(), inode(path)?))
    }

    fn listing(&self) -> Result<Arc<Listing>, StoreError> {
        let listing = self.updated_list()?.listing.clone().unwrap_or_default();
        if listing.unreadable.is_empty() {
            self.history.forget_others(&listing);
        }
        Ok(listing)
    }

    fn mailbox(&self, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
        if !self.history.has(&entry.uniqueid) {
            match self.read(entry)? {
                Some(snapshot) if snapshot.minor_version <= LAST_WITHOUT => {}
                other => return Ok(other),
            }
        }
        self.history.complete(&self.layout, entry, &mut || self.read(entry))
    }

    fn fingerprint(&self, entry: &MailboxEntry) -> Result<Option<Fingerprint>, StoreError> {
        mailbox::fingerprint(&self.layout, entry, &self.history)
    }

    fn user_fingerprint(&self, user: &UserId) -> Result<Fingerprint, StoreError> {
        let inbox = self.entry(&user.inbox())?;
        self.user_mark(user, inbox.as_deref())
    }

    fn user_fingerprints(&self, users: &[UserId]) -> Vec<Option<Fingerprint>> {
        // The list is looked at once for all of them.
        let Ok(list) = self.updated_list() else { return vec![None; users.len()] };
        let inboxes: Vec<_> = users.iter().map(|user| list.names.get(&user.inbox()).cloned()).collect();
        drop(list);
        users.iter().zip(inboxes).map(|(user, inbox)| self.user_mark(user, inbox.as_deref()).ok()).collect()
    }

    fn bodies(&self, entry: &MailboxEntry) -> Result<Box<dyn BodySource>, StoreError> {
        Ok(Box::new(SpoolBodies::new(&self.layout, entry)))
    }

    fn users(&self) -> Result<Vec<UserId>, StoreError> {
        Ok(users::owners(self.updated_list()?.names.all().map(|entry| &entry.name)))
    }

    fn user_meta(&self, user: &UserId) -> Result<UserMeta, StoreError> {
        let inbox = self.entry(&user.inbox())?;
        let mut meta = users::user_meta(&users::places(&self.layout, user, inbox.as_deref()), user)?;
        // What became the flag of a message is not said twice.
        for id in self.own_mailboxes(user)? {
            if self.history.is_flag(&id) {
                meta.seen.remove(&id);
            }
        }
        Ok(meta)
    }

    fn quotas(&self) -> Result<BTreeMap<QuotaRoot, QuotaLimits>, StoreError> {
        users::quotas(&self.layout)
    }

    fn quota_roots(&self) -> Result<Arc<[QuotaRoot]>, StoreError> {
        self.quota_roots.all(&self.layout)
    }

    fn quota(&self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, StoreError> {
        users::quota_of(&self.layout, root)
    }

    fn follows_seen(&self, user: &UserId) -> Result<Vec<UniqueId>, StoreError> {
        let listing = self.listing()?;
        self.history.follows_seen(&self.layout, user, &listing)
    }

    fn remember_in(&self, memory: Arc<dyn Memory>) {
        self.history.remember_in(memory);
    }

    fn is_settled(&self, key: &DirtyKey) -> bool {
        let layout = &self.layout;
        match key {
            DirtyKey::MailboxList => read::is_settled(slice::from_ref(&layout.mailboxes_db)),
            // One command may change the annotations of several mailboxes: the first is told of when the second's turn comes.
            DirtyKey::Annotations | DirtyKey::Mailbox(_) => read::is_settled(slice::from_ref(&layout.annotations_db)),
            DirtyKey::User(_, UserPart::Sieve) => true,
            DirtyKey::User(user, part) => {
                let places = match user {
                    UserRef::Inbox(id) => users::places_of(layout, id),
                    UserRef::Name(user) => {
                        let inbox = self.entry(&user.inbox()).ok().flatten();
                        users::places(layout, user, inbox.as_deref())
                    }
                };
                read::is_settled(if *part == UserPart::Subs { &places.subs } else { &places.seen })
            }
            DirtyKey::Quota(_) | DirtyKey::AllQuotas => {
                layout.quotas_db.as_slice().iter().all(|db| read::is_settled(slice::from_ref(db)))
            }
            DirtyKey::Accessed(_) | DirtyKey::Rescan(_) => true,
        }
    }

    fn server_annotations(&self) -> Result<Vec<Annotation>, StoreError> {
        let annotations = self.updated_annotations()?;
        annotations::of_scope(annotations.db.map(), b"", self.userids(None))
            .map_err(|error| format_error(&self.layout.annotations_db, &error))
    }

    fn annotated_mailboxes(&self) -> Result<BTreeMap<UniqueId, Vec<Annotation>>, StoreError> {
        let (modern, entries) = {
            let list = self.updated_list()?;
            (list.modern, list.listing.clone().unwrap_or_default())
        };
        let annotations = self.updated_annotations()?;
        let mut out = BTreeMap::new();
        for scope in annotations::scopes(annotations.db.map()).filter(|scope| !scope.is_empty()) {
            let entry =
                if modern { entries.by_id(&UniqueId::new(scope)) } else { entries.by_name(&MboxName::new(scope)) };
            let Some(entry) = entry else { continue };
            let list = annotations::of_scope(
                annotations.db.map(),
                scope,
                self.userids(self.layout.owner(&entry.name).as_ref()),
            )
            .map_err(|error| format_error(&self.layout.annotations_db, &error))?;
            if !list.is_empty() {
                out.insert(entry.uniqueid.clone(), list);
            }
        }
        Ok(out)
    }

    fn changed_annotations(&self) -> Result<ChangedAnnotations, StoreError> {
        // Which key a scope is follows from the list, and so it is read first.
        let modern = self.updated_list()?.modern;
        let mut changed = std::mem::take(&mut self.updated_annotations()?.changed);
        let server = changed.remove(&b""[..]);
        let mailbox = |scope: Vec<u8>| match modern {
            true => MailboxRef::Id(scope.into()),
            false => MailboxRef::Name(scope.into()),
        };
        Ok(ChangedAnnotations { mailboxes: changed.into_iter().map(mailbox).collect(), server })
    }

    fn not_carried(&self) -> Result<Vec<(String, String)>, StoreError> {
        let path = &self.layout.user_deny_db;
        let mut out = Vec::new();
        for (user, value) in &read::read_db(slice::from_ref(path))? {
            let denied = match user_deny::parse_value(value) {
                Ok(denied) => denied.services,
                Err(error) => error.to_string(),
            };
            let what =
                format!("{} denies {denied}; csync has no word for it: copy the file to the replica", path.display());
            out.push((format!("user {}", String::from_utf8_lossy(user)), what));
        }
        if self.layout.sieve_in_homes {
            let what =
                "are in home directories (sieveusehomedir), out of reach: bring them over with timsieved's protocol";
            out.push(("all users' sieve scripts".to_owned(), what.to_owned()));
        }
        Ok(out)
    }

    fn sieve_in_mailboxes(&self) -> bool {
        self.is_modern()
    }

    fn deleted_prefix(&self) -> &[u8] {
        &self.layout.deletedprefix
    }
}
