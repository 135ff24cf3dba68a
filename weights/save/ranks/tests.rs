use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;

use burn::module::Module;
use burn::tensor::{Bytes, Device, Tensor};
use volary_kernels::layers::{Linear, LinearConfig};
use volary_kernels::moe::{ExpertMlp, ExpertMlpConfig};
use volary_kernels::random::seeded;

use super::*;
use crate::files::fault::{Fault, with};
use crate::load::{LoadOptions, load};
use crate::rule::{Ones, Rule};
use crate::save::{save, save_tensors};
use crate::{convert, open, read_tensors};

const EXPERTS: usize = 8;

/// Something that all ranks have, and experts with every kind of parameter.
#[derive(Module, Debug)]
struct Layer {
    gate: Linear,
    experts: ExpertMlp,
}

const KEYS: KeyMap = KeyMap::new(&[
    Rule::Rename("gate.weight", "gate.weight"),
    Rule::StackTranspose("experts.{}.up.weight", "experts.up.weight", Ones::Before(1)),
    Rule::Stack("experts.{}.up.bias", "experts.up.bias", Ones::Before(0)),
    Rule::StackTranspose("experts.{}.down.weight", "experts.down.weight", Ones::Before(1)),
    Rule::Stack("experts.{}.down.bias", "experts.down.bias", Ones::Before(0)),
    Rule::Transpose("experts.up.weight", "experts.up.weight"),
    Rule::Rename("experts.up.bias", "experts.up.bias"),
    Rule::Transpose("experts.down.weight", "experts.down.weight"),
    Rule::Rename("experts.down.bias", "experts.down.bias"),
]);

/// The same with all experts in one tensor first.
const FUSED: KeyMap = KeyMap::new(&[
    Rule::Rename("gate.weight", "gate.weight"),
    Rule::Transpose("experts.up.weight", "experts.up.weight"),
    Rule::Rename("experts.up.bias", "experts.up.bias"),
    Rule::Transpose("experts.down.weight", "experts.down.weight"),
    Rule::Rename("experts.down.bias", "experts.down.bias"),
]);

fn init(experts: usize) -> impl Fn(&Device) -> Layer {
    move |device| Layer {
        gate: LinearConfig::new(3, experts).with_bias(false).init(device),
        experts: ExpertMlpConfig::new(experts, 3, 5).init(device),
    }
}

fn layer(seed: u64) -> Layer {
    seeded(seed, &Device::flex(), init(EXPERTS))
}

fn share(rank: usize, ranks: usize) -> Share {
    Share::new(rank, ranks).unwrap()
}

/// All that the ranks do to save a layer.
fn save_at(ranks: usize, folder: &Path, layer: &Layer) -> Result<Vec<PathBuf>, Error> {
    let saving = Saving::begin(folder, ranks)?;
    for rank in 0..ranks {
        let part = share(rank, ranks).of(layer.clone(), &KEYS)?;
        Saving::join(folder, ranks, saving.generation()).write(rank, &part, &KEYS, None)?;
    }
    saving.commit(&KEYS)
}

fn load_at(share: Share, checkpoint: &dyn Checkpoint) -> Result<Layer, Error> {
    let untrained = share.of(init(EXPERTS)(&Device::flex()), &KEYS)?;
    load(untrained, checkpoint, &KEYS, &LoadOptions { share, ..LoadOptions::default() })
}

/// Every tensor of what a reader finds in a folder.
fn stored(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = open(folder).unwrap();
    let bytes = |entry: &Entry| (entry.name.clone(), checkpoint.bytes(&entry.name).unwrap().into_owned());
    checkpoint.entries().iter().map(bytes).collect()
}

/// The same of a layer.
fn tensors(layer: &Layer) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    save(layer, &KEYS, None, &folder.path().join(WHOLE), None).unwrap();
    stored(folder.path())
}

fn names(folder: &Path) -> Vec<String> {
    file_names(folder).unwrap()
}

/// A checkpoint that notes what is read of it.
struct Noted<'a> {
    checkpoint: &'a dyn Checkpoint,
    read: Mutex<BTreeSet<String>>,
}

impl Checkpoint for Noted<'_> {
    fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn entries(&self) -> &[Entry] {
        self.checkpoint.entries()
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        self.read.lock().unwrap().insert(name.to_owned());
        self.checkpoint.bytes(name)
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        self.read.lock().unwrap().insert(name.to_owned());
        self.checkpoint.shared(name)
    }
}

