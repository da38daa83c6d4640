//! The promises of the seam `Replica`: what was applied is what is seen, said twice is said once, and nothing is taken
//! that does not fit.

use super::Subject;
use crate::archive::{Bodies, Source};
use sha1::{Digest, Sha1};
use spooltap::model::*;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

/// Everything, on accounts whose names begin with `prefix`.
pub fn all(subject: &Subject, prefix: &str) {
    type Check = fn(&mut Place);
    let checks: [(&str, Check); 13] = [
        ("life", a_mailbox_lives),
        ("twice", what_is_said_twice_is_said_once),
        ("change", what_has_changed_is_not_overwritten),
        ("fit", bodies_that_do_not_fit_change_nothing),
        ("big", a_large_body_that_changes_while_it_is_sent),
        ("copy", what_is_there_is_not_sent_again),
        ("name", renamed_moved_and_removed_under_its_uniqueid_only),
        ("hold", a_place_holder_buries_nothing),
        ("odd", odd_names_flags_and_values),
        ("self", what_belongs_to_a_user),
        ("quota", quota_limits_come_change_and_go),
        ("note", annotations_of_mailbox_message_and_server),
        ("many", more_messages_than_one_request_takes),
    ];
    for (name, check) in checks {
        let started = std::time::Instant::now();
        check(&mut Place { subject, user: format!("{prefix}{name}"), made: Cell::new(0) });
        eprintln!("{} {name}: {:?}", subject.target.name(), started.elapsed());
    }
}

/// An account nobody else uses.
struct Place<'a> {
    subject: &'a Subject,
    user: String,
    made: Cell<u32>,
}

impl Place<'_> {
    fn user(&self) -> UserId {
        self.user.as_str().into()
    }

    /// A mailbox of the account; `""` is its INBOX.
    fn source(&self, below: &str) -> Source {
        self.made.set(self.made.get() + 1);
        let mut source = Source::new(&format!("id{}{:04}", self.user, self.made.get()), &self.name(below));
        let head = &mut source.snapshot.head;
        head.acl = format!("{}\tlrswipkxtecdan\tanyone\tlrs\t", self.user).into_bytes();
        (head.recenttime, head.last_appenddate, head.pop3_last_login) = (1_700_000_002, 1_700_000_003, 1_700_000_004);
        (head.createdmodseq, head.foldermodseq) = (ModSeq(1), ModSeq(1));
        source
    }

    fn name(&self, below: &str) -> String {
        format!("user.{}{below}", self.user)
    }

    fn open(&self) -> Box<dyn Replica> {
        self.subject.open()
    }

    fn caps(&self) -> Capabilities {
        self.subject.target.capabilities()
    }

    /// The account's INBOX with one message, applied.
    fn inbox(&self, session: &mut dyn Replica) -> Source {
        let mut inbox = self.source("");
        inbox.append(&format!("From: {}\r\n\r\nfirst\r\n", self.user));
        put(session, &inbox, None);
        inbox
    }
}

fn put(session: &mut dyn Replica, source: &Source, since: Option<Since>) {
    let step = source.step(since);
    session.apply(&step, &source.bodies).unwrap_or_else(|error| panic!("{}: {error}", source.snapshot.head.name));
}

#[track_caller]
fn refused(result: Result<(), ReplicaError>, kinds: &str) {
    let error = format!("{:?}", result.expect_err("refused"));
    let kind = error.split(['(', ' ']).next().unwrap_or_default();
    assert!(kinds.split('|').any(|one| one == kind), "{error}, expected {kinds}");
}

/// A record with the names of its flags instead of their numbers, and only what another server may see.
fn shown(record: &Record, names: &[Option<FlagName>]) -> (Record, BTreeSet<FlagName>) {
    let set = names.iter().enumerate().filter(|(bit, _)| record.user_flags >> bit & 1 == 1);
    let flags = set.filter_map(|(_, name)| name.clone()).collect();
    let mut record = Record { user_flags: 0, ..record.clone() };
    record.system_flags.0 &= SystemFlags::REPLICATED;
    (record, flags)
}

