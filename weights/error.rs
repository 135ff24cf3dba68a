//! What can be wrong with a checkpoint: the file, the key, what was expected and what was found.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use crate::format::Dtype;
use crate::format::gguf::GgufError;
use crate::format::megatron::RankProblem;
use crate::format::pipeline::PipelineProblem;
use crate::format::shards::ShardProblem;
use crate::rule::{Rule, RuleError};

/// How many problems a message spells out; the rest is counted.
const SHOWN: usize = 20;
/// How many names a problem offers as the nearest.
const NEAREST: usize = 3;

/// A checkpoint could not be read, applied or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder without a weights file.
    #[error("{}: no weights here, looked for {}", folder.display(), looked_for.join(", "))]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The file names that would have been taken, in order.
        looked_for: &'static [&'static str],
    },
    /// A folder without the weights file of a variant that was asked for.
    #[error("{}: no weights of the variant `{variant}` here, looked for {}", folder.display(), looked_for.join(", "))]
    NoVariant {
        /// The folder.
        folder: PathBuf,
        /// The variant, e.g. `fp16`.
        variant: String,
        /// The file names that would have been taken, in order.
        looked_for: Vec<String>,
    },
    /// A checkpoint in several files whose index and files do not fit; everything that does not is listed.
    #[error("{}: {}", path.display(), Listing("problem", "with the shards", problems))]
    Shards {
        /// The index, or the folder when there is none.
        path: PathBuf,
        /// All of it.
        problems: Vec<ShardProblem>,
    },
    /// The files of tensor-parallel ranks that do not fit together; everything that does not is listed.
    #[error("{}: {}", path.display(), Listing("problem", "with the tensor-parallel ranks", problems))]
    Ranks {
        /// The folder of the ranks.
        path: PathBuf,
        /// All of it.
        problems: Vec<RankProblem>,
    },
    /// Experts that cannot be spread over ranks, or ranks' parts that are not one checkpoint; everything that does not fit
    /// is listed.
    #[error("{}: {}", path.display(), Listing("problem", "with the experts of ranks", problems))]
    Parts {
        /// The folder of the parts, or what stands for the model.
        path: PathBuf,
        /// All of it.
        problems: Vec<PartProblem>,
    },
    /// A GGUF file that does not hold.
    #[error("{}: not a readable GGUF file: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What does not hold.
        reason: GgufError,
    },
    /// A `model_index.json` that does not describe its folder; everything that does not hold is listed.
    #[error("{}: {}", path.display(), Listing("problem", "with the pipeline", problems))]
    Pipeline {
        /// The file.
        path: PathBuf,
        /// All of it.
        problems: Vec<PipelineProblem>,
    },
    /// Something else is stored under the name of a weights file.
    #[error("{}: {found}", path.display())]
    NotWeights {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: Lookalike,
    },
    /// A safetensors file whose header does not describe it.
    #[error("{}: not a valid safetensors file: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What does not hold.
        reason: HeaderError,
    },
    /// A torch file (`.bin`, `.pt`, `.pth`) that cannot be read.
    #[error("{}: not a readable torch file: {reason}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// What does not hold.
        reason: TorchError,
    },
    /// A tensor was asked for by a name that the checkpoint does not have.
    #[error("{}: no tensor `{key}`{}", file.display(), or_nearest(nearest))]
    NoTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The name.
        key: String,
        /// Names that it does have.
        nearest: Vec<String>,
    },
    /// The values of a tensor of which only the description was fetched.
    #[error("{}: the values of `{key}` have not been downloaded, only its header", path.display())]
    NotHere {
        /// Where the file would be.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// A rule of the key map that cannot be followed in both directions.
    #[error("{rule:?}: {reason}")]
    Rule {
        /// The rule.
        rule: Rule,
        /// What is wrong with it.
        reason: RuleError,
    },
    /// The checkpoint and the module do not fit; everything that does not is listed.
    #[error("{}: {}", file.display(), Listing("mismatch", "between checkpoint and model", problems))]
    Mismatch {
        /// The checkpoint.
        file: PathBuf,
        /// All of it.
        problems: Vec<Problem>,
    },
    /// Two tensors for one name in a file to be written.
    #[error("{}: two tensors are named `{key}`", file.display())]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The name.
        key: String,
    },
    /// A tensor that the file format cannot hold.
    #[error("{}: `{key}` is {found}, which safetensors files cannot hold", file.display())]
    Unsaveable {
        /// The file.
        file: PathBuf,
        /// The tensor.
        key: String,
        /// Its dtype.
        found: String,
    },
    /// A module that is to be filled has been filled with packed matrices before.
    #[error(
        "`{parameter}` is held packed, in 8 or 4 bits, and cannot be filled again: load into a fresh module"
    )]
    Packed {
        /// The module path of the first of them.
        parameter: String,
    },
    /// Values that cannot be kept in a file to be written; all tensors that hold some.
    #[error("{}: {}", file.display(), Listing("tensor", "with values that cannot be kept", problems))]
    Values {
        /// The checkpoint that they come from.
        file: PathBuf,
        /// All of it.
        problems: Vec<Problem>,
    },
    /// Names that would be taken for something else in a quantized file.
    #[error(
        "{}: {} end in what quantized files call their parts (.q8, .q4, .scales, .mins): is it quantized already?",
        file.display(), keys.join(", ")
    )]
    Reserved {
        /// The checkpoint.
        file: PathBuf,
        /// The names.
        keys: Vec<String>,
    },
    /// A quantized file that does not hold what it should.
    #[error("{}: {}", path.display(), Listing("fault", "in a quantized file", problems))]
    Quantized {
        /// The file.
        path: PathBuf,
        /// All of it.
        problems: Vec<QuantizedError>,
    },
    /// A module parameter that a [`Rule::Concat`] should cut back into equal parts, and cannot.
    #[error("{}: `{parameter}` has {rows} rows, which cannot be cut into {parts} equal parts", file.display())]
    Uneven {
        /// The file.
        file: PathBuf,
        /// The module parameter.
        parameter: String,
        /// Its first dimension.
        rows: usize,
        /// How many checkpoint keys the rule names.
        parts: usize,
    },
}

