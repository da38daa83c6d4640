//! Requests of one client that is logged in, turned into views and steps of a replica. Answers are written as they are
//! made; what is refused is a word that a real `sync_client` understands.

use super::names;
use super::stage::Stage;
use crate::csync::reply;
use crate::csync::request::{Era, Request, Update};
use crate::model::{
    AccountView, Annotation, BodyRef, FENCE, FlagName, MailboxUpdate, MailboxView, MboxName, MboxType, MessageGuid,
    Partition, Promotion, Record, Replica, ReplicaError, SieveName, Since, Step, SyncCrcs, UniqueId, UserId,
};
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// Why a request was not done.
#[derive(Debug)]
pub(super) enum Refused {
    /// `NO` with this text; a word, a space and more, as the clients compare it.
    No(String),
    /// The connection or the replica is of no use any more.
    Gone(String),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Gone(error.to_string())
    }
}

impl From<ReplicaError> for Refused {
    fn from(error: ReplicaError) -> Self {
        let no = |text: &str| Self::No(text.to_owned());
        match error {
            ReplicaError::NoSuchMailbox(_) => no(NONEXISTENT),
            ReplicaError::Moved(_) => no(MOVED),
            ReplicaError::Locked(_) => no("IMAP_MAILBOX_LOCKED Mailbox locked"),
            ReplicaError::Changed(_) => no(CHECKSUM),
            ReplicaError::Refused(_) => no(NOT_SUPPORTED),
            ReplicaError::Body { .. } | ReplicaError::Lost { .. } => no("IMAP_IOERROR System I/O error"),
            ReplicaError::Fatal(text) | ReplicaError::Denied(_, text) => Self::Gone(text),
        }
    }
}

const NONEXISTENT: &str = "IMAP_MAILBOX_NONEXISTENT No Such Mailbox";
const MOVED: &str = "IMAP_MAILBOX_MOVED Mailbox exists with another name or uniqueid";
const CHECKSUM: &str = "IMAP_SYNC_CHECKSUM Checksum Failure";
const CHANGED: &str = "IMAP_SYNC_CHANGED Changed since last sync";
const NOT_SUPPORTED: &str = "IMAP_MAILBOX_NOTSUPPORTED Operation is not supported on mailbox";

/// Mailboxes that are read before any of them is answered.
const TOGETHER: usize = 256;
/// What a name in a set takes beside its bytes.
const NAME_BYTES: usize = 64;

const PROMOTED: &str = "IMAP_PERMISSION_DENIED Permission denied, this replica was promoted";

/// A promotion by somebody else is seen after so long.
const FENCE_HOLDS: Duration = Duration::from_secs(1);

/// Mailboxes of Sieve scripts travel only where both sides said so.
const SIEVE_MAILBOX: &str = "SIEVE-MAILBOX";

type Done = Result<(), Refused>;

pub(super) struct Session {
    replica: Box<dyn Replica>,
    pub stage: Stage,
    /// The replica can have them at all.
    takes_sieve_mailboxes: bool,
    sieve_mailboxes: bool,
    /// Where the bodies are that a client was told not to send.
    reserved: BTreeSet<MboxName>,
    /// What they take.
    reserved_bytes: usize,
    /// When it was last looked whether the replica was promoted, and whether it was.
    fence: Option<(Instant, bool)>,
    /// The oldest form in which this client has sent a mailbox.
    era: Era,
}

impl Session {
    pub fn new(mut replica: Box<dyn Replica>, takes_sieve_mailboxes: bool, stage: Stage) -> Self {
        replica.be_quick();
        let reserved = BTreeSet::new();
        Self {
            replica,
            stage,
            takes_sieve_mailboxes,
            sieve_mailboxes: false,
            reserved,
            reserved_bytes: 0,
            fence: None,
            era: Era::Three2,
        }
    }