/// The replica holds exactly this.
#[track_caller]
fn holds(place: &Place, session: &mut dyn Replica, source: &Source) {
    let want = &source.snapshot;
    let name = &want.head.name;
    let full = session.view_full(name).expect("views").unwrap_or_else(|| panic!("{name} is not there"));
    // A changed annotation raises it there; before 3.2 nobody keeps it.
    let kept = place.caps().checks_since;
    let options = place.caps().keeps_options;
    assert!(!kept || full.head.foldermodseq >= want.head.foldermodseq, "{name}");
    let head = |head: &MailboxHead| MailboxHead {
        quotaroot: None,
        foldermodseq: ModSeq(0),
        createdmodseq: if kept { head.createdmodseq } else { ModSeq(0) },
        options: if options { head.options } else { Options(0) },
        pop3_show_after: if options { head.pop3_show_after } else { 0 },
        ..head.clone()
    };
    assert_eq!(head(&full.head), head(&want.head));
    assert_eq!(
        full.annotations.iter().map(Annotation::content).collect::<Vec<_>>(),
        want.annotations.iter().map(Annotation::content).collect::<Vec<_>>()
    );
    let records: Vec<_> = full.records.iter().flatten().map(|record| shown(record, &full.user_flags)).collect();
    let mut wanted: Vec<_> = want.records.iter().map(|record| shown(record, &want.user_flags)).collect();
    if place.caps().annot_crc == AnnotCrc::None {
        // 2.4 keeps an expunged record whose file is gone, and does not list it.
        let listed: BTreeSet<Uid> = records.iter().map(|(record, _)| record.uid).collect();
        wanted.retain(|(record, _)| !record.is_expunged() || listed.contains(&record.uid));
    }
    assert_eq!(records, wanted);
    let crcs = source.crcs();
    assert_eq!(full.crc_basic, Some(crcs.basic));
    if place.caps().annot_crc == AnnotCrc::New {
        assert_eq!(full.crc_annot, Some(crcs.annot));
    }
    let short = session.view_mailboxes(&[name.clone(), "user.nobody.x".into()]).expect("views");
    assert_eq!(short, [MailboxView { records: None, user_flags: Vec::new(), ..full.clone() }]);
    if let Some(found) = session.view_uniqueid(&want.head.uniqueid).expect("views") {
        assert_eq!(found.head.name, *name);
    }
    let Some(owner) = name.owner() else { return };
    let account = session.view_user(&owner).expect("views");
    assert!(account.mailboxes.iter().any(|view| head(&view.head) == head(&want.head)), "{account:?}");
}

fn a_mailbox_lives(place: &mut Place) {
    let mut session = place.open();
    assert_eq!(session.view_user(&place.user()).expect("views"), AccountView::default());
    assert_eq!(session.view_mailboxes(&[]).expect("views"), []);
    assert_eq!(session.view_full(&place.user().inbox()).expect("views"), None);
    let mut inbox = place.source("");
    put(&mut *session, &inbox, None);
    holds(place, &mut *session, &inbox);
    let step = |inbox: &mut Source, session: &mut dyn Replica, change: &dyn Fn(&mut Source)| {
        let since = inbox.since();
        change(inbox);
        put(session, inbox, Some(since));
        holds(place, session, inbox);
    };
    step(&mut inbox, &mut *session, &|inbox| (0..4).for_each(|n| inbox.append(&format!("From: a\r\n\r\n{n}\r\n"))));
    step(&mut inbox, &mut *session, &|inbox| inbox.touch(2, |record| record.system_flags.0 = SystemFlags::SEEN));
    step(&mut inbox, &mut *session, &|inbox| {
        inbox.snapshot.user_flags = vec![Some("$Work".into()), None, Some("NonJunk".into())];
        inbox.touch(1, |record| {
            record.system_flags.0 = SystemFlags::ANSWERED | SystemFlags::FLAGGED | SystemFlags::DRAFT;
            record.user_flags = 0b101;
        });
        inbox.touch(3, |record| record.user_flags = 0b100);
    });
    // A flag goes, a date is corrected.
    step(&mut inbox, &mut *session, &|inbox| {
        inbox.touch(1, |record| (record.user_flags, record.system_flags.0) = (0b001, SystemFlags::DELETED));
        inbox.touch(4, |record| (record.internaldate, record.last_updated) = (1_500_000_000, 1_700_000_500));
    });
    step(&mut inbox, &mut *session, &|inbox| {
        inbox.touch(1, |record| record.system_flags.0 |= SystemFlags::EXPUNGED);
    });
    // A header without a record.
    step(&mut inbox, &mut *session, &|inbox| {
        let head = &mut inbox.snapshot.head;
        head.acl = b"anyone\tlr\t".to_vec();
        head.options = Options(Options::POP3_NEW_UIDL | Options::SHARED_SEEN | Options::DUP_DELIVER);
        (head.recentuid, head.recenttime, head.pop3_show_after) = (Uid(4), 1_700_000_900, 1_700_000_901);
        (head.highestmodseq.0, head.uidvalidity) = (head.highestmodseq.0 + 1, 1_700_000_100);
        head.foldermodseq = head.highestmodseq;
    });
    // Seen by another session too, and after a pause.
    session.ping().expect("lives");
    holds(place, &mut *place.open(), &inbox);
    let (sent, received) = session.traffic();
    assert!(sent > 0 && received > 0);
    session.close();
    // New mail of which one is expunged before it was ever sent, its file gone.
    let since = inbox.since();
    inbox.append("From: a\r\n\r\nlate\r\n");
    inbox.append("From: a\r\n\r\nnever seen\r\n");
    inbox.touch(6, |record| record.system_flags.0 = SystemFlags::EXPUNGED | SystemFlags::DELETED);
    let gone = inbox.snapshot.records.last().expect("a record").guid;
    inbox.bodies.0.remove(&gone);
    let mut session = place.open();
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
}

