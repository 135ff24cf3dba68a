//! Which files of a repository a system needs.
//!
//! Every small file (configuration, tokenizer, license), and of the weights one form: safetensors before torch files
//! before GGUF, in one variant, folder by folder.

use std::collections::{BTreeMap, BTreeSet};

use super::error::HubError;
use super::id::{RepoId, check_path};

/// Which files are wanted beside the small ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// The variant of the weights, e.g. `fp16` for `model.fp16.safetensors`; the plain ones where it is `None`.
    pub variant: Option<String>,
    /// Patterns (`*`, `?`) of the weights to take in place of those that would be chosen.
    pub include: Vec<String>,
}

/// The files of a repository that are needed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Configuration, tokenizers, texts.
    pub(super) small: Vec<String>,
    /// Weights, and what an index does not name.
    pub(super) weights: Vec<String>,
    /// Indices of sharded weights: they name the shards, which are needed too.
    pub(super) indices: Vec<String>,
}

impl Selection {
    fn take(&mut self, part: Part, found: Vec<String>) {
        match part {
            Part::Index => self.indices.extend(found),
            Part::Whole | Part::Shard => self.weights.extend(found),
        }
    }
}

/// Endings of the small files.
const SMALL: &[&str] = &["json", "txt", "model", "jinja", "yaml", "yml", "tiktoken", "vocab", "spm", "bpe"];
/// Names of small files, by their start.
const TEXTS: &[&str] = &["LICENSE", "LICENCE", "NOTICE", "README.md"];
/// Folders for other frameworks, and of training runs.
const FOREIGN: &[&str] =
    &["onnx", "openvino", "coreml", "flax", "tf", "tflite", "mlx", "runs", "logs", "original", "metal"];
/// What training leaves beside the weights, by the start of its name.
const STATES: &[&str] =
    &["optimizer", "scheduler.", "training_args", "trainer_state", "rng_state", "scaler.", "random_states"];
/// Weights in the order in which one form is taken.
const FORMS: &[&[&str]] = &[&["safetensors"], &["bin"], &["pt", "pth", "ckpt"], &["gguf"]];
/// Names of weights that stand for the whole model of their folder, the first that exists.
const WHOLE: &[&str] =
    &["model", "open_clip_model", "diffusion_pytorch_model", "pytorch_model", "open_clip_pytorch_model"];
/// The file that names the parts of a pipeline, each in a folder of its own.
pub(super) const PIPELINE: &str = "model_index.json";
const INDEX: &str = ".index";

/// A file's folder (`""` is the root) and its own name.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn ending(path: &str) -> &str {
    split(path).1.rsplit_once('.').map_or("", |(_, ending)| ending)
}

/// A file of weights by its name: `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`.
#[derive(Debug, PartialEq, Eq)]
struct Weights<'a> {
    stem: &'a str,
    variant: Option<&'a str>,
    part: Part,
    /// Its place in [`FORMS`].
    form: usize,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Part {
    Whole,
    Shard,
    Index,
}

impl<'a> Weights<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let name = split(path).1;
        if STATES.iter().any(|state| name.starts_with(state)) {
            return None;
        }
        let form = |ending: &str| FORMS.iter().position(|endings| endings.contains(&ending));
        if let Some(rest) = name.strip_suffix(".json") {
            let (rest, variant) = match rest.strip_suffix(INDEX) {
                Some(rest) => (rest, None),
                None => {
                    let (rest, variant) = rest.rsplit_once('.')?;
                    (rest.strip_suffix(INDEX)?, Some(variant))
                }
            };
            let (stem, ending) = rest.rsplit_once('.')?;
            // `model.fp16.safetensors.index.json` is written too
            let (stem, variant) = match variant {
                None => variant_of(stem),
                variant => (stem, variant),
            };
            return Some(Self { stem, variant, part: Part::Index, form: form(ending)? });
        }
        let (stem, ending) = name.rsplit_once('.')?;
        let form = form(ending)?;
        let (stem, part) = match shard_of(stem) {
            Some(stem) => (stem, Part::Shard),
            None => (stem, Part::Whole),
        };
        let (stem, variant) = if FORMS[form] == ["gguf"] { (stem, None) } else { variant_of(stem) };
        Some(Self { stem, variant, part, form })
    }
}

/// `model.fp16` is `model` in the variant `fp16`. Other names with dots are names.
fn variant_of(stem: &str) -> (&str, Option<&str>) {
    match stem.split_once('.') {
        Some((name, variant)) if WHOLE.contains(&name) => (name, Some(variant)),
        _ => match stem.rsplit_once('.') {
            Some((name, variant)) if ["fp16", "fp32", "bf16", "fp8", "non_ema", "ema"].contains(&variant) => {
                (name, Some(variant))
            }
            _ => (stem, None),
        },
    }
}

