//! The README says what the registry says.

use volary::registry::{SYSTEMS, System};

fn row(system: &System) -> String {
    let proved: Vec<String> = system.proved.iter().map(|name| format!("`{name}`")).collect();
    format!(
        "| {} | [{}]({}) | {} | {} |",
        system.name,
        system.file,
        system.file,
        system.presets.len(),
        proved.join(", ")
    )
}

#[test]
fn the_table_of_systems_is_current() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let missing: Vec<String> = SYSTEMS.iter().map(row).filter(|row| !readme.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "these rows are not in README.md as they should be:\n{}", missing.join("\n"));
}
