//! The engine with a source and a replica in memory: names, conflicts, cuts, random histories.

mod fuses;
mod older;
mod scans;

use super::fake::{Content, FakeStore, FakeTarget};
use super::*;
use crate::model::*;
use crate::state::State;
use proptest::prelude::*;
use std::collections::BTreeMap;

pub(super) struct Rig {
    pub(super) store: Arc<FakeStore>,
    pub(super) target: Arc<FakeTarget>,
    engine: Option<Engine>,
    state: Option<State>,
    dir: tempfile::TempDir,
    allow_loss: bool,
    scan_pace: ScanPace,
    pub(super) removal_delay: Duration,
}

impl Rig {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut rig = Self {
            store: Arc::default(),
            target: Arc::default(),
            engine: None,
            state: None,
            dir,
            allow_loss: false,
            scan_pace: ScanPace::default(),
            removal_delay: Duration::ZERO,
        };
        rig.start();
        rig
    }

    pub(super) fn stop(&mut self) {
        self.engine.take().expect("runs").stop(Duration::from_secs(5));
        self.state.take();
    }

    pub(super) fn start(&mut self) {
        let state = State::open(self.dir.path(), "fake").expect("state");
        let options = super::Options {
            lanes: 2,
            backoff: Backoff { first: Duration::from_millis(1), most: Duration::from_millis(5) },
            allow_loss: self.allow_loss,
            scan_pace: self.scan_pace,
            removal_delay: self.removal_delay,
            ..super::Options::default()
        };
        let store: Arc<dyn MailStore> = self.store.clone();
        let target: Arc<dyn ReplicaTarget> = self.target.clone();
        let targets = vec![(target, state.replica("fake"))];
        self.state = Some(state);
        self.engine = Some(Engine::start(store, targets, &options, Arc::new(|_| {})));
    }

    pub(super) fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("runs")
    }

    /// Tells the engine what a watcher would, and waits.
    pub(super) fn sync(&self) {
        self.notice(DirtyKey::MailboxList);
        let ids: Vec<_> = self.store.0.lock().expect("lock").mailboxes.keys().cloned().collect();
        for id in ids {
            self.notice(DirtyKey::Mailbox(MailboxRef::Id(id)));
        }
        self.notice(DirtyKey::AllQuotas);
        assert!(self.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", self.engine().stats());
    }

    pub(super) fn notice(&self, key: DirtyKey) {
        self.engine().notify(vec![Notice { key, seen_at: Instant::now() }]);
    }

    /// Names, uniqueids, uids and flags of both sides.
    fn differences(&self) -> Vec<String> {
        type Seen = BTreeMap<String, (String, Vec<(u32, u32, MessageGuid)>)>;
        let see = |head: &MailboxHead, records: &[Record]| {
            let live = records.iter().filter(|record| !record.is_expunged());
            let live = live.map(|record| (record.uid.0, record.system_flags.0, record.guid)).collect();
            (head.name.to_string(), (head.uniqueid.to_string(), live))
        };
        let source: Seen =
            self.store.0.lock().expect("lock").mailboxes.values().map(|m| see(&m.head, &m.records)).collect();
        let held = self.target.held.lock().expect("lock");
        let replica: Seen =
            held.mailboxes.values().map(|m| see(&m.head, m.records.as_deref().unwrap_or_default())).collect();
        let mut out = Vec::new();
        for name in source.keys().chain(replica.keys()) {
            if source.get(name) != replica.get(name) {
                out.push(format!("{name}: source {:?}, replica {:?}", source.get(name), replica.get(name)));
            }
        }
        out.extend(self.engine().stats()[0].queue.failed.iter().map(|failure| format!("{failure:?}")));
        out
    }

    fn verified(&self) -> VerifyReport {
        let (caps, mut session) = (self.target.capabilities(), self.target.open().expect("opens"));
        let extent = super::Extent::default();
        super::verify(&*self.store, &mut *session, &caps, None, extent, &mut |_, _| ()).expect("verifies")
    }

    pub(super) fn assert_equal(&self) {
        assert_eq!(self.differences(), Vec::<String>::new());
    }
}

