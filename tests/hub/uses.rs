//! What a user does with repositories, and how many requests it costs.

use std::fs;

use serde_json::Value;

use super::server::{Fault, Server, git_oid, sha256};
use super::{Files, Machine, REPO, Told, WANTED, names, sharded, single};
use crate::support::fixture;

/// A repository with the files of a fixture.
fn of_fixture(name: &str) -> Files {
    let entries = fs::read_dir(fixture(name)).unwrap().flatten();
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn the_second_use_makes_no_request_and_offline_makes_none_ever() {
    let server = Server::new("zoo/vit", of_fixture("vit_f16"));
    let machine = Machine::new();
    let inputs = fixture("vit_f16").join("inputs.safetensors");
    let forward = |extra: &[&str]| {
        let mut program = machine.program(&server, &[]);
        program
            .args(["forward", "zoo/vit", "--output", "out.safetensors", "--input"])
            .arg(&inputs)
            .args(extra);
        Told::of(program.output().unwrap())
    };
    let told = forward(&["--offline"]);
    assert_eq!(told.code, Some(1));
    assert!(told.stderr.contains("zoo/vit") && told.stderr.contains("missing"), "{}", told.stderr);
    assert_eq!(server.log().len(), 0);

    assert_eq!(forward(&[]).code, Some(0));
    let log = server.log();
    assert!(log.len() >= 4 && log.iter().all(|request| request.status < 400), "{log:?}");
    for extra in [&[][..], &["--offline"]] {
        assert_eq!(forward(extra).code, Some(0));
        assert_eq!(server.log().len(), 0, "{extra:?}");
    }

    // what is missing is named
    let folder = machine.run(&server, &["fetch", "zoo/vit"]).folder();
    for missing in ["model.safetensors", "config.json"] {
        let link = fs::read_link(folder.join(missing)).unwrap();
        fs::remove_file(folder.join(missing)).unwrap();
        let told = forward(&["--offline"]);
        assert!(told.stderr.contains(missing) && told.stderr.contains("zoo/vit"), "{}", told.stderr);
        std::os::unix::fs::symlink(link, folder.join(missing)).unwrap();
    }
    assert_eq!(server.log().len(), 0);
}

#[test]
fn the_variables_of_python_turn_the_network_off() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    for (name, value, requests) in [
        ("HF_HUB_OFFLINE", "1", 0),
        ("HF_HUB_OFFLINE", "True", 0),
        ("TRANSFORMERS_OFFLINE", "yes", 0),
        ("HF_HUB_OFFLINE", "0", 1),
    ] {
        machine
            .program(&server, &[])
            .env(name, value)
            .args(["fetch", "no/where", "--no-lock"])
            .output()
            .unwrap();
        assert_eq!(server.log().is_empty(), requests == 0, "{name}={value}");
    }
}

#[test]
fn the_layout_is_that_of_python() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let folder = machine.run(&server, &["fetch", REPO]).folder();
    let commit = server.change(|state| state.commit(REPO));
    assert_eq!(folder, machine.shelf(REPO).join("snapshots").join(&commit));
    assert_eq!(fs::read_to_string(machine.shelf(REPO).join("refs/main")).unwrap(), commit);
    for (file, data) in single().iter().filter(|(file, _)| WANTED.contains(&file.as_str())) {
        let hash = if super::server::is_lfs(data) { sha256(data) } else { git_oid(data) };
        let link = fs::read_link(folder.join(file)).unwrap();
        assert_eq!(link.to_str().unwrap(), format!("../../blobs/{hash}"));
        assert!(machine.cache().join(format!(".locks/models--zoo--model/{hash}.lock")).is_file());
    }
    // without links there are copies, and they are verified too
    let machine = Machine::new();
    let program = |arguments: &[&str]| {
        let mut program = machine.program(&server, &[]);
        Told::of(program.env("HF_HUB_DISABLE_SYMLINKS", "1").args(arguments).output().unwrap())
    };
    let folder = program(&["fetch", REPO]).folder();
    assert!(fs::read_link(folder.join("config.json")).is_err());
    server.log();
    program(&["fetch", REPO]).folder();
    assert_eq!(server.log().len(), 0);
    fs::write(folder.join("config.json"), "{}").unwrap();
    assert_eq!(program(&["fetch", REPO, "--offline"]).code, Some(1));
    program(&["fetch", REPO]).folder();
    assert_eq!(fs::read(folder.join("config.json")).unwrap(), single()["config.json"]);
}

