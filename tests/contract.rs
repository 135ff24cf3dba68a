//! What every system in the registry must keep.

use std::collections::BTreeSet;

use burn::tensor::Device;
use volary::preset::{Preset, Shape};
use volary::registry::SYSTEMS;
use volary_weights::parameters;

fn presets() -> impl Iterator<Item = &'static Preset> {
    SYSTEMS.iter().flat_map(|system| system.presets)
}

/// Counted without allocating: the largest here would be 10 GB.
#[test]
fn every_preset_has_its_published_size() {
    for preset in presets() {
        assert_eq!(preset.shape.count(), preset.parameters, "{}", preset.name);
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
