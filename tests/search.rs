//! `volary search`: what is indexed, when, and what survives.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::cli::{example, volary};
use crate::support::fixture;

/// A folder of pictures, and where its index is.
struct Place {
    scratch: TempDir,
}

/// What a run printed.
struct Run {
    answers: Value,
    told: String,
}

impl Place {
    fn new(pictures: &[(&str, &str)]) -> Self {
        let place = Self { scratch: tempfile::tempdir().unwrap() };
        fs::create_dir_all(place.folder().join("inside")).unwrap();
        for (name, to) in pictures {
            fs::copy(example(name), place.folder().join(to)).unwrap();
        }
        place
    }

    fn folder(&self) -> PathBuf {
        self.scratch.path().join("pictures")
    }

    fn index(&self) -> PathBuf {
        self.scratch.path().join("index")
    }

    fn search(&self, arguments: &[&str]) -> Run {
        let output = self.command(arguments).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{told}");
        Run { answers: serde_json::from_slice(&output.stdout).unwrap(), told }
    }

    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> assert_cmd::Command {
        let mut command = volary();
        command
            .arg("search")
            .arg(self.folder())
            .args(arguments)
            .args(["--json", "--index"])
            .arg(self.index());
        command
    }
}

impl Run {
    /// The names of what was found for a query, the best first.
    fn names(&self, query: usize) -> Vec<String> {
        let images = self.answers[query]["images"].as_array().unwrap();
        let name = |image: &Value| {
            let path = Path::new(image["image"].as_str().unwrap());
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        images.iter().map(name).collect()
    }

    /// Numbers of the last line: pictures, encoded, gone, skipped.
    fn counts(&self) -> [usize; 4] {
        let line = self.told.lines().last().unwrap();
        let words = line.split(|c: char| !c.is_ascii_digit());
        let numbers: Vec<usize> = words.filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().unwrap_or_else(|_| panic!("{line}"))
    }
}

const THREE: [(&str, &str); 3] =
    [("cat.png", "cat.png"), ("pizza.png", "inside/pizza.png"), ("rocket.png", "rocket.png")];

#[test]
fn only_what_changed_is_encoded() {
    let place = Place::new(&THREE);
    let run = place.search(&["火箭"]);
    assert_eq!((run.names(0)[0].as_str(), run.counts()), ("rocket.png", [3, 3, 0, 0]), "{}", run.told);
    assert_eq!(place.search(&["火箭"]).counts(), [3, 0, 0, 0]);

    // gone, new, and renamed: the last is known by its content
    fs::remove_file(place.folder().join("rocket.png")).unwrap();
    fs::copy(example("bicycle.png"), place.folder().join("bicycle.png")).unwrap();
    fs::rename(place.folder().join("cat.png"), place.folder().join("kitten.png")).unwrap();
    let run = place.search(&["bicycle"]);
    assert_eq!(run.counts(), [3, 1, 2, 0], "{}", run.told);
    let mut names = run.names(0);
    assert_eq!(names[0], "bicycle.png");
    names.sort();
    assert_eq!(names, ["bicycle.png", "kitten.png", "pizza.png"]);

    // touched, with the same content; then another content of the same name
    let file = fs::File::options().append(true).open(place.folder().join("kitten.png")).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
    assert_eq!(place.search(&["cat"]).counts(), [3, 0, 0, 0]);
    fs::copy(example("rocket.png"), place.folder().join("kitten.png")).unwrap();
    let run = place.search(&["a rocket"]);
    assert_eq!((run.names(0)[0].as_str(), run.counts()), ("kitten.png", [3, 1, 0, 0]));
}

/// What has the size and time of long ago is not even read again: a picture of the same size and time passes for it.
#[test]
fn what_has_not_changed_is_not_read() {
    let place = Place::new(&THREE);
    let old = SystemTime::now() - Duration::from_secs(1000);
    let set_old = |name: &str| {
        let file = fs::File::options().append(true).open(place.folder().join(name)).unwrap();
        file.set_modified(old).unwrap();
    };
    for (_, to) in THREE {
        set_old(to);
    }
    place.search(&["cat"]);
    let written = fs::metadata(place.index()).unwrap().modified().unwrap();
    let rocket = place.folder().join("rocket.png");
    fs::write(&rocket, vec![0; fs::metadata(&rocket).unwrap().len() as usize]).unwrap();
    set_old("rocket.png");
    let run = place.search(&["a rocket"]);
    assert_eq!((run.names(0)[0].as_str(), run.counts()), ("rocket.png", [3, 0, 0, 0]), "{}", run.told);
    assert_eq!(fs::metadata(place.index()).unwrap().modified().unwrap(), written, "nothing was written");
}

#[test]
fn what_is_no_picture_is_told_file_by_file() {
    let place = Place::new(&THREE);
    let write = |name: &str, content: &[u8]| fs::write(place.folder().join(name), content).unwrap();
    let whole = fs::read(example("cat.png")).unwrap();
    write("broken.png", &whole[..whole.len() / 2]);
    write("notes.txt", b"a note");
    write("empty.jpg", b"");
    write(".hidden", b"is left alone");
    // 100,000 x 100,000 pixels in a few bytes
    let mut bomb = fs::read(fixture("pictures").join("rgb.bmp")).unwrap();
    bomb[18..26].copy_from_slice(&[0xA0, 0x86, 1, 0, 0xA0, 0x86, 1, 0]);
    write("bomb.bmp", &bomb);
    fs::copy(example("cat.png"), place.folder().join("no-ending")).unwrap();
    let reasons = [
        ("broken.png", "damaged or truncated PNG"),
        ("notes.txt", "found text that begins \"a note\""),
        ("empty.jpg", "the file is empty"),
        ("bomb.bmp", ""),
    ];
    for _ in 0..2 {
        // also when nothing is new
        let run = place.search(&["cat"]);
        assert_eq!(run.counts()[0], 4, "the ending of a name says nothing: {}", run.told);
        assert_eq!(run.counts()[3], 4, "{}", run.told);
        for (name, reason) in reasons {
            let line = run.told.lines().find(|line| line.contains(name)).expect(name);
            assert!(line.starts_with("skipped: ") && line.contains(reason), "{line}");
        }
    }
    fs::copy(example("bicycle.png"), place.folder().join("broken.png")).unwrap();
    let run = place.search(&["a bicycle"]);
    assert_eq!((run.names(0)[0].as_str(), run.counts()), ("broken.png", [5, 1, 0, 3]), "{}", run.told);
}

#[cfg(unix)]
#[test]
fn odd_files_are_told_and_not_waited_for() {
    let place = Place::new(&THREE);
    std::os::unix::fs::symlink("gone.png", place.folder().join("dangling.png")).unwrap();
    std::os::unix::fs::symlink("..", place.folder().join("inside/round")).unwrap();
    let pipe = place.folder().join("pipe.png");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let run = place.search(&["cat"]);
    assert_eq!(run.counts(), [3, 3, 0, 3], "{}", run.told);
    for (name, reason) in [
        ("dangling.png", "No such file"),
        ("round", "not followed"),
        ("pipe.png", "neither a file nor a folder"),
    ] {
        let line = run.told.lines().find(|line| line.contains(name)).expect(name);
        assert!(line.contains(reason), "{line}");
    }
}

#[test]
fn texts_pictures_and_both() {
    let place = Place::new(&THREE);
    let like = example("pizza.png");
    let like = like.to_str().unwrap();
    let run = place.search(&["一只猫", "a rocket", "--top", "1"]);
    assert_eq!(run.answers.as_array().unwrap().len(), 2, "one answer a query");
    assert_eq!((&run.answers[0]["query"], &run.answers[1]["query"]), (&"一只猫".into(), &"a rocket".into()));
    assert_eq!([run.names(0), run.names(1)], [["cat.png"], ["rocket.png"]]);

    let run = place.search(&["--like", like]);
    assert_eq!((run.names(0)[0].as_str(), &run.answers[0]["query"]), ("pizza.png", &Value::Null));
    let similarity = run.answers[0]["images"][0]["similarity"].as_f64().unwrap();
    assert!((similarity - 1.0).abs() < 1e-3, "{similarity}");
    assert_eq!(run.answers[0]["like"][0], like);

    for (weight, best) in [("0.9,0.1", "rocket.png"), ("0.1,0.9", "pizza.png"), ("1,0", "rocket.png")] {
        let run = place.search(&["a rocket", "--like", like, "--weight", weight]);
        assert_eq!(run.names(0)[0], best, "{weight}");
    }
    let run = place.search(&["a rocket", "--like", like, "--weight=0,-1"]);
    assert_eq!(run.names(0)[2], "pizza.png", "the opposite comes last");
    assert!(place.fails(&["--like", "no/such.png"]).contains("no/such.png"));
}

#[test]
fn a_contact_sheet_needs_no_other_file() {
    let place = Place::new(&[("cat.png", "a <b> & 'c'.png"), ("rocket.png", "rocket.png")]);
    let page = place.scratch.path().join("sheet.html");
    let like = example("pizza.png");
    place.search(&["cat", "--like", like.to_str().unwrap(), "--html", page.to_str().unwrap()]);
    let page = fs::read_to_string(page).unwrap();
    assert_eq!(
        page.matches("src=\"data:image/jpeg;base64,/9j/").count(),
        3,
        "two found and the one to resemble"
    );
    assert!(page.contains("a &lt;b&gt; &amp; &#39;c&#39;.png") && !page.contains("a <b>"));
    assert!(!page.contains("http") && !page.contains("<link") && !page.contains("<script"));
    assert!(page.contains("light dark"));
}

#[test]
fn a_broken_index_and_another_model_s_are_told() {
    let place = Place::new(&THREE);
    place.search(&["cat"]);
    let whole = fs::read(place.index()).unwrap();
    fs::write(place.index(), &whole[..whole.len() - 1]).unwrap();
    let told = place.fails(&["cat"]);
    assert!(told.contains("index: truncated") && told.contains("delete it"), "{told}");
    fs::write(place.index(), "no index").unwrap();
    assert!(place.fails(&["cat"]).contains("not an index"));
    let mut other = whole.clone();
    other[32] ^= 1; // the model's hash; the digest must be right again
    let notes = &other[96 + 3 * 2 * 256..];
    let digest = Sha256::new().chain_update(&other[..64]).chain_update(notes).finalize();
    other[64..96].copy_from_slice(&digest);
    fs::write(place.index(), other).unwrap();
    let told = place.fails(&["cat"]);
    assert!(told.contains("made by another model") && told.contains("--index"), "{told}");
    fs::write(place.index(), whole).unwrap();
    place.search(&["cat"]);
}

/// A BMP of 4 x 4 pixels, each `number` another.
fn bmp(number: u32) -> Vec<u8> {
    let mut file = b"BM\x66\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x04\0\0\0\x04\0\0\0\x01\0\x18\0".to_vec();
    file.resize(54, 0);
    for pixel in 0..16 {
        file.extend(&(number.wrapping_mul(2_654_435_761).rotate_left(pixel)).to_le_bytes()[..3]);
    }
    file
}

/// Killed while it encodes, the program goes on where it was; what was encoded stays, and the result is that of a run
/// that nobody disturbed.
#[cfg(unix)]
#[test]
fn a_killed_run_is_gone_on_with() {
    use std::os::unix::process::ExitStatusExt;

    const PICTURES: usize = 400;
    let place = Place::new(&[]);
    for number in 0..PICTURES {
        fs::write(place.folder().join(format!("{number:04}.bmp")), bmp(number as u32)).unwrap();
    }
    let journal = place.scratch.path().join("index.journal");
    // A batch takes over 32 KiB, all of them over 200: the system kills the program in the middle of the second batch, or
    // of the third where the shell counts in kilobytes.
    let status = Command::new("sh")
        .args(["-c", "ulimit -c 0; ulimit -f 100; exec \"$@\"", "sh"])
        .arg(assert_cmd::cargo::cargo_bin("volary"))
        .arg("search")
        .arg(place.folder())
        .args(["cat", "--offline", "--index"])
        .arg(place.index())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.signal().is_some(), "not killed: {status}");
    assert!(!place.index().exists() && journal.exists());

    let run = place.search(&["cat", "--top", "5"]);
    let [pictures, encoded, ..] = run.counts();
    assert_eq!(pictures, PICTURES);
    assert!(encoded <= PICTURES - 64 && encoded > 0, "a batch was there already: {encoded}");
    assert!(!journal.exists());
    let vectors = |bytes: Vec<u8>| bytes[96..][..PICTURES * 512].to_vec();
    let resumed = vectors(fs::read(place.index()).unwrap());
    fs::remove_file(place.index()).unwrap();
    let undisturbed = place.search(&["cat", "--top", "5"]);
    assert_eq!(undisturbed.counts()[1], PICTURES);
    assert_eq!(undisturbed.names(0), run.names(0));
    assert_eq!(vectors(fs::read(place.index()).unwrap()), resumed);
}