fn what_is_said_twice_is_said_once(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.source("");
    inbox.append("From: a\r\n\r\none\r\n");
    inbox.append("From: a\r\n\r\ntwo\r\n");
    for session in [&mut session, &mut place.open()] {
        for _ in 0..2 {
            put(&mut **session, &inbox, None);
            holds(place, &mut **session, &inbox);
        }
    }
    let since = inbox.since();
    inbox.touch(1, |record| record.system_flags.0 = SystemFlags::EXPUNGED);
    inbox.append("From: a\r\n\r\nthree\r\n");
    put(&mut *session, &inbox, Some(since));
    // The answer was lost, so it is said again: it was based on something else by then, and that is an answer too.
    match session.apply(&inbox.step(Some(since)), &inbox.bodies) {
        Ok(()) | Err(ReplicaError::Changed(_)) => {}
        other => panic!("{other:?}"),
    }
    holds(place, &mut *session, &inbox);
    let steps = [
        Step::Subscribe { user: place.user(), name: place.user().inbox() },
        Step::Seen {
            user: place.user(),
            uniqueid: inbox.snapshot.head.uniqueid.clone(),
            seen: SeenState { lastread: 1, lastuid: Uid(2), lastchange: 3, seenuids: b"1:2".to_vec() },
        },
        Step::Quota { root: QuotaRoot::new(place.user().inbox()), limits: limits(&[(QuotaResource::Storage, 5000)]) },
        Step::SievePut {
            user: place.user(),
            name: "s".into(),
            last_update: 1,
            content: b"keep;\n".to_vec(),
            compiled: Vec::new(),
        },
        Step::SieveActivate { user: place.user(), name: "s".into() },
        Step::SieveDeactivate { user: place.user() },
        Step::SieveRemove { user: place.user(), name: "s".into() },
        Step::Unsubscribe { user: place.user(), name: place.user().inbox() },
        Step::Unquota { root: QuotaRoot::new(place.user().inbox()) },
        Step::Expunge {
            uniqueid: inbox.snapshot.head.uniqueid.clone(),
            name: place.user().inbox(),
            uids: vec![Uid(3), Uid(77)],
        },
    ];
    for step in steps {
        let mut after = Vec::new();
        for _ in 0..2 {
            session.apply(&step, &inbox.bodies).unwrap_or_else(|error| panic!("{step:?}: {error}"));
            let full = session.view_full(&place.user().inbox()).expect("views").expect("is there");
            let mut account = session.view_user(&place.user()).expect("views");
            account.meta.sieve.values_mut().for_each(|script| script.last_update = 0);
            after.push((full.records, account.quotas, account.meta));
        }
        assert_eq!(after.first(), after.last(), "{step:?}");
    }
}

fn what_has_changed_is_not_overwritten(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let before = session.view_full(&place.user().inbox()).expect("views");
    let since = inbox.since();
    inbox.append("From: a\r\n\r\nmore\r\n");
    let mut wrong = |change: &dyn Fn(&mut MailboxUpdate), kinds: &str| {
        let mut update = inbox.update(Some(since));
        change(&mut update);
        refused(session.apply(&Step::Mailbox(Box::new(update)), &inbox.bodies), kinds);
        assert_eq!(session.view_full(&place.user().inbox()).expect("views"), before);
    };
    if place.caps().checks_since {
        wrong(&|update| update.since.as_mut().expect("since").modseq.0 += 1, "Changed");
        wrong(&|update| update.since.as_mut().expect("since").crcs.basic ^= 1, "Changed");
        wrong(&|update| update.since.as_mut().expect("since").crcs.annot ^= 1, "Changed");
    }
    wrong(&|update| update.head.uniqueid = "somebodyelse".into(), "Moved");
    // 2.4 knows no uniqueid but under its name: it takes this for a new mailbox that lacks a message.
    let elsewhere = if place.caps().annot_crc == AnnotCrc::None { "Changed" } else { "Moved|NoSuchMailbox" };
    wrong(&|update| update.head.name = place.name(".elsewhere").as_str().into(), elsewhere);
    // Older than what is there.
    wrong(
        &|update| (update.since, update.head.highestmodseq, update.records) = (None, ModSeq(1), Vec::new()),
        "Changed",
    );
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
}

