//! One mailbox: its message files first, checked against their GUIDs, then the mailbox itself.

use super::session::{Session, There};
use crate::csync::Unannotation;
use crate::csync::command::{self, Untagged};
use crate::model::{
    Annotation, BodyRef, BodySource, Denial, Disposition, MailboxUpdate, MailboxView, MessageGuid, ModSeq, Partition,
    Record, Replica, ReplicaError, StoreError, Uid, UserId,
};
use sha1::{Digest, Sha1};
use std::collections::HashSet;
use std::io::Read;

/// Messages and bytes in one MESSAGE request.
const BATCH_MESSAGES: usize = 1024;
const BATCH_BYTES: usize = 4 << 20;
/// A larger body is not held in memory: it is hashed in a first pass and streamed in a second.
const WHOLE_BYTES: u64 = 4 << 20;
/// GUIDs in one RESERVE request.
const RESERVE_GUIDS: usize = 8192;
/// So many staged messages are dropped with a RESTART at the next quiet moment.
const STAGED_MOST: usize = 4096;
impl Session {
    /// Brings one mailbox there.
    pub(super) fn mailbox(&mut self, update: &MailboxUpdate, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let name = &update.head.name;
        let partition = self.partition(&update.head.partition);
        if update.head.mbtype.is_intermediate() {
            self.make_room(update)?;
        } else {
            self.prepare(update, &partition, bodies)?;
        }
        let known = self.known(|known| known.mailboxes.remove(name));
        match self.line(&command::mailbox(update, &partition, &self.dialect)) {
            Err(ReplicaError::Refused(text)) if known.is_none() => {
                Err(ReplicaError::Refused(format!("{name}: {text}; {}", cannot_be_made(&partition))))
            }
            Err(ReplicaError::Refused(text)) => Err(ReplicaError::Refused(format!("{name}: {text}"))),
            other => other,
        }?;
        if update.head.mbtype.is_intermediate() {
            return Ok(());
        }
        self.known(|known| known.partitions.insert(partition.clone()));
        let there = There {
            uniqueid: update.head.uniqueid.clone(),
            partition,
            last_uid: update.head.last_uid,
            intermediate: false,
        };
        self.known(|known| known.mailboxes.insert(name.clone(), there));
        if !self.dialect.annotations_inside {
            self.annotations_outside(update)?;
        }
        if self.staged.len() >= STAGED_MOST {
            self.restart()?;
        }
        Ok(())
    }

    /// A place holder said over a live mailbox buries it, whatever its uniqueid, and the server says OK (seen on 3.6.1). So
    /// a mailbox of this uniqueid is removed by name first, as the source has done, and any other is in the way.
    fn make_room(&mut self, update: &MailboxUpdate) -> Result<(), ReplicaError> {
        let (name, id) = (&update.head.name, &update.head.uniqueid);
        match self.look(name)?.filter(|there| !there.intermediate) {
            None => Ok(()),
            Some(there) if there.uniqueid == *id => {
                self.known(|known| known.mailboxes.remove(name));
                self.line(&command::apply("UNMAILBOX", name.as_bytes()))
            }
            Some(there) => Err(ReplicaError::Moved(format!(
                "{name} is to be a place holder, but is mailbox {} there, with mail",
                there.uniqueid
            ))),
        }
    }

