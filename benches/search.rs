//! Exact search among a million vectors of 512 numbers in f16, from a mapped file: time and memory.
//!
//! ```sh
//! cargo bench --bench search
//! cargo bench --bench search -- pictures DIR    # writes 10,000 small pictures for `volary search`
//! ```
//!
//! Writes 1 GB to a temporary folder. The file is in the system's cache, or read from disk where that is too small for
//! it. Memory is the peak of the resident set; the mapped file's pages count, and the system may take them back.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use half::f16;
use rayon::prelude::*;
use volary::bench::peak_memory;
use volary_multimodal::retrieval::{VectorFile, nearest, write_vectors};
use volary_vision::image::Rgb8;

const ROWS: usize = 1_000_000;
const D_EMBED: usize = 512;
const TOP: usize = 10;
const RUNS: usize = 9;
const PICTURES: usize = 10_000;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["pictures", folder] => pictures(Path::new(folder)),
        [] => search(),
        _ => bail!("expected nothing, or: pictures DIR"),
    }
}

/// JPEG files of 320 x 240 pixels: stripes of random colours, widths and noise.
fn pictures(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    (0..PICTURES).into_par_iter().try_for_each(|number| {
        let mut random = fastrand::Rng::with_seed(number as u64);
        let colours: Vec<[u8; 3]> = (0..8).map(|_| [random.u8(..), random.u8(..), random.u8(..)]).collect();
        let [across, down] = [random.usize(1..60), random.usize(1..60)];
        let (width, height) = (320, 240);
        let mut pixels = Vec::with_capacity(width * height * 3);
        for y in 0..height {
            for x in 0..width {
                let colour = colours[(x / across + y / down) % colours.len()];
                pixels.extend(colour.map(|value| value.saturating_add(random.u8(..16))));
            }
        }
        let file = Rgb8::new(width, height, pixels)?.to_jpeg(85)?;
        Ok(std::fs::write(folder.join(format!("{number:05}.jpg")), file)?)
    })
}

fn search() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("index");
    let model = [0; 32];
    let mut random = fastrand::Rng::with_seed(0);
    let mut vector = |_| -> Vec<f32> { (0..D_EMBED).map(|_| random.f32() - 0.5).collect() };
    // rows repeat, in turns of a prime number of them, so that not all of the time goes into making them up
    let rows: Vec<Vec<f16>> =
        (0..4099).map(&mut vector).map(|row| row.into_iter().map(f16::from_f32).collect()).collect();
    let start = Instant::now();
    write_vectors(&path, &model, [ROWS, D_EMBED], (0..ROWS).map(|row| &rows[row % rows.len()][..]), b"")?;
    println!("written in {:.2} s", start.elapsed().as_secs_f64());

    let start = Instant::now();
    let file = VectorFile::open(&path, &model, D_EMBED)?;
    println!(
        "opened in {:.6} s, peak memory {:.0} MiB",
        start.elapsed().as_secs_f64(),
        peak_memory().context("only Linux tells")?
    );
    for n in [1, 8] {
        let queries: Vec<f32> = (0..n).flat_map(&mut vector).collect();
        let mut seconds: Vec<f64> = (0..RUNS)
            .map(|_| {
                let start = Instant::now();
                std::hint::black_box(nearest(file.vectors(), &queries, D_EMBED, TOP));
                start.elapsed().as_secs_f64()
            })
            .collect();
        let first = seconds[0];
        seconds.sort_by(f64::total_cmp);
        let (median, peak) = (seconds[RUNS / 2], peak_memory().context("only Linux tells")?);
        println!("{n} queries: {median:.3} s (first {first:.3} s), peak memory {peak:.0} MiB");
    }
    Ok(())
}
