//! Bytes -> named tensors -> module, and back. Names no model.
//!
//! - [`mod@format`]: a checkpoint file as a list of named tensors ([`format::open`]);
//! - [`hub`]: repositories of the Hugging Face hub, in Python's cache or brought there;
//! - [`rule`]: the key map between a checkpoint and a module, as data, read in both directions;
//! - [`load()`]: fills every parameter of a module or lists everything that does not fit;
//! - [`save()`]: the same rules the other way round, written so that a half-written file never has its final name;
//!   [`Saving`]: the same by several processes, which hold [shares](Share) of a mixture's experts;
//! - [`convert()`] and [`quantize()`]: checkpoint -> files, without a module.
//!
//! ```
//! use burn::{module::Module, nn::{Linear, LinearConfig, LinearLayout}, tensor::Device};
//! use volary_weights::{KeyMap, LoadOptions, Rule, format::Memory, load, save};
//!
//! const KEYS: KeyMap = KeyMap::new(&[
//!     Rule::Rename("classifier.weight", "weight"),
//!     Rule::Rename("classifier.bias", "bias"),
//! ]);
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = LinearConfig::new(3, 2).with_layout(LinearLayout::Col); // stored as [d_out, d_in], like torch
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("model.safetensors");
//! save(&config.init(&Device::flex()), &KEYS, None, &path, None)?;
//!
//! let checkpoint = volary_weights::format::open(folder.path())?;
//! let linear: Linear = load(config.init(&Device::flex()), checkpoint.as_ref(), &KEYS, &LoadOptions::default())?;
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little-endian and are handed to Burn as they are: no big-endian support yet");

mod cast;
pub mod convert;
pub mod error;
pub mod experts;
mod files;
pub mod format;
pub mod hub;
pub mod load;
mod plan;
pub mod quantized;
pub mod rule;
pub mod save;
pub mod share;
#[cfg(test)]
mod testing;

pub use convert::{ConvertOptions, Overflow, convert, spread};
pub use error::{Error, Problem};
pub use format::{Checkpoint, Dtype, Entry, open};
pub use load::{Kind, LoadOptions, NotFinite, Packing, Parameter, check, load, parameters};
pub use quantized::{Bits, Quantization, QuantizeOptions, quantize};
pub use rule::{KeyMap, Ones, Rule};
pub use save::{Saving, read_tensors, save, save_tensors};
pub use share::Share;
