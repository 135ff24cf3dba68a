//! `volary doctor`

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use volary::Clip;
use volary_kernels::Instructions;

use super::{Shared, say, say_json};

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    found: String,
}

/// Runs the command.
pub fn run(shared: &Shared) -> Result<()> {
    let checks = [
        Check { name: "version", ok: true, found: env!("CARGO_PKG_VERSION").into() },
        Check { name: "processor", ok: true, found: processor() },
        Check { name: "features", ok: true, found: features() },
        kernels(),
        device("cpu"),
        device("cuda"),
        embedded(shared),
    ];
    if shared.json {
        say_json(&checks)?;
    } else {
        for Check { name, ok, found } in &checks {
            say(format!("{} {name:<10} {found}", if *ok { "ok " } else { "no " }))?;
        }
    }
    // No CUDA is no fault; a model that does not answer is.
    let faults = checks.iter().filter(|check| !check.ok && check.name != "cuda").count();
    anyhow::ensure!(faults == 0, "{faults} checks failed");
    Ok(())
}

fn processor() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{} {}, {cores} threads", std::env::consts::OS, std::env::consts::ARCH)
}

#[cfg(target_arch = "x86_64")]
fn features() -> String {
    let known = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
    ];
    let found: Vec<&str> = known.iter().filter(|(_, found)| *found).map(|(name, _)| *name).collect();
    let products = if found.contains(&"avx512f") { "AVX-512" } else { "AVX2 or older" };
    format!("{}; matrix products use {products}", found.join(" "))
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> String {
    "not looked up on this architecture".into()
}

/// The instructions of this project's own kernels, which `VOLARY_CPU` chooses among, and what they use besides.
fn kernels() -> Check {
    let name = "kernels";
    match Instructions::wanted() {
        Ok(wanted) => {
            let all: Vec<&str> = Instructions::all().into_iter().map(Instructions::name).collect();
            let used: Vec<&str> = [wanted.name()].into_iter().chain(wanted.besides()).collect();
            Check { name, ok: true, found: format!("{}, of {}", used.join(" + "), all.join(", ")) }
        }
        Err(error) => Check { name, ok: false, found: error },
    }
}

fn device(name: &'static str) -> Check {
    match volary::device::choose(name) {
        Ok(device) => Check { name, ok: true, found: format!("{device:?}") },
        Err(error) => Check { name, ok: false, found: error.to_string() },
    }
}

/// The embedded model answers a question it must know.
fn embedded(shared: &Shared) -> Check {
    let name = "model";
    let answer = || -> Result<String> {
        let start = Instant::now();
        let clip = Clip::embedded().load(&shared.device()?)?;
        let texts = clip.encode_texts(&["dog face", "狗脸", "pizza"])?;
        let (same, other) = (texts.row(0).dot(&texts.row(1)), texts.row(0).dot(&texts.row(2)));
        anyhow::ensure!(
            same > other,
            "`dog face` is nearer to `pizza` ({other:.2}) than to `狗脸` ({same:.2})"
        );
        Ok(format!("loaded and answered in {:.0} ms", start.elapsed().as_secs_f64() * 1e3))
    };
    match answer() {
        Ok(found) => Check { name, ok: true, found },
        Err(error) => Check { name, ok: false, found: format!("{error:#}") },
    }
}
