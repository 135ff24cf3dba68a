//! The table of faults.

use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::server::{Fault, Server, git_oid, sha256};
use super::{Files, Machine, REPO, Told, WANTED, names, sharded, single};

const WEIGHTS: &str = "model.safetensors";

/// How it ends.
enum End {
    /// The right bytes, exit code 0.
    Right,
    /// Exit code 1 and a message with all of these.
    Told(&'static [&'static str]),
}
use End::{Right, Told as Says};

/// One way in which the hub or the network fails, and how `fetch` ends.
struct Case {
    name: &'static str,
    fault: fn() -> Server,
    end: End,
}

fn hub() -> Server {
    Server::new(REPO, single())
}

const CASES: &[Case] = &[
    Case { name: "nothing wrong", fault: hub, end: Right },
    Case { name: "cut, then resumed", fault: || hub().with(WEIGHTS, Fault::Cut(9000)), end: Right },
    Case { name: "cut at the first byte", fault: || hub().with(WEIGHTS, Fault::Cut(0)), end: Right },
    Case { name: "cut in the configuration", fault: || hub().with("config.json", Fault::Cut(5)), end: Right },
    Case {
        name: "cut at every byte 20000",
        fault: || hub().with(WEIGHTS, Fault::CutAlways(20_000)),
        end: Right,
    },
    Case {
        name: "cut at every byte 0",
        fault: || hub().with(WEIGHTS, Fault::CutAlways(0)),
        end: Says(&[WEIGHTS, "ended after 0 of 60"]),
    },
    Case { name: "wrong bytes once", fault: || hub().with(WEIGHTS, Fault::Corrupt(1)), end: Right },
    Case {
        name: "wrong bytes always",
        fault: || hub().with(WEIGHTS, Fault::Corrupt(99)),
        end: Says(&[REPO, WEIGHTS, "sha256", "expected"]),
    },
    Case {
        name: "one bit wrong",
        fault: || hub().with(WEIGHTS, Fault::FlipLast),
        end: Says(&[REPO, WEIGHTS, "sha256"]),
    },
    Case {
        name: "one bit wrong in a small file",
        fault: || hub().with("config.json", Fault::FlipLast),
        end: Says(&[REPO, "config.json", "git object id"]),
    },
    Case {
        name: "403 after a list that is fine",
        fault: || hub().with(WEIGHTS, Fault::Status(403)),
        end: Says(&[WEIGHTS, "403", "HF_TOKEN"]),
    },
    Case {
        name: "401 on a file",
        fault: || hub().with("config.json", Fault::Status(401)),
        end: Says(&["config.json", "401", "HF_TOKEN"]),
    },
    Case { name: "500, then fine", fault: || hub().with(WEIGHTS, Fault::StatusTimes(500, 1)), end: Right },
    Case {
        name: "503 three times, then fine",
        fault: || hub().with("", Fault::StatusTimes(503, 3)),
        end: Right,
    },
    Case {
        name: "500 for ever",
        fault: || hub().with(WEIGHTS, Fault::Status(500)),
        end: Says(&[WEIGHTS, "500"]),
    },
    Case { name: "busy, with a time to come back", fault: || hub().with(WEIGHTS, Fault::Busy), end: Right },
    Case { name: "slow drip", fault: || hub().with(WEIGHTS, Fault::Drip(90)), end: Right },
    Case {
        name: "silence shorter than the timeout",
        fault: || hub().with(WEIGHTS, Fault::Stall(500)),
        end: Right,
    },
    Case {
        name: "silence longer than the timeout",
        fault: || hub().with(WEIGHTS, Fault::Stall(4000)),
        end: Says(&[WEIGHTS, "not a byte for 1 s"]),
    },
    Case {
        name: "no answer",
        fault: || hub().with(WEIGHTS, Fault::Silent),
        end: Says(&[WEIGHTS, "cannot be reached"]),
    },
    Case {
        name: "gated",
        fault: || hub().with("", Fault::Gated),
        end: Says(&[REPO, "gated", "accept its terms at http://127.0.0.1", "HF_TOKEN"]),
    },
    Case { name: "one gated file", fault: || hub().with(WEIGHTS, Fault::Gated), end: Says(&[REPO, "gated"]) },
    Case { name: "no ETag, but a list with hashes", fault: || hub().with("", Fault::NoEtag), end: Right },
    Case {
        name: "no ETag and no list: nothing can be verified",
        fault: || {
            let server = hub().with("", Fault::NoTree);
            for file in WANTED {
                server.set(file, Fault::NoEtag);
            }
            server
        },
        end: Says(&[REPO, "no hash (ETag)", "cannot be verified"]),
    },
    Case { name: "no list of hashes", fault: || hub().with("", Fault::NoTree), end: Right },
    Case { name: "no word of the linked content", fault: || hub().with("", Fault::NoLinked), end: Right },
    Case {
        name: "another hash in the headers than in the list",
        fault: || hub().with(WEIGHTS, Fault::WrongEtag),
        end: Says(&[REPO, WEIGHTS, "contradicts itself"]),
    },
    Case {
        name: "another hash in the list than in the headers",
        fault: || hub().with("config.json", Fault::ListedHash),
        end: Says(&[REPO, "config.json", "contradicts itself"]),
    },
    Case {
        name: "the list says too small a size",
        fault: || hub().with(WEIGHTS, Fault::ListedSize(7)),
        end: Right,
    },
    Case {
        name: "the list says too large a size",
        fault: || hub().with("config.json", Fault::ListedSize(1 << 40)),
        end: Right,
    },
    Case { name: "a relative redirect", fault: || hub().with("", Fault::Relative), end: Right },
    Case {
        name: "redirects in a circle",
        fault: || hub().with(WEIGHTS, Fault::Loop),
        end: Says(&[WEIGHTS, "redirects"]),
    },
    Case {
        name: "a redirect to a file of this machine",
        fault: || hub().with(WEIGHTS, Fault::BadLocation),
        end: Says(&["no address"]),
    },
    Case {
        name: "a login page for a file",
        fault: || hub().with(WEIGHTS, Fault::Html),
        end: Says(&["web page", "captive portal"]),
    },
    Case {
        name: "a login page for the list",
        fault: || hub().with("", Fault::HtmlList),
        end: Says(&["web page"]),
    },
    Case {
        name: "a list that is no JSON",
        fault: || hub().with("", Fault::BrokenList),
        end: Says(&["no JSON"]),
    },
    Case { name: "a list in pages", fault: || hub().with("", Fault::Pages), end: Right },
    Case {
        name: "a list that goes on at another host: asked of this one",
        fault: || hub().with("", Fault::PagesElsewhere),
        end: Right,
    },
    Case {
        name: "a listed file that is gone",
        fault: || hub().with(WEIGHTS, Fault::Gone),
        end: Says(&[REPO, WEIGHTS, "no file"]),
    },
    Case {
        name: "ranges ignored",
        fault: || {
            let server = hub().with(WEIGHTS, Fault::IgnoreRange);
            server.change(|state| state.faults.insert((REPO.into(), "config.json".into()), Fault::Cut(3)));
            server
        },
        end: Right,
    },
    Case {
        name: "files of another commit than the list",
        fault: || hub().with("config.json", Fault::OtherCommit),
        end: Says(&[REPO, "commit"]),
    },
    Case {
        name: "a content length that is too small",
        fault: || hub().with(WEIGHTS, Fault::Short),
        end: Right,
    },
    Case {
        name: "more bytes than there are",
        fault: || hub().with("config.json", Fault::Long),
        end: Says(&["config.json", "expected"]),
    },
    Case {
        name: "a file name that leads out of the cache",
        fault: || {
            let server = hub();
            server.change(|state| state.listed.push("../../../evil.json".into()));
            server
        },
        end: Says(&[REPO, "../../../evil.json", "refused"]),
    },
    Case {
        name: "a file name of this machine's root",
        fault: || {
            let server = hub();
            server.change(|state| state.listed.push("/tmp/evil.json".into()));
            server
        },
        end: Says(&[REPO, "/tmp/evil.json", "refused"]),
    },
    Case {
        name: "a shard that is missing",
        fault: || {
            let mut files = sharded();
            files.remove("model-00002-of-00003.safetensors");
            Server::new(REPO, files)
        },
        end: Says(&[REPO, "model.safetensors.index.json", "model-00002-of-00003.safetensors"]),
    },
    Case {
        name: "an index that leads out of the cache",
        fault: || {
            let mut files = sharded();
            files.insert(
                "model.safetensors.index.json".into(),
                br#"{"weight_map": {"a": "../../config.json"}}"#.to_vec(),
            );
            Server::new(REPO, files)
        },
        end: Says(&[REPO, "../../config.json", "refused"]),
    },
    Case {
        name: "an index that is none",
        fault: || {
            let mut files = sharded();
            files.insert("model.safetensors.index.json".into(), b"[]".to_vec());
            Server::new(REPO, files)
        },
        end: Says(&[REPO, "model.safetensors.index.json", "weight_map"]),
    },
];