/// One thing that is wrong with the experts that ranks hold.
#[derive(Debug, thiserror::Error)]
pub enum PartProblem {
    /// Experts that do not divide into equal shares.
    #[error("`{parameter}`: {experts} experts cannot be spread evenly over {ranks} ranks")]
    Uneven {
        /// The module parameter, or the key.
        parameter: String,
        /// How many there are.
        experts: usize,
        /// Over how many they should be spread.
        ranks: usize,
    },
    /// A rank that does not exist.
    #[error("there is no rank {rank} among {ranks}")]
    NoRank {
        /// The rank, from 0.
        rank: usize,
        /// How many there are.
        ranks: usize,
    },
    /// No rule stacks anything that is there.
    #[error("there are no experts")]
    NoExperts,
    /// An expert whose number leaves out others.
    #[error("`{parameter}` has expert {expert}, and only {experts} in all")]
    Gap {
        /// The module parameter.
        parameter: String,
        /// The expert.
        expert: usize,
        /// How many there are.
        experts: usize,
    },
    /// A rank whose part is not there.
    #[error("the part of rank {rank}, {file}, is missing")]
    Missing {
        /// The rank, from 0.
        rank: usize,
        /// The file.
        file: String,
    },
    /// A part that cannot be read.
    #[error("{0}")]
    Broken(Box<Error>),
    /// A rank that has not the experts that should be its own.
    #[error(
        "`{parameter}`: rank {rank} should have experts {} to {}, and has {}",
        expected.start, expected.end.saturating_sub(1), listed(found)
    )]
    Experts {
        /// The module parameter.
        parameter: String,
        /// The rank, from 0.
        rank: usize,
        /// Those that follow the ranks before it, as many as rank 0 has.
        expected: Range<usize>,
        /// Those that it has.
        found: Vec<usize>,
    },
    /// A tensor that is not the same kind of thing in all ranks.
    #[error("`{key}` is {found} in rank {rank}, expected {expected} as in rank 0")]
    Unlike {
        /// The tensor.
        key: String,
        /// The rank, from 0.
        rank: usize,
        /// The dtype and shape in rank 0.
        expected: String,
        /// The dtype and shape here.
        found: String,
    },
    /// A tensor that several ranks have.
    #[error("`{key}` is in the parts of ranks {first} and {second}")]
    Twice {
        /// The tensor.
        key: String,
        /// A rank, from 0.
        first: usize,
        /// Another one.
        second: usize,
    },
}

