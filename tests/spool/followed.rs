//! A store that followed its databases from transaction to transaction knows what one knows that reads them afresh, and
//! what it says to have changed is what has changed.

use spooltap::model::{Listing, MailStore, MailboxEntry, MailboxRef, UniqueId};
use spooltap::replay::{Player, Recording, Speed};
use spooltap::spool::open_store;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Entries = BTreeMap<UniqueId, Arc<MailboxEntry>>;

fn entries(listing: &Listing) -> Entries {
    listing.entries().map(|entry| (entry.uniqueid.clone(), entry.clone())).collect()
}

#[test]
fn what_is_followed_is_what_is_read_afresh() {
    let (mut marks, mut changes, mut noted) = (0, 0, 0);
    for path in super::recordings() {
        let dir = tempfile::tempdir().expect("directory");
        let recording = Recording::open(&path).expect("recording");
        let conf = recording.unpack(dir.path()).expect("unpacks");
        let store = open_store(&conf).expect("opens");
        let mut player = Player::new(&recording, dir.path());
        let mut before = Arc::<Listing>::default();
        let mut annotated = BTreeMap::new();
        while let Some(mark) = player.next_mark(Speed::Asap).expect("plays") {
            let at = format!("{} step {}", path.display(), mark.step);
            let fresh = open_store(&conf).expect("opens");
            let (now, afresh) = (store.listing().expect("lists"), fresh.listing().expect("lists"));
            assert_eq!(entries(&now), entries(&afresh), "{at}");
            assert!(now.entries().map(|entry| &entry.name).is_sorted(), "{at}");
            assert_eq!(now.unreadable, afresh.unreadable, "{at}");
            for entry in now.entries().chain(before.entries()) {
                assert_eq!(now.by_name(&entry.name).is_some(), afresh.by_name(&entry.name).is_some(), "{at}");
                assert_eq!(now.is_tombstone(&entry.uniqueid), afresh.is_tombstone(&entry.uniqueid), "{at}");
            }
            let (old, new) = (entries(&before), entries(&now));
            let ids: BTreeSet<&UniqueId> = old.keys().chain(new.keys()).collect();
            let differ: Vec<_> = ids.into_iter().filter(|id| old.get(*id) != new.get(*id)).collect();
            let told: Vec<_> = now
                .since(&before)
                .filter_map(|(was, is)| is.or(was).filter(|_| was != is))
                .map(|entry| &entry.uniqueid)
                .collect();
            assert_eq!(told, differ, "{at}");
            changes += differ.len();

            let here = store.annotated_mailboxes().expect("reads");
            assert_eq!(here, fresh.annotated_mailboxes().expect("reads"), "{at}");
            let told = store.changed_annotations().expect("reads").mailboxes;
            for (id, entry) in &new {
                let is_told =
                    told.contains(&MailboxRef::Id(id.clone())) || told.contains(&MailboxRef::Name(entry.name.clone()));
                // One whose name has changed is looked at for that.
                if here.get(id) != annotated.get(id) && old.get(id).is_some_and(|old| old.name == entry.name) {
                    assert!(is_told, "{at}: annotations of {}: {told:?}", entry.name);
                    noted += 1;
                }
            }
            (before, annotated) = (now.clone(), here);
            marks += 1;
        }
    }
    assert!(marks > 50 && changes > 50 && noted > 3, "{marks} marks, {changes} changes, {noted} of annotations");
}
