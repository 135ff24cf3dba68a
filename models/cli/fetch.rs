//! `volary fetch`

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary_weights::hub::{Choice, Freshness, HubError, Lock, Locked, LockedFile, Look, RepoId, Snapshot};

use super::{Shared, say, say_json};

/// Arguments of `fetch`.
#[derive(Args)]
pub struct Arguments {
    /// Repositories: owner/name or owner/name@revision (a branch, a tag, a commit).
    #[arg(required = true, value_name = "OWNER/NAME[@REVISION]")]
    repositories: Vec<String>,
    /// Take these weights in place of those that would be chosen: names or patterns with `*` and `?`.
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Ask the hub where a branch is by now, also when the cache knows a commit of it.
    #[arg(long)]
    refresh: bool,
    /// Write no lock file.
    #[arg(long)]
    no_lock: bool,
}

#[derive(Serialize)]
struct Fetched {
    repository: String,
    revision: String,
    commit: String,
    folder: PathBuf,
    files: BTreeMap<String, LockedFile>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let repositories =
        arguments.repositories.iter().map(|name| name.parse()).collect::<Result<Vec<RepoId>, _>>()?;
    let choice = Choice { variant: shared.variant.clone(), include: arguments.include };
    let freshness = if arguments.refresh { Freshness::Newest } else { Freshness::Cached };
    let hub = shared.hub()?;
    let fetch = |repo: &RepoId| -> Result<(Snapshot, Locked), HubError> {
        let snapshot = hub.snapshot_as(repo, &choice, Look::Full, freshness)?;
        let locked = snapshot.locked()?;
        Ok((snapshot, locked))
    };
    let (mut fetched, mut problems) = (Vec::new(), Vec::new());
    for repo in &repositories {
        match fetch(repo) {
            Ok(found) => fetched.push(found),
            Err(error) => problems.push(error.to_string()),
        }
    }
    if !arguments.no_lock && !shared.locked && !fetched.is_empty() {
        let merged = Lock::merge(&shared.lock, fetched.iter().map(|(_, locked)| locked.clone()));
        problems.extend(merged.err().map(|error| error.to_string()));
    }
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("; "));
    if shared.json {
        let list = fetched.into_iter().map(|(snapshot, locked)| Fetched {
            repository: locked.id,
            revision: locked.revision,
            commit: locked.commit,
            folder: snapshot.folder,
            files: locked.files,
        });
        return say_json(&list.collect::<Vec<_>>());
    }
    for (snapshot, _) in &fetched {
        say(snapshot.folder.display().to_string())?;
    }
    Ok(())
}
