//! The daemon's top loop: signals, the control socket, figures, systemd.

use super::caught_up::CaughtUp;
use super::control::{self, Door, Request, Response};
use super::cross_check::CrossChecker;
use super::ground::Ground;
use super::moves::{Moves, begin};
use super::report::{Book, Memory, SourceStatus, Status, unix_now};
use super::rhythm::{RESTING, Rhythm};
use super::rooms::Rooms;
use super::scrub::Scrub;
use super::signals::{Told, leave_at_second_signal};
use super::{Running, metrics, systemd};
use crate::capture;
use crate::engine::{StandingOrder, Word};
use crate::model::{Notice, Pulse};
use crate::state::{Health, hand_over};
use futures::StreamExt;
use futures::future::LocalBoxFuture;
use futures::stream::FuturesUnordered;
use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tracing::{info, warn};

/// Where the daemon can be seen and spoken to.
#[derive(Clone, Debug)]
pub struct Service {
    /// Holds the control socket, the standing orders and, unless named, the status file.
    pub state: PathBuf,
    pub status_file: PathBuf,
    /// Prometheus asks here.
    pub metrics_listen: Option<SocketAddr>,
    /// For the text-file collector of node_exporter.
    pub metrics_file: Option<PathBuf>,
    /// Everything is compared so often, whatever was noticed.
    pub rescan_every: Option<Duration>,
    /// Watched over beside those of capture and engine.
    pub rooms: Vec<Arc<Pulse>>,
    pub health: Health,
}

/// Why the loop ended.
#[derive(Debug)]
pub enum End<T> {
    Stop,
    /// SIGHUP, and the new configuration is good.
    Reload(T),
}

/// Questions answered at the same time; more have to wait.
const TALKS: usize = 16;
/// The status file is written at least this often, so that the next start knows since when we are blind.
const HEARTBEAT: Duration = Duration::from_secs(60);

impl Service {
    fn orders_file(&self) -> PathBuf {
        self.state.join("orders.json")
    }

    /// Pauses and skips of an earlier run.
    pub fn orders(&self) -> Vec<StandingOrder> {
        let text = std::fs::read(self.orders_file()).unwrap_or_default();
        if text.is_empty() {
            return Vec::new();
        }
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            warn!(%error, path = %self.orders_file().display(), "standing orders cannot be read");
            Vec::new()
        })
    }
}

/// What stays open over a reload: who asks or signals meanwhile is heard afterwards.
pub struct Ears {
    runtime: Runtime,
    told: Option<Told>,
    door: Option<Door>,
}

impl Ears {
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, told: None, door: None })
    }
}

/// Serves until SIGTERM or SIGINT (a second one leaves at once) or until SIGHUP finds a good configuration. SIGUSR1 asks
/// for a scan. Scans first; what happens meanwhile is seen by capture, which is armed already.
pub fn serve<T>(
    running: &Running,
    service: &Service,
    beside: (&Moves, Option<&Scrub>),
    reload: &dyn Fn() -> Option<T>,
    ears: &mut Ears,
) -> io::Result<End<T>> {
    let Ears { runtime, told, door } = ears;
    runtime.block_on(async {
        let told = match told {
            Some(told) => told,
            None => told.insert(Told::new()?),
        };
        run(running, service, beside, reload, door, told).await
    })
}

