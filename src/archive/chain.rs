//! State as a chain of generations: objects `000000000007.json` in one folder, of which each says on which earlier one
//! it stands (`after`), down to one that stands on nothing. What holds is all of them folded, oldest first.
//!
//! A change writes one small object, and one that is at least half as large as what is written anyway is taken in
//! on the way. So a chain stays short (it at least doubles from object to object), and a record is rewritten a
//! logarithmic number of times, however large its mailbox.
//!
//! Publishing is `create` of the next generation, which fails when somebody else was first. As generations that were
//! taken in are deleted, a writer that slept could create a number anew below the newest; so whoever has created one
//! looks whether it is the newest. Where it is not, either somebody has gone on from it already, or it counts for nothing
//! and the next one deletes it as litter: it must not be taken back, for it may be what others stand on.

use super::ArchiveError;
use super::objects::{Listed, Objects};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;

/// The format of all objects; higher ones are refused.
pub(super) const FORMAT: u32 = 1;

/// So many generations may be left for `shorten`, which takes them in together.
const LOOSE: usize = 8;

/// How often a reader starts again because a generation was taken in under its hands.
const ATTEMPTS: usize = 20;

/// What a chain is made of: a whole state, or part of one.
pub(super) trait State: Serialize + DeserializeOwned {
    /// Which kind of object this is; written into it.
    const KIND: &'static str;

    /// Each generation is the whole state: nothing is left of earlier ones.
    const WHOLE: bool = false;

    /// `newer` on top of this.
    fn fold(self, newer: Self) -> Self;

    /// Takes out what only matters on top of something.
    fn settle(&mut self) {}

    /// Bytes that it carries until they are an object of their own.
    fn carried(&self) -> u64 {
        0
    }

    /// They are.
    fn lay_down(&mut self) {}
}

/// The generations that make up a state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// Number and size; oldest first.
    links: Vec<(u64, u64)>,
    /// The newest as the store tells it from others of the same number.
    etag: String,
    /// Some of them carry what may be nowhere else. It has to be put where it belongs before anything is published on top.
    pub carries: bool,
}

/// What a publication has left behind. It counts for nothing, and may be taken away whenever there is time.
#[must_use]
#[derive(Debug)]
pub(super) struct Left {
    folder: String,
    newest: u64,
    superseded: Vec<String>,
}

impl Left {
    /// A listing is not of one moment: another one, lest something is deleted that somebody newer stands on. What cannot be
    /// deleted is litter that the next one finds.
    pub fn sweep(self, objects: &Objects) {
        if !self.superseded.is_empty()
            && matches!(newest(objects, &self.folder), Ok(Some((newest, _))) if newest == self.newest)
        {
            let _ = objects.delete(self.superseded);
        }
    }
}

/// How something is published.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// So that nothing is left to do.
    Steady,
    /// Somebody waits: nothing is taken in.
    Awaited,
}

#[derive(Serialize, Deserialize)]
struct Envelope<S> {
    format: u32,
    kind: String,
    generation: u64,
    after: Option<u64>,
    state: S,
}

/// Only this much is read of an object whose format is not known.
#[derive(Deserialize)]
struct Preface {
    format: u32,
    kind: String,
}

impl Envelope<()> {
    fn with<S>(self, state: S) -> Envelope<S> {
        let Self { format, kind, generation, after, state: () } = self;
        Envelope { format, kind, generation, after, state }
    }
}

impl Chain {
    /// Number of the newest generation; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.links.last().map_or(0, |(generation, _)| *generation)
    }

    /// Nobody has published since.
    pub fn is_current(&self, objects: &Objects, folder: &str) -> Result<bool, ArchiveError> {
        Ok(newest(objects, folder)?.is_some_and(|newest| self.ends_in(&newest)))
    }

    /// This is its newest generation.
    pub fn ends_in(&self, (generation, etag): &(u64, String)) -> bool {
        *generation == self.newest() && *etag == self.etag
    }

    #[cfg(test)]
    pub fn generations(&self) -> Vec<u64> {
        self.links.iter().map(|(generation, _)| *generation).collect()
    }
}

fn path(folder: &str, generation: u64) -> String {
    format!("{folder}/{generation:012}.json")
}

