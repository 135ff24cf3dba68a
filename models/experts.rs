//! Folders whose models are mixtures of experts, written for several ranks.

use std::fs;
use std::path::Path;

use volary_weights::{ConvertOptions, KeyMap, convert, experts, spread};

use crate::error::Error;
use crate::export::{Existing, Export, Progress, export, meant, said};
use crate::folder::Folder;
use crate::registry::System;
use crate::{base_moe, fastmoe, m6, mixtral, switch_transformers};

/// How experts are numbered in the files of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// As in the whole model: shards with an index, which every reader of shards takes for one checkpoint.
    Global,
    /// From 0 in each file, as FastMoE's workers write them.
    Local,
}

/// The systems with experts, and the key map of a folder of each.
type Keys = fn(&Folder) -> Result<&'static KeyMap, Error>;
const SYSTEMS: &[(&str, Keys)] = &[
    (mixtral::SYSTEM.name, |folder| Ok(mixtral::read(folder)?.keys())),
    (switch_transformers::SYSTEM.name, |folder| Ok(switch_transformers::read(folder)?.keys())),
    (fastmoe::SYSTEM.name, |folder| Ok(fastmoe::read(folder)?.keys())),
    (base_moe::SYSTEM.name, base_moe::keys),
    (m6::SYSTEM.name, m6::keys),
];

/// The key map of a folder's system, which says what its experts are.
///
/// # Errors
/// If it is of no system with experts, or its configuration is wrong.
pub fn keys(folder: &Folder) -> Result<&'static KeyMap, Error> {
    let system = System::of(folder)?;
    match SYSTEMS.iter().find(|(name, _)| *name == system.name) {
        Some((_, keys)) => keys(folder),
        None => Err(Error::Task { system: system.name, task: "be spread over ranks: it has no experts" }),
    }
}

/// Writes the folder's weights with an equal share of the experts in each of `ranks` files, and everything else in the
/// first; the other files as they are. However many ranks the experts were saved by, [`convert_folder`] makes one
/// checkpoint of them again.
///
/// [`convert_folder`]: crate::export::convert_folder
///
/// # Errors
/// As [`convert_folder`]; if the experts cannot be spread evenly, or only FastMoE numbers them so.
pub fn spread_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    (ranks, numbers): (usize, Numbers),
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Export, Error> {
    let keys = keys(source)?;
    let system = System::of(source)?;
    if numbers == Numbers::Local && system.name != fastmoe::SYSTEM.name {
        return Err(Error::Task { system: system.name, task: "number experts within ranks, only fastmoe" });
    }
    let done = |bytes| progress.done(bytes);
    let edit = |config: &[u8]| said(config.to_vec(), options.dtype);
    export(source, out, existing, &edit, progress, &meant, &mut |checkpoint, folder, stem| {
        if numbers == Numbers::Global {
            return Ok(spread(checkpoint, folder, stem, (keys, ranks), options, &done).map(drop)?);
        }
        for (rank, part) in experts::workers(checkpoint, keys, ranks)?.iter().enumerate() {
            let folder = folder.join(experts::worker_folder(rank));
            fs::create_dir(&folder).map_err(Error::io(&folder))?;
            convert(part, &folder, experts::WORKER_STEM, options, &done)?;
        }
        Ok(())
    })
}