    /// Bytes in memory that stay from request to request.
    pub fn held(&self) -> usize {
        self.stage.held().saturating_add(self.reserved_bytes)
    }

    /// Forgets what is staged.
    pub fn restart(&mut self) -> Done {
        self.reserved.clear();
        self.reserved_bytes = 0;
        self.stage.clear();
        Ok(self.replica.restart()?)
    }

    pub fn close(self) {
        self.replica.close();
    }

    /// Does one request; untagged answers go to `out`.
    pub fn request(&mut self, request: Request, out: &mut dyn Write) -> Done {
        check_names(&request)?;
        match request {
            Request::GetUser(user) => self.get_user(&user, true, out),
            Request::GetMeta(user) => self.get_user(&user, false, out),
            Request::GetMailboxes(names) => {
                // A name that is said a million times is answered once, and not all answers stand in memory together.
                let names: Vec<MboxName> = names.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
                for names in names.chunks(TOGETHER) {
                    let views = self.replica.view_mailboxes(names)?;
                    self.mailboxes(&views, out)?;
                }
                Ok(())
            }
            Request::GetUniqueIds(ids) => {
                for id in ids.into_iter().collect::<BTreeSet<_>>() {
                    let view = self.replica.view_uniqueid(&id)?;
                    self.mailboxes(view.as_slice(), out)?;
                }
                Ok(())
            }
            Request::GetFullMailbox(name) => {
                let view = self.replica.view_full(&name)?.ok_or_else(nonexistent)?;
                self.mailboxes(&[view], out)
            }
            Request::GetQuota(root) => {
                if let Some(limits) = self.replica.view_quota(&root)? {
                    out.write_all(&reply::quota(&root, &limits))?;
                }
                Ok(())
            }
            Request::GetAnnotation(name) => {
                let annotations = match name.is_empty() {
                    true => self.replica.view_server_annotations()?,
                    false => self.view(&name)?.annotations,
                };
                for annotation in annotations {
                    out.write_all(&reply::annotation(&name, &annotation))?;
                }
                Ok(())
            }
            Request::Fetch { name, guid } => self.fetch(&name, &guid, out),
            Request::FetchSieve { user, file } => {
                let script = script_name(&file)?;
                let text = self.replica.script(&user, &script)?.ok_or_else(nonexistent)?;
                Ok(out.write_all(&reply::sieve_text(user.as_bytes(), &file, &text))?)
            }
            Request::Message => match self.stage.take_fault() {
                Some(fault) => {
                    warn!(fault, "a message cannot be staged");
                    Err(Refused::No("IMAP_IOERROR System I/O error".into()))
                }
                None => Ok(()),
            },
            Request::Reserve { names, guids } => {
                let names: Vec<MboxName> = names.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
                let asked: Vec<MessageGuid> = guids.iter().copied().filter(|guid| !self.stage.has(guid)).collect();
                let found = self.replica.reserve(&asked, &names)?;
                if !found.is_empty() {
                    for name in names {
                        let bytes = name.as_bytes().len().saturating_add(NAME_BYTES);
                        self.reserved_bytes += if self.reserved.insert(name) { bytes } else { 0 };
                    }
                }
                let missing: Vec<&MessageGuid> = asked.iter().filter(|guid| !found.contains(*guid)).collect();
                if !missing.is_empty() {
                    out.write_all(&reply::missing(missing.into_iter()))?;
                }
                Ok(())
            }
            Request::Capabilities(names) => {
                let sieve = self.takes_sieve_mailboxes
                    && names.iter().any(|name| name.eq_ignore_ascii_case(SIEVE_MAILBOX.as_bytes()));
                self.sieve_mailboxes |= sieve;
                let enabled = if sieve { &[SIEVE_MAILBOX][..] } else { &[] };
                Ok(out.write_all(&reply::enabled(enabled))?)
            }
            // A replica of ours never lowers what it has: nothing is forced, and the update that needs it says so.
            Request::Force => Ok(()),
            change => self.change(change),
        }
    }

