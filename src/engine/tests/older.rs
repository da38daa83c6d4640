//! Replicas that hold less than the source.

use super::*;

#[test]
fn what_an_older_replica_cannot_hold_is_refused_until_it_is_allowed() {
    let mut rig = Rig::new();
    rig.target.held.lock().expect("lock").old = true;
    rig.store.change(|content| {
        make(content, "i1", "user.u1", 2);
        make(content, "i2", "user.u2", 2);
        let records = &mut content.mailboxes.get_mut(&UniqueId::from("i2")).expect("is there").records;
        records[0].annotations = vec![Annotation { entry: b"/comment".to_vec(), value: b"x".to_vec(), ..note() }];
        records[1].savedate = 1_600_000_000;
        let limits = [(QuotaResource::Storage, 10), (QuotaResource::Message, 20)].into();
        content.quotas.insert(QuotaRoot::new(b"user.u1"), QuotaLimits { limits, modseq: 0 });
        content.server_annotations = vec![Annotation { entry: b"/motd".to_vec(), value: b"x".to_vec(), ..note() }];
    });
    rig.notice(DirtyKey::Annotations);
    rig.sync();
    let mut failed: Vec<String> =
        rig.engine().stats()[0].queue.failed.iter().map(|failure| failure.reason.clone()).collect();
    failed.sort();
    assert_eq!(
        failed,
        [
            "quota root user.u1: the replica is too old for the limits of Message; nothing of it is sent; take a newer \
             replica, or --allow-loss",
            "the server: the replica is too old for the 1 annotations of the server; nothing of it is sent; take a newer \
             replica, or --allow-loss",
            "user.u2: the replica is too old for the annotations of 1 messages and dates of saving of 1 messages; nothing \
             of it is sent; take a newer replica, or --allow-loss",
        ]
    );
    let names = |rig: &Rig| {
        let held = rig.target.held.lock().expect("lock");
        held.mailboxes.keys().map(MboxName::to_string).collect::<Vec<_>>()
    };
    assert_eq!(names(&rig), ["user.u1"], "its neighbour went through");

    rig.engine.take().expect("runs").stop(Duration::from_secs(5));
    (rig.state, rig.allow_loss) = (None, true);
    rig.start();
    rig.engine().scan();
    rig.sync();
    assert!(rig.engine().stats()[0].queue.failed.is_empty());
    assert_eq!(names(&rig), ["user.u1", "user.u2"]);
    let held = rig.target.held.lock().expect("lock");
    let there = &held.mailboxes[&MboxName::from("user.u2")];
    let records = there.records.as_ref().expect("records");
    assert!(records.len() == 2 && records.iter().all(|record| record.annotations.is_empty() && record.savedate == 0));
    let limits = &held.quotas[&QuotaRoot::new(b"user.u1")].limits;
    assert_eq!(limits.keys().collect::<Vec<_>>(), [&QuotaResource::Storage]);
}

#[test]
fn what_an_older_replica_does_not_list_is_asked_for_and_what_it_does_not_take_is_told() {
    let mut rig = Rig::new();
    rig.target.held.lock().expect("lock").old = true;
    rig.store.change(|content| {
        make(content, "i", "user.a", 1);
        make(content, "gone", "DELETED.user.a.x.5", 2);
    });
    rig.sync();
    let report = rig.verified();
    assert!(report.differences.is_empty() && report.not_held.is_empty() && report.mailboxes == 2, "{report:?}");

    // A state that was lost: nothing is sent again.
    rig.engine.take().expect("runs").stop(Duration::from_secs(5));
    rig.state = None;
    rig.dir = tempfile::tempdir().expect("temporary directory");
    rig.start();
    rig.engine().scan();
    rig.sync();
    rig.assert_equal();
    assert_eq!(rig.target.held.lock().expect("lock").bodies_received, 3);

    rig.store.change(|content| {
        let head = &mut content.mailboxes.get_mut(&UniqueId::from("i")).expect("is there").head;
        (head.options.0, head.highestmodseq.0) = (5, head.highestmodseq.0 + 1);
    });
    rig.sync();
    rig.assert_equal();
    let report = rig.verified();
    assert!(report.differences.is_empty(), "{report:?}");
    let told = "changed options: source \"PS\", replica \"\", as the mailbox was made there";
    assert_eq!(report.not_held, [("user.a".to_owned(), told.to_owned())]);
}
