use std::fs;

use proptest::prelude::*;

use super::*;
use crate::format::{OpenOptions, open as open_folder, open_with};
use crate::testing::{Stored, count, floats, torch_bytes};

const LAYOUT: MegatronLayout = MegatronLayout {
    merges: &[
        ("table", Merge::Vocabulary),
        ("h.{}.norm", Merge::Replicated),
        ("h.{}.up", Merge::Column),
        ("h.{}.down", Merge::Row),
        ("h.{}.qkv", Merge::Fused(3)),
        ("h.{}.gate", Merge::Fused(2)),
        ("h.{}.heads", Merge::PerHead),
    ],
};

/// Rows `[rows of each part]` of a whole tensor, where `pick` says which row a rank's row is.
fn rows(whole: &Stored, key: &str, picked: impl Iterator<Item = usize>) -> Stored {
    let width: usize = whole.shape[1..].iter().product::<usize>() * 4;
    let picked: Vec<usize> = picked.collect();
    let bytes = picked.iter().flat_map(|row| whole.bytes[row * width..(row + 1) * width].to_vec()).collect();
    let shape = [&[picked.len()], &whole.shape[1..]].concat();
    Stored { key: key.to_owned(), dtype: whole.dtype, shape, bytes }
}

/// The part of a whole tensor that one of `ranks` has, as the training programs cut it.
fn cut(whole: &Stored, merge: Merge, rank: usize, ranks: usize, n_heads: usize) -> Stored {
    let key = whole.key.as_str();
    let total = whole.shape[0];
    match merge {
        Merge::Replicated => whole.clone(),
        Merge::Column | Merge::Vocabulary => {
            rows(whole, key, (0..total).skip(rank * total / ranks).take(total / ranks))
        }
        Merge::Fused(parts) => {
            let (part, mine) = (total / parts, total / parts / ranks);
            rows(whole, key, (0..parts).flat_map(move |p| (0..mine).map(move |i| p * part + rank * mine + i)))
        }
        Merge::PerHead => {
            // (head, [q, k, v], d_head) of the rank's heads, out of [q; k; v]
            let (heads, d_head) = (n_heads / ranks, total / 3 / n_heads);
            let row = move |head: usize, part: usize, i: usize| {
                part * n_heads * d_head + (rank * heads + head) * d_head + i
            };
            let picked = (0..heads).flat_map(move |head| {
                (0..3).flat_map(move |part| (0..d_head).map(move |i| row(head, part, i)))
            });
            rows(whole, key, picked)
        }
        Merge::Row => {
            let (columns, inner) = (whole.shape[1], whole.shape[2..].iter().product::<usize>() * 4);
            let mine = columns / ranks;
            let strip = |row: usize| {
                let start = (row * columns + rank * mine) * inner;
                whole.bytes[start..start + mine * inner].to_vec()
            };
            let shape = [&[total, mine], &whole.shape[2..]].concat();
            Stored { key: key.into(), dtype: whole.dtype, shape, bytes: (0..total).flat_map(strip).collect() }
        }
    }
}

fn merge_of(key: &str) -> Merge {
    let end = key.rsplit('.').next().unwrap();
    LAYOUT.merges.iter().find(|(pattern, _)| pattern.ends_with(end)).unwrap().1
}

/// A folder with the ranks of whole tensors, as DeepSpeed names them.
fn ranks_of(whole: &[Stored], ranks: usize, n_heads: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for rank in 0..ranks {
        let parts: Vec<_> =
            whole.iter().map(|whole| cut(whole, merge_of(&whole.key), rank, ranks, n_heads)).collect();
        let bytes = torch_bytes(&parts, Some("module"), &[("mp_world_size", ranks as u8)]);
        fs::write(folder.path().join(format!("mp_rank_{rank:02}_model_states.pt")), bytes).unwrap();
    }
    folder
}

fn options() -> RankOptions {
    RankOptions { n_heads: Some(4), ..RankOptions::new(LAYOUT) }
}

