//! Who serves which area: chooses a source for each, starts it, puts another in its place when it fails, and brings the
//! better one back when the cause is gone. Whatever was not watched for a moment is compared afterwards.

use super::cookies::Cookies;
use super::derive::Roots;
use super::feed::{Control, Counters, Feed, Out, lock};
use super::ground::{Area, Ground, Relief};
use super::{AUTO, BREATH, CaptureError, CaptureStats, SOURCES, Settings, Source, SourceKind, SourceStats, mounts};
use crate::model::{Notice, Pulse, Scope, pulse};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a source that failed rests before it is opened anew.
const REST: Duration = Duration::from_secs(1);
/// How often it is looked whether an area lies on another file system now.
const LOOK: Duration = Duration::from_secs(10);
/// A better source is tried again after `Settings::come_back`, then after twice as long, and so on, up to this.
const COME_BACK_MOST: Duration = Duration::from_secs(1800);

/// A source at work.
struct Post {
    id: u64,
    kind: &'static SourceKind,
    why: String,
    areas: Vec<Area>,
    control: Control,
    counters: Arc<Counters>,
    pulse: Arc<Pulse>,
    /// Serves what others cannot.
    is_relief: bool,
}

/// The sources at work, as whoever started them sees them.
#[derive(Default)]
struct Board {
    posts: Mutex<Vec<Arc<Post>>>,
    /// Areas that nobody serves at this moment.
    vacant: AtomicBool,
    /// Directories wait for a source that is being started.
    wants_relief: AtomicBool,
    restarts: AtomicU64,
    /// Of sources that have ended: events, notices, overflows.
    past: [AtomicU64; 3],
}

enum Word {
    Ended(u64, Result<(), CaptureError>),
    /// Some directory waits for relief.
    Bell,
    Stop,
}

/// A running capture; dropping it stops it.
pub struct CaptureHandle {
    board: Arc<Board>,
    words: Sender<Word>,
    cookies: Option<Arc<Cookies>>,
    conductor: Option<JoinHandle<()>>,
    pulse: Arc<Pulse>,
}

struct Conductor {
    ground: Ground,
    settings: Settings,
    out: Out,
    /// The sources that may be used, best first.
    kinds: Vec<&'static SourceKind>,
    board: Arc<Board>,
    words: Sender<Word>,
    inbox: Receiver<Word>,
    relief: Arc<Relief>,
    threads: Vec<(u64, JoinHandle<()>)>,
    next_id: u64,
    /// Areas without a source, since when, and why.
    vacancies: Vec<(Area, Instant, String)>,
    /// When to try a better source for what is not served by the best.
    better_at: Option<Instant>,
    pause: Duration,
}

/// Starts capturing. `out` is called on the capturing threads, by one at a time: while it blocks, the kernel's queue
/// fills.
pub fn start(
    roots: Roots,
    settings: Settings,
    out: Box<dyn FnMut(Vec<Notice>) + Send>,
) -> Result<CaptureHandle, CaptureError> {
    let kinds: Vec<&'static SourceKind> = match settings.source.as_str() {
        AUTO => SOURCES.iter().filter(|kind| kind.auto).collect(),
        name => SOURCES.iter().filter(|kind| kind.name == name).collect(),
    };
    if kinds.is_empty() {
        let known = SOURCES.iter().map(|kind| kind.name).chain([AUTO]).collect::<Vec<_>>().join(", ");
        return Err(CaptureError::UnknownSource { name: settings.source, known });
    }
    let (words, inbox) = mpsc::channel();
    // Without them everything works, but how far it got is not proven.
    let made = settings.cookies.as_deref().map(Cookies::new).transpose();
    let cookies = made.unwrap_or_else(|error| {
        tracing::warn!(%error, "how far changes were noticed cannot be proven");
        None
    });
    let cookies = cookies.map(Arc::new);
    let ground = Ground::new(roots, &settings, cookies.clone());
    let board = Arc::new(Board::default());
    let pause = settings.come_back;
    let (ring, rung) = (words.clone(), board.clone());
    let mut conductor = Conductor {
        ground,
        settings,
        out: Arc::new(Mutex::new(out)),
        kinds,
        board: board.clone(),
        words: words.clone(),
        inbox,
        // Without a conductor nobody needs relief any more.
        relief: Relief::new(Box::new(move || {
            rung.wants_relief.store(true, Relaxed);
            let _ = ring.send(Word::Bell);
        })),
        threads: Vec::new(),
        next_id: 0,
        vacancies: Vec::new(),
        better_at: None,
        pause,
    };
    conductor.begin()?;
    let pulse = Pulse::new("capture");
    let theirs = pulse.clone();
    let run = move || theirs.during(|| conductor.run());
    let thread = std::thread::Builder::new().name("capture".to_owned()).spawn(run);
    let thread = thread.map_err(|cause| CaptureError::System { what: "thread", cause })?;
    Ok(CaptureHandle { board, words, cookies, conductor: Some(thread), pulse })
}