    /// Somebody else may have promoted it meanwhile.
    fn is_promoted(&mut self) -> Result<bool, Refused> {
        if let Some((at, promoted)) = self.fence
            && at.elapsed() < FENCE_HOLDS
        {
            return Ok(promoted);
        }
        let promoted = Promotion::among(&self.replica.view_server_annotations()?).is_some();
        self.fence = Some((Instant::now(), promoted));
        Ok(promoted)
    }

    fn change(&mut self, request: Request) -> Done {
        match &request {
            // How a fence is raised and taken down.
            Request::Annotation { name, annotation: Annotation { entry, .. } }
            | Request::Unannotation { name, entry, .. }
                if name.is_empty() && entry == FENCE =>
            {
                self.fence = None;
            }
            _ if self.is_promoted()? => return Err(Refused::No(PROMOTED.into())),
            _ => {}
        }
        let step = match request {
            Request::Mailbox(update) => return self.mailbox(*update),
            Request::Expunge { name, uniqueid, uids } => Step::Expunge { uniqueid, name, uids },
            Request::Rename { from, to, partition, uidvalidity } => {
                let head = self.view(&from)?.head;
                let uidvalidity = uidvalidity.unwrap_or(head.uidvalidity);
                Step::Rename { uniqueid: head.uniqueid, from, to, partition, uidvalidity }
            }
            Request::Unmailbox(name) => Step::Remove { uniqueid: self.view(&name)?.head.uniqueid, name },
            Request::Unuser(user) => return self.remove_user(&user),
            Request::Sub { user, name } => Step::Subscribe { user, name },
            Request::Unsub { user, name } => Step::Unsubscribe { user, name },
            Request::Seen { user, uniqueid, seen } => Step::Seen { user, uniqueid, seen },
            Request::Quota { root, limits } => Step::Quota { root, limits },
            Request::Unquota(root) => Step::Unquota { root },
            Request::Annotation { name, annotation } if name.is_empty() => Step::ServerAnnotation(annotation),
            Request::Annotation { name, annotation } => {
                return self.annotate(&name, |all| {
                    all.retain(|old| old.entry != annotation.entry || old.userid != annotation.userid);
                    all.push(annotation.clone());
                });
            }
            Request::Unannotation { name, entry, userid } if name.is_empty() => {
                Step::RemoveServerAnnotation { entry, userid }
            }
            Request::Unannotation { name, entry, userid } => {
                return self.annotate(&name, |all| all.retain(|old| old.entry != entry || old.userid != userid));
            }
            // What a script compiles to is the replica's own affair.
            Request::Sieve { file, .. } | Request::Unsieve { file, .. } if file.ends_with(b".bc") => return Ok(()),
            Request::Sieve { user, file, last_update, content } => {
                Step::SievePut { user, name: script_name(&file)?, last_update, content, compiled: Vec::new() }
            }
            Request::Unsieve { user, file } => Step::SieveRemove { user, name: script_name(&file)? },
            Request::ActivateSieve { user, file } => {
                let name = script_name(&file)?;
                // A 2.4 client links to what it has compiled, whether the script was sent or not.
                if !self.replica.view_user(&user)?.meta.sieve.contains_key(&name) {
                    return Err(Refused::No(NONEXISTENT.into()));
                }
                Step::SieveActivate { user, name }
            }
            Request::UnactivateSieve(user) => Step::SieveDeactivate { user },
            other => return Err(Refused::No(format!("IMAP_PROTOCOL_ERROR Protocol error in {other:?}"))),
        };
        self.apply(&step)
    }

    fn apply(&mut self, step: &Step) -> Done {
        self.replica.apply(step, &self.stage).map_err(|error| {
            debug!(%error, "a step was refused");
            error.into()
        })
    }

    fn view(&mut self, name: &MboxName) -> Result<MailboxView, Refused> {
        let views = self.replica.view_mailboxes(std::slice::from_ref(name))?;
        views.into_iter().next().ok_or_else(nonexistent)
    }