/// Each row: how it ends, what the cache serves then, and that all is well once the fault is gone.
#[test]
fn every_fault_ends_right_or_in_a_clear_error() {
    assert!(CASES.len() >= 40);
    let next = AtomicUsize::new(0);
    let slowest = thread::scope(|scope| {
        let work = || {
            let mut slowest = (Duration::ZERO, "");
            while let Some(case) = CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
                let start = Instant::now();
                check(case);
                slowest = slowest.max((start.elapsed(), case.name));
            }
            slowest
        };
        // they mostly wait
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
    });
    println!("{} faults, the slowest {:?}", CASES.len(), slowest);
}

fn check(case: &Case) {
    let name = case.name;
    let (server, machine) = ((case.fault)(), Machine::new());
    let truth = server.change(|state| state.repos[REPO].clone());
    let told = machine.run(&server, &["fetch", REPO]);
    match &case.end {
        Right => {
            assert_eq!(told.code, Some(0), "{name}: {}", told.stderr);
            assert_eq!(names(&told.folder()), WANTED, "{name}");
        }
        Says(words) => {
            assert_eq!(told.code, Some(1), "{name}: {told:?}");
            assert!(told.stdout.is_empty(), "{name}: {}", told.stdout);
            assert_eq!(told.stderr.trim_end().lines().count(), 1, "{name}: {}", told.stderr);
            for word in *words {
                assert!(told.stderr.contains(word), "{name}: no `{word}` in {}", told.stderr);
            }
        }
    }
    machine.assert_right(&[&truth], name);
    for request in server.log().iter().filter(|request| request.server == "cdn") {
        assert!(!request.headers.contains_key("authorization"), "{name}: the token went to another host");
        assert!(!request.path.starts_with("/api/"), "{name}: the list was asked of another host");
    }
    assert!(!machine.0.path().join("evil.json").exists() && !machine.path("../evil.json").exists());

    server.heal();
    if truth != single() {
        server.change(|state| {
            state.repos = [(REPO.to_owned(), single())].into();
            state.commits.insert(REPO.into(), "a".repeat(40));
        });
    }
    let healed = machine.run(&server, &["fetch", REPO, "--refresh"]);
    assert_eq!(names(&healed.folder()), WANTED, "{name}: after the fault");
    machine.assert_right(&[&truth, &single()], name);
    server.log();
    let again = machine.run(&server, &["fetch", REPO]);
    assert_eq!(again.folder(), healed.folder(), "{name}");
    assert_eq!(server.log().len(), 0, "{name}: the second use makes no request");
}