impl Conductor {
    fn begin(&mut self) -> Result<(), CaptureError> {
        let mut areas = self.ground.areas.clone();
        areas.extend(self.remote_below());
        let (left, last) = self.staff(areas, None, 0);
        match (left.first(), last) {
            (None, _) => Ok(()),
            (Some(_), Some(error)) => {
                self.end();
                Err(error)
            }
            (Some(area), None) => {
                let why = self.kinds.iter().filter_map(|kind| (kind.fit)(&self.ground, area).err()).collect::<Vec<_>>();
                let name = self.kinds.first().map(|kind| kind.name).unwrap_or_default();
                let error = CaptureError::Unfit { source_name: name, path: area.path.clone(), why: why.join("; ") };
                self.end();
                Err(error)
            }
        }
    }

    /// File systems below an area that have to be looked after in another way than the area itself.
    fn remote_below(&self) -> Vec<Area> {
        if self.settings.source != AUTO {
            return Vec::new();
        }
        let trees = self.ground.areas.iter().filter(|area| area.reach == super::Reach::Tree);
        let found: BTreeSet<PathBuf> = trees.flat_map(|area| mounts::remote_below(&area.path)).collect();
        found.into_iter().map(|path| Area { path, reach: super::Reach::Tree }).collect()
    }

    /// Finds a source for each area, not better than rank `from`; gives areas that none would serve, and the last
    /// reason.
    fn staff(
        &mut self,
        areas: Vec<Area>,
        gap_since: Option<Instant>,
        from: usize,
    ) -> (Vec<Area>, Option<CaptureError>) {
        let mut left = areas;
        let mut last = None;
        let mut refused = Vec::new();
        for rank in from..self.kinds.len() {
            let Some(kind) = self.kinds.get(rank).copied() else { break };
            let mut whys = Vec::new();
            let (fit, unfit): (Vec<Area>, Vec<Area>) =
                left.into_iter().partition(|area| match (kind.fit)(&self.ground, area) {
                    Ok(why) => {
                        whys.push(why);
                        true
                    }
                    Err(why) => {
                        refused.push(format!("not {}: {why}", kind.name));
                        false
                    }
                });
            left = unfit;
            if fit.is_empty() {
                continue;
            }
            whys.extend(refused.iter().cloned());
            whys.dedup();
            if let Err((error, areas)) = self.post(kind, fit, &whys.join(", "), gap_since, false) {
                refused.push(format!("not {}: {error}", kind.name));
                // Whoever takes its place does so until it works again.
                self.better_at.get_or_insert(Instant::now() + self.pause);
                left.extend(areas);
                last = Some(error);
            }
        }
        (left, last)
    }

    /// True when some better source than `poll` and `scan` comes after this one for all these areas.
    fn has_successor(&self, kind: &SourceKind, areas: &[Area]) -> bool {
        let after = self.kinds.iter().skip_while(|other| other.name != kind.name).skip(1).filter(|other| other.prompt);
        after.into_iter().any(|other| areas.iter().all(|area| (other.fit)(&self.ground, area).is_ok()))
    }