/// Numbers as people write them.
fn listed(numbers: &[usize]) -> String {
    match numbers {
        [] => "none".to_owned(),
        numbers => numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// One thing that does not fit between a checkpoint and a module.
#[derive(Debug, Clone, PartialEq)]
pub enum Problem {
    /// A parameter whose tensor the checkpoint lacks.
    Missing {
        /// The checkpoint key that was wanted.
        key: String,
        /// The module parameter it would fill.
        parameter: String,
        /// Keys of the checkpoint with similar names (for the first problems only).
        nearest: Vec<String>,
    },
    /// A parameter that no rule fills.
    Unmapped {
        /// The module parameter.
        parameter: String,
    },
    /// A key of the checkpoint that nothing uses.
    Unexpected {
        /// The key.
        key: String,
        /// The parameter to which a rule sends it, if one does: the module has no such parameter.
        parameter: Option<String>,
        /// Similar names that would have been known (for the first problems only).
        nearest: Vec<String>,
    },
    /// A tensor of another shape than the parameter's.
    Shape {
        /// The checkpoint key.
        key: String,
        /// The shape that the module wants under this key.
        expected: Vec<usize>,
        /// The shape in the checkpoint.
        found: Vec<usize>,
    },
    /// A tensor of another kind than the parameter's, e.g. integers for floats.
    Dtype {
        /// The checkpoint key.
        key: String,
        /// The kind that the module wants: `float`, `int` or `bool`.
        expected: &'static str,
        /// The dtype in the checkpoint.
        found: Dtype,
    },
    /// NaN or infinite weights.
    NotFinite {
        /// The checkpoint key.
        key: String,
        /// The dtype into which it was read: a large f32 is infinite as f16.
        dtype: Dtype,
        /// How many values.
        count: usize,
        /// The flat index of the first one, in the order of the checkpoint.
        first_index: usize,
    },
    /// Finite numbers that become infinite in the dtype they are to be stored in.
    Overflow {
        /// The checkpoint key.
        key: String,
        /// The dtype that is too narrow.
        dtype: Dtype,
        /// How many values.
        count: usize,
        /// The flat index of the first value that is infinite in that dtype.
        first_index: usize,
    },
    /// A key that more than one rule matches.
    Ambiguous {
        /// The key.
        key: String,
        /// The rules.
        rules: Vec<Rule>,
    },
    /// A parameter that more than one key of the checkpoint would fill.
    Conflict {
        /// The module parameter.
        parameter: String,
        /// The keys.
        keys: Vec<String>,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Missing { key, parameter, nearest } => {
                write!(f, "missing `{key}` for parameter `{parameter}`{}", or_nearest(nearest))
            }
            Problem::Unmapped { parameter } => write!(f, "no rule fills parameter `{parameter}`"),
            Problem::Unexpected { key, parameter: None, nearest } => {
                write!(f, "unexpected `{key}`: no rule knows it{}", or_nearest(nearest))
            }
            Problem::Unexpected { key, parameter: Some(parameter), nearest } => {
                write!(
                    f,
                    "unexpected `{key}`: the model has no parameter `{parameter}`{}",
                    or_nearest(nearest)
                )
            }
            Problem::Shape { key, expected, found } => {
                write!(f, "`{key}`: the checkpoint has {found:?}, the model wants {expected:?}")
            }
            Problem::Dtype { key, expected, found } => {
                write!(f, "`{key}`: the checkpoint has {found}, the model wants {expected}")
            }
            Problem::NotFinite { key, dtype, count, first_index } => {
                write!(
                    f,
                    "`{key}`: {count} NaN or infinite values as {dtype}, the first at index {first_index}"
                )
            }
            Problem::Overflow { key, dtype, count, first_index } => {
                write!(f, "`{key}`: {count} numbers too large for {dtype}, the first at index {first_index}")
            }
            Problem::Ambiguous { key, rules } => {
                write!(f, "`{key}` matches {} rules: {rules:?}", rules.len())
            }
            Problem::Conflict { parameter, keys } => {
                write!(f, "parameter `{parameter}` would be filled by each of {}", keys.join(", "))
            }
        }
    }
}

/// Something that is often stored under the name of a weights file by mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lookalike {
    /// Nothing.
    #[error("the file is empty")]
    Empty,
    /// Not a file at all.
    #[error("not a regular file")]
    NotAFile,
    /// The stub that `git clone` leaves without git-lfs.
    #[error(
        "this is a git-lfs pointer, not the weights: run `git lfs pull` in that repository, or download the file"
    )]
    LfsPointer,
    /// A web page, usually a login or error page.
    #[error("this is a web page (HTML) saved under the name of a weights file: download the file itself")]
    WebPage,
    /// Text: JSON, XML, a message.
    #[error("this is a text file, not weights")]
    Text,
    /// Neither of the formats that are read.
    #[error("neither a safetensors, nor a torch, nor a GGUF file")]
    Unknown,
}