async fn run<T>(
    running: &Running,
    service: &Service,
    (moves, scrub): (&Moves, Option<&Scrub>),
    reload: &dyn Fn() -> Option<T>,
    door: &mut Option<Door>,
    told: &mut Told,
) -> io::Result<End<T>> {
    let socket = Door::listen(door, &service.state)?;
    let metrics = match service.metrics_listen {
        Some(address) => Some(TcpListener::bind(address).await?),
        None => None,
    };
    let view = View::new(running, service, moves, scrub);
    let mut talks: FuturesUnordered<LocalBoxFuture<'_, ()>> = FuturesUnordered::new();
    let mut first_scan = Some(running.engine.begin_scan());
    systemd::notify("READY=1\nSTATUS=catch-up scan");
    // A cross-check decides by what is proven, and systemd waits for a sign of life.
    let seldom = systemd::watchdog().map_or(RESTING, |every| RESTING.min(every / 4));
    let seldom = running.cross_check.as_ref().map_or(seldom, |_| Duration::ZERO);
    let mut rhythm = Rhythm::new(running.stir.clone(), seldom);
    let mut timer =
        service.rescan_every.map(|every| tokio::time::interval_at(tokio::time::Instant::now() + every, every));
    let end = loop {
        let room = talks.len() < TALKS;
        tokio::select! {
            () = told.ends.recv() => break End::Stop,
            _ = told.hangup.recv() => {
                systemd::notify_reloading();
                match reload() {
                    Some(fresh) => break End::Reload(fresh),
                    None => systemd::notify("READY=1"),
                }
            }
            _ = told.scan.recv() => running.rescan(),
            Some(()) = next(timer.as_mut()) => running.rescan(),
            Some(()) = talks.next() => {}
            Ok((stream, _)) = socket.accept(), if room => {
                running.stir.stir();
                talks.push(Box::pin(control::talk(stream, |request| view.answer(request))));
            }
            Some(Ok((stream, _))) = accept(metrics.as_ref()), if room => {
                running.stir.stir();
                talks.push(Box::pin(metrics::talk(stream, || metrics::render(&view.status()))));
            }
            () = rhythm.due() => {
                if first_scan.as_ref().is_some_and(is_over) {
                    first_scan = None;
                    view.compared.set(true);
                    info!("live");
                }
                view.caught_up.borrow_mut().tick(running);
                if let Some(checker) = &running.cross_check {
                    checker.prove(running.capture.seen_until());
                }
                view.ground.borrow_mut().look(&service.state);
                view.rooms.borrow_mut().look(running, &service.rooms);
                let changed = view.write(first_scan.is_some());
                rhythm.looked(changed || first_scan.is_some());
                if systemd::watchdog().is_some() && view.rooms.borrow().wedged().is_empty() {
                    systemd::notify("WATCHDOG=1");
                }
            }
        }
    };
    drop(talks);
    view.write(false);
    if matches!(end, End::Stop) {
        systemd::notify("STOPPING=1\nSTATUS=stopping");
        leave_at_second_signal();
        *door = None;
    }
    Ok(end)
}

async fn accept(listener: Option<&TcpListener>) -> Option<io::Result<(tokio::net::TcpStream, SocketAddr)>> {
    Some(listener?.accept().await)
}

async fn next(timer: Option<&mut tokio::time::Interval>) -> Option<()> {
    timer?.tick().await;
    Some(())
}

pub(super) fn is_over(done: &Receiver<()>) -> bool {
    matches!(done.try_recv(), Ok(()) | Err(TryRecvError::Disconnected))
}

/// What is shown, and where it is written.
struct View<'a> {
    running: &'a Running,
    service: &'a Service,
    moves: &'a Moves,
    scrub: Option<&'a Scrub>,
    started: Instant,
    book: RefCell<Book>,
    /// The first scan is over.
    compared: Cell<bool>,
    caught_up: RefCell<CaughtUp>,
    rooms: RefCell<Rooms>,
    ground: RefCell<Ground>,
    written: RefCell<Option<(String, Instant)>>,
}

impl<'a> View<'a> {
    fn new(running: &'a Running, service: &'a Service, moves: &'a Moves, scrub: Option<&'a Scrub>) -> Self {
        let names: Vec<String> = running.stats().into_iter().map(|stats| stats.replica).collect();
        let before = std::fs::read(&service.status_file).ok();
        let before = before.and_then(|text| serde_json::from_slice::<Status>(&text).ok());
        let book = RefCell::new(Book::new(&names, before.as_ref()));
        let (caught_up, ground, written) = Default::default();
        let rooms = RefCell::new(Rooms::new());
        Self {
            running,
            service,
            moves,
            scrub,
            started: Instant::now(),
            book,
            compared: Cell::new(false),
            caught_up,
            rooms,
            ground,
            written,
        }
    }

    fn status(&self) -> Status {
        let mut replicas = self.book.borrow_mut().replicas(self.running.stats(), self.compared.get());
        for replica in &mut replicas {
            replica.caught_up_at = self.caught_up.borrow().at(&replica.stats);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            at: unix_now(),
            uptime_seconds: self.started.elapsed().as_secs(),
            source: SourceStatus {
                trouble: self.running.trouble(),
                cross_check: self.running.cross_check.as_ref().map(CrossChecker::stats),
                ..self.running.capture.stats().into()
            },
            memory: Memory::now(),
            wedged: self.rooms.borrow().wedged().to_vec(),
            ground: self.ground.borrow().shown(&self.service.health),
            replicas,
            orders: self.running.engine.standing_orders(),
            moves: self.moves.all(),
            scan: self.running.engine.scan_progress(),
            scrub: self.scrub.map(Scrub::status),
        }
    }