    fn post(
        &mut self,
        kind: &'static SourceKind,
        areas: Vec<Area>,
        why: &str,
        gap_since: Option<Instant>,
        is_relief: bool,
    ) -> Result<Arc<Post>, (CaptureError, Vec<Area>)> {
        let can_be_relieved = self.kinds.iter().any(|kind| kind.name == RELIEF) && kind.name != RELIEF;
        let ground = Ground {
            areas: areas.clone(),
            relief: (is_relief || can_be_relieved).then(|| self.relief.clone()),
            has_successor: self.has_successor(kind, &areas),
            ..self.ground.clone()
        };
        let opened = (kind.open)(&ground);
        let control = Control::new().map_err(|errno| CaptureError::System { what: "eventfd", cause: errno.into() });
        let (source, control) = match (opened, control) {
            (Ok(source), Ok(control)) => (source, control),
            (Err(error), _) | (_, Err(error)) => return Err((error, areas)),
        };
        let paths = areas.iter().map(|area| area.path.display().to_string()).collect::<Vec<_>>().join(" ");
        let mut feed = Feed::new(self.ground.roots.clone(), &self.settings, self.out.clone(), gap_since);
        feed.cookies = self.ground.cookies.clone();
        let post = Arc::new(Post {
            id: self.next_id,
            kind,
            why: why.to_owned(),
            areas,
            control,
            counters: feed.counters.clone(),
            pulse: Pulse::new(format!("capture by {}", kind.name)),
            is_relief,
        });
        self.next_id += 1;
        let (theirs, words) = (post.clone(), self.words.clone());
        let thread = std::thread::Builder::new()
            .name(format!("capture-{}", kind.name))
            .spawn(move || theirs.pulse.clone().during(|| serve(source, feed, &theirs, &words)));
        match thread {
            Ok(thread) => self.threads.push((post.id, thread)),
            Err(cause) => return Err((CaptureError::System { what: "thread", cause }, post.areas.clone())),
        }
        tracing::info!(source = kind.name, areas = paths, reason = why, "capture");
        lock(&self.board.posts).push(post.clone());
        Ok(post)
    }

    fn run(mut self) {
        loop {
            let now = Instant::now();
            let vacant = (!self.vacancies.is_empty()).then(|| now + REST);
            let next = [Some(now + LOOK), vacant, self.better_at].into_iter().flatten().min().unwrap_or(now + LOOK);
            let word = loop {
                pulse::beat();
                match self.inbox.recv_timeout(next.saturating_duration_since(Instant::now()).min(BREATH)) {
                    Err(RecvTimeoutError::Timeout) if Instant::now() < next => {}
                    word => break word,
                }
            };
            match word {
                Ok(Word::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(Word::Ended(id, result)) => self.ended(id, result),
                Ok(Word::Bell) => self.relieve("directories without a watch"),
                Err(RecvTimeoutError::Timeout) => self.tick(),
            }
        }
        self.end();
    }

    /// Closes all posts; each hands on what it saw.
    fn end(&mut self) {
        let posts = lock(&self.board.posts).clone();
        posts.iter().for_each(|post| post.control.stop());
        for (_, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("capture ended in a panic");
            }
        }
    }

    fn take_off(&mut self, id: u64) -> Option<Arc<Post>> {
        let post = {
            let mut posts = lock(&self.board.posts);
            let at = posts.iter().position(|post| post.id == id)?;
            posts.remove(at)
        };
        let counters = &post.counters;
        for (past, now) in self.board.past.iter().zip([&counters.events, &counters.notices, &counters.overflows]) {
            past.fetch_add(now.load(Relaxed), Relaxed);
        }
        if let Some(at) = self.threads.iter().position(|(thread, _)| *thread == id) {
            let (_, thread) = self.threads.swap_remove(at);
            if thread.join().is_err() {
                tracing::error!(source = post.kind.name, "capture ended in a panic");
            }
        }
        Some(post)
    }

    /// A source has ended by itself.
    fn ended(&mut self, id: u64, result: Result<(), CaptureError>) {
        let since = Instant::now();
        // Before it is off the board: nobody may conclude that all is served.
        self.board.vacant.store(true, Relaxed);
        if let Some(post) = self.take_off(id) {
            self.board.restarts.fetch_add(1, Relaxed);
            let error = match result {
                Ok(()) => "it ended".to_owned(),
                Err(error) => {
                    let error_text = error.to_string();
                    tracing::error!(source = post.kind.name, %error, "capture failed");
                    if error.is_lasting() {
                        self.succeed(&post, since, &error_text);
                    } else {
                        self.vacancies.extend(post.areas.iter().map(|area| (area.clone(), since, error_text.clone())));
                    }
                    error_text
                }
            };
            if post.is_relief {
                self.relieve(&error);
            }
        }
        self.board.vacant.store(!self.vacancies.is_empty(), Relaxed);
    }

