//! Removals by accident.

use super::*;

#[test]
fn a_mass_removal_trips_the_fuse() {
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        (0..200).for_each(|n| make(content, &format!("m{n}"), &format!("user.a.m{n}"), 0));
    });
    rig.sync();
    rig.store
        .change(|content| (0..90).for_each(|n| drop(content.mailboxes.remove(&UniqueId::from(&*format!("m{n}"))))));
    rig.notice(DirtyKey::MailboxList);
    rig.engine().settle(1, Some(Duration::from_secs(20)));
    let left = rig.target.held.lock().expect("lock").mailboxes.len();
    assert!((150..=152).contains(&left), "{left} mailboxes are left");
    assert!(rig.engine().stats()[0].queue.failed.iter().all(|failure| failure.reason.contains("spooltap allow")));
    assert!(rig.engine().stats()[0].fuse.is_some());
    let count = rig.engine().allow_removals(None, Duration::from_secs(60)).expect("allows");
    assert!(count > 0, "{count}");
    assert!(rig.engine().settle(2, Some(Duration::from_secs(20))));
    rig.assert_equal();
    assert!(rig.engine().stats()[0].fuse.is_none());
}

#[test]
fn a_small_list_that_is_another_one_removes_nothing() {
    let rig = Rig::new();
    rig.store.change(|content| (0..15).for_each(|n| make(content, &format!("m{n}"), &format!("user.a{n}"), 1)));
    rig.sync();
    rig.store.change(|content| {
        content.mailboxes.clear();
        (0..15).for_each(|n| make(content, &format!("n{n}"), &format!("user.b{n}"), 1));
    });
    rig.notice(DirtyKey::MailboxList);
    rig.engine().settle(1, Some(Duration::from_secs(20)));
    let left = rig
        .target
        .held
        .lock()
        .expect("lock")
        .mailboxes
        .keys()
        .filter(|name| name.to_string().contains("user.a"))
        .count();
    assert_eq!(left, 15);
    assert!(rig.engine().stats()[0].fuse.as_ref().is_some_and(|fuse| fuse.contains("vanished")));
}