/// Saved by four, loaded by one, two and eight, who save again: always the same values, and nobody reads the experts of
/// others.
#[test]
fn any_number_of_ranks_loads_what_any_other_has_saved() {
    let layer = layer(1);
    let expected = tensors(&layer);
    assert_eq!(expected.len(), 1 + 4 * EXPERTS);
    let folder = tempfile::tempdir().unwrap();
    save_at(4, folder.path(), &layer).unwrap();
    for ranks in [1, 2, 8, 4] {
        assert_eq!(stored(folder.path()), expected);
        let checkpoint = open(folder.path()).unwrap();
        let saving = Saving::begin(folder.path(), ranks).unwrap();
        for rank in 0..ranks {
            let noted = Noted { checkpoint: checkpoint.as_ref(), read: Mutex::default() };
            let part = load_at(share(rank, ranks), &noted).unwrap();
            assert_eq!(part.experts.up.weight.dims(), [EXPERTS / ranks, 3, 5]);
            let mut own = BTreeSet::from(["gate.weight".to_owned()]);
            for expert in share(rank, ranks).places(EXPERTS / ranks) {
                own.extend(
                    ["up.weight", "up.bias", "down.weight", "down.bias"]
                        .map(|name| format!("experts.{expert}.{name}")),
                );
            }
            assert_eq!(*noted.read.lock().unwrap(), own);
            saving.write(rank, &part, &KEYS, None).unwrap();
        }
        let files = saving.commit(&KEYS).unwrap();
        assert_eq!(files.len(), ranks + 1);
        // only the first rank writes what all have
        for (rank, file) in files[..ranks].iter().enumerate() {
            assert_eq!(read_tensors(file).unwrap().len(), 4 * EXPERTS / ranks + usize::from(rank == 0));
        }
    }
}

/// Experts in one tensor are read by ranges.
#[test]
fn a_rank_finds_its_experts_in_one_tensor() {
    let layer = layer(2);
    let folder = tempfile::tempdir().unwrap();
    save(&layer, &FUSED, None, &folder.path().join(WHOLE), None).unwrap();
    let checkpoint = open(folder.path()).unwrap();
    for rank in 0..4 {
        let found = load_at(share(rank, 4), checkpoint.as_ref()).unwrap();
        let of_whole = share(rank, 4).of(layer.clone(), &KEYS).unwrap();
        assert_eq!(found.experts.up.weight.val().into_data(), of_whole.experts.up.weight.val().into_data());
        assert_eq!(
            found.experts.down.weight.val().into_data(),
            of_whole.experts.down.weight.val().into_data()
        );
        let bias = |layer: &Layer| layer.experts.up.bias.as_ref().unwrap().val().into_data();
        assert_eq!(bias(&found), bias(&of_whole));
    }
}

/// Numbers that are none are an error for the rank that reads them, and for no other.
#[test]
fn a_damaged_expert_concerns_its_own_rank() {
    let folder = tempfile::tempdir().unwrap();
    let mut damaged = layer(3);
    let up = damaged.experts.up.weight.val();
    let poison = Tensor::<3>::full([1, 3, 5], f32::NAN, &Device::flex());
    damaged.experts.up.weight =
        damaged.experts.up.weight.map(|_| up.slice_assign([5..6, 0..3, 0..5], poison));
    save_at(2, folder.path(), &damaged).unwrap();
    let checkpoint = open(folder.path()).unwrap();
    for rank in 0..4 {
        match load_at(share(rank, 4), checkpoint.as_ref()) {
            Err(Error::Mismatch { problems, .. }) if rank == 2 => {
                assert_eq!(problems.len(), 1, "{problems:?}")
            }
            result => drop(result.unwrap()),
        }
    }
}

#[test]
fn more_or_fewer_experts_than_the_ranks_have_are_told() {
    let folder = tempfile::tempdir().unwrap();
    save_at(4, folder.path(), &layer(4)).unwrap();
    let checkpoint = open(folder.path()).unwrap();
    let refusal = |experts: usize, share: Share| {
        let options = LoadOptions { share, ..LoadOptions::default() };
        let module = share.of(init(experts)(&Device::flex()), &KEYS).unwrap();
        load(module, checkpoint.as_ref(), &KEYS, &options).unwrap_err().to_string()
    };
    let told = refusal(12, share(1, 2));
    assert!(told.contains("missing `experts.8.up.weight`") && told.contains("[12, 3]"), "{told}");
    let told = refusal(6, share(1, 2));
    assert!(told.contains("unexpected `experts.6.up.weight`") && !told.contains("experts.5."), "{told}");
    let told = share(0, 3).of(layer(4), &KEYS).unwrap_err().to_string();
    assert!(
        told.contains("4 problems") && told.contains("8 experts cannot be spread evenly over 3 ranks"),
        "{told}"
    );
}