pub(super) fn make(content: &mut Content, id: &str, name: &str, messages: u32) {
    let mut mailbox = MailboxSnapshot {
        head: MailboxHead {
            uniqueid: id.into(),
            name: name.into(),
            partition: "default".into(),
            uidvalidity: 1,
            highestmodseq: ModSeq(1),
            ..MailboxHead::default()
        },
        minor_version: 17,
        ..MailboxSnapshot::default()
    };
    (0..messages).for_each(|_| append(&mut mailbox));
    content.mailboxes.insert(id.into(), mailbox);
}

fn append(mailbox: &mut MailboxSnapshot) {
    let head = &mut mailbox.head;
    head.last_uid.0 += 1;
    head.highestmodseq.0 += 1;
    let text = super::fake::text_of(&head.uniqueid, head.last_uid);
    let (guid, _) = super::held::guid_of(text.as_bytes()).expect("is read");
    mailbox.records.push(Record {
        uid: head.last_uid,
        modseq: head.highestmodseq,
        last_updated: 1_600_000_000,
        size: 10,
        guid,
        ..Record::default()
    });
}

fn flag(mailbox: &mut MailboxSnapshot, at: usize, bits: u32) {
    let count = mailbox.records.len();
    let Some(record) = mailbox.records.get_mut(at % count.max(1)).filter(|record| !record.is_expunged()) else {
        return;
    };
    mailbox.head.highestmodseq.0 += 1;
    record.modseq = mailbox.head.highestmodseq;
    record.system_flags.0 ^= bits;
}

fn rename(content: &mut Content, id: &str, to: &str) {
    let mailbox = content.mailboxes.get_mut(&UniqueId::from(id)).expect("is there");
    mailbox.head.name = to.into();
    mailbox.head.highestmodseq.0 += 1;
}

#[test]
fn a_mailbox_that_was_only_read_is_not_read_by_us() {
    // Fails when `Accessed` is taken for `Mailbox`.
    let rig = Rig::new();
    rig.store.change(|content| make(content, "inbox-a", "user.a", 2));
    rig.sync();
    let readings = || rig.store.change(|content| content.readings);
    let access = || {
        for mailbox in [MailboxRef::Id("inbox-a".into()), MailboxRef::Name("inbox-a".into())] {
            rig.notice(DirtyKey::Accessed(mailbox));
        }
        assert!(rig.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", rig.engine().stats());
    };
    let before = readings();
    access();
    assert_eq!(readings(), before);
    rig.store.change(|content| append(content.mailboxes.get_mut(&UniqueId::from("inbox-a")).expect("is there")));
    access();
    assert_eq!(readings(), before + 1);
    rig.assert_equal();
}

#[test]
fn what_changes_between_the_reading_and_the_receipt_is_found() {
    // Fails when `content` takes the fingerprint after the reading: the receipt then vouches for what nobody has read.
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "inbox-a", "user.a", 2);
        content.after_reading = Some(append);
    });
    rig.notice(DirtyKey::MailboxList);
    assert!(rig.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", rig.engine().stats());
    assert_ne!(rig.differences(), Vec::<String>::new(), "one message is not there yet");
    // Its own event may be lost; both ways of finding out without one have to work.
    rig.notice(DirtyKey::Rescan(Scope::Everything));
    assert!(rig.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", rig.engine().stats());
    rig.assert_equal();
    rig.store.change(|content| {
        append(content.mailboxes.get_mut(&UniqueId::from("inbox-a")).expect("is there"));
        content.after_reading = Some(append);
    });
    for _ in 0..2 {
        rig.notice(DirtyKey::Accessed(MailboxRef::Id("inbox-a".into())));
        assert!(rig.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", rig.engine().stats());
    }
    rig.assert_equal();
}

#[test]
fn a_mailbox_deleted_and_created_again_is_another_one_though_the_hint_is_one() {
    // Fails when `Pusher::remove` only forgets what has left the list.
    // Not shown to fail yet: it passes when the router compares the list by name instead of by uniqueid.
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "inbox-a", "user.a", 1);
        make(content, "1", "user.a.one", 2);
    });
    rig.sync();
    rig.store.change(|content| {
        content.mailboxes.remove(&UniqueId::from("1"));
        make(content, "2", "user.a.one", 2);
    });
    rig.notice(DirtyKey::MailboxList);
    rig.notice(DirtyKey::Mailbox(MailboxRef::Name("user.a.one".into())));
    assert!(rig.engine().settle(8, Some(Duration::from_secs(10))), "{:?}", rig.engine().stats());
    rig.assert_equal();
}

