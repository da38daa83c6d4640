//! The queue by itself: order, owners, pauses, holds.

use super::*;

const SOON: Duration = Duration::from_millis(20);

fn queue(workers: usize) -> Queue {
    Queue::new(workers, Backoff { first: Duration::from_millis(5), most: Duration::from_millis(40) })
}

fn user(name: &str) -> Lane {
    Lane::User(name.into())
}

fn mailbox(id: &str) -> Item {
    Item::Mailbox(id.into())
}

fn take(queue: &Queue) -> Option<Job> {
    queue.take(SOON).ok().flatten()
}

fn done(job: &Job) -> Vec<(Item, Instant, Outcome, Option<MboxName>)> {
    job.items.iter().map(|(item, at)| (item.clone(), *at, Outcome::Done, None)).collect()
}

#[test]
fn twenty_notices_for_one_mailbox_are_one_item_with_the_oldest_age() {
    let queue = queue(2);
    let first = Instant::now();
    for n in 0..20 {
        queue.push(user("a"), mailbox("x"), first + Duration::from_millis(n), true);
    }
    let job = take(&queue).expect("a job");
    assert_eq!(job.items, [(mailbox("x"), first)]);
    queue.finish(job, vec![(mailbox("x"), first, Outcome::Done, None)]);
    assert!(queue.wait_settled(1, Some(SOON)));
}

#[test]
fn a_lane_has_one_owner_and_what_arrives_meanwhile_waits() {
    let queue = queue(2);
    queue.push(user("a"), mailbox("x"), Instant::now(), true);
    let job = take(&queue).expect("a job");
    queue.push(user("a"), mailbox("y"), Instant::now(), true);
    assert!(take(&queue).is_none());
    queue.push(user("b"), mailbox("z"), Instant::now(), true);
    let other = take(&queue).expect("another lane goes on");
    assert_eq!(other.lane, user("b"));
    let outcomes = done(&job);
    queue.finish(job, outcomes);
    assert_eq!(take(&queue).expect("the later item").items[0].0, mailbox("y"));
}

#[test]
fn live_work_overtakes_bulk_and_bulk_never_takes_all_workers() {
    let queue = queue(2);
    queue.push(user("a"), mailbox("1"), Instant::now(), false);
    queue.push(user("b"), mailbox("2"), Instant::now(), false);
    queue.push(user("c"), mailbox("3"), Instant::now(), true);
    assert_eq!(take(&queue).expect("live first").lane, user("c"));
    assert_eq!(take(&queue).expect("one bulk").lane, user("a"));
    assert!(take(&queue).is_none(), "the second bulk job has to wait");
}

#[test]
fn a_failing_item_backs_off_and_its_neighbours_go_on() {
    let queue = queue(2);
    queue.push(user("a"), mailbox("bad"), Instant::now(), true);
    let job = take(&queue).expect("a job");
    let at = job.items[0].1;
    let failed = Outcome::Failed { reason: "crc".into(), quarantine: true };
    queue.finish(job, vec![(mailbox("bad"), at, failed, None)]);
    queue.push(user("a"), mailbox("good"), Instant::now(), true);
    assert_eq!(take(&queue).map(|job| job.items.len()), Some(1));
    let stats = queue.stats();
    assert_eq!((stats.failed.len(), stats.failed[0].tries), (1, 1));
    assert!(stats.failed[0].quarantined);
}

#[test]
fn a_failed_item_comes_back_by_itself_and_success_clears_it() {
    let queue = queue(2);
    queue.push(user("a"), mailbox("x"), Instant::now(), true);
    for tries in 1..4 {
        let job = queue.take(Duration::from_secs(1)).expect("in time").expect("a job");
        let at = job.items[0].1;
        queue.finish(job, vec![(mailbox("x"), at, Outcome::Failed { reason: "no".into(), quarantine: false }, None)]);
        assert_eq!(queue.stats().failed[0].tries, tries);
    }
    let job = queue.take(Duration::from_secs(1)).expect("in time").expect("a job");
    let outcomes = done(&job);
    queue.finish(job, outcomes);
    assert!(queue.stats().failed.is_empty());
    assert!(queue.wait_settled(1, Some(SOON)));
}