#[test]
fn a_relative_cache_gives_a_whole_path() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let told =
        machine.program(&server, &[]).env("HF_HUB_CACHE", "cache").args(["fetch", REPO]).output().unwrap();
    let folder = Told::of(told).folder();
    assert!(folder.is_absolute() && names(&folder) == WANTED, "{}", folder.display());
}

/// Python's client looks at `hub` in `HF_HOME`; so do we.
#[test]
fn a_home_of_its_own_is_honoured() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let program = |arguments: &[&str]| {
        let mut program = machine.program(&server, &[]);
        program.env_remove("HF_HUB_CACHE").env("HF_HOME", "~/of/mine").args(arguments);
        Told::of(program.output().unwrap())
    };
    assert!(program(&["fetch", REPO]).folder().starts_with(machine.path("of/mine/hub/models--zoo--model")));
}

#[test]
fn what_python_downloaded_is_used_without_a_request() {
    let server = Server::new("zoo/vit", Files::new());
    for with_list in [false, true] {
        let machine = Machine::new();
        let commit = "c".repeat(40);
        let files = of_fixture("vit_f16");
        machine.lay_out("zoo/vit", &commit, &files);
        if with_list {
            let list: serde_json::Map<String, Value> = files
                .iter()
                .map(|(name, data)| {
                    (name.clone(), serde_json::json!({ "size": data.len(), "blob_id": "0".repeat(40), "lfs_sha256": sha256(data), "lfs_size": data.len() }))
                })
                .filter(|(name, _)| super::server::is_lfs(&files[name]))
                .collect();
            let tree = serde_json::json!({ "format_version": 1, "files": list });
            fs::create_dir(machine.shelf("zoo/vit").join("trees")).unwrap();
            fs::write(machine.shelf("zoo/vit").join(format!("trees/{commit}.json")), tree.to_string())
                .unwrap();
        }
        let told = machine.run(&server, &["info", "zoo/vit", "--json"]);
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        let at_commit = format!("zoo/vit@{commit}");
        for repo in ["zoo/vit", &at_commit] {
            assert!(machine.run(&server, &["fetch", repo]).folder().ends_with(&commit));
        }
        assert_eq!(server.log().len(), 0, "with a list: {with_list}");
    }
}

#[test]
fn what_python_began_is_completed() {
    let server = Server::new(REPO, single());
    let some =
        |files: Files| -> Files { files.into_iter().filter(|(name, _)| name == "config.json").collect() };
    // at the commit of the hub, and at one that the hub no longer has
    for commit in [server.change(|state| state.commit(REPO)), "d".repeat(40)] {
        let machine = Machine::new();
        machine.lay_out(REPO, &commit, &some(single()));
        let told = machine.run(&server, &["info", REPO, "--offline"]);
        assert!(told.code == Some(1) && told.stderr.contains("missing weights"), "{told:?}");
        server.log();
        let folder = machine.run(&server, &["fetch", REPO]).folder();
        assert!(folder.ends_with(server.change(|state| state.commit(REPO))));
        assert_eq!(names(&folder), WANTED);
        let is_config = |path: &str| path.ends_with("config.json") && !path.contains("tokenizer");
        assert!(!server.log().iter().any(|request| is_config(&request.path)), "it was there");
    }
}