#[test]
fn names_are_freed_before_they_are_taken() {
    let rig = Rig::new();
    rig.store.change(|content| {
        for user in ["a", "b"] {
            make(content, &format!("inbox-{user}"), &format!("user.{user}"), 2);
        }
        make(content, "1", "user.a.one", 1);
        make(content, "2", "user.a.two", 2);
        make(content, "3", "user.b.three", 3);
        make(content, "4", "news.x", 1);
    });
    rig.sync();
    rig.assert_equal();
    // A chain, a swap, a move between users and one into a shared tree, all seen at once.
    rig.store.change(|content| {
        rename(content, "1", "user.b.three");
        rename(content, "3", "user.a.two");
        rename(content, "2", "user.a.one");
        rename(content, "4", "user.b.news");
    });
    rig.sync();
    rig.assert_equal();
    rig.store.change(|content| {
        rename(content, "1", "user.a.one");
        rename(content, "2", "user.b.three");
    });
    rig.sync();
    rig.assert_equal();
    assert_eq!(rig.target.held.lock().expect("lock").bodies_received, 11, "nothing was sent twice");
}

#[test]
fn a_deleted_and_recreated_name_is_another_mailbox() {
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "old", "user.a.x", 3);
    });
    rig.sync();
    rig.store.change(|content| {
        content.mailboxes.remove(&UniqueId::from("old"));
        make(content, "new", "user.a.x", 1);
    });
    rig.sync();
    rig.assert_equal();
}

#[test]
fn a_folder_that_the_replica_made_goes_with_what_it_was_made_for() {
    let mut rig = Rig::new();
    rig.target.held.lock().expect("lock").modern = true;
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "one", "user.a.x.y.z", 1);
        make(content, "two", "user.a.x.v", 1);
        make(content, "three", "user.a.full.z", 1);
        make(content, "four", "user.a.late.z", 1);
    });
    rig.sync();
    let there = |name: &str| rig.target.held.lock().expect("lock").mailboxes.contains_key(&MboxName::from(name));
    assert!(there("user.a.x") && there("user.a.x.y") && there("user.a.full") && there("user.a.late"));
    // While they have to be there they are no difference.
    let report = rig.verified();
    let made: Vec<(&str, &str)> =
        report.made_there.iter().map(|(name, below)| (name.as_str(), below.as_str())).collect();
    let expected = [
        ("user.a.full", "user.a.full.z"),
        ("user.a.late", "user.a.late.z"),
        ("user.a.x", "user.a.x.v"),
        ("user.a.x.y", "user.a.x.y.z"),
    ];
    assert_eq!(made, expected);
    assert!(report.differences.is_empty(), "{report:?}");
    rig.store.change(|content| {
        rename(content, "one", "user.a.z");
        content.mailboxes.remove(&UniqueId::from("three"));
        make(content, "parent", "user.a.late", 2);
    });
    rig.target
        .held
        .lock()
        .expect("lock")
        .mailboxes
        .get_mut(&MboxName::from("user.a.full"))
        .expect("is there")
        .head
        .last_uid = Uid(1);
    rig.sync();
    // Something is still below it; somebody has put mail into it.
    assert!(there("user.a.x") && !there("user.a.x.y") && there("user.a.full"));
    rig.target.held.lock().expect("lock").mailboxes.remove(&MboxName::from("user.a.full"));
    // The next life has not seen how it was made.
    rig.engine.take().expect("runs").stop(Duration::from_secs(5));
    rig.state = None;
    rig.start();
    rig.engine().scan();
    rig.store.change(|content| drop(content.mailboxes.remove(&UniqueId::from("two"))));
    rig.sync();
    rig.assert_equal();
}