fn generations(listed: &[Listed]) -> impl Iterator<Item = (u64, &Listed)> {
    listed.iter().filter_map(|object| Some((object.file.strip_suffix(".json")?.parse().ok()?, object)))
}

/// The newest generation in a folder and a mark that changes with it; `None` when there is none.
pub(super) fn newest(objects: &Objects, folder: &str) -> Result<Option<(u64, String)>, ArchiveError> {
    let (listed, _) = objects.list(folder)?;
    Ok(generations(&listed).max_by_key(|(generation, _)| *generation).map(|(n, object)| (n, object.etag.clone())))
}

/// The folded state; `None` when the folder has none.
pub(super) fn load<S: State>(objects: &Objects, folder: &str) -> Result<Option<(Chain, S)>, ArchiveError> {
    'again: for _ in 0..ATTEMPTS {
        let Some((newest, etag)) = newest(objects, folder)? else { return Ok(None) };
        let (mut links, mut states, mut carries) = (Vec::new(), Vec::new(), false);
        let mut next = Some(newest);
        while let Some(generation) = next {
            let Some((envelope, bytes)) = read::<S>(objects, folder, generation)? else { continue 'again };
            if envelope.after.is_some_and(|after| after >= generation) {
                return Err(broken(objects, folder, generation, "stands on a later generation"));
            }
            next = envelope.after;
            let carried = envelope.state.carried();
            carries |= carried > 0;
            links.push((generation, bytes.saturating_sub(carried)));
            states.push(envelope.state);
        }
        links.reverse();
        let state = states.into_iter().rev().reduce(S::fold);
        return Ok(state.map(|mut state| {
            state.settle();
            (Chain { links, etag, carries }, state)
        }));
    }
    Err(broken(objects, folder, 0, "generations vanish while they are read"))
}

/// The newest generation alone, without what it stands on.
pub(super) fn load_newest<S: State>(objects: &Objects, folder: &str) -> Result<Option<S>, ArchiveError> {
    for _ in 0..ATTEMPTS {
        let Some((newest, _)) = newest(objects, folder)? else { return Ok(None) };
        if let Some((envelope, _)) = read::<S>(objects, folder, newest)? {
            return Ok(Some(envelope.state));
        }
    }
    Err(broken(objects, folder, 0, "generations vanish while they are read"))
}

fn read<S: State>(
    objects: &Objects,
    folder: &str,
    generation: u64,
) -> Result<Option<(Envelope<S>, u64)>, ArchiveError> {
    let Some(bytes) = objects.get(&path(folder, generation))? else { return Ok(None) };
    let fault = |fault: String| broken(objects, folder, generation, fault);
    let envelope: Envelope<S> = decode(&bytes, S::KIND).map_err(fault)?;
    if envelope.generation != generation {
        return Err(fault(format!("says it is generation {}", envelope.generation)));
    }
    // Without the empty lines that may be at its end, but for the one that belongs there.
    Ok(Some((envelope, bytes.trim_ascii_end().len() as u64 + 1)))
}

fn broken(objects: &Objects, folder: &str, generation: u64, fault: impl Into<String>) -> ArchiveError {
    ArchiveError::Format { object: format!("{}/{}", objects.name, path(folder, generation)), fault: fault.into() }
}

/// An object is there from its first byte to its last.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok()
}

/// Reads an object of ours after looking at its format and kind.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8], kind: &str) -> Result<T, String> {
    let preface: Preface = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if preface.format != FORMAT {
        return Err(format!("is of archive format {}, this spooltap knows {FORMAT}", preface.format));
    }
    if preface.kind != kind {
        return Err(format!("is a {:?}, expected a {kind:?}", preface.kind));
    }
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// JSON with a line for each member of the outer levels, so that line tools can be used on it.
pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>, ArchiveError> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Lines::default());
    value.serialize(&mut serializer).map_err(|error| ArchiveError::Runtime(error.to_string()))?;
    out.push(b'\n');
    Ok(out)
}

/// Publishes `change` on top of `chain` (or, with `anew`, a state that stands on nothing) and returns the new chain.
/// `ArchiveError::Conflict` when somebody else has published since the chain was loaded; nothing has changed then.
pub(super) fn publish<S: State>(
    objects: &Objects,
    folder: &str,
    chain: &Chain,
    change: S,
    anew: bool,
) -> Result<Chain, ArchiveError> {
    let (chain, left) = publish_only(objects, folder, chain, change, anew, Pace::Steady)?;
    left.sweep(objects);
    Ok(chain)
}