#[test]
fn revisions_are_branches_tags_and_commits() {
    let server = Server::new(REPO, single());
    let commit = server.change(|state| state.commit(REPO));
    for revision in ["main", "v1", &commit, &commit[..8]] {
        let machine = Machine::new();
        let repo = format!("{REPO}@{revision}");
        let folder = machine.run(&server, &["fetch", &repo]).folder();
        assert!(folder.ends_with(&commit), "{revision}");
        assert_eq!(names(&folder), WANTED);
        server.log();
        machine.run(&server, &["fetch", &repo]).folder();
        assert_eq!(server.log().len(), 0, "{revision}");
        let lock = fs::read_to_string(machine.path("volary.lock")).unwrap();
        assert!(lock.contains(&format!("revision = \"{revision}\"")) && lock.contains(&commit), "{lock}");
    }
}

#[test]
fn a_branch_that_moved_is_seen_with_refresh_and_files_never_mix() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let old = machine.run(&server, &["fetch", REPO]).folder();
    let mut files = single();
    files.insert("config.json".into(), br#"{"model_type": "new"}"#.to_vec());
    server.change(|state| {
        state.repos.insert(REPO.into(), files.clone());
        state.commits.insert(REPO.into(), "b".repeat(40));
    });
    assert_eq!(machine.run(&server, &["fetch", REPO]).folder(), old);
    server.log();
    let new = machine.run(&server, &["fetch", REPO, "--refresh"]).folder();
    assert!(new.ends_with("b".repeat(40)));
    assert_eq!(fs::read(new.join("config.json")).unwrap(), files["config.json"]);
    assert_eq!(fs::read(old.join("config.json")).unwrap(), single()["config.json"]);
    // what is the same is not downloaded again
    assert!(!server.log().iter().any(|request| request.path.contains("model.safetensors")));
    machine.assert_right(&[&single(), &files], "two commits");
}

#[test]
fn only_what_a_system_needs_is_downloaded() {
    let server = Server::new(REPO, sharded());
    let machine = Machine::new();
    let folder = machine.run(&server, &["fetch", REPO]).folder();
    assert_eq!(names(&folder).len(), 5);
    server.log();
    machine.run(&server, &["fetch", REPO]).folder();
    assert_eq!(server.log().len(), 0);

    let mut files = single();
    files.insert("model.fp16.safetensors".into(), super::weights(30_000));
    files.insert("model.q4.gguf".into(), vec![4; 3000]);
    let server = Server::new(REPO, files);
    for (arguments, weights) in [
        (&["--variant", "fp16"][..], "model.fp16.safetensors"),
        (&["--include", "*.gguf"], "model.q4.gguf"),
        (&["--include", "pytorch_model.bin"], "pytorch_model.bin"),
    ] {
        let machine = Machine::new();
        let arguments = [&["fetch", REPO], arguments].concat();
        let folder = machine.run(&server, &arguments).folder();
        assert_eq!(names(&folder), ["README.md", "config.json", weights, "tokenizer.json"]);
        server.log();
        machine.run(&server, &arguments).folder();
        assert_eq!(server.log().len(), 0, "{arguments:?}");
    }
    let told = Machine::new().run(&server, &["fetch", REPO, "--variant", "int3"]);
    assert!(told.stderr.contains("int3") && told.stderr.contains("fp16"), "{}", told.stderr);
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    machine.run(&server, &["fetch", REPO]).folder();
    let log = server.log();
    assert!(log.iter().any(|request| request.server == "cdn"));
    for request in log {
        let token = request.headers.get("authorization").map(String::as_str);
        assert_eq!(token, (request.server == "hub").then_some("Bearer hf_very_secret"), "{request:?}");
    }
    // from the file of a login, and not where that is turned off
    for (off, token) in [("0", Some("Bearer hf_of_a_file")), ("1", None)] {
        let machine = Machine::new();
        fs::create_dir_all(machine.path(".cache/huggingface")).unwrap();
        fs::write(machine.path(".cache/huggingface/token"), "hf_of_a_file\n").unwrap();
        let mut program = machine.program(&server, &[]);
        program.env_remove("HF_TOKEN").env("HF_HUB_DISABLE_IMPLICIT_TOKEN", off).args(["fetch", REPO]);
        Told::of(program.output().unwrap()).folder();
        let log = server.log();
        assert_eq!(log[0].headers.get("authorization").map(String::as_str), token, "{off}");
    }
}