/// A lie in the header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum HeaderError {
    #[error("it has {found} bytes, the length of the header alone takes 8")]
    TooShort { found: usize },
    #[error("the header should have {expected} bytes, the file has {found} after the length: truncated?")]
    HeaderLength { expected: u64, found: usize },
    #[error("the header claims {found} bytes, at most {limit} are accepted")]
    HeaderTooLong { found: u64, limit: usize },
    #[error("the header is not UTF-8")]
    NotText,
    #[error("the header is not the expected JSON: {0}")]
    NotJson(String),
    #[error("`{key}` is described twice")]
    DuplicateKey { key: String },
    #[error("`{key}` has the unknown dtype `{found}`")]
    UnknownDtype { key: String, found: String },
    #[error("`{key}` has a shape of more bytes than can be counted: {shape:?}")]
    TooLarge { key: String, shape: Vec<usize> },
    #[error("`{key}` is {dtype} of shape {shape:?}, which takes {expected} bytes, its offsets span {found}")]
    Length { key: String, dtype: Dtype, shape: Vec<usize>, expected: usize, found: usize },
    #[error("`{key}` has offsets that run backwards: {begin} to {end}")]
    Backwards { key: String, begin: usize, end: usize },
    #[error("`{key}` ends at byte {end} of the data, the file has {found}: truncated?")]
    OutOfFile { key: String, end: usize, found: usize },
    #[error(
        "`{key}` should begin at byte {expected} of the data, where the tensor before it ends, and begins at {found}"
    )]
    Gap { key: String, expected: usize, found: usize },
    #[error("the tensors end at byte {expected} of the data, the file goes on to {found}")]
    Trailing { expected: usize, found: usize },
}

/// What does not hold in a file that says it is quantized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum QuantizedError {
    #[error("its description in the header is not the expected JSON: {0}")]
    Description(String),
    #[error("it is of version {found}, known is {known}")]
    Version { found: u64, known: u64 },
    #[error("{bits} bits, {form}, are not read: only 8 bits, symmetric, and 4 bits with minima")]
    Scheme { bits: u64, form: &'static str },
    #[error("blocks of {found} values, expected an even number from 2 to 65536")]
    Block { found: u64 },
    #[error("`{part}` is missing beside `{beside}`")]
    Missing { part: String, beside: String },
    #[error("`{part}` belongs to no `{wanted}`")]
    Orphan { part: String, wanted: String },
    #[error("`{key}` is there both as it is and quantized")]
    Twice { key: String },
    #[error("`{part}` is {found}, expected {expected}")]
    Dtype { part: String, expected: Dtype, found: Dtype },
    #[error("`{part}` is of shape {found:?}, expected two dimensions")]
    Rank { part: String, found: Vec<usize> },
    #[error("`{part}` is of shape {found:?}, expected {expected:?}")]
    Shape { part: String, expected: Vec<usize>, found: Vec<usize> },
}

/// What can be wrong with a torch file. Pickles are read as data, never run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TorchError {
    #[error("the zip archive is broken: {0}")]
    Zip(&'static str),
    #[error("`{entry}` is compressed or encrypted, torch stores its archives plain")]
    Packed { entry: String },
    #[error("the archive has no data.pkl")]
    NoPickle,
    #[error("the tensors are big-endian")]
    BigEndian,
    #[error("the pickle at byte {at}: {reason}")]
    Pickle { at: usize, reason: PickleError },
    #[error("this looks like the tar format of torch before 0.1.10: save it again with a later one")]
    Tar,
    #[error("the legacy layout does not hold: {0}")]
    Legacy(&'static str),
    #[error("it holds no tensors in plain dictionaries (a whole module?): save the state_dict()")]
    NoTensors,
    #[error("tensor `{key}` appears twice")]
    DuplicateKey { key: String },
    #[error("a tensor name of {length} bytes")]
    LongKey { length: usize },
    #[error("dictionaries nested too deep or too often")]
    Nested,
    #[error("`{key}` is stored as `{found}`, which is not read")]
    Unsupported { key: String, found: String },
    #[error("`{key}`: its storage `{storage}` is not in the file")]
    NoStorage { key: String, storage: String },
    #[error("`{key}`: its storage `{storage}` should have {expected} bytes and has {found}: truncated?")]
    StorageLength { key: String, storage: String, expected: usize, found: usize },
    #[error(
        "`{key}`: offset {offset}, shape {shape:?} and strides {strides:?} reach outside its storage of {elements} elements"
    )]
    Extent { key: String, offset: usize, shape: Vec<usize>, strides: Vec<usize>, elements: usize },
    #[error("`{key}`: shape {shape:?} repeats a small storage into more than the file could hold")]
    TooLarge { key: String, shape: Vec<usize> },
}