fn bodies_that_do_not_fit_change_nothing(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let before = session.view_full(&place.user().inbox()).expect("views");
    let since = inbox.since();
    for n in 0..3 {
        inbox.append(&format!("From: a\r\n\r\nbody {n}\r\n"));
    }
    let guid = inbox.snapshot.records[2].guid;
    for wrong in
        [None, Some(""), Some("From: a\r\n"), Some("From: a\r\n\r\nbOdy 1\r\n"), Some("From: a\r\n\r\nbody 1\r\nmore")]
    {
        let mut bodies = inbox.bodies.clone();
        match wrong {
            None => drop(bodies.0.remove(&guid)),
            Some(text) => drop(bodies.0.insert(guid, text.as_bytes().to_vec())),
        }
        refused(session.apply(&inbox.step(Some(since)), &bodies), "Body");
        assert_eq!(session.view_full(&place.user().inbox()).expect("views"), before, "{wrong:?}");
    }
    // No body at all for a message that is new there.
    let mut bare = inbox.update(Some(since));
    bare.bodies.clear();
    refused(session.apply(&Step::Mailbox(Box::new(bare)), &inbox.bodies), "Refused|Changed");
    assert_eq!(session.view_full(&place.user().inbox()).expect("views"), before);
    session.ping().expect("lives");
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
}

/// Gives another text each time it is asked: the file was replaced meanwhile.
struct Changing(Mutex<Vec<Vec<u8>>>);

impl BodySource for Changing {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let mut texts = self.0.lock().expect("alone");
        let text = if texts.len() > 1 { texts.remove(0) } else { texts[0].clone() };
        Ok(Body { size: body.size, reader: Box::new(std::io::Cursor::new(text)) })
    }
}

fn a_large_body_that_changes_while_it_is_sent(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let before = session.view_full(&place.user().inbox()).expect("views");
    let since = inbox.since();
    let text = format!("From: a\r\n\r\n{}", "0123456789abcdef\r\n".repeat(400_000));
    inbox.append(&text);
    let good = text.into_bytes();
    let mut bad = good.clone();
    *bad.last_mut().expect("a byte") = b'!';
    let short = good[..5_000_000].to_vec();
    for first in [bad.clone(), short.clone(), [good.clone(), b"more".to_vec()].concat()] {
        refused(session.apply(&inbox.step(Some(since)), &Changing(Mutex::new(vec![first]))), "Body");
        assert_eq!(session.view_full(&place.user().inbox()).expect("views"), before);
    }
    for then in [bad, short] {
        let mut session = place.open();
        match session.apply(&inbox.step(Some(since)), &Changing(Mutex::new(vec![good.clone(), then]))) {
            // It asks only once.
            Ok(()) => return holds(place, &mut *session, &inbox),
            other => refused(other, "Body"),
        }
        drop(session);
        assert_eq!(place.open().view_full(&place.user().inbox()).expect("views"), before);
    }
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
}

fn what_is_there_is_not_sent_again(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let since = inbox.since();
    for n in 0..20 {
        inbox.append(&format!("From: a\r\n\r\n{n} {}\r\n", "x".repeat(5000)));
    }
    put(&mut *session, &inbox, Some(since));
    // A new session: nothing is staged for it.
    let mut session = place.open();
    let mut copies = place.source(".copies");
    for record in inbox.snapshot.records.clone() {
        copies.snapshot.head.last_uid = record.uid;
        copies.snapshot.head.highestmodseq.0 += 1;
        copies.snapshot.records.push(Record { modseq: copies.snapshot.head.highestmodseq, ..record });
    }
    copies.append("From: a\r\n\r\nonly this is new\r\n");
    let mut update = copies.update(None);
    let all = inbox.snapshot.records.iter();
    update.bodies.extend(all.map(|r| BodyRef { uid: r.uid, guid: r.guid, size: r.size, copied: true }));
    update.reserve_from = vec![inbox.snapshot.head.name.clone(), "user.nobody".into()];
    // Whoever asks for a body that is there already gets none.
    let before = session.traffic().0;
    session.apply(&Step::Mailbox(Box::new(update)), &copies.bodies).expect("applies");
    assert!(session.traffic().0 - before < 50_000, "sent again");
    holds(place, &mut *session, &copies);
}