    fn shown(&self, view: &MailboxView) -> bool {
        !view.head.mbtype.is_deleted() && (self.sieve_mailboxes || !view.head.mbtype.is_sieve())
    }

    fn mailboxes(&self, views: &[MailboxView], out: &mut dyn Write) -> Done {
        for view in views.iter().filter(|view| self.shown(view)) {
            out.write_all(&reply::mailbox(view, self.era == Era::Three2))?;
        }
        Ok(())
    }

    fn get_user(&mut self, user: &UserId, all: bool, out: &mut dyn Write) -> Done {
        let AccountView { mailboxes, quotas, meta } = self.replica.view_user(user)?;
        if all {
            self.mailboxes(&mailboxes, out)?;
            for (root, limits) in &quotas {
                out.write_all(&reply::quota(root, limits))?;
            }
        }
        for (uniqueid, seen) in &meta.seen {
            out.write_all(&reply::seen(uniqueid, seen))?;
        }
        if !meta.subs.is_empty() {
            out.write_all(&reply::subscriptions(meta.subs.iter()))?;
        }
        if self.sieve_mailboxes {
            return Ok(());
        }
        for (name, script) in &meta.sieve {
            let file = [name.as_bytes(), b".script"].concat();
            out.write_all(&reply::sieve(&file, script.last_update, &script.guid, false))?;
        }
        if let Some(active) = &meta.active {
            let file = [active.as_bytes(), b".bc"].concat();
            out.write_all(&reply::sieve(&file, 0, &MessageGuid::default(), true))?;
        }
        Ok(())
    }

    fn fetch(&mut self, name: &MboxName, guid: &MessageGuid, out: &mut dyn Write) -> Done {
        let mut body = self.replica.body(name, guid)?.ok_or_else(nonexistent)?;
        out.write_all(&reply::message_head(&Partition::from("default"), guid, body.size))?;
        let sent = io::copy(&mut body.reader.by_ref().take(body.size), out)?;
        if sent != body.size {
            return Err(Refused::Gone(format!("the body {guid} is shorter than it should be")));
        }
        Ok(out.write_all(b"\r\n")?)
    }

    fn mailbox(&mut self, update: Update) -> Done {
        let Update { view, since, era } = update;
        self.era = self.era.min(era);
        let head = view.head;
        if head.mbtype.is_deleted() {
            // A tombstone says nothing that the absence of the mailbox does not say; it must bury nothing.
            let taken = !self.replica.view_mailboxes(std::slice::from_ref(&head.name))?.is_empty();
            return if taken { Err(Refused::No(MOVED.into())) } else { Ok(()) };
        }
        if head.mbtype.is_foreign() || head.mbtype.is_sieve() && !self.sieve_mailboxes {
            return Err(Refused::No(NOT_SUPPORTED.into()));
        }
        let mut records = view.records.unwrap_or_default();
        let user_flags = in_order(view.user_flags, &mut records);
        if records.iter().any(|record| record.guid.is_null()) {
            return Err(Refused::No(NOT_SUPPORTED.into()));
        }
        if records.iter().any(|record| record.uid.0 == 0 || record.uid > head.last_uid) {
            return Err(Refused::No("IMAP_PROTOCOL_BAD_PARAMETERS near LAST_UID".into()));
        }
        let bodies = records.iter().filter(|record| self.stage.has(&record.guid));
        let bodies = bodies.map(|r| BodyRef { uid: r.uid, guid: r.guid, size: r.size, copied: false }).collect();
        let mut annotations = view.annotations;
        if era == Era::Two4 {
            // It sends them apart: none here does not mean none.
            let old = self.replica.view_mailboxes(std::slice::from_ref(&head.name))?;
            annotations = old.into_iter().next().map(|view| view.annotations).unwrap_or_default();
        }
        // The rules of 2.5 and 3.0 are others than a replica's of ours.
        let annot = view.crc_annot.filter(|_| era == Era::Three2).unwrap_or_default();
        let update = MailboxUpdate {
            head,
            crcs: SyncCrcs { basic: view.crc_basic.unwrap_or_default(), annot },
            since,
            user_flags,
            annotations,
            records,
            bodies,
            reserve_from: self.reserved.iter().cloned().collect(),
            create: true,
        };
        let name = update.head.name.clone();
        match self.replica.apply(&Step::Mailbox(Box::new(update)), &self.stage) {
            Err(ReplicaError::Changed(reason)) => {
                debug!(mailbox = %name, reason, "an update does not fit");
                Err(Refused::No(self.unfit(&name, since, era)?.into()))
            }
            Err(error) => {
                warn!(mailbox = %name, %error, "an update was refused");
                Err(error.into())
            }
            Ok(()) => Ok(()),
        }
    }

