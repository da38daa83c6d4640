//! With a source and a replica in memory.

use super::super::tests::{Rig, make};
use crate::model::{DirtyKey, MboxName, UniqueId};
use std::time::{Duration, Instant};

fn has(rig: &Rig, name: &str) -> bool {
    rig.target.held.lock().expect("lock").mailboxes.contains_key(&MboxName::from(name))
}

fn settle(rig: &Rig) {
    rig.notice(DirtyKey::MailboxList);
    assert!(rig.engine().settle(1, Some(Duration::from_secs(20))));
}

fn waiting(rig: &Rig) -> usize {
    rig.engine().stats()[0].removals_waiting
}

fn start(delay: Duration) -> Rig {
    let mut rig = Rig::new();
    rig.stop();
    rig.removal_delay = delay;
    rig.start();
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "x", "user.a.x", 2);
    });
    rig.sync();
    rig
}

#[test]
fn a_removal_waits_and_then_happens() {
    let rig = start(Duration::from_millis(1500));
    let begun = Instant::now();
    rig.store.change(|content| content.mailboxes.remove(&UniqueId::from("x")));
    settle(&rig);
    let stats = rig.engine().stats();
    assert!(has(&rig, "user.a.x") && stats[0].removals_waiting == 1, "{stats:?}");
    // It is not late, it waits.
    assert_eq!((stats[0].queue.waiting, stats[0].queue.oldest_seconds), (0, 0.0));
    while has(&rig, "user.a.x") {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rig.engine().stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() >= Duration::from_millis(1500));
    settle(&rig);
    assert_eq!(waiting(&rig), 0);
    rig.assert_equal();
}

#[test]
fn what_comes_back_is_not_removed_and_a_restart_forgets_nothing() {
    let mut rig = start(Duration::from_secs(3600));
    let kept = rig.store.change(|content| content.mailboxes.remove(&UniqueId::from("x"))).expect("was there");
    settle(&rig);
    assert_eq!((has(&rig, "user.a.x"), waiting(&rig)), (true, 1));
    rig.stop();
    rig.start();
    assert_eq!(waiting(&rig), 1);
    rig.engine().scan();
    settle(&rig);
    assert_eq!((has(&rig, "user.a.x"), waiting(&rig)), (true, 1));
    rig.store.change(|content| content.mailboxes.insert("x".into(), kept));
    settle(&rig);
    assert_eq!(waiting(&rig), 0);
    rig.assert_equal();
    // And if it goes once more, its time begins anew.
    rig.store.change(|content| content.mailboxes.remove(&UniqueId::from("x")));
    settle(&rig);
    let stats = rig.engine().stats();
    assert!(stats[0].next_removal_seconds.is_some_and(|left| left > 3590.0), "{stats:?}");
}

#[test]
fn a_name_that_is_wanted_is_freed_and_its_mailbox_waits_elsewhere() {
    let rig = start(Duration::from_millis(1500));
    rig.store.change(|content| {
        content.mailboxes.remove(&UniqueId::from("x"));
        make(content, "y", "user.a.x", 1);
    });
    settle(&rig);
    let names = || -> Vec<(String, String)> {
        let held = rig.target.held.lock().expect("lock");
        held.mailboxes.values().map(|view| (view.head.uniqueid.to_string(), view.head.name.to_string())).collect()
    };
    let there = names();
    assert!(there.contains(&("y".into(), "user.a.x".into())), "{there:?}");
    let aside = there.iter().find(|(id, _)| id == "x").unwrap_or_else(|| panic!("is gone: {there:?}"));
    assert!(aside.1.starts_with("DELETED.user.a.x."), "{there:?}");
    let begun = Instant::now();
    while names().iter().any(|(id, _)| id == "x") {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rig.engine().stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    settle(&rig);
    rig.assert_equal();
}