#[test]
fn what_is_held_back_waits_and_ages_and_its_neighbours_go_on() {
    let queue = queue(2);
    let old = Instant::now() - Duration::from_secs(5);
    queue.hold_back(Hold::Lane(user("a")), false);
    queue.hold_back(Hold::Item(user("b"), mailbox("y")), true);
    queue.push(user("a"), mailbox("x"), old, true);
    queue.push(user("b"), mailbox("y"), old - Duration::from_secs(50), true);
    queue.push(user("b"), mailbox("z"), Instant::now(), true);
    let job = take(&queue).expect("the neighbour");
    assert_eq!(job.items.iter().map(|(item, _)| item.clone()).collect::<Vec<_>>(), [mailbox("z")]);
    let outcomes = done(&job);
    queue.finish(job, outcomes);
    assert!(take(&queue).is_none());
    let stats = queue.stats();
    assert_eq!((stats.pending, stats.held_back, stats.skipped), (0, 1, 1));
    assert!((5.0..40.0).contains(&stats.oldest_seconds), "{}", stats.oldest_seconds);
    queue.let_go(&Hold::Lane(user("a")));
    let job = take(&queue).expect("let go");
    assert_eq!(job.items, [(mailbox("x"), old)]);
    queue.let_go_skipped(&Hold::Everything);
    assert_eq!(take(&queue).expect("no longer skipped").lane, user("b"));
}

#[test]
fn a_failed_item_can_be_tried_at_once_or_given_up() {
    let queue = Queue::new(1, Backoff { first: Duration::from_secs(500), most: Duration::from_secs(500) });
    let old = Instant::now() - Duration::from_secs(9);
    queue.push(user("a"), mailbox("x"), old, true);
    let fail = |queue: &Queue| {
        let job = take(queue).expect("a job");
        let failed = Outcome::Failed { reason: "crc".into(), quarantine: true };
        let at = job.items[0].1;
        queue.finish(job, vec![(mailbox("x"), at, failed, None)]);
    };
    fail(&queue);
    assert!(take(&queue).is_none());
    assert!(queue.stats().failed[0].next_try_seconds.is_some_and(|left| left > 400.0));
    assert_eq!(queue.retry(&Hold::Lane(user("b"))), 0);
    assert_eq!(queue.retry(&Hold::Lane(user("a"))), 1);
    fail(&queue);
    assert_eq!(queue.stats().failed[0].tries, 2);
    queue.hold_back(Hold::Item(user("a"), mailbox("x")), true);
    let stats = queue.stats();
    assert_eq!((stats.failed_total, stats.skipped, stats.oldest_seconds), (0, 1, 0.0));
    queue.retry(&Hold::Everything);
    assert!(take(&queue).is_none(), "given up is given up");
}

#[test]
fn a_second_lane_can_be_taken_only_when_free() {
    let queue = queue(3);
    queue.push(user("a"), mailbox("x"), Instant::now(), true);
    queue.push(user("b"), mailbox("y"), Instant::now(), true);
    let mut a = take(&queue).expect("a");
    let b = take(&queue).expect("b");
    assert!(!queue.try_extra(&mut a, &user("b")));
    let outcomes = done(&b);
    queue.finish(b, outcomes);
    assert!(queue.try_extra(&mut a, &user("b")));
    queue.push(user("b"), mailbox("z"), Instant::now(), true);
    assert!(take(&queue).is_none(), "b belongs to a's job");
    let outcomes = done(&a);
    queue.finish(a, outcomes);
    assert_eq!(take(&queue).expect("b again").lane, user("b"));
}

#[test]
fn two_lanes_that_need_each_other_come_one_after_the_other() {
    let queue = queue(3);
    queue.push(user("a"), mailbox("x"), Instant::now(), true);
    queue.push(user("b"), mailbox("y"), Instant::now(), true);
    let (a, b) = (take(&queue).expect("a"), take(&queue).expect("b"));
    for (job, other) in [(a, "b"), (b, "a")] {
        let outcomes = job.items.iter().map(|(item, at)| (item.clone(), *at, Outcome::Needs(user(other)), None));
        let outcomes = outcomes.collect();
        queue.finish(job, outcomes);
    }
    for (mine, other) in [("a", "b"), ("b", "a")] {
        let mut job = take(&queue).expect("has both");
        assert_eq!(job.lane, user(mine));
        assert!(queue.try_extra(&mut job, &user(other)) && take(&queue).is_none());
        let outcomes = done(&job);
        queue.finish(job, outcomes);
    }
    assert!(take(&queue).is_none());
}