#[test]
fn a_subscription_does_not_come_before_the_inbox() {
    let rig = Rig::new();
    rig.target.held.lock().expect("lock").modern = true;
    let meta = UserMeta { subs: [MboxName::from("user.a")].into(), ..UserMeta::default() };
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        content.metas.insert(UserId::new("a"), meta.clone());
    });
    rig.notice(DirtyKey::User(UserRef::Name(UserId::new("a")), UserPart::Subs));
    assert!(rig.engine().settle(8, Some(Duration::from_secs(10))));
    rig.sync();
    rig.assert_equal();
    assert_eq!(rig.target.held.lock().expect("lock").metas.get(&UserId::new("a")), Some(&meta));
}

/// The replica has `user.a.kept`, with mail, of which the source knows nothing.
fn hold_a_stray(rig: &Rig) {
    let mut other = Content::default();
    make(&mut other, "i", "user.a", 1);
    make(&mut other, "stray", "user.a.kept", 2);
    for mailbox in other.mailboxes.values() {
        let mut view = MailboxView { head: mailbox.head.clone(), ..MailboxView::default() };
        view.records = Some(mailbox.records.clone());
        let crcs = diff::crcs(mailbox, &super::fake::CAPS);
        (view.crc_basic, view.crc_annot) = (Some(crcs.basic), Some(crcs.annot));
        rig.target.held.lock().expect("lock").mailboxes.insert(mailbox.head.name.clone(), view);
    }
}

/// A job has a list of its own, and works for a while: a folder may come and be read in meanwhile. What was left out because
/// its mailbox was not in the list was believed to be there, and never said.
#[test]
fn what_is_read_in_a_mailbox_that_came_meanwhile_is_not_missed() {
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "inbox-a", "user.a", 1);
        content.metas.insert(UserId::new("a"), UserMeta::default());
    });
    rig.sync();
    rig.store.change(|content| {
        content.before_meta = Some(|content| {
            make(content, "later", "shared.later", 1);
            let seen = SeenState { seenuids: b"1".to_vec(), ..SeenState::default() };
            content.metas.entry(UserId::new("a")).or_default().seen.insert("later".into(), seen);
        });
    });
    rig.notice(DirtyKey::User(UserRef::Name(UserId::new("a")), UserPart::Seen));
    assert!(rig.engine().settle(8, Some(Duration::from_secs(10))));
    rig.sync();
    rig.assert_equal();
    let held = rig.target.held.lock().expect("lock");
    let seen = &held.metas.get(&UserId::new("a")).expect("has data").seen;
    assert_eq!(seen.get(&"later".into()).map(|seen| seen.seenuids.as_slice()), Some(b"1".as_slice()));
}

#[test]
fn what_was_begun_before_a_death_is_not_in_the_way_after_it() {
    let rig = Rig::new();
    hold_a_stray(&rig);
    rig.state.as_ref().expect("is open").replica("fake").begin_mailbox(&"stray".into(), None);
    rig.store.change(|content| {
        make(content, "i", "user.a", 3);
        make(content, "mine", "user.a.kept", 1);
    });
    rig.sync();
    rig.assert_equal();
}

/// Nobody tells the engine anything, and yet both sides are equal before long.
fn heals(rig: &Rig) {
    assert_ne!(rig.differences(), Vec::<String>::new());
    let deadline = Instant::now() + Duration::from_secs(8);
    while !rig.differences().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    rig.assert_equal();
}

#[test]
fn what_a_lost_session_still_does_behind_our_back_is_found() {
    let rig = Rig::new();
    rig.store.change(|content| make(content, "i", "user.a", 3));
    rig.sync();
    let old = rig.target.held.lock().expect("lock").mailboxes.clone();
    rig.target.held.lock().expect("lock").lose_in = Some(0);
    rig.store.change(|content| content.mailboxes.values_mut().for_each(append));
    rig.sync();
    rig.assert_equal();
    // Now the server comes to what the first session had asked for.
    rig.target.held.lock().expect("lock").mailboxes = old;
    heals(&rig);
}

