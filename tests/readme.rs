//! The README says what the registry says. With `VOLARY_UPDATE=1` its tables are written anew.

use volary::preset::Preset;
use volary::registry::{SYSTEMS, System};

fn system(system: &System) -> String {
    let proved: Vec<String> = system.proved.iter().map(|name| format!("`{name}`")).collect();
    let System { name, file, presets, .. } = system;
    format!("| {name} | [{file}]({file}) | {} | {} |", presets.len(), proved.join(", "))
}

fn preset(system: &System, preset: &Preset) -> String {
    let Preset { name, parameters, weights, license, .. } = preset;
    format!("| {} | {name} | {} | {} | {license} |", system.name, grouped(*parameters), weights.told())
}

/// `1234567` -> `1,234,567`
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[test]
fn the_tables_of_systems_and_presets_are_current() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&file).unwrap();
    let presets = SYSTEMS.iter().flat_map(|of| of.presets.iter().map(|each| preset(of, each)));
    let tables = [
        (
            "| system | file | presets | agrees with |\n|---|---|---|---|\n",
            SYSTEMS.iter().map(system).collect(),
        ),
        ("| system | preset | parameters | weights | license |\n|---|---|---|---|---|\n", presets.collect()),
    ];
    let current = tables.iter().fold(readme.clone(), |readme, (head, rows): &(&str, Vec<String>)| {
        let start = readme.find(head).expect("the README has the table") + head.len();
        let end = start + readme[start..].find("\n\n").expect("an empty line ends a table") + 1;
        format!("{}{}\n{}", &readme[..start], rows.join("\n"), &readme[end..])
    });
    if std::env::var_os("VOLARY_UPDATE").is_some() {
        std::fs::write(&file, &current).unwrap();
    } else {
        let stale: Vec<&str> = current.lines().filter(|line| !readme.contains(line)).collect();
        assert!(
            readme == current,
            "run this test with VOLARY_UPDATE=1; not in README.md:\n{}",
            stale.join("\n")
        );
    }
}
