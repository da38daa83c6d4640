//! What lies outside mailboxes: users' data, quota roots, server annotations.

use super::ArchiveError;
use super::bodies;
use super::chain::{self, Chain};
use super::objects::Objects;
use super::shapes::{StoredScript, StoredServer, StoredUser, load_annotations, store_annotations};
use super::text;
use crate::model::{Annotation, QuotaLimits, QuotaRoot, SieveScript, UserId, UserMeta};
use std::collections::BTreeMap;

const USERS: &str = "users";
const SERVER: &str = "server";

/// How often a change is tried again when others publish in between.
const ATTEMPTS: usize = 10;

fn folder(user: &UserId) -> String {
    format!("{USERS}/{}", text::path_part(user.as_bytes()))
}

/// Users that have data outside mailboxes.
pub(super) fn users(objects: &Objects) -> Result<Vec<UserId>, ArchiveError> {
    let (_, folders) = objects.list(USERS)?;
    Ok(folders.iter().map(|folder| UserId::from(text::from_path_part(folder))).collect())
}

/// A mark that changes with the user's data.
pub(super) fn mark(objects: &Objects, user: &UserId) -> Result<Option<(u64, String)>, ArchiveError> {
    chain::newest(objects, &folder(user))
}

/// Everything of one user; scripts with their text if `texts`.
pub(super) fn meta(objects: &Objects, user: &UserId, texts: bool) -> Result<UserMeta, ArchiveError> {
    let Some((_, stored)) = chain::load::<StoredUser>(objects, &folder(user))? else { return Ok(UserMeta::default()) };
    let mut sieve = BTreeMap::new();
    for (name, StoredScript { guid, last_update }) in stored.sieve {
        let content = if texts { bodies::script(objects, &guid)? } else { Vec::new() };
        sieve.insert(name, SieveScript { guid, last_update, content, compiled: Vec::new() });
    }
    Ok(UserMeta {
        subs: stored.subscribed,
        seen: stored.seen.into_iter().map(|(id, seen)| (id, seen.into())).collect(),
        seen_incomplete: false,
        sieve,
        active: stored.active,
    })
}

/// Changes a user's data and publishes it if that makes a difference.
pub(super) fn change_user(
    objects: &Objects,
    user: &UserId,
    change: impl Fn(&mut StoredUser),
) -> Result<(), ArchiveError> {
    let folder = folder(user);
    retry(objects, &folder, || {
        let (chain, old) = chain::load::<StoredUser>(objects, &folder)?.unwrap_or_default();
        let mut new = StoredUser { user: user.clone(), ..old.clone() };
        change(&mut new);
        if new == (StoredUser { user: user.clone(), ..StoredUser::default() }) {
            // A user without data is no user here: who reads the archive would ask after them for ever.
            return if chain == Chain::default() { Ok(()) } else { remove_user(objects, user) };
        }
        if new != old {
            chain::publish(objects, &folder, &chain, new, true)?;
        }
        Ok(())
    })
}

/// Forgets a user's data.
pub(super) fn remove_user(objects: &Objects, user: &UserId) -> Result<(), ArchiveError> {
    chain::remove(objects, &folder(user))
}

/// A mark that changes with quotas and server annotations.
pub(super) fn server_mark(objects: &Objects) -> Result<Option<(u64, String)>, ArchiveError> {
    chain::newest(objects, SERVER)
}

/// Quota roots and server annotations.
pub(super) fn server(objects: &Objects) -> Result<(BTreeMap<QuotaRoot, QuotaLimits>, Vec<Annotation>), ArchiveError> {
    let stored = chain::load::<StoredServer>(objects, SERVER)?.map(|(_, stored)| stored).unwrap_or_default();
    let quotas = stored.quotas.into_iter().filter_map(|(root, limits)| Some((root, limits?))).collect();
    Ok((quotas, load_annotations(stored.annotations)))
}

/// Sets a quota root, or takes it out.
pub(super) fn set_quota(objects: &Objects, root: &QuotaRoot, limits: Option<&QuotaLimits>) -> Result<(), ArchiveError> {
    change_server(objects, |quotas, _| match quotas.get(root) == limits {
        true => None,
        false => Some((root.clone(), limits.cloned())),
    })
}

/// Changes the server's annotations.
pub(super) fn change_annotations(objects: &Objects, change: impl Fn(&mut Vec<Annotation>)) -> Result<(), ArchiveError> {
    change_server(objects, |_, annotations| {
        change(annotations);
        None
    })
}

type QuotaChange = (QuotaRoot, Option<QuotaLimits>);

fn change_server(
    objects: &Objects,
    change: impl Fn(&BTreeMap<QuotaRoot, QuotaLimits>, &mut Vec<Annotation>) -> Option<QuotaChange>,
) -> Result<(), ArchiveError> {
    retry(objects, SERVER, || {
        let loaded = chain::load::<StoredServer>(objects, SERVER)?;
        let (chain, stored) = loaded.unwrap_or_default();
        let quotas = stored.quotas.into_iter().filter_map(|(root, limits)| Some((root, limits?))).collect();
        let old = load_annotations(stored.annotations);
        let mut annotations = old.clone();
        let quota = change(&quotas, &mut annotations);
        annotations.sort();
        if quota.is_some() || annotations != old {
            let quotas = quota.into_iter().collect();
            let change = StoredServer { quotas, annotations: store_annotations(&annotations) };
            chain::publish(objects, SERVER, &chain, change, false)?;
        }
        Ok(())
    })
}

fn retry(objects: &Objects, folder: &str, publish: impl Fn() -> Result<(), ArchiveError>) -> Result<(), ArchiveError> {
    let _turn = objects.turn(folder);
    for _ in 0..ATTEMPTS {
        match publish() {
            Err(ArchiveError::Conflict { .. }) => {}
            done => return done,
        }
    }
    publish()
}