    /// The next source in the table takes over.
    fn succeed(&mut self, post: &Post, since: Instant, why: &str) {
        let rank = self.kinds.iter().position(|kind| kind.name == post.kind.name).unwrap_or_default();
        let (left, last) = self.staff(post.areas.clone(), Some(since), rank + 1);
        let why = last.map_or_else(|| why.to_owned(), |error| error.to_string());
        self.vacancies.extend(left.into_iter().map(|area| (area, since, why.clone())));
        self.better_at.get_or_insert(since + self.pause);
    }

    fn tick(&mut self) {
        let vacancies = std::mem::take(&mut self.vacancies);
        if let Some(since) = vacancies.iter().map(|(_, since, _)| *since).min() {
            let why = vacancies.iter().map(|(_, _, why)| why.clone()).next().unwrap_or_default();
            let areas = vacancies.into_iter().map(|(area, ..)| area).collect();
            let (left, last) = self.staff(areas, Some(since), 0);
            if let Some(error) = last {
                tracing::error!(%error, "capture cannot be started");
            }
            self.vacancies.extend(left.into_iter().map(|area| (area, since, why.clone())));
            self.board.vacant.store(!self.vacancies.is_empty(), Relaxed);
        }
        self.reassess();
        self.retire();
        if self.better_at.is_some_and(|at| at <= Instant::now()) {
            self.come_back();
        }
    }

    /// Looks after directories that got no watch.
    fn relieve(&mut self, why: &str) {
        let already = lock(&self.board.posts).iter().any(|post| post.is_relief);
        if let Some(kind) = self.kinds.iter().find(|kind| kind.name == RELIEF).copied().filter(|_| !already)
            && let Err((error, _)) = self.post(kind, Vec::new(), why, Some(Instant::now()), true)
        {
            tracing::error!(%error, "capture cannot be started");
        }
        self.board.wants_relief.store(false, Relaxed);
    }

    /// No directory waits for relief any more. Whoever asks from here on rings the bell.
    fn retire(&mut self) {
        let relief = lock(&self.board.posts).iter().find(|post| post.is_relief).cloned();
        if let Some(post) = relief.filter(|_| self.relief.dirs().is_empty()) {
            post.control.stop();
            self.take_off(post.id);
        }
    }

    /// An area may have been unmounted, and something else mounted there.
    fn reassess(&mut self) {
        let posts = lock(&self.board.posts).clone();
        for area in self.remote_below() {
            if !posts.iter().any(|post| post.areas.contains(&area)) {
                let _ = self.staff(vec![area], Some(Instant::now()), 0);
            }
        }
        for post in posts {
            let unfit = post.areas.iter().find_map(|area| (post.kind.fit)(&self.ground, area).err());
            if let Some(why) = unfit.filter(|_| self.settings.source == AUTO) {
                tracing::warn!(source = post.kind.name, why, "capture changes over");
                self.replace(&post, 0, Instant::now());
            }
        }
    }

    /// Opens sources for the areas of a post, then closes the post: at no moment nobody watches.
    fn replace(&mut self, post: &Arc<Post>, from: usize, since: Instant) {
        let (left, _) = self.staff(post.areas.clone(), Some(since), from);
        if left.is_empty() {
            self.board.restarts.fetch_add(1, Relaxed);
            post.control.stop();
            self.take_off(post.id);
        }
    }

    /// Tries whether a better source works by now for what the second best serve.
    fn come_back(&mut self) {
        self.better_at = None;
        let posts = lock(&self.board.posts).clone();
        for post in posts.iter().filter(|post| !post.kind.settled && !post.is_relief) {
            let Some(rank) = self.kinds.iter().position(|kind| kind.name == post.kind.name) else { continue };
            let mut better = false;
            for kind in self.kinds.clone().into_iter().take(rank) {
                if post.areas.iter().any(|area| (kind.fit)(&self.ground, area).is_err()) {
                    continue;
                }
                let since = Instant::now();
                if let Ok(new) = self.post(kind, post.areas.clone(), "it works again", Some(since), false) {
                    // That has a pulse of its own.
                    pulse::abroad(|| new.control.wait_armed());
                    // It may have failed at once; then it is told, and this post stays.
                    if new.control.is_serving() {
                        better = true;
                        self.pause = self.settings.come_back;
                        self.board.restarts.fetch_add(1, Relaxed);
                        post.control.stop();
                        self.take_off(post.id);
                        break;
                    }
                    new.control.stop();
                    self.take_off(new.id);
                }
            }
            let could = self
                .kinds
                .iter()
                .take(rank)
                .any(|kind| post.areas.iter().all(|area| (kind.fit)(&self.ground, area).is_ok()));
            if !better && could {
                self.pause = (self.pause * 2).min(COME_BACK_MOST);
                self.better_at = Some(Instant::now() + self.pause);
            }
        }
    }
}