/// The same; what it supersedes is left to be swept. Nothing that the chain carries may be without an object of its own. What
/// need not be done while somebody waits is left to `Objects::settle` and `shorten`.
pub(super) fn publish_only<S: State>(
    objects: &Objects,
    folder: &str,
    chain: &Chain,
    change: S,
    anew: bool,
    pace: Pace,
) -> Result<(Chain, Left), ArchiveError> {
    let kept = if anew || S::WHOLE { Vec::new() } else { chain.links.clone() };
    publish_on(objects, folder, chain.newest() + 1, kept, change, pace)
}

/// Takes in what was left for later; `None` where nothing was.
pub(super) fn shorten<S: State>(
    objects: &Objects,
    folder: &str,
    chain: &Chain,
) -> Result<Option<(Chain, Left)>, ArchiveError> {
    let mut kept = chain.links.clone();
    let loose = kept.iter().zip(kept.iter().skip(1)).filter(|((_, older), (_, newer))| *older < 2 * newer).count();
    let Some((newest, _)) = kept.pop_if(|_| loose >= LOOSE) else { return Ok(None) };
    let Some((mut envelope, _)) = read::<S>(objects, folder, newest)? else { return Err(conflict(objects, folder)) };
    envelope.state.lay_down();
    publish_on(objects, folder, newest + 1, kept, envelope.state, Pace::Steady).map(Some)
}

/// Publishes `change` as this generation, on top of those.
fn publish_on<S: State>(
    objects: &Objects,
    folder: &str,
    generation: u64,
    mut kept: Vec<(u64, u64)>,
    mut change: S,
    pace: Pace,
) -> Result<(Chain, Left), ArchiveError> {
    let carried = change.carried();
    let envelope = |after| Envelope { format: FORMAT, kind: S::KIND.to_owned(), generation, after, state: () };
    let mut size = match pace == Pace::Awaited || kept.is_empty() {
        true => 0,
        false => ((encode(&change)?.len() + encode(&envelope(Some(0)))?.len()) as u64).saturating_sub(carried),
    };
    // Of no size when nothing is to be taken in.
    while let Some((last, bytes)) = kept.pop_if(|(_, bytes)| *bytes < 2 * size) {
        let Some((mut older, _)) = read::<S>(objects, folder, last)? else { return Err(conflict(objects, folder)) };
        older.state.lay_down();
        change = older.state.fold(change);
        size += bytes;
    }
    let after = kept.last().map(|(generation, _)| *generation);
    if after.is_none() {
        change.settle();
    }
    let bytes = encode(&envelope(after).with(change))?;
    kept.push((generation, (bytes.len() as u64).saturating_sub(carried)));
    let left = |superseded| Left { folder: folder.to_owned(), newest: generation, superseded };
    let path_of = |generation| path(folder, generation);
    let is_first = match pace {
        Pace::Steady => objects.create_text(&path_of(generation), bytes)?,
        Pace::Awaited => objects.promise_text(&path_of(generation), bytes)?,
    };
    if !is_first {
        return Err(conflict(objects, folder));
    }
    let (listed, _) = objects.list(folder)?;
    if generations(&listed).any(|(other, _)| other > generation) {
        return match is_stood_on(objects, folder, generation)? {
            true => Ok((Chain { links: kept, etag: String::new(), carries: carried > 0 }, left(Vec::new()))),
            false => Err(conflict(objects, folder)),
        };
    }
    let ours = generations(&listed).find(|(other, _)| *other == generation);
    let etag = ours.map(|(_, object)| object.etag.clone()).unwrap_or_default();
    let superseded = generations(&listed).map(|(other, _)| other).filter(|other| kept.iter().all(|(n, _)| n != other));
    let superseded = superseded.map(path_of).collect();
    Ok((Chain { links: kept, etag, carries: carried > 0 }, left(superseded)))
}