fn renamed_moved_and_removed_under_its_uniqueid_only(place: &mut Place) {
    let mut session = place.open();
    let inbox = place.inbox(&mut *session);
    let mut folder = place.source(".A");
    folder.append("From: a\r\n\r\nfolder\r\n");
    let mut child = place.source(".A.child");
    child.append("From: a\r\n\r\nchild\r\n");
    for source in [&folder, &child] {
        put(&mut *session, source, None);
    }
    let none = Bodies::default();
    let id = |source: &Source| source.snapshot.head.uniqueid.clone();
    let rename = |id: &UniqueId, from: &str, to: &str, partition: &str| Step::Rename {
        uniqueid: id.clone(),
        from: place.name(from).as_str().into(),
        to: place.name(to).as_str().into(),
        partition: partition.into(),
        uidvalidity: 1_700_000_000,
    };
    let remove =
        |id: &UniqueId, name: &str| Step::Remove { uniqueid: id.clone(), name: place.name(name).as_str().into() };
    let mut no = |step: Step, kinds: &str| refused(session.apply(&step, &none), kinds);
    no(remove(&id(&inbox), ".A"), "Moved");
    no(remove(&id(&inbox), ".none"), "NoSuchMailbox");
    no(rename(&id(&inbox), ".A", ".B", "default"), "Moved");
    no(rename(&id(&folder), ".A", ".A.child", "default"), "Moved");
    no(rename(&"nobody".into(), ".none", ".B", "default"), "NoSuchMailbox");
    let expunge = Step::Expunge { uniqueid: id(&inbox), name: place.name(".A").as_str().into(), uids: vec![Uid(1)] };
    no(expunge, "Moved");
    for source in [&inbox, &folder, &child] {
        holds(place, &mut *session, source);
    }
    // One mailbox, not its children; twice is once; the partition too.
    for (from, to, partition) in [(".A", ".B", "default"), (".B", ".C", "second"), (".C", ".C", "default")] {
        for _ in 0..2 {
            session.apply(&rename(&id(&folder), from, to, partition), &none).expect("renames");
        }
        let names = [from, to, ".A.child"].map(|name| MboxName::from(place.name(name).as_str()));
        let views = session.view_mailboxes(&names).expect("views");
        let found: BTreeMap<_, _> = views
            .iter()
            .filter(|view| !view.head.mbtype.is_intermediate())
            .map(|view| (view.head.name.clone(), (view.head.uniqueid.clone(), view.head.partition.clone())))
            .collect();
        let expected =
            [(names[1].clone(), (id(&folder), partition.into())), (names[2].clone(), (id(&child), "default".into()))];
        assert_eq!(found, expected.into());
    }
    // A rename may raise modseqs: the next update comes after a look.
    let view = session.view_full(&place.name(".C").as_str().into()).expect("views").expect("is there");
    let head = &mut folder.snapshot.head;
    (head.name, head.foldermodseq) = (place.name(".C").as_str().into(), view.head.foldermodseq);
    head.highestmodseq = ModSeq(view.head.highestmodseq.0 + 1);
    let since = Since {
        modseq: view.head.highestmodseq,
        crcs: SyncCrcs { basic: view.crc_basic.expect("a crc"), annot: view.crc_annot.unwrap_or_default() },
    };
    folder.append("From: a\r\n\r\nafter the rename\r\n");
    put(&mut *session, &folder, Some(since));
    folder.snapshot.records.truncate(2);
    holds(place, &mut *session, &folder);
    // Out of sight and gone, as a delayed delete does it.
    let gone = format!("DELETED.user.{}.C.6B050F77", place.user);
    let away = Step::Rename {
        uniqueid: id(&folder),
        from: place.name(".C").as_str().into(),
        to: gone.as_str().into(),
        partition: "default".into(),
        uidvalidity: 1_700_000_000,
    };
    session.apply(&away, &none).expect("renames");
    let for_good = Step::Remove { uniqueid: id(&folder), name: gone.as_str().into() };
    session.apply(&for_good, &none).expect("removes");
    refused(session.apply(&for_good, &none), "NoSuchMailbox");
    for (source, name) in [(&child, ".A.child"), (&inbox, "")] {
        session.apply(&remove(&id(source), name), &none).expect("removes");
    }
    let names = ["", ".A.child", ".C"].map(|name| MboxName::from(place.name(name).as_str()));
    assert_eq!(session.view_mailboxes(&names).expect("views"), []);
    // The name is free again for another mailbox.
    let again = place.inbox(&mut *session);
    holds(place, &mut *session, &again);
}