/// A tensor of each kind, for up to 4 ranks.
fn whole() -> Vec<Stored> {
    vec![
        count("table", &[12, 2], 0),
        count("h.0.norm", &[5], 100),
        count("h.0.up", &[8, 3], 200),
        count("h.0.down", &[3, 8], 300),
        count("h.0.qkv", &[24, 2], 400),
        count("h.0.gate", &[16], 500),
        count("h.1.heads", &[24, 2], 600),
    ]
}

fn problems(result: Result<Ranks, Error>) -> Vec<String> {
    match result {
        Err(Error::Ranks { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_of_tensor_is_merged_to_what_was_cut() {
    for ranks in [1, 2, 4] {
        let folder = ranks_of(&whole(), ranks, 4);
        let merged = Ranks::open(folder.path(), &options()).unwrap();
        for Stored { key, shape, bytes, .. } in whole() {
            let entry = merged.entries().iter().find(|entry| entry.name == key).unwrap();
            assert_eq!(entry.shape, shape, "{key} of {ranks}");
            assert_eq!(*merged.bytes(&key).unwrap(), bytes, "{key} of {ranks}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn any_sizes_are_merged_to_what_was_cut(
        ranks in 1..5usize, heads in 1..4usize, d_head in 1..4usize, width in 1..5usize, up in 1..4usize, rest in 0..3usize,
    ) {
        let n_heads = heads * ranks;
        let d_model = n_heads * d_head;
        let whole = [
            count("table", &[up * ranks, width], 0),
            count("h.3.norm", &[width], 0),
            count("h.3.up", &[up * ranks, width, rest], 0),
            count("h.3.down", &[width, up * ranks, rest], 0),
            count("h.3.qkv", &[3 * d_model, width], 0),
            count("h.3.gate", &[2 * up * ranks], 0),
            count("h.10.heads", &[3 * d_model, width], 0),
        ];
        let folder = ranks_of(&whole, ranks, n_heads);
        let options = RankOptions { n_heads: Some(n_heads), ranks: Some(ranks), ..options() };
        let merged = Ranks::open(folder.path(), &options).unwrap();
        for Stored { key, shape, bytes, .. } in whole {
            let entry = merged.entries().iter().find(|entry| entry.name == key).unwrap();
            prop_assert_eq!(&entry.shape, &shape);
            prop_assert_eq!(&*merged.bytes(&key).unwrap(), &bytes[..]);
        }
    }
}

#[test]
fn rows_that_pad_the_vocabulary_are_cut() {
    let folder = ranks_of(&whole()[..1], 4, 4);
    let with = |vocab_size| Ranks::open(folder.path(), &RankOptions { vocab_size, ..options() });
    assert_eq!(with(None).unwrap().entries()[0].shape, [12, 2]);
    let merged = with(Some(10)).unwrap();
    assert_eq!(merged.entries()[0].shape, [10, 2]);
    assert_eq!(*merged.bytes("table").unwrap(), whole()[0].bytes[..80]);
    assert_eq!(
        problems(with(Some(13))),
        ["`table` has 12 rows in all ranks together, expected at least the vocabulary's 13"]
    );
}

#[test]
fn copies_that_differ_are_named_when_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, value) in [1.0, 1.0, 2.0].into_iter().enumerate() {
        let bytes = torch_bytes(&[floats("h.0.norm", &[2], [value, 0.0])], None, &[]);
        fs::write(folder.path().join(format!("mp_rank_{rank:02}_model_states.pt")), bytes).unwrap();
    }
    let merged = Ranks::open(folder.path(), &options()).unwrap();
    let error = merged.bytes("h.0.norm").unwrap_err().to_string();
    let expected = "`h.0.norm` should be the same in all ranks, and differs between rank 0 and rank 2";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn everything_that_does_not_fit_comes_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let write = |rank: usize, tensors: &[Stored]| {
        let bytes = torch_bytes(tensors, Some("module"), &[]);
        fs::write(folder.path().join(format!("mp_rank_{rank:02}_model_states.pt")), bytes).unwrap();
    };
    write(
        0,
        &[
            count("h.0.up", &[2, 2], 0),
            count("h.0.qkv", &[4, 2], 0),
            count("h.0.down", &[4], 0),
            count("h.1.heads", &[5], 0),
            count("other", &[4], 0),
            count("h.2.norm", &[4], 0),
        ],
    );
    write(
        1,
        &[
            count("h.0.up", &[2, 3], 0),
            count("h.0.qkv", &[4, 2], 0),
            count("h.0.down", &[4], 0),
            count("h.1.heads", &[5], 0),
            count("other", &[4], 0),
            count("h.3.norm", &[4], 0),
        ],
    );
    assert_eq!(
        problems(Ranks::open(folder.path(), &options())),
        [
            "`h.0.up` is F32 [2, 3] in rank 1, expected F32 [2, 2] as in rank 0",
            "`h.0.qkv` of shape [4, 2] in each rank cannot be merged as Fused(3): its rows are not so many equal parts",
            "`h.0.down` of shape [4] in each rank cannot be merged as Row: it has no second dimension",
            "`h.1.heads` of shape [5] in each rank cannot be merged as PerHead: its rows are not q, k and v for each of \
             the rank's heads",
            "`other`: the layout does not say how it is merged",
            "`h.2.norm` is not in rank 1",
            "`h.3.norm` is not in rank 0",
        ]
    );
}

#[test]
fn missing_and_surplus_ranks_are_counted() {
    let folder = ranks_of(&whole(), 4, 4);
    let path = |rank: usize| folder.path().join(format!("mp_rank_{rank:02}_model_states.pt"));
    fs::remove_file(path(0)).unwrap();
    fs::remove_file(path(3)).unwrap();
    let open = |options: &RankOptions| problems(Ranks::open(folder.path(), options));
    assert_eq!(open(&options()), ["rank 0 of 4 is missing", "rank 3 of 4 is missing"]);
    assert_eq!(
        open(&RankOptions { ranks: Some(2), ..options() }),
        [
            "rank 0 of 2 is missing",
            "rank 2 is one too many, expected 2 ranks",
            "rank 1 was written as one of 4 ranks, expected 2",
            "rank 2 was written as one of 4 ranks, expected 2",
        ]
    );
    fs::write(path(0), "<html>").unwrap();
    assert!(open(&options())[0].contains("this is a web page"));
}

#[test]
fn ranks_are_found_where_training_programs_put_them() {
    let part = || torch_bytes(&[count("h.0.norm", &[2], 0)], Some("model"), &[]);
    let folder = tempfile::tempdir().unwrap();
    let open = || Ranks::open(folder.path(), &options());
    let names = |ranks: Ranks| ranks.entries().iter().map(|entry| entry.name.clone()).collect::<Vec<_>>();
    assert!(matches!(open(), Err(Error::NoWeights { .. })));

    // Megatron-LM
    let newest = folder.path().join("iter_0000100");
    for rank in ["mp_rank_00", "mp_rank_01"] {
        fs::create_dir_all(newest.join(rank)).unwrap();
        fs::write(newest.join(rank).join("model_optim_rng.pt"), part()).unwrap();
    }
    assert_eq!(names(open().unwrap()), ["h.0.norm"], "the only subfolder with ranks");
    fs::create_dir_all(folder.path().join("iter_0000050")).unwrap();
    fs::write(folder.path().join("iter_0000050/mp_rank_00_model_states.pt"), part()).unwrap();
    assert_eq!(problems(open()), ["there are ranks in each of iter_0000050, iter_0000100: open one of them"]);
    let tracker = folder.path().join("latest_checkpointed_iteration.txt");
    fs::write(&tracker, "100\n").unwrap();
    assert_eq!(open().unwrap().path(), newest);
    for lie in ["200", "..", "../other", "/etc", ""] {
        fs::write(&tracker, lie).unwrap();
        assert_eq!(
            problems(open()),
            [format!("latest_checkpointed_iteration.txt should name a folder beside it, and says `{lie}`")]
        );
    }
    // DeepSpeed
    fs::write(folder.path().join("latest"), "iter_0000050").unwrap();
    assert_eq!(open().unwrap().path(), folder.path().join("iter_0000050"));

    fs::create_dir_all(newest.join("mp_rank_00_001")).unwrap();
    fs::write(newest.join("mp_rank_00_001/model_optim_rng.pt"), part()).unwrap();
    fs::write(folder.path().join("latest"), "iter_0000100").unwrap();
    assert_eq!(problems(open()), ["mp_rank_00_001 is a pipeline-parallel rank, which is not merged"]);

    // Meta, in the folder itself
    for rank in ["consolidated.00.pth", "consolidated.01.pth"] {
        fs::write(folder.path().join(rank), part()).unwrap();
    }
    assert_eq!(open().unwrap().path(), folder.path());
    fs::rename(folder.path().join("consolidated.00.pth"), folder.path().join("consolidated.02.pth")).unwrap();
    assert_eq!(problems(open()), ["rank 0 of 3 is missing"]);
}

#[test]
fn without_a_layout_one_rank_is_a_checkpoint_and_several_are_an_error() {
    let one = ranks_of(&whole(), 1, 4);
    assert_eq!(open_folder(one.path()).unwrap().entries().len(), whole().len());
    let two = ranks_of(&whole(), 2, 4);
    let error = open_folder(two.path()).err().unwrap().to_string();
    assert!(
        error.ends_with(
            "2 ranks hold parts of each tensor, and nothing was given that says how they are merged"
        )
    );
    let options = options();
    let merged = open_with(two.path(), &OpenOptions { ranks: Some(&options), ..OpenOptions::default() });
    assert_eq!(merged.unwrap().entries().len(), whole().len());
    fs::remove_file(two.path().join("mp_rank_01_model_states.pt")).unwrap();
    let error = open_folder(two.path()).err().unwrap().to_string();
    assert!(error.ends_with("rank 0 was written as one of 2 ranks, expected 1"), "{error}");
}

/// As the archives of GLM unpack: the model's name, the iteration, the ranks.
#[test]
fn ranks_may_lie_two_folders_deep() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("blocklm/250000");
    fs::create_dir_all(&inside).unwrap();
    let part = torch_bytes(&[count("h.0.norm", &[2], 0)], Some("module"), &[]);
    fs::write(inside.join("mp_rank_00_model_states.pt"), &part).unwrap();
    assert_eq!(Ranks::open(folder.path(), &options()).unwrap().path(), inside);

    let deeper = tempfile::tempdir().unwrap();
    fs::create_dir_all(deeper.path().join("a/b/c")).unwrap();
    fs::write(deeper.path().join("a/b/c/mp_rank_00_model_states.pt"), part).unwrap();
    assert!(matches!(Ranks::open(deeper.path(), &options()), Err(Error::NoWeights { .. })));
}

/// Where each rank has columns of a matrix, it has scales of its own for their rows: they are worked out before the merge.
#[test]
fn ranks_may_have_scales_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, scale) in [2.0, 0.5].into_iter().enumerate() {
        let tensors = [count("h.0.down", &[2, 2], 1), floats("h.0.down_scale", &[2], [scale, 10.0 * scale])];
        let bytes = torch_bytes(&tensors, Some("module"), &[]);
        fs::write(folder.path().join(format!("mp_rank_{rank:02}_model_states.pt")), bytes).unwrap();
    }
    let options =
        OpenOptions { ranks: Some(&options()), scaled: Some(Bits::Eight), ..OpenOptions::default() };
    let merged = crate::format::open_with(folder.path(), &options).unwrap();
    assert_eq!(merged.entries()[0].shape, [2, 4]);
    let expected = [2.0f32, 4.0, 0.5, 1.0, 60.0, 80.0, 15.0, 20.0];
    let expected: Vec<u8> = expected.into_iter().flat_map(f32::to_le_bytes).collect();
    assert_eq!(*merged.bytes("h.0.down").unwrap(), expected);
}