#[test]
fn what_a_dead_life_still_does_behind_the_back_of_the_next_is_found() {
    let mut rig = Rig::new();
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "s", "shared.x", 1);
    });
    rig.sync();
    let old = rig.target.held.lock().expect("lock").mailboxes.clone();
    for lane in [Lane::User("a".into()), Lane::Shared("shared".into())] {
        let replica = rig.state.as_ref().expect("is open").replica("fake");
        replica.at_work(&postcard::to_stdvec(&lane).expect("packs")).expect("is written").keep();
    }
    rig.store.change(|content| content.mailboxes.retain(|_, mailbox| mailbox.head.name.owner().is_some()));
    rig.engine.take().expect("runs").stop(Duration::from_secs(5));
    rig.state = None;
    rig.start();
    rig.engine().scan();
    rig.sync();
    rig.assert_equal();
    // The shared mailbox comes again, and nothing but its name from before tells where to look for it.
    rig.target.held.lock().expect("lock").mailboxes = old;
    heals(&rig);
}

#[test]
fn what_only_the_replica_has_is_left_alone() {
    let rig = Rig::new();
    hold_a_stray(&rig);
    rig.store.change(|content| make(content, "i", "user.a", 3));
    rig.sync();
    assert_eq!(rig.differences().len(), 1, "{:?}", rig.differences());
    assert!(rig.target.held.lock().expect("lock").mailboxes.contains_key(&MboxName::from("user.a.kept")));
    // A name held by mail that is not ours is a conflict for that mailbox alone.
    rig.store.change(|content| {
        make(content, "mine", "user.a.kept", 1);
        make(content, "other", "user.a.other", 1);
    });
    rig.notice(DirtyKey::MailboxList);
    rig.engine().settle(2, Some(Duration::from_secs(20)));
    let stats = rig.engine().stats();
    assert!(stats[0].queue.failed.iter().any(|failure| failure.quarantined && failure.reason.contains("taken")));
    assert!(rig.target.held.lock().expect("lock").mailboxes.contains_key(&MboxName::from("user.a.other")));
}

#[test]
fn one_bad_mailbox_stops_nobody() {
    let rig = Rig::new();
    rig.target.held.lock().expect("lock").refuse.insert("user.a.bad".into());
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "bad", "user.a.bad", 1);
        make(content, "good", "user.a.good", 1);
        make(content, "j", "user.b", 1);
    });
    rig.notice(DirtyKey::MailboxList);
    rig.engine().settle(2, Some(Duration::from_secs(20)));
    assert_eq!(rig.target.held.lock().expect("lock").mailboxes.len(), 3);
    rig.target.held.lock().expect("lock").refuse.clear();
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.engine().settle(1, Some(Duration::from_secs(20))));
    rig.assert_equal();
}

#[test]
fn changes_made_on_the_replica_are_overruled_and_its_mail_is_kept() {
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "i", "user.a", 3);
        make(content, "f", "user.a.f", 3);
    });
    rig.sync();
    {
        let mut held = rig.target.held.lock().expect("lock");
        let inbox = held.mailboxes.get_mut(&MboxName::from("user.a")).expect("there");
        inbox.head.highestmodseq.0 += 3;
        let modseq = inbox.head.highestmodseq;
        let record = &mut inbox.records.as_mut().expect("records")[0];
        record.modseq = modseq;
        record.system_flags.0 |= SystemFlags::FLAGGED;
        let folder = held.mailboxes.get_mut(&MboxName::from("user.a.f")).expect("there");
        folder.head.last_uid.0 += 1;
        folder.head.highestmodseq.0 += 1;
        let mut record = folder.records.as_ref().expect("records")[0].clone();
        record.uid = folder.head.last_uid;
        record.guid = MessageGuid([9; 20]);
        folder.records.as_mut().expect("records").push(record);
    }
    rig.store.change(|content| content.mailboxes.values_mut().for_each(append));
    rig.sync();
    let held = rig.target.held.lock().expect("lock");
    let names: Vec<String> = held.mailboxes.keys().map(ToString::to_string).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    let kept = held.mailboxes.values().find(|view| view.head.name.to_string().contains("replica-only")).expect("kept");
    assert_eq!(kept.records.as_ref().expect("records")[0].guid, MessageGuid([9; 20]));
    let inbox = &held.mailboxes[&MboxName::from("user.a")];
    assert_eq!(inbox.records.as_ref().expect("records")[0].system_flags.0 & SystemFlags::FLAGGED, 0);
    drop(held);
    // And the next ordinary change goes the ordinary way.
    rig.store.change(|content| flag(content.mailboxes.get_mut(&UniqueId::from("i")).expect("i"), 1, SystemFlags::SEEN));
    rig.sync();
    assert_eq!(rig.differences().len(), 1, "{:?}", rig.differences());
}