    /// Uploads what the update needs, once it is certain that the server survives both.
    fn prepare(
        &mut self,
        update: &MailboxUpdate,
        partition: &Partition,
        bodies: &dyn BodySource,
    ) -> Result<(), ReplicaError> {
        let name = &update.head.name;
        let with_body: HashSet<MessageGuid> = update.bodies.iter().map(|body| body.guid).collect();
        let bare = |session: &Self, record: &Record| {
            !record.is_expunged()
                && !with_body.contains(&record.guid)
                && !session.staged.contains(&(partition.clone(), record.guid))
        };
        let highest_bare = update.records.iter().filter(|record| bare(self, record)).map(|record| record.uid).max();
        if update.bodies.is_empty() && highest_bare.is_none() {
            return Ok(());
        }
        let mut there = self.known(|known| known.mailboxes.get(name).cloned());
        let fits = |there: &There| {
            there.uniqueid == update.head.uniqueid
                && there.partition == *partition
                && highest_bare.is_none_or(|uid| uid <= there.last_uid)
        };
        let sure = match &there {
            Some(there) => fits(there),
            None => highest_bare.is_none() && self.knows_all_of(name),
        };
        if !sure {
            there = self.look(name)?;
        }
        let there = there.filter(|there| there.uniqueid == update.head.uniqueid && !there.intermediate);
        // A record that is new there and has no message file makes the server abort.
        let last_uid = there.as_ref().map_or(Uid(0), |there| there.last_uid);
        if let Some(uid) = highest_bare.filter(|uid| *uid > last_uid) {
            return Err(match update.create || there.is_some() {
                true => ReplicaError::Refused(format!(
                    "{name}: UID {} is new to the replica and no message file goes with it; restore the file at the \
                     source or run reconstruct there",
                    uid.0
                )),
                // The caller took the mailbox for known.
                false => ReplicaError::NoSuchMailbox(name.to_string()),
            });
        }
        if update.bodies.is_empty() {
            return Ok(());
        }
        match there {
            // Files staged on another partition are not found, and the server aborts.
            Some(there) if there.partition != *partition => {
                return Err(ReplicaError::Changed(format!("{name} is on partition {} there", there.partition)));
            }
            Some(_) => {}
            None => self.require_partition(update, partition)?,
        }
        self.upload(update, partition, bodies)
    }

    /// A file value that names an unknown partition kills a 3.x server, an empty mailbox on it is only refused. So the
    /// first mailbox on a partition nobody has seen yet is made empty first.
    fn require_partition(&mut self, update: &MailboxUpdate, partition: &Partition) -> Result<(), ReplicaError> {
        if self.known(|known| known.partitions.contains(partition)) {
            return Ok(());
        }
        let mut probe = update.clone();
        probe.head.last_uid = Uid(0);
        probe.head.recentuid = Uid(0);
        probe.head.highestmodseq = ModSeq(1).min(probe.head.highestmodseq);
        probe.crcs = Default::default();
        probe.since = None;
        (probe.records, probe.bodies, probe.annotations) = (Vec::new(), Vec::new(), Vec::new());
        match self.line(&command::mailbox(&probe, partition, &self.dialect)) {
            // It is there after all: then its partition is looked at below.
            Ok(()) | Err(ReplicaError::Changed(_)) => {}
            Err(ReplicaError::Refused(text)) => {
                let name = &update.head.name;
                return Err(ReplicaError::Refused(format!("{name}: {text}; {}", cannot_be_made(partition))));
            }
            Err(error) => return Err(error),
        }
        match self.look(&update.head.name)? {
            Some(there) if there.partition == *partition => Ok(()),
            Some(there) => {
                Err(ReplicaError::Changed(format!("{} is on partition {} there", update.head.name, there.partition)))
            }
            None => Err(ReplicaError::Changed(format!("{} has vanished there", update.head.name))),
        }
    }