fn a_place_holder_buries_nothing(place: &mut Place) {
    if !place.caps().intermediates {
        return;
    }
    let mut session = place.open();
    place.inbox(&mut *session);
    let mut folder = place.source(".A");
    folder.append("From: a\r\n\r\nfolder\r\n");
    let mut child = place.source(".A.child");
    child.append("From: a\r\n\r\nchild\r\n");
    put(&mut *session, &folder, None);
    put(&mut *session, &child, None);
    let place_holder = |id: &UniqueId, name: &str| {
        let mut source = Source::new(&id.to_string(), name);
        source.snapshot.head.mbtype = MboxType("i".into());
        (source.snapshot.head.createdmodseq, source.snapshot.head.foldermodseq) = (ModSeq(1), ModSeq(1));
        Step::Mailbox(Box::new(MailboxUpdate { crcs: SyncCrcs::default(), ..source.update(None) }))
    };
    let none = Bodies::default();
    let mut session = place.open();
    let of_another = place_holder(&"idofanother".into(), &place.name(".A"));
    refused(session.apply(&of_another, &none), "Moved");
    holds(place, &mut *session, &folder);
    // The mailbox was deleted at the source and its child was not.
    for _ in 0..2 {
        session.apply(&place_holder(&folder.snapshot.head.uniqueid, &place.name(".A")), &none).expect("applies");
        let views = session.view_mailboxes(&[folder.snapshot.head.name.clone()]).expect("views");
        assert!(views.iter().all(|view| view.head.mbtype.is_intermediate()), "{views:?}");
        holds(place, &mut *session, &child);
    }
    // And becomes a mailbox again.
    let mut again = place.source(".A");
    again.append("From: a\r\n\r\nagain\r\n");
    match session.apply(&again.step(None), &again.bodies) {
        Ok(()) => {}
        // It has to be said that the place holder goes.
        other => {
            refused(other, "Moved");
            let (uniqueid, name) = (folder.snapshot.head.uniqueid.clone(), folder.snapshot.head.name.clone());
            session.apply(&Step::Remove { uniqueid, name }, &none).expect("removes");
            put(&mut *session, &again, None);
        }
    }
    holds(place, &mut *session, &again);
    // A name nobody had.
    session.apply(&place_holder(&"idofanother".into(), &place.name(".B")), &none).expect("applies");
    let views = session.view_mailboxes(&[place.name(".B").as_str().into()]).expect("views");
    assert!(views.iter().all(|view| view.head.mbtype.is_intermediate()), "{views:?}");
}

fn odd_names_flags_and_values(place: &mut Place) {
    let mut session = place.open();
    place.inbox(&mut *session);
    for name in [
        ".Old Stuff",
        ".a(b)",
        ".a*b",
        ".a@b=c?",
        ".a^b",
        ".100&- more",
        ".&ZeVnLIqe-",
        ".x'y",
        ".#news",
        ".[z]",
        ".~",
        ".NIL",
    ] {
        let mut folder = place.source(name);
        folder.append(&format!("From: a\r\n\r\n{name}\r\n"));
        put(&mut *session, &folder, None);
        holds(place, &mut *session, &folder);
    }
    let mut folder = place.source(".flags");
    folder.snapshot.head.acl = b"anyone\tlr\ta b\tlrs\t-c\tl\t".to_vec();
    folder.append("From: a\r\n\r\n8 bit \u{fc}\u{1f600}\r\nand a bare\nend");
    folder.append("no header at all");
    folder.append("From: a\r\n\r\nnul \0 and )\r\n\"{5}\r\n%{x}\r\n");
    let flags: Vec<String> = (0..128).map(|n| format!("Keyword{n:03}")).collect();
    folder.snapshot.user_flags = flags.iter().map(|flag| Some(flag.as_str().into())).collect();
    folder.touch(1, |record| record.user_flags = u128::MAX);
    let odd = ["$Forwarded", "a:b", "a'b", "a&b", "a[b", "NIL", "a+b"];
    put(&mut *session, &folder, None);
    holds(place, &mut *session, &folder);
    let mut folder = place.source(".odd flags");
    folder.append("From: a\r\n\r\nflags\r\n");
    folder.snapshot.user_flags = odd.iter().map(|flag| Some((*flag).into())).collect();
    folder.touch(1, |record| record.user_flags = 0x7f);
    put(&mut *session, &folder, None);
    holds(place, &mut *session, &folder);
}

