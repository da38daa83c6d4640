//! Which replicas of this state took over from their source. A file of its own beside the database: it has to be there when
//! the receipts are not.

use crate::model::Promotion;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// One line of the book.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    promotion: Promotion,
    /// The replica has its fence, and all that belongs to a promotion was done.
    done: bool,
}

/// All promotions; on the disk before anything follows from them.
#[derive(Debug)]
pub struct Promotions {
    path: PathBuf,
    lines: Vec<Line>,
}

impl Promotions {
    /// Reads the book. One that cannot be read is an error: without it something would be pushed over a promoted replica.
    pub fn open(state: &Path) -> io::Result<Self> {
        let path = state.join("promoted.json");
        let told = |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
        let lines = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| told(&error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(told(&error)),
        };
        Ok(Self { path, lines })
    }

    /// The promotion of this replica, begun or done.
    pub fn of(&self, replica: &str) -> Option<&Promotion> {
        self.lines.iter().map(|line| &line.promotion).find(|promotion| promotion.replica == replica)
    }

    pub fn is_done(&self, replica: &str) -> bool {
        self.lines.iter().any(|line| line.promotion.replica == replica && line.done)
    }

    /// Writes down that a replica is about to take over.
    pub fn begin(&mut self, promotion: &Promotion) -> io::Result<()> {
        self.put(promotion, false)
    }

    /// And that it has.
    pub fn done(&mut self, promotion: &Promotion) -> io::Result<()> {
        self.put(promotion, true)
    }

    fn put(&mut self, promotion: &Promotion, done: bool) -> io::Result<()> {
        let mut lines = self.lines.clone();
        lines.retain(|line| line.promotion.replica != promotion.replica);
        lines.push(Line { promotion: promotion.clone(), done });
        self.save(lines)
    }

    /// It is a replica again.
    pub fn forget(&mut self, replica: &str) -> io::Result<()> {
        let mut lines = self.lines.clone();
        lines.retain(|line| line.promotion.replica != replica);
        self.save(lines)
    }

    fn save(&mut self, lines: Vec<Line>) -> io::Result<()> {
        let dir = self.path.parent().unwrap_or(&self.path);
        std::fs::create_dir_all(dir)?;
        let fresh = self.path.with_extension("json.new");
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(&lines).map_err(io::Error::other)?)?;
        file.sync_all()?;
        super::hand_over(&fresh);
        std::fs::rename(&fresh, &self.path)?;
        std::fs::File::open(dir)?.sync_all()?;
        self.lines = lines;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_book_outlives_us_and_is_missed_when_it_is_damaged() {
        let dir = tempfile::tempdir().expect("directory");
        let promotion = Promotion { replica: "csync://r".into(), at: 5, ..Promotion::default() };
        let mut book = Promotions::open(dir.path()).expect("opens");
        assert_eq!(book.of("csync://r"), None);
        book.begin(&promotion).expect("writes");
        let mut again = Promotions::open(dir.path()).expect("opens");
        assert_eq!((again.of("csync://r"), again.is_done("csync://r")), (Some(&promotion), false));
        again.done(&promotion).expect("writes");
        assert!(Promotions::open(dir.path()).expect("opens").is_done("csync://r"));
        again.forget("csync://r").expect("writes");
        assert_eq!(Promotions::open(dir.path()).expect("opens").of("csync://r"), None);
        std::fs::write(dir.path().join("promoted.json"), "[{").expect("writes");
        assert!(Promotions::open(dir.path()).is_err());
    }
}