/// `model` for `model-00001-of-00002`.
fn shard_of(stem: &str) -> Option<&str> {
    let (rest, of) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(of) && is_number(number)).then_some(stem)
}

fn is_small(path: &str) -> bool {
    let name = split(path).1;
    let is_text = TEXTS.iter().any(|text| name.starts_with(text));
    !name.starts_with('.')
        && Weights::of(path).is_none()
        && !STATES.iter().any(|state| name.starts_with(state))
        && (is_text || SMALL.contains(&ending(path)))
}

fn is_foreign(path: &str) -> bool {
    split(path).0.split('/').any(|folder| folder.starts_with('.') || FOREIGN.contains(&folder))
}

/// Chooses among the names of a repository's files.
///
/// # Errors
/// [`HubError::UnsafeName`] if any name would lead out of a snapshot; [`HubError::NoVariant`], [`HubError::Ambiguous`],
/// [`HubError::NoMatch`].
pub(super) fn select<'a>(
    repo: &RepoId,
    names: impl IntoIterator<Item = &'a str>,
    choice: &Choice,
) -> Result<Selection, HubError> {
    let names: Vec<&str> = names.into_iter().collect();
    for name in &names {
        check_path(name).map_err(|problem| HubError::UnsafeName {
            repo: repo.clone(),
            name: (*name).into(),
            problem,
        })?;
    }
    let mut selection = Selection::default();
    let mut folders: BTreeMap<&str, Vec<(&str, Weights)>> = BTreeMap::new();
    for &name in names.iter().filter(|name| !is_foreign(name)) {
        if is_small(name) {
            selection.small.push(name.into());
        } else if let Some(weights) = Weights::of(name) {
            folders.entry(split(name).0).or_default().push((name, weights));
        }
    }
    if !choice.include.is_empty() {
        // A name that is asked for is taken, wherever it is.
        for &name in names.iter().filter(|name| choice.include.iter().any(|pattern| matches(pattern, name))) {
            match Weights::of(name).map(|weights| weights.part) {
                Some(Part::Index) => selection.indices.push(name.into()),
                _ if selection.small.iter().any(|small| small == name) => {}
                _ => selection.weights.push(name.into()),
            }
        }
        let has_small = |pattern: &String| selection.small.iter().any(|name| matches(pattern, name));
        if selection.weights.is_empty()
            && selection.indices.is_empty()
            && !choice.include.iter().any(has_small)
        {
            let known = names.iter().map(|name| (*name).to_owned()).collect();
            return Err(HubError::NoMatch { repo: repo.clone(), asked: choice.include.clone(), known });
        }
        return Ok(selection);
    }

    let is_pipeline = names.contains(&PIPELINE);
    let has_root = folders.contains_key("") && !is_pipeline;
    let of_parts: Vec<_> = folders
        .iter()
        .filter(|(folder, _)| if has_root { folder.is_empty() } else { !(is_pipeline && folder.is_empty()) })
        .collect();
    let variants: BTreeSet<&str> = of_parts
        .iter()
        .flat_map(|(_, files)| files.iter().filter_map(|(_, weights)| weights.variant))
        .collect();
    if let Some(variant) = &choice.variant
        && !variants.contains(variant.as_str())
    {
        let known = variants.iter().map(|variant| (*variant).to_owned()).collect();
        return Err(HubError::NoVariant { repo: repo.clone(), variant: variant.clone(), known });
    }
    // GGUF only where there is nothing else in the whole repository.
    let is_gguf = |weights: &Weights| FORMS[weights.form] == ["gguf"];
    let only_gguf = of_parts.iter().all(|(_, files)| files.iter().all(|(_, weights)| is_gguf(weights)));
    for (_, files) in of_parts {
        let files: Vec<_> = files.iter().filter(|(_, weights)| only_gguf || !is_gguf(weights)).collect();
        take_folder(repo, &files, choice.variant.as_deref(), &mut selection)?;
    }
    selection.weights.sort();
    Ok(selection)
}