/// The list and the files are those of a repository that now has another name.
#[test]
fn a_renamed_repository_is_followed() {
    for is_listed in [false, true] {
        let server = Server::new("new/name", single());
        server.change(|state| {
            state.faults.insert(("old/name".into(), String::new()), Fault::Renamed("new/name"));
            if is_listed {
                state.repos.insert("old/name".into(), Files::from([("config.json".into(), b"old".to_vec())]));
            }
        });
        let machine = Machine::new();
        let folder = machine.run(&server, &["fetch", "old/name"]).folder();
        assert_eq!(names(&folder), WANTED);
        assert!(folder.ends_with(server.change(|state| state.commit("new/name"))));
        server.log();
        machine.run(&server, &["fetch", "old/name"]).folder();
        assert_eq!(server.log().len(), 0);
    }
}

#[test]
fn what_is_not_there_is_told_apart() {
    let server = hub();
    let machine = Machine::new();
    for (asked, words) in [
        ("no/where", &["no/where", "no such repository", "HF_TOKEN"][..]),
        ("zoo/model@v9", &["zoo/model", "no branch, tag or commit `v9`"]),
        ("zoo/model@0123456789012345678901234567890123456789", &["0123456789012345678901234567890123456789"]),
        ("zoo", &["`zoo`", "owner/name"]),
        ("../zoo", &["`../zoo`"]),
        ("zoo/model@../../x", &["revision"]),
    ] {
        let told = machine.run(&server, &["fetch", asked]);
        assert_eq!(told.code, Some(1), "{asked}");
        for word in words {
            assert!(told.stderr.contains(word), "{asked}: no `{word}` in {}", told.stderr);
        }
    }
    assert_eq!(machine.served(), []);
}