    fn upload(
        &mut self,
        update: &MailboxUpdate,
        partition: &Partition,
        bodies: &dyn BodySource,
    ) -> Result<(), ReplicaError> {
        let mut seen = HashSet::new();
        let mut wanted: Vec<&BodyRef> = update
            .bodies
            .iter()
            .filter(|body| !self.staged.contains(&(partition.clone(), body.guid)) && seen.insert(body.guid))
            .collect();
        if !update.reserve_from.is_empty() && !wanted.is_empty() {
            let mut missing = HashSet::new();
            for chunk in wanted.chunks(RESERVE_GUIDS) {
                let guids: Vec<MessageGuid> = chunk.iter().map(|body| body.guid).collect();
                for line in self.request(&command::reserve(partition, &update.reserve_from, &guids))? {
                    if let Untagged::Missing(guids) = line {
                        missing.extend(guids);
                    }
                }
            }
            let (upload, there): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|body| missing.contains(&body.guid));
            self.staged.extend(there.iter().map(|body| (partition.clone(), body.guid)));
            wanted = upload;
        }
        let mut batch: Vec<u8> = Vec::new();
        let mut in_batch: Vec<MessageGuid> = Vec::new();
        for body in wanted {
            if body.size > WHOLE_BYTES {
                self.stream(partition, body, bodies)?;
                continue;
            }
            let bytes = read_checked(body, bodies)?;
            if in_batch.len() >= BATCH_MESSAGES || batch.len() + bytes.len() > BATCH_BYTES {
                self.message_batch(partition, &mut batch, &mut in_batch)?;
            }
            batch.extend_from_slice(if in_batch.is_empty() { b"APPLY MESSAGE (" } else { b" " });
            batch.extend(command::file_head(partition, &body.guid, body.size));
            batch.extend_from_slice(&bytes);
            in_batch.push(body.guid);
        }
        self.message_batch(partition, &mut batch, &mut in_batch)
    }

    fn message_batch(
        &mut self,
        partition: &Partition,
        batch: &mut Vec<u8>,
        guids: &mut Vec<MessageGuid>,
    ) -> Result<(), ReplicaError> {
        if guids.is_empty() {
            return Ok(());
        }
        batch.extend_from_slice(b")\r\n");
        // The update that uses these bodies is sent only after the server has confirmed that it has them.
        self.line(batch)?;
        self.staged.extend(guids.drain(..).map(|guid| (partition.clone(), guid)));
        batch.clear();
        Ok(())
    }

    /// A large body: hashed once before the first byte leaves, and again while it is sent.
    fn stream(&mut self, partition: &Partition, body: &BodyRef, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let mut buffer = vec![0; 256 << 10];
        hash_body(body, bodies, &mut buffer, &mut |_| Ok(()))?;
        let mut head = b"APPLY MESSAGE (".to_vec();
        head.extend(command::file_head(partition, &body.guid, body.size));
        self.send(&head, false)?;
        let sent = hash_body(body, bodies, &mut buffer, &mut |bytes| self.send(bytes, false));
        if let Err(error) = sent {
            // Half a file is on its way: only closing the connection keeps it from being used.
            self.dead = true;
            return Err(error);
        }
        self.line(b")\r\n")?;
        self.staged.insert((partition.clone(), body.guid));
        Ok(())
    }

    /// Annotations of one mailbox, or of the server, sorted.
    pub(super) fn view_annotations(&mut self, name: &[u8]) -> Result<Vec<Annotation>, ReplicaError> {
        let lines = self.request(&command::get("ANNOTATION", name))?;
        let only = |line| match line {
            Untagged::Annotation(annotation) => {
                let userid = self.dialect.user_here(&annotation.userid);
                Some(Annotation { userid, ..annotation })
            }
            _ => None,
        };
        let mut out: Vec<Annotation> = lines.into_iter().filter_map(only).collect();
        out.sort_by(|a, b| a.content().cmp(&b.content()));
        Ok(out)
    }

    /// 2.4 tells mailbox annotations apart from the mailbox.
    pub(super) fn annotations_apart(&mut self, views: &mut [MailboxView]) -> Result<(), ReplicaError> {
        if !self.dialect.annotations_inside {
            for view in views {
                view.annotations = self.view_annotations(view.head.name.as_bytes())?;
            }
        }
        Ok(())
    }

    /// 2.4 takes mailbox annotations apart from the mailbox.
    fn annotations_outside(&mut self, update: &MailboxUpdate) -> Result<(), ReplicaError> {
        let name = update.head.name.as_bytes();
        let mut there = self.view_annotations(name)?;
        there.iter_mut().for_each(|annotation| annotation.userid = self.dialect.user_there(&annotation.userid));
        // One that this server does not take keeps back no other.
        let mut refused = Ok(());
        for annotation in &update.annotations {
            if !there.iter().any(|other| other.content() == annotation.content()) {
                match self.annotation(name, annotation) {
                    Err(error @ ReplicaError::Refused(_)) => refused = Err(error),
                    other => other?,
                }
            }
        }
        let named = |annotation: &Annotation| (annotation.entry.clone(), annotation.userid.clone());
        let wanted: HashSet<_> = update.annotations.iter().map(named).collect();
        for gone in there.into_iter().filter(|annotation| !wanted.contains(&named(annotation))) {
            self.unannotate(name, &gone.entry, &gone.userid)?;
        }
        refused
    }

    /// Takes an annotation away that may be there.
    pub(super) fn unannotate(&mut self, name: &[u8], entry: &[u8], userid: &UserId) -> Result<(), ReplicaError> {
        if self.dialect.unannotation == Unannotation::Command {
            let fields: [(&str, &[u8]); 3] = [("MBOXNAME", name), ("ENTRY", entry), ("USERID", userid.as_bytes())];
            return self.line(&command::apply_fields("UNANNOTATION", &fields));
        }
        // One that is not there cannot be removed.
        let here = self.dialect.user_here(userid);
        let there = self.view_annotations(name)?;
        if !there.iter().any(|annotation| annotation.entry == entry && annotation.userid == here) {
            return Ok(());
        }
        let (entry, userid, value) = (entry.to_vec(), userid.clone(), b"NIL".to_vec());
        self.annotation(name, &Annotation { entry, userid, value, modseq: ModSeq(0) })
    }

    pub(super) fn annotation(&mut self, name: &[u8], annotation: &Annotation) -> Result<(), ReplicaError> {
        let fields: [(&str, &[u8]); 4] = [
            ("MBOXNAME", name),
            ("ENTRY", &annotation.entry),
            ("USERID", annotation.userid.as_bytes()),
            ("VALUE", &annotation.value),
        ];
        match self.line(&command::apply_fields("ANNOTATION", &fields)) {
            // Who is no admin was found out before. A server says the same of an entry that nobody has defined.
            Err(ReplicaError::Denied(Denial::NotAdmin, _)) => Err(ReplicaError::Refused(format!(
                "annotation {}: this server does not take it; name it in its annotation_definitions (from 2.5 on \
                 annotation_allow_undefined: yes does, too)",
                String::from_utf8_lossy(&annotation.entry)
            ))),
            other => other,
        }
    }
}

