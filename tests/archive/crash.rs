//! The program dies at every request it makes to the object store, just before it takes effect and just after.

use super::*;
use futures::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};
use std::sync::atomic::{AtomicI64, Ordering};

/// Works for a number of changing requests; at the last one the line goes dead for good.
#[derive(Debug)]
struct Dying {
    inner: Arc<dyn ObjectStore>,
    left: Arc<AtomicI64>,
    /// The last request takes effect, but nobody hears of it.
    effective: bool,
    /// It is the only one that fails, and one that reads counts as well.
    once: bool,
}

fn dead() -> object_store::Error {
    object_store::Error::Generic { store: "dying", source: "dead".into() }
}

impl std::fmt::Display for Dying {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("dying")
    }
}

impl Dying {
    fn alive(&self) -> Result<()> {
        if self.once {
            return self.last().and_then(|last| if last { Err(dead()) } else { Ok(()) });
        }
        if self.left.load(Ordering::SeqCst) > 0 { Ok(()) } else { Err(dead()) }
    }

    /// True when this request is the one after which nothing is heard any more.
    fn last(&self) -> Result<bool> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            left if left <= 0 && !self.once => Err(dead()),
            1 if self.effective => Ok(true),
            1 => Err(dead()),
            _ => Ok(false),
        }
    }
}