    /// What is wrong with an update, in the word that makes the client do the right thing about it.
    fn unfit(&mut self, name: &MboxName, since: Option<Since>, era: Era) -> Result<&'static str, Refused> {
        if era == Era::Two4 {
            return Ok("IMAP_MAILBOX_CRC Checksum Failure");
        }
        let Some(since) = since else { return Ok(CHECKSUM) };
        let views = self.replica.view_mailboxes(std::slice::from_ref(name))?;
        let same = |theirs: u32, ours: Option<u32>| theirs == 0 || ours.is_none_or(|ours| ours == 0 || ours == theirs);
        let fits = views.first().is_some_and(|view| {
            view.head.highestmodseq == since.modseq
                && same(since.crcs.basic, view.crc_basic)
                && same(since.crcs.annot, view.crc_annot)
        });
        Ok(if fits { CHECKSUM } else { CHANGED })
    }

    /// Changes the annotations of a mailbox and nothing else.
    fn annotate(&mut self, name: &MboxName, change: impl Fn(&mut Vec<Annotation>)) -> Done {
        let view = self.replica.view_full(name)?.ok_or_else(nonexistent)?;
        let crcs = SyncCrcs { basic: view.crc_basic.unwrap_or_default(), annot: view.crc_annot.unwrap_or_default() };
        let mut annotations = view.annotations;
        change(&mut annotations);
        annotations.sort();
        self.apply(&Step::Mailbox(Box::new(MailboxUpdate {
            since: Some(Since { modseq: view.head.highestmodseq, crcs }),
            head: view.head,
            crcs,
            user_flags: view.user_flags,
            annotations,
            records: Vec::new(),
            bodies: Vec::new(),
            reserve_from: Vec::new(),
            create: false,
        })))
    }

    /// Everything of a user, the INBOX last: with it goes what is not in mailboxes.
    fn remove_user(&mut self, user: &UserId) -> Done {
        if user.is_empty() {
            return Ok(());
        }
        let AccountView { mut mailboxes, quotas, meta } = self.replica.view_user(user)?;
        mailboxes.sort_by_key(|view| (view.head.name.is_inbox(), std::cmp::Reverse(view.head.name.clone())));
        for view in mailboxes {
            self.apply(&Step::Remove { uniqueid: view.head.uniqueid, name: view.head.name })?;
        }
        for root in quotas.into_keys() {
            self.apply(&Step::Unquota { root })?;
        }
        for name in meta.subs {
            self.apply(&Step::Unsubscribe { user: user.clone(), name })?;
        }
        for name in meta.sieve.into_keys() {
            self.apply(&Step::SieveRemove { user: user.clone(), name })?;
        }
        Ok(())
    }
}

