//! What every system in the registry must keep.

use std::collections::BTreeSet;

use burn::tensor::Device;
use volary::preset::{Preset, Shape};
use volary::registry::SYSTEMS;
use volary_weights::parameters;

fn presets() -> impl Iterator<Item = &'static Preset> {
    SYSTEMS.iter().flat_map(|system| system.presets)
}

/// Set in the process that counts and does nothing else.
const COUNTING: &str = "VOLARY_TEST_COUNTS";

/// Counted without allocating them, in a process of its own: the largest would not fit on any machine.
#[test]
fn every_preset_has_its_published_size() {
    const NAME: &str = "contract::every_preset_has_its_published_size";
    if std::env::var_os(COUNTING).is_none() {
        let this = std::env::current_exe().unwrap();
        let mut child = assert_cmd::Command::new(this);
        child.args([NAME, "--exact", "--test-threads=1"]).env(COUNTING, "1").assert().success();
        return;
    }
    for preset in presets() {
        assert_eq!(preset.shape.count(), preset.parameters, "{}", preset.name);
    }
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kilobytes: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(kilobytes < 100_000, "counting took {kilobytes} kB");
    }
}

#[test]
fn names_are_unique() {
    let names: Vec<&str> = presets().map(|preset| preset.name).collect();
    let unique: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(names.len(), unique.len());
    let systems: BTreeSet<&str> = SYSTEMS.iter().map(|system| system.name).collect();
    assert_eq!(systems.len(), SYSTEMS.len());
}

#[test]
fn every_file_that_the_list_names_exists() {
    for system in SYSTEMS {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(root.join(system.file).is_file(), "{}", system.file);
        for name in system.proved {
            assert!(crate::support::fixture(name).join("reference.json").is_file(), "{name}");
        }
    }
}

/// Both directions: every parameter has a checkpoint key, and that key leads back to it.
#[test]
fn the_key_maps_of_clip_are_invertible() {
    use volary::clip::Layout;
    for preset in presets() {
        let Shape::Clip(config) = &preset.shape else { continue };
        let is_vit = matches!(config.vision, volary::clip::VisionConfig::Vit(_));
        let layouts =
            if is_vit { &[Layout::Transformers, Layout::OpenClip][..] } else { &[Layout::OpenClip] };
        for layout in layouts {
            let keys = layout.keys(&config.vision);
            for parameter in parameters(&config.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}: {} <- {found:?}", preset.name, parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path));
            }
        }
    }
}