    fn answer(&self, request: Request) -> Response {
        let engine = &self.running.engine;
        let result = match request {
            Request::Status => return Response { status: Some(self.status()), ..Response::default() },
            Request::Order { word, subject, replica } => {
                info!(?word, ?subject, replica, "ordered");
                let result = engine.order_about(replica.as_deref(), &subject, word);
                if word != Word::Retry || result.is_ok() {
                    let text = serde_json::to_vec_pretty(&engine.standing_orders()).unwrap_or_default();
                    if let Err(error) = write_whole(&self.service.orders_file(), &text) {
                        warn!(%error, "standing orders cannot be written, a restart will forget them");
                    }
                }
                result
            }
            Request::Move { user, to } => {
                info!(user, to, "to be moved");
                return match begin(self.moves, &engine.mover(), &user, &to, &|name| engine.has(name, &user)) {
                    Ok(()) => Response::default(),
                    Err(error) => Response { error: Some(error), ..Response::default() },
                };
            }
            Request::Allow { seconds, replica } => {
                info!(seconds, replica, "removals allowed");
                engine.allow_removals(replica.as_deref(), Duration::from_secs(seconds))
            }
            Request::Logged { line } => {
                let seen_at = Instant::now();
                let keys = capture::synclog::keys_of(line.strip_suffix(b"\n").unwrap_or(&line));
                engine.notify(keys.into_iter().map(|key| Notice { key, seen_at }).collect());
                return Response::default();
            }
        };
        match result {
            Ok(count) => Response { retried: Some(count), ..Response::default() },
            Err(error) => Response { error: Some(error.to_string()), ..Response::default() },
        }
    }

    /// Writes the figures when they changed, and now and then when not; says whether they did.
    fn write(&self, scanning: bool) -> bool {
        let status = self.status();
        let mut timeless = status.clone();
        (timeless.at, timeless.uptime_seconds, timeless.memory) = (0, 0, Memory::default());
        // Our own signs of life pass through the kernel as well.
        timeless.source.events_total = 0;
        timeless.replicas.iter_mut().for_each(|replica| replica.caught_up_at = None);
        (timeless.ground.free_bytes, timeless.ground.clock_jumped_ago_seconds) = (None, None);
        timeless.replicas.iter_mut().for_each(|replica| replica.stats.next_removal_seconds = None);
        timeless.wedged.iter_mut().for_each(|room| room.seconds = None);
        let key = serde_json::to_string(&timeless).unwrap_or_default();
        let mut written = self.written.borrow_mut();
        let changed = written.as_ref().is_none_or(|(old, _)| *old != key);
        if !changed && written.as_ref().is_some_and(|(_, at)| at.elapsed() < HEARTBEAT) {
            return false;
        }
        let text = serde_json::to_vec(&status).unwrap_or_default();
        if let Err(error) = write_whole(&self.service.status_file, &text) {
            warn!(%error, "status file cannot be written");
        }
        if let Some(path) = &self.service.metrics_file
            && let Err(error) = write_whole(path, metrics::render(&status).as_bytes())
        {
            warn!(%error, "metrics file cannot be written");
        }
        *written = Some((key, Instant::now()));
        let lag = status.replicas.iter().map(|replica| replica.lag_seconds).fold(0.0, f64::max);
        let stage = match self.running.engine.scan_progress() {
            Some((done, all)) if scanning => format!("catch-up scan, {done} of {all}"),
            _ if scanning => "catch-up scan".to_owned(),
            _ => "live".to_owned(),
        };
        let stage = match status.wedged.first() {
            Some(wedged) => format!("{} does not get on, waiting to be restarted; {stage}", wedged.room),
            None => stage,
        };
        systemd::notify(&format!("STATUS={stage}, {} replicas, {lag:.1} s behind", status.replicas.len()));
        changed
    }
}

/// By rename, so that a reader sees the old or the new whole.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    std::fs::write(&fresh, bytes)?;
    hand_over(Path::new(&fresh));
    std::fs::rename(&fresh, path)
}
