//! What capture would do here, and what limits it: for `doctor`. Opens and closes, watches nothing.

use super::ground::{Area, Ground};
use super::{Reach, Roots, SOURCES, Settings, fs_kind};
use std::path::PathBuf;

/// How one area would be served.
#[derive(Clone, Debug)]
pub struct Prospect {
    pub path: PathBuf,
    pub reach: Reach,
    pub fs: String,
    /// The source that `auto` would take, and why.
    pub source: &'static str,
    pub reason: String,
    /// Why the better ones cannot be taken.
    pub refused: Vec<(&'static str, String)>,
}

/// One entry per area.
pub fn survey(roots: &Roots, settings: &Settings) -> Vec<Prospect> {
    let ground = Ground::new(roots.clone(), settings, None);
    let areas = ground.areas.clone();
    areas.iter().map(|area| prospect(&ground, area)).collect()
}

fn prospect(ground: &Ground, area: &Area) -> Prospect {
    let fs = fs_kind(&area.path).map_or_else(|error| error.to_string(), |kind| kind.to_string());
    let mut refused = Vec::new();
    let one = Ground { areas: vec![area.clone()], ..ground.clone() };
    for kind in SOURCES.iter().filter(|kind| kind.auto) {
        let fit = (kind.fit)(&one, area).and_then(|why| match (kind.open)(&one) {
            Ok(_) => Ok(why),
            Err(error) => Err(error.to_string()),
        });
        match fit {
            Ok(reason) => {
                return Prospect { path: area.path.clone(), reach: area.reach, fs, source: kind.name, reason, refused };
            }
            Err(why) => refused.push((kind.name, why)),
        }
    }
    let reason = "nothing works".to_owned();
    Prospect { path: area.path.clone(), reach: area.reach, fs, source: "none", reason, refused }
}

/// Whether fanotify could serve this directory.
pub fn fanotify_fits(roots: &Roots, settings: &Settings, path: &std::path::Path) -> Result<String, String> {
    let ground = Ground::new(roots.clone(), settings, None);
    super::fanotify::fit(&ground, &Area { path: path.to_owned(), reach: Reach::Tree })
}
