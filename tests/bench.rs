//! `volary bench` and `--dtype auto`.

use serde_json::Value;

use crate::cli::volary;
use crate::support::fixture;

/// What is counted depends on the shapes alone.
#[test]
fn models_are_timed_by_what_they_are_good_for() {
    let found = |model: &str| -> Vec<(String, String)> {
        let run = volary().args(["bench", model, "--rounds", "1", "--json"]).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        assert!(report["peak_gflops"].as_f64().unwrap() > 0.0);
        let rows = report["rows"].as_array().unwrap();
        for row in rows {
            for number in ["per_second", "seconds", "gflops", "gbytes_per_second"] {
                assert!(row[number].as_f64().unwrap() > 0.0, "{row}");
            }
        }
        let name = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        rows.iter().map(|row| (name(row, "what"), name(row, "unit"))).collect()
    };
    let row = |what: &str, unit: &str| (what.to_owned(), unit.to_owned());
    let llama = found(fixture("llama").to_str().unwrap());
    assert_eq!(llama, [row("read 32 tokens", "tokens"), row("write 32 tokens", "tokens")]);
    let clip = found(fixture("clip").to_str().unwrap());
    assert_eq!(clip[1], row("embed 8 images", "images"));
    assert_eq!(clip[2], row("embed 1 texts", "texts"));
    let pipeline = found(fixture("pipe_sd").to_str().unwrap());
    assert_eq!(pipeline, [row("draw a picture in 2 steps", "pictures")]);
    assert_eq!(found("volary/emoji-draw"), [row("draw a picture in 64 steps", "pictures")]);
}

#[test]
fn what_does_nothing_of_this_is_told() {
    let run = volary().arg("bench").arg(fixture("vit")).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{told}");
    assert!(told.contains("vit cannot be timed"), "{told}");
}

#[test]
fn the_dtype_that_is_chosen_is_told() {
    let run = volary().args(["bench", "--dtype", "auto", "--rounds", "1"]).output().unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && told.starts_with("--dtype auto: f32"), "{told}");
}