/// Whether a generation is one of those that the newest one stands on. It may have been taken in as well: that is not to
/// be seen, and who asks has to look at the state.
fn is_stood_on(objects: &Objects, folder: &str, generation: u64) -> Result<bool, ArchiveError> {
    #[derive(Deserialize)]
    struct Link {
        after: Option<u64>,
    }
    'again: for _ in 0..ATTEMPTS {
        let mut next = newest(objects, folder)?.map(|(newest, _)| newest);
        while let Some(at) = next.filter(|at| *at > generation) {
            let Some(bytes) = objects.get(&path(folder, at))? else { continue 'again };
            let link: Link =
                serde_json::from_slice(&bytes).map_err(|error| broken(objects, folder, at, error.to_string()))?;
            next = link.after.filter(|after| *after < at);
        }
        return Ok(next == Some(generation));
    }
    Ok(false)
}

/// Nothing to stand on, but numbers that go on where those in the folder end.
pub(super) fn numbering(objects: &Objects, folder: &str) -> Result<Chain, ArchiveError> {
    let newest = newest(objects, folder)?;
    Ok(newest
        .map(|(generation, etag)| Chain { links: vec![(generation, 0)], etag, carries: false })
        .unwrap_or_default())
}

/// Deletes a whole chain that nothing refers to any more.
pub(super) fn remove(objects: &Objects, folder: &str) -> Result<(), ArchiveError> {
    let (listed, _) = objects.list(folder)?;
    objects.delete(generations(&listed).map(|(generation, _)| path(folder, generation)).collect())
}

fn conflict(objects: &Objects, folder: &str) -> ArchiveError {
    ArchiveError::Conflict { object: format!("{}/{folder}", objects.name) }
}

/// Compact JSON, but members down to the third level begin a line.
#[derive(Default)]
struct Lines {
    depth: usize,
}

impl Lines {
    const DEPTH: usize = 3;

    fn line<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(match (first, self.depth <= Self::DEPTH) {
            (true, true) => b"\n",
            (true, false) => b"",
            (false, true) => b",\n",
            (false, false) => b",",
        })
    }
}

