//! A failback that was agreed to, kept in our state until it is done: what the other side had before it was touched.

use crate::cli::Failure;
use crate::engine::{Sides, Surplus};
use crate::model::{MboxName, SieveName, UserId};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::Path;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Begun {
    pub replica: String,
    pub plan: String,
    pub surplus: Vec<Surplus>,
    pub subscriptions: Vec<(UserId, MboxName)>,
    pub scripts: Vec<(UserId, SieveName, Vec<u8>)>,
}

const FILE: &str = "failback.json";

impl Begun {
    pub fn new(replica: &str, plan: &str, found: &Sides) -> Self {
        Self {
            replica: replica.to_owned(),
            plan: plan.to_owned(),
            surplus: found.surplus.clone(),
            subscriptions: found.subscriptions.clone(),
            scripts: found.scripts.clone(),
        }
    }

    /// One that cannot be read is an error: what it holds is nowhere else.
    pub fn read(state: &Path) -> Result<Option<Self>, Failure> {
        let path = state.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()).into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(anyhow::anyhow!("{}: {error}", path.display()).into()),
        }
    }

    /// On the disk before anything follows from it.
    pub fn write(&self, state: &Path) -> Result<(), Failure> {
        let (path, fresh) = (state.join(FILE), state.join("failback.json.new"));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        std::fs::File::open(state)?.sync_all()?;
        Ok(())
    }

    pub fn remove(state: &Path) -> Result<(), Failure> {
        match std::fs::remove_file(state.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}