fn what_belongs_to_a_user(place: &mut Place) {
    let mut session = place.open();
    let inbox = place.inbox(&mut *session);
    let none = Bodies::default();
    let user = place.user();
    let mut meta = UserMeta::default();
    let mut check = |steps: &[Step], change: &dyn Fn(&mut UserMeta)| {
        for step in steps {
            session.apply(step, &none).unwrap_or_else(|error| panic!("{step:?}: {error}"));
        }
        change(&mut meta);
        let mut got = session.view_user(&user).expect("views").meta;
        for (name, script) in &mut got.sieve {
            // Some releases keep a time of their own.
            if let Some(want) = meta.sieve.get(name) {
                script.last_update = want.last_update;
            }
            script.content.clear();
            script.compiled.clear();
        }
        assert_eq!(got, meta);
    };
    let folder = |name: &str| MboxName::from(place.name(name).as_str());
    for name in ["", ".Sent", ".not there", ".&ZeVnLIqe-"] {
        check(&[Step::Subscribe { user: place.user(), name: folder(name) }], &|meta| {
            meta.subs.insert(folder(name));
        });
    }
    check(&[Step::Subscribe { user: place.user(), name: "user.somebody.else".into() }], &|meta| {
        meta.subs.insert("user.somebody.else".into());
    });
    check(&[Step::Unsubscribe { user: place.user(), name: folder(".Sent") }], &|meta| {
        meta.subs.remove(&folder(".Sent"));
    });
    check(&[Step::Unsubscribe { user: place.user(), name: folder(".never") }], &|_| {});
    for seenuids in ["1:3,7", "", "1:4000000000"] {
        let seen = SeenState { lastread: 1_700_000_000, lastuid: Uid(7), lastchange: 5, seenuids: seenuids.into() };
        let step = Step::Seen { user: place.user(), uniqueid: "some0other0mailbox000000".into(), seen: seen.clone() };
        check(&[step], &|meta| drop(meta.seen.insert("some0other0mailbox000000".into(), seen.clone())));
    }
    let script = |text: &str| SieveScript {
        guid: MessageGuid(Sha1::digest(text).into()),
        last_update: 1_700_000_000,
        ..SieveScript::default()
    };
    let put = |name: &str, text: &str| Step::SievePut {
        user: place.user(),
        name: name.into(),
        last_update: 1_700_000_000,
        content: text.into(),
        // Without it nothing is active on 2.4 and 2.5.
        compiled: b"bytecode".to_vec(),
    };
    let activate = |name: &str| Step::SieveActivate { user: place.user(), name: name.into() };
    let drop_it = |name: &str| Step::SieveRemove { user: place.user(), name: name.into() };
    check(&[put("main", "keep;\n")], &|meta| drop(meta.sieve.insert("main".into(), script("keep;\n"))));
    check(&[activate("main")], &|meta| meta.active = Some("main".into()));
    // Replaced while it is active, by a longer one with all that must not end a line.
    let long = format!("require [\"fileinto\"];\r\n# {}\n\"%{{5}}\";", "\u{fc}\"({ ".repeat(900));
    let long = long.replace("\"%{5}\";", "keep;\n");
    check(&[put("main", &long)], &|meta| drop(meta.sieve.insert("main".into(), script(&long))));
    check(&[put("other one", "discard;\n")], &|meta| drop(meta.sieve.insert("other one".into(), script("discard;\n"))));
    check(&[activate("other one")], &|meta| meta.active = Some("other one".into()));
    check(&[drop_it("main"), drop_it("never")], &|meta| drop(meta.sieve.remove(&SieveName::from("main"))));
    check(&[Step::SieveDeactivate { user: place.user() }], &|meta| meta.active = None);
    check(&[drop_it("other one")], &|meta| meta.sieve.clear());
    holds(place, &mut *session, &inbox);
}

fn limits(limits: &[(QuotaResource, u64)]) -> QuotaLimits {
    QuotaLimits { limits: limits.iter().copied().collect(), modseq: 0 }
}

fn quota_limits_come_change_and_go(place: &mut Place) {
    let mut session = place.open();
    place.inbox(&mut *session);
    let none = Bodies::default();
    let root = QuotaRoot::new(place.user().inbox());
    assert_eq!(session.view_quota(&root).expect("views"), None);
    use QuotaResource::{AnnotationStorage, Message, NumFolders, Storage};
    for set in [
        &[(Storage, 100_000)][..],
        &[(Storage, 100_000), (Message, 500)],
        &[(Message, 0)],
        &[],
        &[(Storage, 0), (NumFolders, 7), (AnnotationStorage, 9)],
        // 2.4 counts them in an int.
        &[(Storage, if place.caps().quota_resources { 4_000_000_000 } else { 2_000_000_000 })],
    ] {
        let set: Vec<_> = set.iter().filter(|one| place.caps().quota_resources || one.0 == Storage).copied().collect();
        let set = set.as_slice();
        session.apply(&Step::Quota { root: root.clone(), limits: limits(set) }, &none).expect("sets");
        let want = limits(set).limits;
        assert_eq!(session.view_quota(&root).expect("views").map(|quota| quota.limits), Some(want.clone()));
        let account = session.view_user(&place.user()).expect("views").quotas;
        assert_eq!(account.get(&root).map(|quota| &quota.limits), Some(&want));
    }
    session.apply(&Step::Unquota { root: root.clone() }, &none).expect("removes");
    assert_eq!(session.view_quota(&root).expect("views"), None);
}

