use std::fs;
use std::path::PathBuf;

use super::*;
use crate::testing::{Stored, checkpoint, count, safetensors_bytes, torch_bytes};

const KEYS: KeyMap = KeyMap::new(&[
    Rule::Rename("gate", "gate"),
    Rule::StackTranspose("h.{}.experts.{}.w", "h.{}.w", Ones::Before(1)),
    Rule::Stack("h.{}.experts.{}.b", "h.{}.b", Ones::Before(0)),
    Rule::Transpose("h.{}.experts.w", "h.{}.w"),
    Rule::Rename("h.{}.experts.b", "h.{}.b"),
]);

/// The experts of a whole model, together and one by one.
fn together() -> Vec<Stored> {
    vec![
        count("gate", &[4, 2], 0),
        count("h.0.experts.w", &[4, 3, 2], 100),
        count("h.0.experts.b", &[4, 3], 200),
    ]
}

fn apart(experts: usize, first: usize) -> Vec<Stored> {
    let of_one = |at: usize| {
        let (w, b) = (format!("h.0.experts.{at}.w"), format!("h.0.experts.{at}.b"));
        [count(&w, &[1, 3, 2], 100 + 6 * (first + at)), count(&b, &[3], 200 + 3 * (first + at))]
    };
    (0..experts).flat_map(of_one).collect()
}

/// Names, shapes and values.
fn contents(checkpoint: &dyn Checkpoint) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let content = |entry: &Entry| {
        let bytes = checkpoint.bytes(&entry.name).unwrap().into_owned();
        if let Some(shared) = checkpoint.shared(&entry.name) {
            assert_eq!(shared[..], bytes[..]);
        }
        (entry.name.clone(), (entry.shape.clone(), bytes))
    };
    checkpoint.entries().iter().map(content).collect()
}

fn stored(tensors: Vec<Stored>) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    tensors.into_iter().map(|Stored { key, shape, bytes, .. }| (key, (shape, bytes))).collect()
}

/// All tensors of a whole model, one by one.
fn whole() -> Vec<Stored> {
    [vec![count("gate", &[4, 2], 0)], apart(4, 0)].concat()
}

#[test]
fn experts_in_one_tensor_are_cut_apart() {
    let together = checkpoint(&together());
    let found = one_by_one(&together, &KEYS).unwrap();
    assert_eq!(contents(&found), stored(whole()));
    assert_eq!(homes(&found, &KEYS, 2).unwrap().iter().sum::<usize>(), 4);
}

/// What FastMoE's workers write, by the file that each has in its folder.
fn write(folder: &Path, rank: usize, name: &str, bytes: Vec<u8>) {
    let folder = folder.join("iter_0000007").join(worker_folder(rank));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), bytes).unwrap();
}

/// Torch files of two workers, as Megatron nests them, with experts one by one and in one tensor.
#[test]
fn the_files_of_workers_are_merged() {
    let gate = count("gate", &[4, 2], 0);
    let half = |first: usize| {
        vec![
            count("h.0.experts.w", &[2, 3, 2], 100 + 6 * first),
            count("h.0.experts.b", &[2, 3], 200 + 3 * first),
        ]
    };
    for [first, second] in [[apart(2, 0), apart(2, 2)], [half(0), half(2)], [apart(2, 0), half(2)]] {
        let folder = tempfile::tempdir().unwrap();
        let all = [vec![gate.clone()], first].concat();
        write(folder.path(), 0, "model_optim_rng.pt", torch_bytes(&all, Some("model"), &[]));
        write(folder.path(), 1, "model_optim_rng.pt", torch_bytes(&second, Some("model"), &[]));
        let merged = open_workers(folder.path(), &KEYS).unwrap().unwrap();
        let found = contents(merged.as_ref());
        assert_eq!(found, stored(whole()));
        // without a key map nothing says whose experts they are
        let told = crate::open(folder.path()).err().unwrap().to_string();
        assert!(told.contains("mp_rank_00_dp_rank_0001 has experts of its own"), "{told}");
    }
}

/// Written by any number of workers, one by one or in one tensor as they were, and merged again.
#[test]
fn what_workers_write_is_the_whole_again() {
    for tensors in [whole(), together()] {
        let source = checkpoint(&tensors);
        for ranks in [2, 4] {
            let folder = tempfile::tempdir().unwrap();
            for (rank, part) in workers(&source, &KEYS, ranks).unwrap().iter().enumerate() {
                let folder = folder.path().join(worker_folder(rank));
                fs::create_dir(&folder).unwrap();
                crate::convert(part, &folder, WORKER_STEM, &Default::default(), &|_| ()).unwrap();
                // every worker counts from 0
                let is_first =
                    |entry: &&Entry| entry.name.contains(".0.w") || entry.name.ends_with("experts.w");
                assert!(part.entries().iter().any(|entry| is_first(&entry)));
                assert_eq!(part.entries().iter().any(|entry| entry.name == "gate"), rank == 0);
            }
            let merged = open_workers(folder.path(), &KEYS).unwrap().unwrap();
            assert_eq!(contents(merged.as_ref()), stored(whole()));
        }
    }
    assert!(open_workers(&PathBuf::from(env!("CARGO_MANIFEST_DIR")), &KEYS).unwrap().is_none());
}

#[test]
fn what_does_not_fit_between_workers_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let gate = || vec![count("gate", &[4, 2], 0)];
    let put = |rank: usize, tensors: &[Stored]| {
        write(folder.path(), rank, "model_optim_rng.safetensors", safetensors_bytes(tensors));
    };
    let told = || open_workers(folder.path(), &KEYS).err().unwrap().to_string();
    put(0, &[gate(), apart(2, 0)].concat());
    put(3, &apart(2, 6));
    let missing = told();
    assert!(
        missing.contains("2 problems") && missing.contains("rank 1, mp_rank_00_dp_rank_0001, is missing"),
        "{missing}"
    );
    put(1, &[gate(), apart(3, 2)].concat());
    put(2, &[count("h.0.experts.0.w", &[1, 3, 5], 0), count("h.0.experts.0.b", &[3], 0)]);
    let wrong = told();
    for part in [
        "`gate` is in the parts of ranks 0 and 1",
        "`h.0.w`: rank 1 should have experts 2 to 3, and has 2, 3, 4",
        "`h.0.w`: rank 2 should have experts 4 to 5, and has 4",
        "`h.0.experts.4.w` is F32 [1, 3, 5] in rank 2, expected F32 [1, 3, 2] as in rank 0",
    ] {
        assert!(wrong.contains(part), "{wrong}\nlacks {part}");
    }
}

#[test]
fn experts_that_cannot_be_spread_are_told() {
    let refusal =
        |tensors: &[Stored], ranks| workers(&checkpoint(tensors), &KEYS, ranks).unwrap_err().to_string();
    assert!(refusal(&whole(), 3).contains("`h.0.b`: 4 experts cannot be spread evenly over 3 ranks"));
    assert!(refusal(&whole()[..1], 2).contains("there are no experts"));
    assert!(refusal(&whole()[5..], 2).contains("`h.0.w` has expert 3, and only 2 in all"));
    // no more names than there may be experts are made of a claim
    let claim = Stored { shape: vec![1 << 40, 0], bytes: Vec::new(), ..count("h.0.experts.b", &[1], 0) };
    let claimed = checkpoint(&[claim]);
    assert_eq!(one_by_one(&claimed, &KEYS).unwrap().entries().len(), 1);
}