#[test]
fn what_the_source_has_lost_is_kept_when_its_mailbox_is_made_anew() {
    let rig = Rig::new();
    let (id, name) = (UniqueId::from("f"), MboxName::from("user.a.f"));
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "f", "user.a.f", 3);
    });
    rig.sync();
    let lost = {
        let mut held = rig.target.held.lock().expect("lock");
        let folder = held.mailboxes.get_mut(&name).expect("there");
        // It has a UID that the source has not reached.
        folder.head.last_uid.0 += 2;
        folder.records.as_ref().expect("records")[1].guid
    };
    rig.store.change(|content| {
        append(content.mailboxes.get_mut(&id).expect("f"));
        content.lost.insert(id.clone(), std::collections::BTreeSet::from([Uid(2)]));
    });
    rig.sync();
    let held = rig.target.held.lock().expect("lock");
    let guids = |view: &MailboxView| -> Vec<MessageGuid> {
        view.records.iter().flatten().filter(|record| !record.is_expunged()).map(|record| record.guid).collect()
    };
    let kept = held.mailboxes.values().find(|view| view.head.name.to_string().contains("replica-only")).expect("kept");
    assert_eq!(guids(kept), [lost]);
    assert_eq!(
        held.mailboxes[&name].records.iter().flatten().map(|record| record.uid.0).collect::<Vec<_>>(),
        [1, 3, 4]
    );
    drop(held);
    let failed = rig.engine().stats().remove(0).queue.failed;
    assert!(matches!(&failed[..], [one] if one.reason.contains("UID 2: 2. is missing")), "{failed:?}");
}

#[derive(Clone, Debug)]
enum Change {
    Make(u8, u8),
    Append(u8),
    Flag(u8, u8),
    Expunge(u8, u8),
    Rename(u8, u8, u8),
    Delete(u8),
    Cut(u8),
    Restart,
    Sync,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => (0..3u8, 0..6u8).prop_map(|(user, name)| Change::Make(user, name)),
        4 => any::<u8>().prop_map(Change::Append),
        3 => any::<(u8, u8)>().prop_map(|(mailbox, at)| Change::Flag(mailbox, at)),
        2 => any::<(u8, u8)>().prop_map(|(mailbox, at)| Change::Expunge(mailbox, at)),
        3 => (any::<u8>(), 0..3u8, 0..6u8).prop_map(|(mailbox, user, name)| Change::Rename(mailbox, user, name)),
        2 => any::<u8>().prop_map(Change::Delete),
        2 => (0..6u8).prop_map(Change::Cut),
        1 => Just(Change::Restart),
        3 => Just(Change::Sync),
    ]
}