/// The source that looks after what others cannot watch.
const RELIEF: &str = "poll";

/// The thread of one post.
fn serve(mut source: Box<dyn Source>, mut feed: Feed, post: &Post, words: &Sender<Word>) {
    let result = source.run(&mut feed, &post.control);
    if result.is_err() {
        // What it had seen and not handed on is part of what is lost.
        feed.lost(Scope::Everything, Instant::now());
        feed.flush();
    }
    post.control.ended();
    // Closed before anybody opens another: a kernel may allow only one.
    drop(source);
    if !post.control.is_stopping() {
        let _ = words.send(Word::Ended(post.id, result));
    }
}

impl CaptureHandle {
    /// Blocks until the initial set of watches stands: every change from here on is noticed.
    pub fn wait_armed(&self) {
        loop {
            let posts = lock(&self.board.posts).clone();
            posts.iter().for_each(|post| post.control.wait_armed());
            if self.is_armed() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The initial set of watches stands, or never will.
    pub fn is_armed(&self) -> bool {
        self.serving() || self.conductor.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Every area has a source, and each source watches.
    fn serving(&self) -> bool {
        let posts = lock(&self.board.posts);
        let is_staffed = !self.board.vacant.load(Relaxed) && !self.board.wants_relief.load(Relaxed);
        is_staffed && !posts.is_empty() && posts.iter().all(|post| post.control.is_serving())
    }

    /// Returns once everything that was noticeable before this call has been given to `out`, held back or not; false
    /// when the deadline came first. Touches nothing in the source.
    pub fn drain(&self, deadline: Instant) -> bool {
        loop {
            let posts = lock(&self.board.posts).clone();
            let served = self.serving();
            let waiting: Vec<Receiver<()>> = posts.iter().map(|post| post.control.marker()).collect();
            drop(posts);
            let done = waiting
                .iter()
                .all(|done| done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok());
            if done && served {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            // A source is being replaced: ask those that take its place.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the kernel's queues for a proof; `seen_until` tells when it has come.
    pub fn prove(&self) {
        if let Some(cookies) = &self.cookies {
            cookies.make();
        }
    }

    /// Everything that changed before this moment has been handed on; `None` while that is not known.
    pub fn seen_until(&self) -> Option<Instant> {
        let posts = lock(&self.board.posts).clone();
        let proven = posts.iter().map(|post| post.counters.proven()).collect::<Option<Vec<Instant>>>()?;
        proven.into_iter().min().filter(|_| self.serving())
    }

    /// Hands on what was seen, then ends.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.words.send(Word::Stop);
        if let Some(thread) = self.conductor.take()
            && thread.join().is_err()
        {
            tracing::error!("capture ended in a panic");
        }
    }

    /// Signs of life of whoever is at work.
    pub fn pulses(&self) -> Vec<Arc<Pulse>> {
        let posts = lock(&self.board.posts);
        posts.iter().map(|post| post.pulse.clone()).chain([self.pulse.clone()]).collect()
    }

    pub fn stats(&self) -> CaptureStats {
        let posts = lock(&self.board.posts).clone();
        let [events, notices, overflows] = self.board.past.each_ref().map(|past| past.load(Relaxed));
        let mut stats = CaptureStats {
            armed: self.serving(),
            restarts: self.board.restarts.load(Relaxed),
            events,
            notices,
            overflows,
            ..CaptureStats::default()
        };
        for post in posts {
            let count = |counter: &AtomicU64| counter.load(Relaxed);
            let one = SourceStats {
                source: post.kind.name,
                reason: post.why.clone(),
                areas: post.areas.iter().map(|area| area.path.clone()).collect(),
                watches: count(&post.counters.watches),
                unwatched: count(&post.counters.unwatched),
                events: count(&post.counters.events),
                notices: count(&post.counters.notices),
                overflows: count(&post.counters.overflows),
            };
            stats.watches += one.watches;
            stats.unwatched += one.unwatched;
            stats.events += one.events;
            stats.notices += one.notices;
            stats.overflows += one.overflows;
            stats.sources.push(one);
        }
        stats
    }
}

impl Drop for CaptureHandle {
    fn drop(&mut self) {
        self.end();
    }
}