/// Puts a layer into a folder.
type Prepare = Box<dyn Fn(&Path, &Layer)>;

/// What may be in a folder before a save.
fn olds() -> Vec<(&'static str, Prepare)> {
    let sharded = |folder: &Path, layer: &Layer| {
        save(layer, &KEYS, None, &folder.join("all.safetensors"), None).unwrap();
        let options = convert::ConvertOptions { max_shard_size: Some(400), ..Default::default() };
        convert(open(&folder.join("all.safetensors")).unwrap().as_ref(), folder, "model", &options, &|_| ())
            .unwrap();
        fs::remove_file(folder.join("all.safetensors")).unwrap();
    };
    vec![
        ("nothing", Box::new(|_, _| ())),
        ("one file", Box::new(|folder, layer| save(layer, &KEYS, None, &folder.join(WHOLE), None).unwrap())),
        ("shards", Box::new(sharded)),
        (
            "shards without an index",
            Box::new(move |folder, layer| {
                sharded(folder, layer);
                fs::remove_file(folder.join(INDEX)).unwrap();
            }),
        ),
        ("a save before", Box::new(|folder, layer| drop(save_at(3 - 1, folder, layer).unwrap()))),
    ]
}

/// However far a save came when its program ended, or the disk was full: a reader finds the checkpoint before, or after
/// the switch the new one, whole; and the next save leaves nothing of the unfinished one.
#[test]
fn a_save_that_ends_anywhere_leaves_a_whole_checkpoint() {
    let (before, after, last) = (layer(5), layer(6), layer(7));
    let [old, new, newest] = [&before, &after, &last].map(tensors);
    for (name, prepare) in olds() {
        for kind in [Fault::Kill as fn(usize) -> Fault, Fault::Full] {
            let mut outcomes = Vec::new();
            for changes in 0.. {
                let folder = tempfile::tempdir().unwrap();
                prepare(folder.path(), &before);
                let fault = kind(changes);
                let (result, came) = with(fault, || save_at(2, folder.path(), &after));
                if !came {
                    result.unwrap();
                    assert!(changes > 2 * 5, "{name}: only {changes} changes");
                    break;
                }
                match open(folder.path()) {
                    Err(Error::NoWeights { .. }) if name == "nothing" => outcomes.push("old"),
                    Err(error) => panic!("{name}, {fault:?}: {error}"),
                    Ok(_) => {
                        let found = stored(folder.path());
                        assert!(found == old || found == new, "{name}, {fault:?}: neither old nor new");
                        outcomes.push(if found == old { "old" } else { "new" });
                    }
                }
                if let Err(error) = result {
                    let told = error.to_string();
                    assert!(told.contains(folder.path().to_str().unwrap()), "{told}");
                    let partial = names(folder.path()).into_iter().find(|name| name.ends_with(PARTIAL));
                    assert!(partial.is_none() || kind(0) == Fault::Kill(0), "{name}, {fault:?}: {partial:?}");
                } else {
                    assert_eq!(outcomes.pop(), Some("new"), "{name}, {fault:?}");
                }
                save_at(1, folder.path(), &last).unwrap();
                assert_eq!(stored(folder.path()), newest, "{name}, {fault:?}");
                let left = names(folder.path());
                assert_eq!(left.len(), 2, "{name}, {fault:?}: {left:?}"); // one part and the index
            }
            // of saves that did not come to their end: it is switched once, and late
            let switched = outcomes.iter().position(|outcome| *outcome == "new").unwrap_or(outcomes.len());
            assert!(outcomes[switched..].iter().all(|outcome| *outcome == "new"), "{name}: {outcomes:?}");
            assert!(switched > 2 * 4, "{name}: {outcomes:?}");
        }
    }
}

