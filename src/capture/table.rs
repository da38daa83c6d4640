//! Which directory a watch belongs to. One small entry per directory: its name and the watch above it, so that a
//! directory that moves is one entry changed, however much lies below. Pure.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// How events below a watch are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Above a root that does not exist yet: only the creation of what leads there matters.
    Ladder,
    Flat,
    Tree,
    /// Lock files: whoever lets one go may have changed what it stands for.
    Locks,
}

/// One watched directory; `W` is what the kernel's interface wants back to remove the watch.
#[derive(Debug)]
pub struct Dir<W> {
    pub watch: W,
    /// `None`: a root, `name` is its whole path.
    pub parent: Option<i32>,
    pub name: Box<OsStr>,
    pub role: Role,
}

/// All watched directories by watch descriptor.
#[derive(Debug)]
pub struct Table<W> {
    dirs: HashMap<i32, Dir<W>>,
}

/// No path has more components than this; a longer chain is a circle.
const DEEPEST: usize = 2048;

impl<W> Default for Table<W> {
    fn default() -> Self {
        Self { dirs: HashMap::new() }
    }
}

impl<W> Table<W> {
    pub fn get(&self, wd: i32) -> Option<&Dir<W>> {
        self.dirs.get(&wd)
    }

    pub fn get_mut(&mut self, wd: i32) -> Option<&mut Dir<W>> {
        self.dirs.get_mut(&wd)
    }

    pub fn insert(&mut self, wd: i32, dir: Dir<W>) {
        self.dirs.insert(wd, dir);
    }

    pub fn remove(&mut self, wd: i32) -> Option<Dir<W>> {
        self.dirs.remove(&wd)
    }

    pub fn len(&self) -> usize {
        self.dirs.len()
    }

    pub fn wds(&self) -> impl Iterator<Item = i32> {
        self.dirs.keys().copied()
    }

    /// The directory's path; `None` when a directory above it is not known any more.
    pub fn path(&self, wd: i32) -> Option<PathBuf> {
        let mut names = Vec::new();
        let mut at = wd;
        loop {
            let dir = self.dirs.get(&at)?;
            names.push(&*dir.name);
            match dir.parent {
                Some(parent) if names.len() < DEEPEST => at = parent,
                Some(_) => return None,
                None => return Some(names.into_iter().rev().collect()),
            }
        }
    }

    /// True when `wd` is `above` or below it.
    pub fn is_within(&self, wd: i32, above: i32) -> bool {
        let mut at = Some(wd);
        for _ in 0..DEEPEST {
            match at {
                Some(at) if at == above => return true,
                Some(wd) => at = self.dirs.get(&wd).and_then(|dir| dir.parent),
                None => return false,
            }
        }
        false
    }

    /// `above` and all below it; looks at every entry, for rare occasions.
    pub fn within(&self, above: i32) -> Vec<i32> {
        self.wds().filter(|&wd| self.is_within(wd, above)).collect()
    }

    /// Puts a known directory elsewhere.
    pub fn place(&mut self, wd: i32, parent: Option<i32>, name: OsString) {
        if let Some(dir) = self.dirs.get_mut(&wd) {
            dir.parent = parent;
            dir.name = name.into_boxed_os_str();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(dirs: &[(i32, Option<i32>, &str)]) -> Table<()> {
        let mut table = Table::default();
        for &(wd, parent, name) in dirs {
            let name = OsString::from(name).into_boxed_os_str();
            table.insert(wd, Dir { watch: (), parent, name, role: Role::Tree });
        }
        table
    }

    #[test]
    fn a_moved_directory_takes_what_is_below_with_it() {
        let mut table = table(&[(1, None, "/spool"), (2, Some(1), "a"), (3, Some(2), "b"), (4, Some(1), "c")]);
        assert_eq!(table.path(3), Some("/spool/a/b".into()));
        table.place(2, Some(4), "z".into());
        assert_eq!(table.path(3), Some("/spool/c/z/b".into()));
        let mut within = table.within(4);
        within.sort();
        assert_eq!(within, [2, 3, 4]);
    }

    #[test]
    fn a_circle_and_a_lost_parent_have_no_path() {
        let table = table(&[(1, Some(2), "a"), (2, Some(1), "b"), (3, Some(9), "c")]);
        assert_eq!(table.path(1), None);
        assert_eq!(table.path(3), None);
        assert!(!table.is_within(1, 3));
    }
}