#[async_trait::async_trait]
impl ObjectStore for Dying {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let last = self.last()?;
        let result = self.inner.put_opts(at, payload, options).await;
        if last { Err(dead()) } else { result }
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.alive()?;
        self.inner.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.alive()?;
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.last() {
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
            Ok(false) => self.inner.delete_stream(paths),
            Ok(true) => self.inner.delete_stream(paths).map(|_| Err(dead())).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.alive()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// What happens to an archive in its life; every kind of step is in it.
pub(crate) fn life() -> (Vec<Step>, Bodies) {
    let (mut inbox, mut folder) = (Source::new("id-1", "user.u1"), Source::new("id-2", "user.u1.Work"));
    let mut steps = vec![inbox.step(None)];
    inbox.append("From: a\r\n\r\none");
    inbox.append("From: a\r\n\r\ntwo");
    inbox.snapshot.head.acl = b"u1\tlrswipkxtecdan\tu2\tlrs\t".to_vec();
    steps.push(inbox.step(Some(Source::new("id-1", "user.u1").since())));
    folder.append("From: b\r\n\r\nthree");
    steps.push(folder.step(None));
    let before = inbox.since();
    inbox.snapshot.user_flags = vec![None, Some("work".into())];
    inbox.touch(1, |record| (record.system_flags.0, record.user_flags) = (SystemFlags::SEEN, 2));
    inbox.snapshot.annotations = vec![Annotation {
        entry: b"/comment".to_vec(),
        userid: "u1".into(),
        value: b"\xff".to_vec(),
        modseq: ModSeq(3),
    }];
    steps.push(inbox.step(Some(before)));
    let (user, name): (UserId, SieveName) = ("u1".into(), "main".into());
    let seen = SeenState { seenuids: b"1:2".to_vec(), ..SeenState::default() };
    let note = Annotation { entry: b"/motd".to_vec(), userid: "".into(), value: b"hi".to_vec(), modseq: ModSeq(0) };
    let limits = QuotaLimits { limits: [(QuotaResource::Storage, 1000)].into(), modseq: 0 };
    steps.extend([
        Step::Subscribe { user: user.clone(), name: "user.u1.Work".into() },
        Step::Seen { user: "u2".into(), uniqueid: "id-1".into(), seen },
        Step::SievePut {
            user: user.clone(),
            name: name.clone(),
            last_update: 5,
            content: b"keep;".to_vec(),
            compiled: Vec::new(),
        },
        Step::SieveActivate { user: user.clone(), name: name.clone() },
        Step::Quota { root: "user.u1".into(), limits: limits.clone() },
        Step::Quota { root: "user.u2".into(), limits },
        Step::ServerAnnotation(note),
        Step::Expunge { uniqueid: "id-1".into(), name: "user.u1".into(), uids: vec![Uid(2)] },
        Step::Rename {
            uniqueid: "id-2".into(),
            from: "user.u1.Work".into(),
            to: "user.u1.Play".into(),
            partition: "other".into(),
            uidvalidity: 1_700_000_002,
        },
        Step::Unsubscribe { user: user.clone(), name: "user.u1.Work".into() },
        Step::SieveDeactivate { user: user.clone() },
        Step::SieveRemove { user, name },
        Step::Unquota { root: "user.u2".into() },
        Step::RemoveServerAnnotation { entry: b"/motd".to_vec(), userid: "".into() },
        Step::Remove { uniqueid: "id-2".into(), name: "user.u1.Play".into() },
        folder.step(None),
        Step::Remove { uniqueid: "id-1".into(), name: "user.u1".into() },
    ]);
    let mut bodies = inbox.bodies;
    bodies.0.extend(folder.bodies.0);
    (steps, bodies)
}

/// The state after each step of a life without accidents.
fn states(steps: &[Step], bodies: &Bodies) -> Vec<BTreeMap<String, String>> {
    let store = memory();
    let mut session = session(&store);
    let mut states = vec![dump(&store)];
    for step in steps {
        session.apply(step, bodies).expect("applies");
        states.push(dump(&store));
    }
    states
}

#[test]
fn said_twice_is_said_once() {
    let (steps, bodies) = life();
    let states = states(&steps, &bodies);
    let store = memory();
    let mut session = session(&store);
    for (step, expected) in steps.iter().zip(&states[1..]) {
        session.apply(step, &bodies).expect("applies");
        match session.apply(step, &bodies) {
            Ok(()) => {}
            Err(ReplicaError::NoSuchMailbox(_)) if matches!(step, Step::Remove { .. }) => {}
            other => panic!("{step:?}: {other:?}"),
        }
        assert_eq!(dump(&store), *expected, "{step:?}");
    }
}

#[test]
fn a_death_at_any_request_leaves_a_state_to_go_on_from() {
    dies_at_any_request(false);
}

/// What is put off until after the confirmation dies as well; what was confirmed is there.
#[test]
fn a_death_at_any_request_of_one_that_is_waited_for_loses_nothing() {
    dies_at_any_request(true);
}

fn dies_at_any_request(quick: bool) {
    let (steps, bodies) = life();
    let states = states(&steps, &bodies);
    let mut deaths = 0;
    for (number, step) in steps.iter().enumerate() {
        for effective in [false, true] {
            for requests in 1.. {
                let store = memory();
                let mut steady = session(&store);
                steps[..number].iter().for_each(|step| steady.apply(step, &bodies).expect("applies"));
                let left = Arc::new(AtomicI64::new(i64::MAX));
                let dying: Arc<dyn ObjectStore> =
                    Arc::new(Dying { inner: store.clone(), left: left.clone(), effective, once: false });
                let mut session = session(&dying);
                if quick {
                    session.be_quick();
                }
                left.store(requests, Ordering::SeqCst);
                let confirmed = session.apply(step, &bodies).is_ok();
                session.close();
                let survived = confirmed && left.load(Ordering::SeqCst) > 0;
                let place = format!("{step:?} died at request {requests}, effective {effective}");
                let found = dump(&store);
                check_between(&found, &states[number], &states[number + 1], &place);
                assert!(!confirmed || found == states[number + 1], "{place}: was confirmed");
                // The next start says the step again: first with what the old session knew, then anew.
                let mut next = self::session(&store);
                match next.apply(step, &bodies) {
                    Ok(()) => {}
                    Err(ReplicaError::NoSuchMailbox(_)) if matches!(step, Step::Remove { .. }) => {}
                    other => panic!("{place}: {other:?}"),
                }
                assert_eq!(dump(&store), states[number + 1], "{place}");
                deaths += 1;
                if survived {
                    break;
                }
            }
        }
    }
    assert!(deaths > 100, "{deaths}");
}

/// Each part of the state is as before or as after the step; no part is anything else.
fn check_between(
    found: &BTreeMap<String, String>,
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
    place: &str,
) {
    for key in found.keys().chain(before.keys()).chain(after.keys()) {
        let found = found.get(key);
        // A head is in two objects, of which the index has the last word: its other fields may be ahead.
        if key.ends_with(" head") && found.is_some() && before.contains_key(key) && after.contains_key(key) {
            continue;
        }
        assert!(found == before.get(key) || found == after.get(key), "{place}: {key}: {found:?}");
    }
}

/// One request fails, of those that read as well, and the session goes on with what it remembers.
#[test]
fn a_failed_request_is_got_over() {
    let (steps, bodies) = life();
    let states = states(&steps, &bodies);
    let mut failures = 0;
    for (number, step) in steps.iter().enumerate() {
        for effective in [false, true] {
            for requests in 1.. {
                let store = memory();
                let left = Arc::new(AtomicI64::new(i64::MAX));
                let failing: Arc<dyn ObjectStore> =
                    Arc::new(Dying { inner: store.clone(), left: left.clone(), effective, once: true });
                let mut session = session(&failing);
                steps[..number].iter().for_each(|step| session.apply(step, &bodies).expect("applies"));
                left.store(requests, Ordering::SeqCst);
                let first = session.apply(step, &bodies);
                let place = format!("{step:?}, request {requests} failed, effective {effective}: {first:?}");
                if left.load(Ordering::SeqCst) > 0 {
                    assert!(first.is_ok(), "{place}");
                    break;
                }
                check_between(&dump(&store), &states[number], &states[number + 1], &place);
                match session.apply(step, &bodies) {
                    Ok(()) => {}
                    Err(ReplicaError::NoSuchMailbox(_)) if matches!(step, Step::Remove { .. }) => {}
                    other => panic!("{place}: {other:?}"),
                }
                assert_eq!(dump(&store), states[number + 1], "{place}");
                failures += 1;
            }
        }
    }
    assert!(failures > 100, "{failures}");
}