/// A server says no more than `NO Unknown error`.
pub(super) fn cannot_be_made(partition: &Partition) -> String {
    format!(
        "where it is new there, the replica may have no partition {partition} (add partition-{partition} to its imapd.conf, \
         or map it with [partition] in spooltap's configuration), lack its parent, or be part of a Murder whose mupdate \
         server does not answer"
    )
}

fn body_error(body: &BodyRef, disposition: Disposition, fault: &str) -> ReplicaError {
    let error = StoreError::new(
        disposition,
        format!("message file of UID {} {fault}; it is not sent; restore the file or run reconstruct", body.uid.0),
    );
    ReplicaError::Body { uid: body.uid, error }
}

/// Reads a body whole and checks size and SHA-1.
fn read_checked(body: &BodyRef, bodies: &dyn BodySource) -> Result<Vec<u8>, ReplicaError> {
    let open = bodies.open(body).map_err(|error| ReplicaError::Body { uid: body.uid, error })?;
    let mut bytes = Vec::with_capacity(usize::try_from(body.size).unwrap_or(0));
    open.reader
        .take(body.size.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| body_error(body, Disposition::RetrySoon, &format!("cannot be read: {error}")))?;
    if bytes.len() as u64 != body.size {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("has not the {} bytes of its record", body.size),
        ));
    }
    if Sha1::digest(&bytes).as_slice() != body.guid.0 {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("is not the message of its record (GUID {})", body.guid),
        ));
    }
    Ok(bytes)
}

/// Passes a body on in pieces and checks size and SHA-1.
fn hash_body(
    body: &BodyRef,
    bodies: &dyn BodySource,
    buffer: &mut [u8],
    pass: &mut dyn FnMut(&[u8]) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let mut open = bodies.open(body).map_err(|error| ReplicaError::Body { uid: body.uid, error })?;
    let (mut hash, mut left) = (Sha1::new(), body.size);
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = open
            .reader
            .read(buffer.get_mut(..most).unwrap_or_default())
            .map_err(|error| body_error(body, Disposition::RetrySoon, &format!("cannot be read: {error}")))?;
        if count == 0 {
            return Err(body_error(body, Disposition::Quarantine, &format!("ends {left} bytes too early")));
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        hash.update(bytes);
        pass(bytes)?;
        left = left.saturating_sub(count as u64);
    }
    let more = open.reader.read(buffer.get_mut(..1).unwrap_or_default());
    if more.map_err(|error| body_error(body, Disposition::RetrySoon, &format!("cannot be read: {error}")))? > 0 {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("has not the {} bytes of its record", body.size),
        ));
    }
    if hash.finalize().as_slice() != body.guid.0 {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("is not the message of its record (GUID {})", body.guid),
        ));
    }
    Ok(())
}