fn act(rig: &mut Rig, change: &Change, fresh: &mut u32) {
    let name = |user: u8, name: u8| format!("user.u{user}.f{name}");
    let pick = |content: &Content, at: u8| {
        let folders: Vec<UniqueId> =
            content.mailboxes.values().filter(|m| !m.head.name.is_inbox()).map(|m| m.head.uniqueid.clone()).collect();
        folders.get(at as usize % folders.len().max(1)).cloned()
    };
    let taken = |content: &Content, name: &str| content.mailboxes.values().any(|m| m.head.name == MboxName::from(name));
    match change {
        Change::Make(user, folder) => rig.store.change(|content| {
            let name = name(*user, *folder);
            if !taken(content, &name) {
                *fresh += 1;
                make(content, &format!("id{fresh}"), &name, 1);
            }
        }),
        Change::Append(at) => rig.store.change(|content| {
            if let Some(id) = pick(content, *at) {
                append(content.mailboxes.get_mut(&id).expect("picked"));
            }
        }),
        Change::Flag(at, record) => rig.store.change(|content| {
            if let Some(id) = pick(content, *at) {
                flag(content.mailboxes.get_mut(&id).expect("picked"), *record as usize, SystemFlags::FLAGGED);
            }
        }),
        Change::Expunge(at, record) => rig.store.change(|content| {
            if let Some(id) = pick(content, *at) {
                let mailbox = content.mailboxes.get_mut(&id).expect("picked");
                flag(mailbox, *record as usize, SystemFlags::EXPUNGED);
                if record % 3 == 0 {
                    let gone: Vec<ModSeq> =
                        mailbox.records.iter().filter(|r| r.is_expunged()).map(|r| r.modseq).collect();
                    mailbox.records.retain(|record| !record.is_expunged());
                    mailbox.deletedmodseq = gone.into_iter().max().unwrap_or(mailbox.deletedmodseq);
                }
            }
        }),
        Change::Rename(at, user, folder) => rig.store.change(|content| {
            let name = name(*user, *folder);
            if let Some(id) = pick(content, *at).filter(|_| !taken(content, &name)) {
                rename(content, &id.to_string(), &name);
            }
        }),
        Change::Delete(at) => rig.store.change(|content| {
            if let Some(id) = pick(content, *at) {
                content.mailboxes.remove(&id);
            }
        }),
        Change::Cut(after) => rig.target.held.lock().expect("lock").lose_in = Some(*after as usize),
        Change::Restart => {
            rig.engine.take().expect("runs").stop(Duration::from_secs(5));
            rig.state = None;
            rig.start();
            rig.engine().scan();
        }
        Change::Sync => rig.sync(),
    }
}

#[test]
fn an_annotation_that_follows_its_mailbox_late_is_not_missed() {
    let rig = Rig::new();
    let change = |name: &str, annotations: Vec<Annotation>| {
        rig.store.change(|content| {
            content.mailboxes.values_mut().for_each(|mailbox| {
                (mailbox.head.name, mailbox.annotations) = (name.into(), annotations.clone());
            });
        });
    };
    let mine = vec![Annotation { entry: b"/comment".to_vec(), value: b"x".to_vec(), ..note() }];
    rig.store.change(|content| make(content, "i", "shared.a", 1));
    change("shared.a", mine.clone());
    rig.engine().scan();
    rig.sync();
    // Its row is renamed first, its annotations some moments later; who looks at the annotations alone sees nothing happen.
    for (annotations, key) in [(vec![], DirtyKey::MailboxList), (mine.clone(), DirtyKey::Annotations)] {
        change("shared.b", annotations.clone());
        rig.notice(key);
        assert!(rig.engine().settle(8, Some(Duration::from_secs(20))), "{:?}", rig.engine().stats());
        let held = rig.target.held.lock().expect("lock");
        assert_eq!(held.mailboxes[&MboxName::from("shared.b")].annotations, annotations);
    }
}

fn note() -> Annotation {
    Annotation { entry: Vec::new(), userid: UserId::from(""), value: Vec::new(), modseq: ModSeq(0) }
}

/// More with `SPOOLTAP_CASES`.
fn cases() -> u32 {
    std::env::var("SPOOLTAP_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_history_with_cuts_and_restarts_ends_equal(changes in prop::collection::vec(change(), 1..40)) {
        let mut rig = Rig::new();
        rig.store.change(|content| (0..3).for_each(|user| make(content, &format!("i{user}"), &format!("user.u{user}"), 1)));
        rig.sync();
        let mut fresh = 0;
        for change in &changes {
            act(&mut rig, change, &mut fresh);
        }
        rig.target.held.lock().expect("lock").lose_in = None;
        rig.sync();
        rig.sync();
        let differences = rig.differences();
        prop_assert!(differences.is_empty(), "{:#?}", differences);
    }
}