/// Ranges that are answered with something else, for a download that was begun.
#[test]
fn a_begun_download_goes_on_whatever_the_server_makes_of_ranges() {
    for fault in [Fault::IgnoreRange, Fault::WrongRange, Fault::NoRange] {
        let server = hub();
        let machine = Machine::new();
        let data = single()[WEIGHTS].clone();
        let blobs = machine.shelf(REPO).join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        // once with a true beginning, once with a false one
        for begun in [data[..30_000].to_vec(), vec![9; 30_000]] {
            fs::write(blobs.join(format!("{}.incomplete", sha256(&data))), begun).unwrap();
            server.set(WEIGHTS, fault.clone());
            machine.run(&server, &["fetch", REPO]).folder();
            machine.assert_right(&[&single()], "ranges");
            fs::remove_dir_all(machine.shelf(REPO).join("snapshots")).unwrap();
            fs::remove_file(blobs.join(sha256(&data))).unwrap();
        }
    }
}

#[test]
fn a_download_that_was_killed_is_resumed() {
    let server = hub().with(WEIGHTS, Fault::Drip(200));
    let machine = Machine::new();
    let incomplete =
        machine.shelf(REPO).join("blobs").join(format!("{}.incomplete", sha256(&single()[WEIGHTS])));
    let mut child =
        machine.program(&server, &[]).args(["fetch", REPO]).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while fs::metadata(&incomplete).map_or(0, |metadata| metadata.len()) < 3000 {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    machine.assert_right(&[&single()], "killed");
    assert!(!machine.served().iter().any(|(name, _)| name == WEIGHTS));
    server.heal();
    server.log();
    machine.run(&server, &["fetch", REPO]).folder();
    let log = server.log();
    let resumed =
        log.iter().find(|request| request.server == "cdn" && request.path.contains(WEIGHTS)).unwrap();
    assert!(resumed.headers["range"].starts_with("bytes="), "{resumed:?}");
    assert!(!incomplete.exists());
    machine.assert_right(&[&single()], "resumed");
}

#[test]
fn two_processes_at_once_download_once() {
    let server = hub().with(WEIGHTS, Fault::Drip(30));
    let machine = Machine::new();
    let children: Vec<_> = (0..2)
        .map(|_| {
            let mut program = machine.program(&server, &[]);
            program.args(["fetch", REPO]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in children {
        Told::of(child.wait_with_output().unwrap()).folder();
    }
    machine.assert_right(&[&single()], "two");
    let bodies =
        server.log().into_iter().filter(|request| request.server == "cdn" && request.path.contains(WEIGHTS));
    assert_eq!(bodies.count(), 1);
}

#[test]
fn a_full_disk_is_told_and_what_came_is_kept() {
    let server = hub();
    // No file may grow beyond 16 KiB: what a quota does.
    let machine = Machine::new();
    let limit = ["sh", "-c", "trap '' XFSZ; ulimit -f 32; exec \"$0\" \"$@\""];
    let told = Told::of(machine.program(&server, &limit).args(["fetch", REPO]).output().unwrap());
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(
        told.stderr.contains("the disk is full after") && told.stderr.contains("of 60"),
        "{}",
        told.stderr
    );
    machine.assert_right(&[&single()], "quota");
    machine.run(&server, &["fetch", REPO]).folder();
    machine.assert_right(&[&single()], "after the quota");

    // A file system of 32 KiB, where this user may have one.
    let machine = Machine::new();
    fs::create_dir(machine.cache()).unwrap();
    let mount =
        format!("mount -t tmpfs -o size=32k none '{}' && exec \"$0\" \"$@\"", machine.cache().display());
    let small = ["unshare", "-rm", "sh", "-c", &mount];
    let output = machine.program(&server, &small).args(["fetch", REPO, "--no-lock"]).output();
    match output.map(Told::of) {
        Ok(told) if told.code == Some(1) && told.stderr.starts_with("error: ") => {
            assert!(told.stderr.contains("the disk is full after"), "{}", told.stderr);
        }
        other => println!("SKIPPED: no file system of our own here: {other:?}"),
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_told() {
    let server = hub();
    let machine = Machine::new();
    let sys = std::path::Path::new("/sys");
    if !sys.is_dir() {
        println!("SKIPPED: no /sys here");
        return;
    }
    let told =
        machine.program(&server, &[]).env("HF_HUB_CACHE", sys.join("hub")).args(["fetch", REPO]).output();
    let told = Told::of(told.unwrap());
    assert_eq!(told.code, Some(1));
    assert!(
        told.stderr.contains("cannot be written") && told.stderr.contains("HF_HUB_CACHE"),
        "{}",
        told.stderr
    );

    fs::write(machine.path("file"), "").unwrap();
    let told = machine
        .program(&server, &[])
        .env("HF_HUB_CACHE", machine.path("file"))
        .args(["fetch", REPO])
        .output();
    assert_eq!(Told::of(told.unwrap()).code, Some(1));
}

/// Bytes that change while they lie in the cache are found by `verify` and `fetch`, and never served again.
#[test]
fn a_content_that_rots_is_replaced() {
    let server = hub();
    let machine = Machine::new();
    let folder = machine.run(&server, &["fetch", REPO]).folder();
    for (file, damage) in [
        (WEIGHTS, (|data| *data.last_mut().unwrap() ^= 1) as fn(&mut Vec<u8>)),
        (WEIGHTS, |data| data.truncate(5000)),
        ("config.json", |data| data[0] = b'['),
    ] {
        let path = folder.join(file).canonicalize().unwrap();
        let mut data = fs::read(&path).unwrap();
        damage(&mut data);
        fs::write(&path, data).unwrap();

        let told = machine.run(&server, &["verify"]);
        assert_eq!(told.code, Some(1));
        assert!(told.stdout.contains(file), "{told:?}");
        let told = machine.run(&server, &["fetch", REPO, "--offline"]);
        assert_eq!(told.code, Some(1));
        assert!(told.stderr.contains(file) && told.stderr.contains("expected"), "{told:?}");
        server.log();
        machine.run(&server, &["fetch", REPO]).folder();
        assert!(server.log().iter().any(|request| request.path.contains(file)));
        machine.assert_right(&[&single()], file);
        assert_eq!(machine.run(&server, &["verify"]).code, Some(0));
    }
    assert_eq!(git_oid(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
}
