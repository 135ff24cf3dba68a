//! Names a picture among labels in two languages.
//!
//! ```sh
//! cargo run --release --example zero_shot -- examples/pictures/cat.png 一只猫 "a dog" 披萨
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::Device;
use volary::Clip;
use volary_vision::image::{ReadOptions, read};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let picture = arguments.next().context("name a picture and some labels")?;
    let labels: Vec<String> = arguments.collect();

    // `Clip::from_pretrained("path/to/a/folder")?` for a model of your own.
    let clip = Clip::embedded().load(&Device::flex())?;
    let picture = read(Path::new(&picture), ReadOptions::SEEN)?;
    let probabilities = clip.zero_shot(&[picture], &labels)?;
    for (label, probability) in labels.iter().zip(probabilities.row(0)) {
        println!("{:5.1} %  {label}", 100.0 * probability);
    }
    Ok(())
}
