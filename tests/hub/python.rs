//! One cache for Python's huggingface_hub and for us. `VOLARY_PYTHON` names the Python that has it.

use std::path::Path;
use std::process::{Command, Output};

use super::server::Server;
use super::{Machine, REPO, WANTED, names, single};

/// Runs the script beside the other references; nothing where Python or its client is missing.
fn python(machine: &Machine, server: &Server, arguments: &[&str]) -> Option<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/hub_cache.py");
    let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import huggingface_hub"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: no huggingface_hub for `{python}`; VOLARY_PYTHON names another Python");
        return None;
    }
    let output = Command::new(&python)
        .arg(script)
        .args(arguments)
        .env("HF_HUB_CACHE", machine.cache())
        .env("HF_ENDPOINT", server.endpoint())
        .env("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(output)
}

fn folder_of(output: &Output) -> std::path::PathBuf {
    String::from_utf8_lossy(&output.stdout).trim().into()
}

#[test]
fn python_uses_our_cache() {
    let server = Server::new(REPO, single());
    let machine = Machine::new();
    let ours = machine.run(&server, &["fetch", REPO]).folder();
    server.log();
    for how in ["offline-snapshot", "offline-file"] {
        let Some(output) = python(&machine, &server, &[how, REPO]) else { return };
        assert_eq!(folder_of(&output), ours, "{how}");
        assert_eq!(server.log().len(), 0, "{how}");
    }
    // and it adds what we left out beside what we have
    let output = python(&machine, &server, &["snapshot", REPO]).unwrap();
    assert_eq!(folder_of(&output), ours);
    assert!(
        !server
            .log()
            .iter()
            .any(|request| request.server == "cdn" && request.path.contains("model.safetensors"))
    );
    assert_eq!(names(&ours).len(), single().len());
    machine.assert_right(&[&single()], "both");
    assert_eq!(machine.run(&server, &["verify", REPO]).code, Some(0));
}

#[test]
fn we_use_pythons_cache() {
    let server = Server::new(REPO, single());
    for how in ["snapshot", "file"] {
        let machine = Machine::new();
        let Some(output) = python(&machine, &server, &[how, REPO]) else { return };
        server.log();
        let ours = machine.run(&server, &["fetch", REPO]).folder();
        assert_eq!(ours, folder_of(&output), "{how}");
        assert_eq!(server.log().len(), 0, "{how}");
        assert!(WANTED.iter().all(|file| ours.join(file).is_file()));
    }
}
