//! `volary paint`: pictures answered as examples show it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use volary_vision::image::{ReadOptions, Rgb8, read};

use crate::cli::volary;
use crate::support::{copy_folder, fixture};

/// `volary paint query.png` in the folder of the fixture, with these prompts and targets.
fn paint(model: &Path, pairs: &[(&str, &str)], extra: &[&str]) -> std::process::Output {
    let mut command = volary();
    command.current_dir(fixture("paint")).args(["paint", "query.png", "--json", "--model"]).arg(model);
    for (prompt, target) in pairs {
        command.args(["--prompt", prompt, "--target", target]);
    }
    command.args(extra).output().unwrap()
}

/// What is painted.
fn painted(model: &Path, pairs: &[(&str, &str)], extra: &[&str]) -> Rgb8 {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("painting.png");
    let output = paint(model, pairs, &[extra, &["-o", file.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    let picture = picture(&file);
    assert_eq!(answers[0]["image"], "query.png");
    assert_eq!(answers[0]["painting"], file.to_str().unwrap());
    assert_eq!(answers[0]["width"], picture.width());
    assert_eq!(answers[0]["height"], picture.height());
    let written = fs::read_dir(&scratch).unwrap().count();
    assert_eq!(written, 1, "nothing else lies beside it");
    picture
}

fn picture(file: &Path) -> Rgb8 {
    read(file, ReadOptions::SEEN).unwrap()
}

const PAIR: (&str, &str) = ("prompt.png", "target.png");

/// One level of 255 may be lost where numbers are cut to whole ones.
#[track_caller]
fn assert_like(found: &Rgb8, expected: &Rgb8) {
    assert_eq!([found.width(), found.height()], [expected.width(), expected.height()]);
    let worst = found.pixels().iter().zip(expected.pixels()).map(|(&a, &b)| a.abs_diff(b)).max().unwrap();
    assert!(worst <= 1, "{worst} levels apart");
}

/// Of the authors' scripts: every way in which they resize.
#[test]
fn paintings_are_those_of_the_authors() {
    let model = fixture("painter");
    for resize in ["nearest", "bilinear", "bicubic"] {
        let expected = picture(&fixture("paint").join(format!("{resize}.png")));
        assert_like(&painted(&model, &[PAIR], &["--resize", resize]), &expected);
    }
    assert_like(&painted(&model, &[PAIR], &[]), &picture(&fixture("paint").join("bilinear.png")));
}

/// An example that is shown twice says what it says once; another one says something else.
#[test]
fn examples_are_averaged() {
    let model = fixture("painter");
    let once = painted(&model, &[PAIR], &[]);
    assert_like(&painted(&model, &[PAIR, PAIR], &[]), &once);
    assert_ne!(painted(&model, &[PAIR, ("target.png", "prompt.png")], &[]), once);
}

/// One thing is meant, and every pixel is one of the model's.
#[test]
fn a_seggpt_paints_as_it_segments() {
    let model = fixture("seggpt");
    let scratch = tempfile::tempdir().unwrap();
    let segmented = volary()
        .current_dir(&scratch)
        .arg("segment")
        .arg(fixture("paint").join("query.png"))
        .arg("--prompt")
        .arg(fixture("paint").join("prompt.png"))
        .arg("--mask")
        .arg(fixture("paint").join("target.png"))
        .arg("--model")
        .arg(&model)
        .output()
        .unwrap();
    assert!(segmented.status.success(), "{}", String::from_utf8_lossy(&segmented.stderr));
    let mask = picture(&scratch.path().join("query.mask.png"));
    assert_eq!(painted(&model, &[PAIR], &[]), mask);
    assert_ne!(painted(&model, &[PAIR], &["--resize", "bilinear"]), mask);
}

#[test]
fn what_is_wrong_is_told_at_once() {
    let scratch = tempfile::tempdir().unwrap();
    copy_folder(&fixture("paint"), scratch.path());
    let file = |name: &str| -> PathBuf { scratch.path().join(name) };
    fs::write(file("text.png"), "no picture").unwrap();
    fs::write(file("broken.png"), &fs::read(file("target.png")).unwrap()[..90]).unwrap();
    let fails = |model: &str, pairs: &[(&str, &str)], extra: &[&str], code: i32| {
        let mut command = volary();
        command.current_dir(&scratch).args(["paint", "query.png", "--model"]).arg(fixture(model));
        for (prompt, target) in pairs {
            command.args(["--prompt", prompt, "--target", target]);
        }
        let output = command.args(extra).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(!file("query.painting.png").exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let told = fails("painter", &[PAIR], &["--prompt", "gone.png"], 2);
    assert!(told.contains("2 --prompt and 1 --target: each prompt has one target"), "{told}");
    let told = fails("painter", &[], &[], 2);
    assert!(told.contains("--prompt <IMAGE>") && told.contains("--target <IMAGE>"), "{told}");
    let told = fails("painter", &[PAIR], &["--resize", "lanczos"], 2);
    assert!(told.contains("nearest, bilinear, bicubic"), "{told}");

    let told = fails("painter", &[("gone.png", "text.png"), ("prompt.png", "broken.png")], &[], 1);
    for named in ["gone.png: ", "text.png: not a picture", "broken.png: damaged or truncated PNG"] {
        assert!(told.contains(named), "{told}");
    }
    let told = fails("painter", &[PAIR, ("prompt.png", "query.png"), ("query.png", "target.png")], &[], 1);
    assert!(
        told.contains("example 2: the picture is 20x30, its answer 23x18; example 3: the picture is 23x18, its answer 20x30"),
        "{told}"
    );
    for model in ["seggpt", "painter"] {
        let told = fails(model, &[("prompt.png", "query.png")], &[], 1);
        assert!(told.contains("example 1: the picture is 20x30, its answer 23x18"), "{told}");
    }
    let told = fails("vit", &[PAIR], &[], 1);
    assert!(
        told.contains("vit cannot paint answers as examples show them (systems that can: painter, seggpt)"),
        "{told}"
    );
}

/// Without `-o` it lies here.
#[test]
fn a_painting_is_named_after_its_question() {
    let scratch = tempfile::tempdir().unwrap();
    let mut command = volary();
    command.current_dir(&scratch).arg("paint").arg(fixture("paint").join("query.png"));
    command.arg("--prompt").arg(fixture("paint").join("prompt.png"));
    command.arg("--target").arg(fixture("paint").join("target.png"));
    let output = command.arg("--model").arg(fixture("painter")).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.ends_with("query.png: query.painting.png\n"), "{told}");
    assert_like(
        &picture(&scratch.path().join("query.painting.png")),
        &picture(&fixture("paint").join("bilinear.png")),
    );
}
