//! Scans and what gets between them.

use super::*;

#[test]
fn what_interrupts_a_scan_costs_no_second_look() {
    let rig = Rig::new();
    rig.store.change(|content| (0..5).for_each(|n| make(content, &format!("i{n}"), &format!("user.u{n}"), 1)));
    rig.engine().scan();
    rig.sync();
    let (before, failing) = rig.store.change(|content| {
        content.quotas_fail = 2;
        (content.marks, content.mailboxes.len())
    });
    rig.engine().scan();
    let (marks, left) = rig.store.change(|content| (content.marks - before, content.quotas_fail));
    assert_eq!((marks, left), (failing, 0), "each mailbox once, and the scan came to its end");
}

#[test]
fn a_scan_keeps_its_rate_and_notices_get_between() {
    let mut rig = Rig::new();
    rig.store.change(|content| (0..12).for_each(|n| make(content, &format!("i{n:02}"), &format!("shared.u{n:02}"), 1)));
    rig.engine().scan();
    rig.sync();
    rig.engine.take().expect("runs").stop(Duration::from_secs(5));
    rig.state = None;
    rig.scan_pace = ScanPace { per_second: 4, busy_percent: 0 };
    rig.start();
    let since = Instant::now();
    let scanned = rig.engine().begin_scan();
    rig.store.change(|content| append(content.mailboxes.get_mut(&UniqueId::from("i11")).expect("is there")));
    rig.notice(DirtyKey::Mailbox(MailboxRef::Id("i11".into())));
    let arrives =
        || rig.target.held.lock().expect("lock").mailboxes[&MboxName::from("shared.u11")].head.last_uid.0 == 2;
    while !arrives() {
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", rig.engine().stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(scanned.try_recv() == Err(mpsc::TryRecvError::Empty), "the change did not wait for the scan");
    let _ = scanned.recv();
    assert!(since.elapsed() >= Duration::from_millis(2500), "{:?} for 12 mailboxes", since.elapsed());
}

/// Without the look at the list before a partial scan, what changed elsewhere would be taken for known.
#[test]
fn a_scan_of_one_place_swallows_no_change_of_another() {
    let rig = Rig::new();
    rig.store.change(|content| {
        make(content, "i1", "user.u1", 1);
        make(content, "i2", "shared.old", 1);
    });
    rig.engine().scan();
    rig.sync();
    rig.store.change(|content| {
        content.mailboxes.get_mut(&"i2".into()).expect("is there").head.name = "shared.new".into();
    });
    rig.notice(DirtyKey::Rescan(Scope::Below("user.u1".into())));
    rig.notice(DirtyKey::MailboxList);
    assert!(rig.engine().settle(8, Some(Duration::from_secs(20))), "{:?}", rig.engine().stats());
    let held = rig.target.held.lock().expect("lock");
    assert!(held.mailboxes.contains_key(&MboxName::from("shared.new")), "{:?}", held.mailboxes.keys());
}

#[test]
fn what_is_told_in_the_middle_of_a_transaction_is_read_after_it() {
    // Fails without `unless_settled` in `Router::notices`: the one notice is spent on what was there before.
    let rig = Rig::new();
    rig.store.change(|content| make(content, "i", "shared.a", 1));
    rig.engine().scan();
    rig.sync();
    rig.store.change(|content| content.busy.insert(DirtyKey::Annotations));
    rig.notice(DirtyKey::Annotations);
    assert!(rig.engine().settle(8, Some(Duration::from_secs(20))), "{:?}", rig.engine().stats());
    // Nobody may conclude meanwhile that all is done.
    let open = || rig.engine().stats()[0].queue.oldest_seconds;
    assert!(open() > 0.0);
    let mine = vec![Annotation { entry: b"/comment".to_vec(), value: b"x".to_vec(), ..note() }];
    rig.store.change(|content| {
        content.mailboxes.values_mut().for_each(|mailbox| mailbox.annotations = mine.clone());
        content.busy.clear();
    });
    let begun = Instant::now();
    while rig.target.held.lock().expect("lock").mailboxes[&MboxName::from("shared.a")].annotations != mine {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rig.engine().stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    while open() > 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rig.engine().stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}