/// Flags come in order of first sight, which is another one each time: by name they move as little as possible there.
fn in_order(names: Vec<Option<FlagName>>, records: &mut [Record]) -> Vec<Option<FlagName>> {
    let mut order: Vec<usize> = (0..names.len().min(128)).collect();
    order.sort_by_key(|at| names.get(*at));
    for record in records.iter_mut().filter(|record| record.user_flags != 0) {
        let set = order.iter().enumerate().filter(|(_, from)| record.user_flags >> **from & 1 == 1);
        record.user_flags = set.fold(0, |all, (to, _)| all | 1 << to);
    }
    order.into_iter().filter_map(|at| names.get(at).cloned()).collect()
}

fn nonexistent() -> Refused {
    Refused::No(NONEXISTENT.into())
}

/// `main.script`, `main.bc` → `main`.
fn script_name(file: &[u8]) -> Result<SieveName, Refused> {
    let name = file.strip_suffix(b".script").or_else(|| file.strip_suffix(b".bc"));
    let name = name.filter(|name| names::script(name));
    name.map(SieveName::new).ok_or_else(|| Refused::No("IMAP_PROTOCOL_BAD_PARAMETERS near FILENAME".into()))
}

/// Refuses names that must not become paths.
fn check_names(request: &Request) -> Done {
    let bad = |what: &str| Err(Refused::No(format!("IMAP_MAILBOX_BADNAME Invalid {what} name")));
    let (mut mailboxes, mut ids, mut users, mut partitions): (
        Vec<&MboxName>,
        Vec<&UniqueId>,
        Vec<&UserId>,
        Vec<&Partition>,
    ) = Default::default();
    match request {
        Request::Rename { from, to, partition, .. } => {
            mailboxes.extend([from, to]);
            partitions.push(partition);
        }
        Request::Mailbox(update) => {
            let head = &update.view.head;
            mailboxes.push(&head.name);
            ids.push(&head.uniqueid);
            // A place holder has none.
            if head.mbtype == MboxType::default() || !head.partition.is_empty() {
                partitions.push(&head.partition);
            }
        }
        Request::Expunge { name, uniqueid, .. } => {
            mailboxes.push(name);
            ids.push(uniqueid);
        }
        Request::Unmailbox(name) | Request::GetFullMailbox(name) | Request::Fetch { name, .. } => mailboxes.push(name),
        Request::Annotation { name, .. } | Request::Unannotation { name, .. } | Request::GetAnnotation(name) => {
            mailboxes.extend(Some(name).filter(|name| !name.is_empty()));
        }
        Request::Sub { user, name } | Request::Unsub { user, name } => {
            users.push(user);
            mailboxes.push(name);
        }
        Request::Seen { user, uniqueid, .. } => {
            users.push(user);
            ids.push(uniqueid);
        }
        Request::GetMailboxes(names) => mailboxes.extend(names),
        Request::GetUniqueIds(all) => ids.extend(all),
        Request::GetUser(user)
        | Request::GetMeta(user)
        | Request::FetchSieve { user, .. }
        | Request::Sieve { user, .. }
        | Request::Unsieve { user, .. }
        | Request::ActivateSieve { user, .. }
        | Request::UnactivateSieve(user) => users.push(user),
        Request::Unuser(user) => users.extend(Some(user).filter(|user| !user.is_empty())),
        Request::GetQuota(root) | Request::Quota { root, .. } | Request::Unquota(root) => {
            // A domain's root ends in its mark.
            let name = root.as_bytes().strip_suffix(b"!").unwrap_or(root.as_bytes());
            return if names::mailbox(&MboxName::new(name)) { Ok(()) } else { bad("quota root") };
        }
        Request::Message | Request::Reserve { .. } | Request::Force | Request::Capabilities(_) => {}
    }
    if !mailboxes.into_iter().all(names::mailbox) {
        return bad("mailbox");
    }
    if !ids.into_iter().all(names::uniqueid) {
        return bad("uniqueid");
    }
    if !users.into_iter().all(names::user) {
        return bad("user");
    }
    if !partitions.into_iter().all(names::partition) {
        return bad("partition");
    }
    Ok(())
}