#[test]
fn a_lock_file_decides_with_locked() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let told = machine.run(&server, &["info", REPO, "--locked"]);
    assert!(told.code == Some(1) && told.stderr.contains("volary.lock"), "{told:?}");

    let old = machine.run(&server, &["fetch", REPO]).folder();
    let lock = fs::read_to_string(machine.path("volary.lock")).unwrap();
    assert!(
        lock.contains(&sha256(&single()["config.json"]))
            && lock.contains(&sha256(&single()["model.safetensors"]))
    );
    server.change(|state| state.commits.insert(REPO.into(), "b".repeat(40)));

    // another machine, the same lock, a branch that has moved: the server no longer has the locked commit
    let other = Machine::new();
    fs::write(other.path("volary.lock"), &lock).unwrap();
    let told = other.run(&server, &["fetch", REPO, "--locked"]);
    assert!(
        told.code == Some(1) && told.stderr.contains(old.file_name().unwrap().to_str().unwrap()),
        "{told:?}"
    );
    server.change(|state| state.commits.clear());
    assert!(other.run(&server, &["fetch", REPO, "--locked"]).folder().ends_with(old.file_name().unwrap()));
    server.log();
    assert_eq!(other.run(&server, &["fetch", REPO, "--locked"]).code, Some(0));
    assert_eq!(server.log().len(), 0);
    assert_eq!(fs::read_to_string(other.path("volary.lock")).unwrap(), lock);

    // a lock with another hash: what the hub has is not taken
    let other = Machine::new();
    let wrong = lock.replace(&sha256(&single()["config.json"]), &sha256(b"other"));
    fs::write(other.path("volary.lock"), &wrong).unwrap();
    let told = other.run(&server, &["fetch", REPO, "--locked"]);
    assert!(
        told.code == Some(1) && told.stderr.contains("config.json") && told.stderr.contains("sha256"),
        "{told:?}"
    );
    assert!(!other.served().iter().any(|(file, _)| file == "config.json"));

    let told = machine.run(&server, &["fetch", "zoo/other", "--locked"]);
    assert!(told.stderr.contains("zoo/other is not in it"), "{told:?}");
    for (path, arguments) in [("volary.lock", &["verify"][..]), ("volary.lock", &["verify", REPO])] {
        fs::write(machine.path(path), &lock).unwrap();
        assert_eq!(machine.run(&server, arguments).code, Some(0));
        fs::write(machine.path(path), &wrong).unwrap();
        let told = machine.run(&server, arguments);
        assert!(told.code == Some(1) && told.stdout.contains("config.json"), "{told:?}");
    }
    fs::remove_file(machine.path("volary.lock")).unwrap();
    assert_eq!(machine.run(&server, &["verify", REPO]).code, Some(0), "by the names of the contents");
    assert_eq!(machine.run(&server, &["verify", old.to_str().unwrap()]).code, Some(0));
    let told = machine.run(&server, &["verify", "zoo/other"]);
    assert!(told.code == Some(1) && told.stderr.contains("zoo/other is not in"), "{told:?}");
}

#[test]
fn a_lock_file_that_cannot_be_written_is_told_after_the_download() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    fs::create_dir(machine.path("volary.lock")).unwrap();
    let told = machine.run(&server, &["fetch", REPO]);
    assert!(
        told.code == Some(1) && told.stderr.contains("volary.lock") && told.stdout.is_empty(),
        "{told:?}"
    );
    assert_eq!(names(&machine.run(&server, &["fetch", REPO, "--no-lock"]).folder()), WANTED);
    machine.run(&server, &["fetch", REPO, "--lock", "other.lock"]).folder();
    assert!(machine.path("other.lock").is_file());
    let told = machine.run(&server, &["fetch", REPO, "--json", "--no-lock"]);
    let list: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(list[0]["files"]["config.json"]["sha256"], sha256(&single()["config.json"]));
}