/// Why a pickle cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PickleError {
    #[error("it ends in the middle: truncated?")]
    Truncated,
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    #[error("{0}")]
    Malformed(&'static str),
}

/// Offers `nearest` in a message.
fn or_nearest(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!(" (nearest: {})", nearest.join(", ")) }
}

/// The names of `among` that look most like `name`, best first; none when nothing comes close.
pub(crate) fn nearest<'a>(name: &str, among: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let furthest = (name.len() / 3).max(3);
    let mut close: Vec<(usize, &str)> = among
        .into_iter()
        // the distance is at least the difference in length: skips most of the work
        .filter(|other| other.len().abs_diff(name.len()) <= furthest)
        .map(|other| (strsim::levenshtein(name, other), other))
        .filter(|&(distance, _)| distance <= furthest)
        .collect();
    close.sort();
    close.into_iter().take(NEAREST).map(|(_, other)| other.to_owned()).collect()
}

/// Whether the problem after `found` others is still worth a search for its nearest names.
pub(crate) fn is_shown(found: usize) -> bool {
    found < SHOWN
}

/// All problems, one a line, at most [`SHOWN`], under what one of them is and where.
struct Listing<'a, P>(&'static str, &'static str, &'a [P]);

impl<P: fmt::Display> fmt::Display for Listing<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Listing(one, place, problems) = self;
        let s = match (problems.len(), one.ends_with("ch")) {
            (1, _) => "",
            (_, true) => "es",
            (_, false) => "s",
        };
        write!(f, "{} {one}{s} {place}", problems.len())?;
        for problem in problems.iter().take(SHOWN) {
            write!(f, "\n  {problem}")?;
        }
        match problems.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            rest => write!(f, "\n  and {rest} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(i: usize) -> Problem {
        Problem::Missing {
            key: format!("h.{i}.weight"),
            parameter: format!("blocks.{i}.weight"),
            nearest: vec![],
        }
    }

    #[test]
    fn a_mismatch_names_the_file_and_lists_each_problem() {
        let error = Error::Mismatch {
            file: "model.safetensors".into(),
            problems: vec![
                missing(0),
                Problem::Shape { key: "wte".into(), expected: vec![8, 2], found: vec![2, 8] },
            ],
        };
        assert_eq!(
            error.to_string(),
            "model.safetensors: 2 mismatches between checkpoint and model\
             \n  missing `h.0.weight` for parameter `blocks.0.weight`\
             \n  `wte`: the checkpoint has [2, 8], the model wants [8, 2]"
        );
    }

    #[test]
    fn a_long_list_is_cut_at_twenty_and_counted() {
        let error = Error::Mismatch { file: "m".into(), problems: (0..33).map(missing).collect() };
        let text = error.to_string();
        assert_eq!(text.lines().count(), 1 + 20 + 1);
        assert!(text.starts_with("m: 33 mismatches"));
        assert!(text.ends_with("\n  and 13 more"));
    }

    #[test]
    fn nearest_names_are_sorted_by_distance_and_far_ones_left_out() {
        let known =
            ["encoder.layer.0.gamma", "encoder.layer.0.weight", "pooler.bias", "encoder.layer.1.weight"];
        assert_eq!(
            nearest("encoder.layers.0.weight", known),
            ["encoder.layer.0.weight", "encoder.layer.1.weight", "encoder.layer.0.gamma"]
        );
        assert_eq!(nearest("x", ["something.else.entirely"]), Vec::<String>::new());
    }
}