impl serde_json::ser::Formatter for Lines {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth += 1;
        writer.write_all(b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth -= 1;
        writer.write_all(b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.line(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth += 1;
        writer.write_all(b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth -= 1;
        writer.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.line(writer, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;
    use object_store::path::Path;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Numbers(BTreeMap<u32, Option<u32>>);

    impl State for Numbers {
        const KIND: &'static str = "numbers";

        fn fold(mut self, newer: Self) -> Self {
            self.0.extend(newer.0);
            self
        }

        fn settle(&mut self) {
            self.0.retain(|_, value| value.is_some());
        }
    }

    fn memory() -> Objects {
        Objects::new(Arc::new(InMemory::new()), Path::default(), "memory:", None)
    }

    fn change(key: u32, value: Option<u32>) -> Numbers {
        Numbers([(key, value)].into())
    }

    #[test]
    fn a_chain_stays_short_and_holds_everything() {
        let objects = memory();
        let mut chain = Chain::default();
        let mut expected = BTreeMap::new();
        let (mut longest, mut written) = (0, 0);
        for n in 0..600u32 {
            let (key, value) = (n * 7 % 151, (n % 11 != 0).then_some(n));
            expected.insert(key, value);
            chain = publish(&objects, "n", &chain, change(key, value), false).unwrap();
            longest = longest.max(chain.links.len());
            written = objects.traffic().0;
            let (loaded, state) = load::<Numbers>(&objects, "n").unwrap().unwrap();
            assert_eq!(loaded, chain);
            assert_eq!(state.0, expected.iter().filter(|(_, v)| v.is_some()).map(|(k, v)| (*k, *v)).collect());
        }
        assert!(longest <= 8, "{longest}");
        // A state of 151 members is about 1800 bytes; writing it whole each time would be over a million.
        assert!(written < 400_000, "{written}");
        let (listed, _) = objects.list("n").unwrap();
        assert_eq!(listed.len(), chain.links.len(), "nothing superseded is left");
    }

    /// Who waits waits for his own change alone, and the chain is short again once it was behind.
    #[test]
    fn what_is_left_for_later_is_taken_in_then() {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::open(&format!("file://{}", dir.path().display())).unwrap();
        objects.provide();
        let (mut chain, mut expected) = (Chain::default(), BTreeMap::new());
        let (mut longest, mut shortened) = (0, 0);
        for n in 0..600u32 {
            let new = Numbers((n * 10..n * 10 + 10).map(|key| (key % 3001, Some(n))).collect());
            expected.extend(new.0.clone());
            let before = objects.traffic().0;
            let (quick, left) = publish_only(&objects, "n", &chain, new, false, Pace::Awaited).unwrap();
            assert!(objects.traffic().0 - before < 400, "{n}");
            objects.settle("n").unwrap();
            left.sweep(&objects);
            longest = longest.max(quick.links.len());
            chain = match shorten::<Numbers>(&objects, "n", &quick).unwrap() {
                Some((shorter, left)) => {
                    left.sweep(&objects);
                    shortened += 1;
                    assert!(shorter.links.is_sorted_by(|(_, older), (_, newer)| *older >= 2 * newer));
                    shorter
                }
                None => quick,
            };
            let (loaded, state) = load::<Numbers>(&objects, "n").unwrap().unwrap();
            assert_eq!(loaded, chain);
            assert_eq!(state.0, expected);
        }
        assert!(longest <= LOOSE + 8 && (1..100).contains(&shortened), "{longest} {shortened}");
        // Somebody else was first.
        while chain.links.len() <= LOOSE {
            let new = change(1, Some(1));
            chain = publish_only(&objects, "n", &chain, new, false, Pace::Awaited).unwrap().0;
            objects.settle("n").unwrap();
        }
        let loose =
            Chain { links: chain.links.iter().map(|(generation, _)| (*generation, 9)).collect(), ..chain.clone() };
        publish(&objects, "n", &chain, change(1, Some(1)), false).unwrap();
        assert!(matches!(shorten::<Numbers>(&objects, "n", &loose), Err(ArchiveError::Conflict { .. })));
    }

    #[test]
    fn the_second_writer_is_refused() {
        let objects = memory();
        let first = publish(&objects, "n", &Chain::default(), change(1, Some(1)), false).unwrap();
        let second = publish(&objects, "n", &first, change(2, Some(2)), false).unwrap();
        for stale in [&Chain::default(), &first] {
            let result = publish(&objects, "n", stale, change(3, Some(3)), false);
            assert!(matches!(result, Err(ArchiveError::Conflict { .. })));
        }
        // A number that was taken in and deleted is free again, but not the newest.
        let third = publish(&objects, "n", &second, change(3, Some(3)), true).unwrap();
        assert_eq!(third.generations(), [3]);
        let result = publish(&objects, "n", &first, change(4, Some(4)), false);
        assert!(matches!(result, Err(ArchiveError::Conflict { .. })));
        let (chain, state) = load::<Numbers>(&objects, "n").unwrap().unwrap();
        assert_eq!((chain, state), (third, change(3, Some(3))));
    }

    #[test]
    fn unknown_formats_and_kinds_are_named() {
        let objects = memory();
        let check = |text: &str, says: &str| {
            objects.delete(vec![path("n", 1)]).unwrap();
            assert!(objects.create(&path("n", 1), text.as_bytes().to_vec()).unwrap());
            assert_eq!(
                load::<Numbers>(&objects, "n").unwrap_err().to_string(),
                format!("memory:/{}: {says}", path("n", 1))
            );
        };
        check(r#"{"format":2,"kind":"numbers","anything":1}"#, "is of archive format 2, this spooltap knows 1");
        check(r#"{"format":1,"kind":"users"}"#, "is a \"users\", expected a \"numbers\"");
        check(r#"{"format":1,"kind":"numbers","generation":4,"after":null,"state":{}}"#, "says it is generation 4");
        check(r#"{"format":1,"kind":"numbers","generation":1,"after":1,"state":{}}"#, "stands on a later generation");
    }

    #[test]
    fn objects_have_a_line_for_each_member() {
        #[derive(Serialize)]
        struct Shape {
            a: Vec<Vec<u8>>,
        }
        let text = encode(&serde_json::json!({"x": {"records": [{"a": [1, 2]}, {"b": 2}]}})).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "{\n\"x\":{\n\"records\":[\n{\"a\":[1,2]},\n{\"b\":2}]}}\n");
        assert_eq!(encode(&Shape { a: vec![] }).unwrap(), b"{\n\"a\":[]}\n");
    }
}