/// Takes one form of one folder's weights: by a name that stands for the whole model, else by any.
fn take_folder(
    repo: &RepoId,
    files: &[&(&str, Weights)],
    variant: Option<&str>,
    selection: &mut Selection,
) -> Result<(), HubError> {
    // A part of a pipeline without the variant is taken as it is.
    let variant = variant.filter(|variant| files.iter().any(|(_, weights)| weights.variant == Some(variant)));
    let fitting: Vec<&(&str, Weights)> =
        files.iter().copied().filter(|(_, weights)| weights.variant == variant).collect();
    let names = |is_it: &dyn Fn(&Weights) -> bool| -> Vec<String> {
        let found = fitting.iter().filter(|(_, weights)| is_it(weights));
        found.map(|(name, _)| (*name).to_owned()).collect()
    };
    for form in 0..FORMS.len() {
        for stem in WHOLE {
            for part in [Part::Whole, Part::Index, Part::Shard] {
                let found =
                    names(&|weights| weights.form == form && weights.stem == *stem && weights.part == part);
                if !found.is_empty() {
                    selection.take(part, found);
                    return Ok(());
                }
            }
        }
    }
    // Names that nobody agreed on: an index, else all of them, but of GGUF only one.
    let Some(form) = fitting.iter().map(|(_, weights)| weights.form).min() else { return Ok(()) };
    let of_form = |part: Part| names(&|weights| weights.form == form && weights.part == part);
    let stems: BTreeSet<&str> = fitting.iter().map(|(_, weights)| weights.stem).collect();
    if FORMS[form] == ["gguf"] && stems.len() > 1 {
        let found = names(&|_| true);
        return Err(HubError::Ambiguous { repo: repo.clone(), found });
    }
    let indices = of_form(Part::Index);
    if indices.is_empty() {
        selection.take(Part::Whole, of_form(Part::Whole));
        selection.take(Part::Shard, of_form(Part::Shard));
    } else {
        selection.take(Part::Index, indices);
    }
    Ok(())
}