#[test]
fn info_reads_headers_before_any_download() {
    let mut files = of_fixture("clip");
    files.insert("README.md".into(), b"---\nlicense: apache-2.0\n---\n".to_vec());
    let size = files["model.safetensors"].len();
    let server = Server::new("zoo/clip", files);
    let machine = Machine::new();
    let told = machine.run(&server, &["info", "zoo/clip", "--json"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    let info: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!((info["system"].as_str(), info["parameters"].as_u64()), (Some("clip"), Some(43_521)));
    assert_eq!(
        (info["license"].as_str(), info["download"].as_u64()),
        (Some("apache-2.0"), Some(size as u64))
    );
    for request in server.log().iter().filter(|request| request.path.contains("model.safetensors")) {
        let range = request.headers["range"].strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let (start, end): (usize, usize) = (range.0.parse().unwrap(), range.1.parse().unwrap());
        assert!(end - start < size / 2 && end < size / 2, "{range:?} of {size}");
    }
    assert!(!machine.served().iter().any(|(file, _)| file == "model.safetensors"));

    // once it is here, it is read here
    machine.run(&server, &["fetch", "zoo/clip"]).folder();
    server.log();
    let told = machine.run(&server, &["info", "zoo/clip", "--json"]);
    let mut here: Value = serde_json::from_str(&told.stdout).unwrap();
    here["download"] = info["download"].clone();
    let without_paths = |mut info: Value| {
        info["stored"]["preprocessor"] = Value::Null;
        info["stored"]["tokenizer"] = Value::Null;
        info
    };
    assert_eq!(without_paths(here), without_paths(info));
    assert_eq!(server.log().len(), 0);
}

#[test]
fn info_tells_what_would_not_fit_and_what_is_no_header() {
    let mut files = of_fixture("clip");
    files.insert("model.safetensors".into(), super::weights(30_000));
    let server = Server::new("zoo/clip", files);
    let told = Machine::new().run(&server, &["info", "zoo/clip"]);
    assert!(told.code == Some(1) && told.stdout.contains("does not fit"), "{told:?}");

    let mut files = of_fixture("clip");
    for broken in [vec![255; 3000], [&9u64.to_le_bytes()[..], &[b'x'; 2000]].concat()] {
        files.insert("model.safetensors".into(), broken);
        let server = Server::new("zoo/clip", files.clone());
        let told = Machine::new().run(&server, &["info", "zoo/clip"]);
        assert!(told.code == Some(1) && told.stderr.contains("model.safetensors"), "{told:?}");
    }

    // a server without ranges sends the beginning all the same
    let server = Server::new("zoo/clip", of_fixture("clip")).with("model.safetensors", Fault::IgnoreRange);
    assert_eq!(Machine::new().run(&server, &["info", "zoo/clip"]).code, Some(0));
}

#[test]
fn torch_files_tell_their_tensors_before_they_are_downloaded() {
    let server = Server::new("zoo/torch", of_fixture("bert_legacy_bin"));
    let machine = Machine::new();
    let told = machine.run(&server, &["info", "zoo/torch", "--json"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    let log = server.log();
    let mut parts = log.iter().filter(|request| request.path.contains("pytorch_model.bin"));
    assert!(parts.all(|request| request.method == "GET" && request.headers.contains_key("range")));
    let there: Value = serde_json::from_str(&told.stdout).unwrap();
    let told = machine.run(&server, &["info", fixture("bert_legacy_bin").to_str().unwrap(), "--json"]);
    let here: Value = serde_json::from_str(&told.stdout).unwrap();
    for field in ["system", "parameters", "memory"] {
        assert_eq!(there[field], here[field]);
    }
    assert_eq!(there["stored"]["dtypes"], here["stored"]["dtypes"]);
    assert!(!machine.served().iter().any(|(file, _)| file == "pytorch_model.bin"));
}