fn annotations_of_mailbox_message_and_server(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let note = |entry: &str, userid: &str, value: &str, modseq: ModSeq| Annotation {
        entry: entry.into(),
        userid: userid.into(),
        value: value.into(),
        modseq,
    };
    let since = inbox.since();
    let values = ["gr\u{fc}n", "two\r\nlines", "a\"b\\c%d{5}", "NIL", &"x".repeat(3000)];
    // To 2.4 that value means that there is none.
    let values: Vec<&str> =
        values.into_iter().filter(|value| place.caps().message_annotations || *value != "NIL").collect();
    inbox.touch(1, |record| {
        let mut all: Vec<_> = values
            .iter()
            .enumerate()
            .map(|(n, value)| note("/comment", &format!("w{n}"), value, record.modseq))
            .collect();
        all.push(note("/comment", "", "shared", record.modseq));
        all.push(note("/altsubject", "", "zzz", record.modseq));
        all.sort();
        record.annotations = all;
        (record.cid, record.savedate, record.createdmodseq) = (0xabc_0000_0001, 1_700_000_000, ModSeq(2));
    });
    put(&mut *session, &inbox, Some(since));
    if place.caps().message_annotations {
        holds(place, &mut *session, &inbox);
    }
    let since = inbox.since();
    inbox.touch(1, |record| record.annotations.truncate(2));
    put(&mut *session, &inbox, Some(since));
    if !place.caps().message_annotations {
        // They were sent to somebody who passes over them; the engine tells the loss before.
        let record = &mut inbox.snapshot.records[0];
        (record.cid, record.savedate, record.createdmodseq, record.annotations) = (0, 0, ModSeq(0), Vec::new());
    }
    holds(place, &mut *session, &inbox);
    let since = inbox.since();
    inbox.snapshot.head.highestmodseq.0 += 1;
    let modseq = inbox.snapshot.head.highestmodseq;
    let mut all: Vec<_> =
        values.iter().enumerate().map(|(n, value)| note("/comment", &format!("w{n}"), value, modseq)).collect();
    all.push(note("/vendor/cmu/cyrus-imapd/expire", "", "7", modseq));
    all.sort();
    inbox.snapshot.annotations = all;
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
    let since = inbox.since();
    inbox.snapshot.head.highestmodseq.0 += 1;
    inbox.snapshot.annotations.truncate(1);
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
    let since = inbox.since();
    inbox.snapshot.head.highestmodseq.0 += 1;
    inbox.snapshot.annotations.clear();
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
    let none = Bodies::default();
    // 2.4 takes only what is defined.
    let entry =
        if place.caps().message_annotations { format!("/vendor/test/{}", place.user) } else { "/comment".into() };
    let mine = |session: &mut dyn Replica| -> Vec<(UserId, Vec<u8>)> {
        let all = session.view_server_annotations().expect("views");
        all.into_iter().filter(|note| note.entry == entry.as_bytes()).map(|note| (note.userid, note.value)).collect()
    };
    for value in ["one", "gr\u{fc}n\r\n%"] {
        session.apply(&Step::ServerAnnotation(note(&entry, "", value, ModSeq(0))), &none).expect("sets");
        assert_eq!(mine(&mut *session), [(UserId::default(), value.as_bytes().to_vec())]);
    }
    let remove = Step::RemoveServerAnnotation { entry: entry.clone().into_bytes(), userid: UserId::default() };
    for _ in 0..2 {
        session.apply(&remove, &none).expect("removes");
        assert_eq!(mine(&mut *session), []);
    }
}

fn more_messages_than_one_request_takes(place: &mut Place) {
    let mut session = place.open();
    let mut inbox = place.inbox(&mut *session);
    let since = inbox.since();
    for n in 0..1500 {
        inbox.append(&format!("From: a\r\nSubject: {n}\r\n\r\n{n}\r\n"));
    }
    // The same message again and again is one body.
    for _ in 0..50 {
        inbox.append("From: a\r\n\r\nalways the same\r\n");
    }
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
    session.restart().expect("restarts");
    let since = inbox.since();
    inbox.append("From: a\r\n\r\nalways the same\r\n");
    put(&mut *session, &inbox, Some(since));
    holds(place, &mut *session, &inbox);
}