#[test]
fn the_parts_of_an_unfinished_save_are_not_taken_for_those_of_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let unfinished = Saving::begin(folder.path(), 2).unwrap();
    for rank in 0..2 {
        unfinished.write(rank, &share(rank, 2).of(layer(8), &KEYS).unwrap(), &KEYS, None).unwrap();
    }
    let saving = Saving::begin(folder.path(), 2).unwrap();
    assert!(saving.generation() > unfinished.generation());
    saving.write(0, &share(0, 2).of(layer(9), &KEYS).unwrap(), &KEYS, None).unwrap();
    // a rank that has not noticed
    unfinished.write(1, &share(1, 2).of(layer(8), &KEYS).unwrap(), &KEYS, None).unwrap();
    let Err(Error::Parts { problems, .. }) = saving.commit(&KEYS) else { panic!() };
    let [PartProblem::Missing { rank: 1, file }] = &problems[..] else { panic!("{problems:?}") };
    assert_eq!(file, "model-g000002-00002-of-00002.safetensors");
    assert!(matches!(open(folder.path()), Err(Error::NoWeights { .. })));
    assert!(matches!(unfinished.write(2, &layer(8), &KEYS, None), Err(Error::Parts { .. })));
}

#[test]
fn what_ranks_do_not_agree_about_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    save_at(2, folder.path(), &layer(10)).unwrap();
    let old = stored(folder.path());
    let saving = Saving::begin(folder.path(), 4).unwrap();
    let part = |rank| share(rank, 4).of(layer(11), &KEYS).unwrap();
    saving.write(0, &part(0), &KEYS, None).unwrap();
    saving.write(1, &part(1), &KEYS, Some(FloatDType::BF16)).unwrap();
    // of a model of twelve experts, and wider
    let device = Device::flex();
    let other = Layer {
        gate: LinearConfig::new(4, 12).with_bias(false).init(&device),
        experts: ExpertMlpConfig::new(12, 4, 5).init(&device),
    };
    saving.write(2, &share(2, 4).of(other, &KEYS).unwrap(), &KEYS, None).unwrap();
    fs::write(folder.path().join(saving.part(3)), "half").unwrap();
    let Err(Error::Parts { problems, .. }) = saving.commit(&KEYS) else { panic!() };
    assert!(matches!(&problems[..], [PartProblem::Broken(_)]), "{problems:?}");

    let mut tensors: Vec<_> =
        read_tensors(&saving.write(3, &part(3), &KEYS, None).unwrap()).unwrap().into_iter().collect();
    let (_, gate) = read_tensors(&folder.path().join(saving.part(0))).unwrap().pop_last().unwrap();
    tensors.push(("gate.weight".into(), gate));
    save_tensors(&folder.path().join(saving.part(3)), &tensors).unwrap();
    let Err(error @ Error::Parts { .. }) = saving.commit(&KEYS) else { panic!() };
    let told = error.to_string();
    for part in [
        "`gate.weight` is in the parts of ranks 0 and 3",
        "`experts.up.bias`: rank 2 should have experts 4 to 5, and has 6, 7, 8",
        "`experts.2.down.weight` is BF16 [1, 3, 5] in rank 1, expected F32 [1, 3, 5] as in rank 0",
        "`experts.6.up.weight` is F32 [1, 5, 4] in rank 2, expected F32 [1, 5, 3] as in rank 0",
    ] {
        assert!(told.contains(part), "{told}\nlacks {part}");
    }
    assert_eq!(stored(folder.path()), old);
}

/// A share of what was used is learned, as the whole was, and on its own.
#[test]
fn a_share_is_learned_as_the_whole_is() {
    let device = Device::flex().autodiff();
    for whole in [seeded(12, &device, init(EXPERTS)).train(), init(EXPERTS)(&device).train()] {
        let part = share(1, 4).of(whole, &KEYS).unwrap();
        let weight = part.experts.up.weight.val();
        let gradients = (weight.clone() * 3.0).sum().backward();
        assert_eq!(
            weight.grad(&gradients).unwrap().into_data(),
            Tensor::<3>::full([2, 3, 5], 3.0, &device).into_data()
        );
    }
}

/// What was never used stays so: a rank's share of any model takes no memory before it is loaded.
#[test]
fn a_share_allocates_nothing() {
    let huge = ExpertMlpConfig::new(100_000, 10_000, 50_000).with_bias(false).init(&Device::flex());
    const HUGE: KeyMap = KeyMap::new(&[
        Rule::StackTranspose("{}.up", "up.weight", Ones::Before(0)),
        Rule::StackTranspose("{}.down", "down.weight", Ones::Before(0)),
    ]);
    let part = share(3, 1000).of(huge, &HUGE).unwrap();
    let shapes: Vec<_> = crate::parameters(&part).into_iter().map(|parameter| parameter.shape).collect();
    assert_eq!(shapes, [[100, 10_000, 50_000], [100, 50_000, 10_000]]);
}