/// The shards that an index names, in its folder.
///
/// # Errors
/// [`HubError::Index`], [`HubError::UnsafeName`].
pub(super) fn shards(repo: &RepoId, index: &str, text: &[u8]) -> Result<Vec<String>, HubError> {
    let broken = |problem: String| HubError::Index { repo: repo.clone(), index: index.into(), problem };
    let json: serde_json::Value = serde_json::from_slice(text).map_err(|error| broken(error.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| broken("it has no `weight_map`".into()))?;
    let folder = split(index).0;
    let mut shards = BTreeSet::new();
    for (key, shard) in map {
        let shard = shard.as_str().ok_or_else(|| broken(format!("`{key}` is in no file")))?;
        check_path(shard).map_err(|problem| HubError::UnsafeName {
            repo: repo.clone(),
            name: shard.into(),
            problem,
        })?;
        shards.insert(if folder.is_empty() { shard.to_owned() } else { format!("{folder}/{shard}") });
    }
    if shards.is_empty() {
        return Err(broken("it names no shard".into()));
    }
    Ok(shards.into_iter().collect())
}

/// What a snapshot without a list visibly lacks: a configuration, or weights beside one.
pub(super) fn lacking(names: &[String]) -> Vec<String> {
    let has = |name: &str| names.iter().any(|known| known == name);
    let folders: BTreeSet<&str> = names.iter().map(|name| split(name).0).collect();
    let has_weights =
        |folder: &str| names.iter().any(|name| split(name).0 == folder && Weights::of(name).is_some());
    if has(PIPELINE) {
        let has_config = |folder: &&&str| !folder.is_empty() && has(&format!("{folder}/config.json"));
        let bare = folders.iter().filter(has_config).filter(|folder| !has_weights(folder));
        return bare.map(|folder| format!("weights in {folder}")).collect();
    }
    let mut lacking = Vec::new();
    let is_described = ["config.json", "open_clip_config.json", "scheduler_config.json"].into_iter().any(has);
    if !is_described {
        lacking.push("config.json".to_owned());
    }
    if !folders.iter().any(|folder| has_weights(folder)) && !has("scheduler_config.json") {
        lacking.push("weights (model.safetensors or pytorch_model.bin)".to_owned());
    }
    lacking
}

/// Whether this is a file of weights, or an index of one.
pub(super) fn is_weights(path: &str) -> bool {
    Weights::of(path).is_some()
}

/// Whether a model can be run without this small file.
pub(super) fn is_text(path: &str) -> bool {
    let name = split(path).1;
    let is_prose = TEXTS.iter().any(|text| name.starts_with(text));
    is_small(path) && (is_prose || !(ending(path) == "json" || is_vocabulary(name)))
}

fn is_vocabulary(name: &str) -> bool {
    ["vocab", "merges", "tokenizer", "spiece", "sentencepiece", "added_tokens", "bpe"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Whether `*` (anything, `/` too) and `?` (one character) make `pattern` into `text`.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // where the last star was, and what it has taken so far
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    t = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], choice: &Choice) -> Result<Vec<String>, HubError> {
        let repo = "a/b".parse().unwrap();
        let Selection { small, mut weights, indices } = select(&repo, names.iter().copied(), choice)?;
        weights.extend(indices);
        weights.extend(small);
        Ok(weights)
    }

    fn variant(name: &str) -> Choice {
        Choice { variant: Some(name.into()), ..Choice::default() }
    }

    #[test]
    fn one_form_of_the_weights_is_taken() {
        let all = [
            ".gitattributes",
            "README.md",
            "config.json",
            "model.safetensors",
            "model.fp16.safetensors",
            "flax_model.msgpack",
            "pytorch_model.bin",
            "tf_model.h5",
            "rust_model.ot",
            "onnx/model.onnx",
            "onnx/config.json",
            "tokenizer.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "training_args.bin",
            "optimizer.pt",
            "model-q4.gguf",
            "pytorch_model.bin.index.json",
            "checkpoint-5/model.safetensors",
            "LICENSE.txt",
            "chat_template.jinja",
        ];
        let small = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "LICENSE.txt",
            "chat_template.jinja",
        ];
        let with = |weights: &'static str| [&[weights], &small[..]].concat();
        assert_eq!(chosen(&all, &Choice::default()).unwrap(), with("model.safetensors"));
        assert_eq!(chosen(&all, &variant("fp16")).unwrap(), with("model.fp16.safetensors"));
        let include = Choice { include: vec!["*.gguf".into()], ..Choice::default() };
        assert_eq!(chosen(&all, &include).unwrap(), with("model-q4.gguf"));
        assert!(matches!(chosen(&all, &variant("int3")), Err(HubError::NoVariant { .. })));
    }

    #[test]
    fn shards_come_with_their_index_and_torch_files_where_there_is_nothing_better() {
        for (names, taken) in [
            (
                &[
                    "model-00001-of-00002.safetensors",
                    "model-00002-of-00002.safetensors",
                    "model.safetensors.index.json",
                ][..],
                &["model.safetensors.index.json"][..],
            ),
            (
                &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
                &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ),
            (&["pytorch_model.bin", "training_args.bin"], &["pytorch_model.bin"]),
            (&["pytorch_model.bin", "inputs.safetensors"], &["pytorch_model.bin"]),
            (
                &["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "x.gguf"],
                &["pytorch_model.bin.index.json"],
            ),
            (&["ViT-B-32.pt"], &["ViT-B-32.pt"]),
            (
                &["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
                &["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
            ),
            (&["a.Q4_K.gguf"], &["a.Q4_K.gguf"]),
            (&["vocab.txt"], &["vocab.txt"]),
        ] {
            assert_eq!(chosen(names, &Choice::default()).unwrap(), taken, "{names:?}");
        }
        assert!(matches!(
            chosen(&["a.Q4.gguf", "a.Q8.gguf"], &Choice::default()),
            Err(HubError::Ambiguous { .. })
        ));
    }

    #[test]
    fn each_part_of_a_pipeline_is_on_its_own() {
        let names = [
            "model_index.json",
            "sd-v1.safetensors",
            "sd-v1.ckpt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.bin",
            "text_encoder/model.safetensors.index.fp16.json",
            "text_encoder/model.fp16-00001-of-00002.safetensors",
            "text_encoder/model.safetensors",
            "tokenizer/vocab.json",
        ];
        assert_eq!(
            chosen(&names, &Choice::default()).unwrap(),
            [
                "text_encoder/model.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "model_index.json",
                "unet/config.json",
                "tokenizer/vocab.json",
            ]
        );
        assert_eq!(
            chosen(&names, &variant("fp16")).unwrap(),
            [
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "text_encoder/model.safetensors.index.fp16.json",
                "model_index.json",
                "unet/config.json",
                "tokenizer/vocab.json",
            ]
        );
    }

    #[test]
    fn an_index_names_shards_beside_it_and_nothing_else() {
        let repo: RepoId = "a/b".parse().unwrap();
        let index = |text: &str| shards(&repo, "unet/model.safetensors.index.json", text.as_bytes());
        let good = r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}"#;
        assert_eq!(index(good).unwrap(), ["unet/a.safetensors", "unet/b.safetensors"]);
        assert!(matches!(index(r#"{"weight_map": {"x": "../../x"}}"#), Err(HubError::UnsafeName { .. })));
        for broken in ["", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"x": 3}}"#] {
            assert!(matches!(index(broken), Err(HubError::Index { .. })), "{broken}");
        }
    }

    #[test]
    fn a_name_that_leads_elsewhere_stops_everything() {
        for name in ["../config.json", "/etc/passwd", "a\\..\\b.json"] {
            assert!(matches!(
                chosen(&["config.json", name], &Choice::default()),
                Err(HubError::UnsafeName { .. })
            ));
        }
    }

    #[test]
    fn stars_and_question_marks() {
        for (pattern, text, is_match) in [
            ("*.gguf", "a/b.gguf", true),
            ("*q?_k*", "model-q4_k.gguf", true),
            ("model", "model.bin", false),
            ("*a*b", "xaxbxb", true),
            ("?", "", false),
            ("**", "", true),
        ] {
            assert_eq!(matches(pattern, text), is_match, "{pattern} {text}");
        }
    }
}
