use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::torch::Torch;
use super::*;
use crate::error::{HeaderError, TorchError};
use crate::testing::{count, fixture, ints, safetensors_bytes, torch_bytes, zip_bytes};

/// A safetensors file with this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn header_error(bytes: Vec<u8>) -> HeaderError {
    match Memory::new("m", bytes) {
        Err(Error::Header { path, reason }) if path.as_os_str() == "m" => reason,
        other => panic!("{other:?}"),
    }
}

fn torch(bytes: Vec<u8>) -> Result<Torch<Cow<'static, [u8]>>, Error> {
    Torch::parse(PathBuf::from("m.bin"), bytes.into())
}

fn floats(checkpoint: &dyn Checkpoint, name: &str) -> Vec<f32> {
    crate::cast::values(Dtype::F32, &checkpoint.bytes(name).unwrap())
}

#[test]
fn the_reference_implementation_reads_the_same() {
    for name in ["clip", "vit_f16"] {
        let folder = fixture(name);
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let checkpoint = open(&folder).unwrap();
        assert_eq!(checkpoint.path(), folder.join("model.safetensors"));
        assert_eq!(checkpoint.entries().len(), reference.len());
        for entry in checkpoint.entries() {
            let tensor = reference.tensor(&entry.name).unwrap();
            assert_eq!(
                (entry.shape.as_slice(), entry.dtype.name()),
                (tensor.shape(), tensor.dtype().to_string().as_str())
            );
            assert_eq!(checkpoint.bytes(&entry.name).unwrap(), tensor.data());
        }
    }
}

#[cfg(unix)]
#[test]
fn what_is_shared_is_the_file_itself_in_every_format() {
    let shared = |path: &str| {
        let checkpoint = open(&fixture(path)).unwrap();
        assert!(checkpoint.shared("no such tensor").is_none());
        let is_shared = |Entry { name, shape, dtype }: &&Entry| {
            let Some(shared) = checkpoint.shared(name) else { return false };
            assert_eq!(shared.len(), dtype.bytes_of(shape).unwrap(), "{path} {name}");
            assert_eq!(shared.as_ptr(), checkpoint.bytes(name).unwrap().as_ptr(), "{path} {name}");
            true
        };
        (checkpoint.entries().iter().filter(is_shared).count(), checkpoint.entries().len())
    };
    // not: the transposed, the expanded and the empty tensor of `torch_small`, nor GGUF's blocks
    for (path, expected) in [
        ("vit_f16", (56, 56)),
        ("llama_sharded", (30, 30)),
        ("bert_legacy_bin", (65, 65)),
        ("torch_small/zip.pt", (7, 10)),
        ("torch_small/legacy.pt", (7, 10)),
        ("gguf/small.gguf", (8, 18)),
    ] {
        assert_eq!(shared(path), expected, "{path}");
    }
}

#[test]
fn the_content_decides_and_not_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vectors.json");
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    // a length of 123 is the same byte as a brace
    fs::write(&path, file(&format!("{header:123}"), &[7])).unwrap();
    assert_eq!(*open(&path).unwrap().bytes("a").unwrap(), [7]);
    fs::write(&path, r#"{"x":{"y":1}}"#).unwrap();
    assert!(matches!(open(&path), Err(Error::Shards { .. })));
}

#[test]
fn an_unknown_name_offers_the_nearest() {
    let checkpoint = open(&fixture("clip")).unwrap();
    let error = checkpoint.bytes("visual_projection.weights").unwrap_err().to_string();
    let expected =
        "no tensor `visual_projection.weights` (nearest: visual_projection.weight, text_projection.weight)";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn every_lie_of_a_header_is_named() {
    let a = |rest: &str| format!(r#"{{"a":{{{rest}}}}}"#);
    let key = || "a".to_owned();
    assert_eq!(header_error(vec![0x80, 0, 0]), HeaderError::TooShort { found: 3 });
    assert_eq!(
        header_error(vec![9, 0, 0, 0, 0, 0, 0, 0, b'{']),
        HeaderError::HeaderLength { expected: 9, found: 1 }
    );
    assert_eq!(
        header_error([&u64::MAX.to_le_bytes()[..], &[0x80; 9]].concat()),
        HeaderError::HeaderLength { expected: u64::MAX, found: 9 }
    );
    assert_eq!(header_error([&2u64.to_le_bytes()[..], &[0xff; 2]].concat()), HeaderError::NotText);
    for header in
        ["{", "[]", "{}x", "{\"a\":1}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}"]
    {
        assert!(matches!(header_error(file(header, &[])), HeaderError::NotJson(_)), "{header}");
    }
    let one = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    assert_eq!(
        header_error(file(&format!("{{{one},{one}}}"), &[0])),
        HeaderError::DuplicateKey { key: key() }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]"#), &[0])),
        HeaderError::UnknownDtype { key: key(), found: "F8_E4M3".into() }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]"#), &[])),
        HeaderError::TooLarge { key: key(), shape: vec![1 << 32, 1 << 32] }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), &[0; 4])),
        HeaderError::Length { key: key(), dtype: Dtype::F32, shape: vec![2], expected: 8, found: 4 }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"U8","shape":[1],"data_offsets":[1,0]"#), &[0])),
        HeaderError::Backwards { key: key(), begin: 1, end: 0 }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"U8","shape":[4],"data_offsets":[0,4]"#), &[0; 3])),
        HeaderError::OutOfFile { key: key(), end: 4, found: 3 }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"U8","shape":[1],"data_offsets":[1,2]"#), &[0; 2])),
        HeaderError::Gap { key: key(), expected: 0, found: 1 }
    );
    assert_eq!(
        header_error(file(&a(r#""dtype":"U8","shape":[1],"data_offsets":[0,1]"#), &[0; 3])),
        HeaderError::Trailing { expected: 1, found: 3 }
    );
    let overlap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
    assert_eq!(
        header_error(file(overlap, &[0; 3])),
        HeaderError::Gap { key: "b".into(), expected: 2, found: 1 }
    );
}

#[test]
fn a_header_may_be_empty_or_have_metadata() {
    assert_eq!(Memory::new("m", file("{}  ", &[])).unwrap().entries(), []);
    let file = Memory::new("m", file(r#"{"__metadata__":{"format":"pt"}}"#, &[])).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
}

#[test]
fn what_is_no_weights_file_is_called_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let found = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        match open(&path) {
            Err(Error::NotWeights { found, .. }) => found,
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("opened"),
        }
    };
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1710540580\n";
    assert_eq!(found(pointer.as_bytes()), Lookalike::LfsPointer);
    assert_eq!(found(b"\n<!DOCTYPE html><html>Sign in</html>"), Lookalike::WebPage);
    assert_eq!(found("没有找到 404".as_bytes()), Lookalike::Text);
    assert_eq!(found(b"{\"error\": \"Entry not found\"}"), Lookalike::Text);
    assert_eq!(found(b""), Lookalike::Empty);

    let other = folder.path().join("weights.h5");
    fs::write(&other, b"\x89HDF\r\n\x1a\n\0\0").unwrap();
    assert!(matches!(open(&other), Err(Error::NotWeights { found: Lookalike::Unknown, .. })));
    assert!(matches!(open(&folder.path().join("none.bin")), Err(Error::Io { .. })));
    assert!(matches!(
        SafetensorsFile::open(folder.path()),
        Err(Error::NotWeights { found: Lookalike::NotAFile, .. })
    ));
}

#[test]
fn a_folder_gives_its_first_known_file() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = || open(folder.path()).err().unwrap();
    assert_eq!(
        refusal().to_string(),
        format!("{}: no weights here, looked for {}", folder.path().display(), FILES.join(", "))
    );
    for name in FILES.iter().rev() {
        let content = safetensors_bytes(&[count(name, &[2], 0)]);
        if name.ends_with(INDEX) {
            fs::write(folder.path().join(format!("{name}.shard")), content).unwrap();
            let index = format!(r#"{{"weight_map": {{"{name}": "{name}.shard"}}}}"#);
            fs::write(folder.path().join(name), index).unwrap();
        } else {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let checkpoint = open(folder.path()).unwrap();
        assert_eq!(checkpoint.entries()[0].name, *name, "by its content, whatever its name");
        assert_eq!(checkpoint.path(), folder.path().join(name));
    }
}

#[test]
fn the_only_pth_file_is_taken_whatever_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        fs::write(folder.path().join(name), safetensors_bytes(&[count(name, &[2], 0)])).unwrap();
    };
    write("painter_vit_large.pth");
    assert_eq!(open(folder.path()).unwrap().entries()[0].name, "painter_vit_large.pth");
    write("another.pth");
    assert!(matches!(open(folder.path()), Err(Error::NoWeights { .. })), "which of two is not known");
    write(FILES[0]);
    assert_eq!(open(folder.path()).unwrap().entries()[0].name, FILES[0]);
}

#[test]
fn a_torch_archive_is_read_as_python_reads_it() {
    let checkpoint = open(&fixture("bert_legacy_bin")).unwrap();
    let entry = |name: &str| checkpoint.entries().iter().find(|entry| entry.name == name).unwrap();
    assert_eq!(checkpoint.entries().len(), 65);
    assert_eq!(entry("bert.embeddings.word_embeddings.weight").shape, [96, 32]);
    assert_eq!(entry("bert.embeddings.position_ids").dtype, Dtype::I64);
    let head = floats(checkpoint.as_ref(), "cls.predictions.decoder.weight");
    assert_eq!(
        head,
        floats(checkpoint.as_ref(), "bert.embeddings.word_embeddings.weight"),
        "one storage, two names"
    );
    assert_eq!(head[..2], [0.33611512, 0.1510013]);
}

#[test]
fn both_torch_layouts_give_the_same_tensors() {
    for name in ["zip.pt", "legacy.pt"] {
        let file = TorchFile::open(fixture("torch_small").join(name)).unwrap();
        let found: Vec<_> = file
            .entries()
            .iter()
            .map(|Entry { name, shape, dtype }| (name.as_str(), shape.clone(), *dtype))
            .collect();
        assert_eq!(
            found,
            [
                ("weight", vec![2, 3], Dtype::F32),
                ("weight_t", vec![3, 2], Dtype::F32),
                ("last_row", vec![3], Dtype::F32),
                ("bias", vec![2], Dtype::F32),
                ("half", vec![3], Dtype::F16),
                ("ids", vec![1, 4], Dtype::I64),
                ("mask", vec![2], Dtype::Bool),
                ("scale", vec![], Dtype::F32),
                ("expanded", vec![3, 2], Dtype::F32),
                ("empty", vec![0, 4], Dtype::F32),
            ],
            "{name}"
        );
        assert_eq!(floats(&file, "weight"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(floats(&file, "weight_t"), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(floats(&file, "last_row"), [3.0, 4.0, 5.0]);
        assert_eq!(floats(&file, "bias"), [0.5, -0.5]);
        assert_eq!(floats(&file, "scale"), [-0.5]);
        assert_eq!(floats(&file, "expanded"), [0.5, -0.5, 0.5, -0.5, 0.5, -0.5]);
        assert_eq!(floats(&file, "empty"), [0.0; 0]);
        assert_eq!(
            crate::cast::values::<f32>(Dtype::F16, &file.bytes("half").unwrap()),
            [1.5, -2.0, 65504.0]
        );
        assert_eq!(crate::cast::values::<i64>(Dtype::I64, &file.bytes("ids").unwrap()), [0, 1, 2, -3]);
        assert_eq!(&*file.bytes("mask").unwrap(), [1, 0]);
        assert!(matches!(file.bytes("weight").unwrap(), Cow::Borrowed(_)), "it stays in the mapped file");
    }
}

/// A legacy torch file around the pickle of an object, with one storage `0` of four floats.
fn legacy(object: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    let keys = b"\x80\x02]X\x01\0\0\x000a.";
    [&magic[..], object, keys, &4u64.to_le_bytes(), &[0; 16]].concat()
}

/// The pickle of a tensor called `w`: a view of `storage` with an offset, a shape and strides, as opcodes.
fn tensor(class: &str, storage: &str, view: &str) -> Vec<u8> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let id = [
        b"((",
        &text("storage")[..],
        b"ctorch\n",
        class.as_bytes(),
        b"\n",
        &text(storage),
        &text("cpu"),
        b"K\x04tQ",
    ];
    let view: Vec<u8> = view.bytes().collect();
    [b"\x80\x02}", &text("w")[..], b"ctorch._utils\n_rebuild_tensor_v2\n", &id.concat(), &view, b"\x89}tRs."]
        .concat()
}

#[test]
fn tensors_that_lie_about_their_storage_are_refused_by_name() {
    let error = |object: Vec<u8>| match torch(legacy(&object)) {
        Err(Error::Torch { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let key = || "w".to_owned();
    assert!(torch(legacy(&tensor("FloatStorage", "0", "K\0(K\x02K\x02t(K\x02K\x01t"))).is_ok());
    let outside = |offset, shape: &[usize], strides: &[usize]| TorchError::Extent {
        key: key(),
        offset,
        shape: shape.into(),
        strides: strides.into(),
        elements: 4,
    };
    assert_eq!(error(tensor("FloatStorage", "0", "K\x01(K\x04t(K\x01t")), outside(1, &[4], &[1]));
    assert_eq!(
        error(tensor("FloatStorage", "0", "K\0(K\x02K\x02t(K\x03K\x01t")),
        outside(0, &[2, 2], &[3, 1])
    );
    // a stride of zero repeats one element more often than any memory could hold
    let billions = "K\0(J\u{7f}\u{7f}\u{7f}\u{7f}J\u{7f}\u{7f}\u{7f}\u{7f}t(K\0K\0t";
    assert!(matches!(error(tensor("FloatStorage", "0", billions)), TorchError::TooLarge { .. }));
    let (cut, unknown) = ("a storage is cut short: truncated?", "a storage of unknown dtype");
    assert_eq!(error(tensor("DoubleStorage", "0", "K\0(K\x04t(K\x01t")), TorchError::Legacy(cut));
    assert_eq!(error(tensor("FloatStorage", "1", "K\0(K\x04t(K\x01t")), TorchError::Legacy(unknown));
    let then = |opcodes: &[u8]| {
        let mut object = tensor("FloatStorage", "0", "K\0(K\x04t(K\x01t");
        object.pop();
        [object, opcodes.to_vec()].concat()
    };
    assert_eq!(error(then(b"0}.")), TorchError::NoTensors, "another dictionary takes its place");
    assert_eq!(error(then(b"q\0X\x01\0\0\0xh\0s.")), TorchError::Nested, "a dictionary that holds itself");
}

#[test]
fn nothing_in_a_pickle_is_run() {
    // os.system("touch x") as the value of a key: passed over as data, like any other object
    let mut object = tensor("FloatStorage", "0", "K\0(K\x04t(K\x01t");
    object.pop();
    object.extend(b"X\x01\0\0\0xcos\nsystem\n(X\x07\0\0\0touch xtRs.");
    let file = torch(legacy(&object)).unwrap();
    assert_eq!(file.entries().iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["w"]);
}

#[test]
fn other_pickles_and_archives_are_refused() {
    let reason = |bytes: &[u8]| match torch(bytes.to_vec()) {
        Err(Error::Torch { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(matches!(reason(b"\x80\x02}."), TorchError::Legacy(_)));
    assert!(matches!(reason(b"\x80\x02\xff"), TorchError::Pickle { at: 2, .. }));
    assert!(matches!(reason(b"PK\x03\x04 and no directory, however long this text is"), TorchError::Zip(_)));
    assert!(matches!(
        torch(b"<html></html>".to_vec()),
        Err(Error::NotWeights { found: Lookalike::WebPage, .. })
    ));
    let mut tar = vec![b'a'; 512];
    tar[257..262].copy_from_slice(b"ustar");
    assert_eq!(reason(&tar), TorchError::Tar);
}

fn names(checkpoint: &dyn Checkpoint) -> Vec<&str> {
    checkpoint.entries().iter().map(|entry| entry.name.as_str()).collect()
}

#[test]
fn a_state_dict_is_found_in_what_training_programs_save() {
    let tensors = [count("h.0.w", &[2], 0), count("b", &[1], 5)];
    let bare = torch(torch_bytes(&tensors, None, &[])).unwrap();
    assert_eq!(names(&bare), ["h.0.w", "b"]);
    for wrapper in super::torch::WRAPPERS {
        let file = torch(torch_bytes(&tensors, Some(wrapper), &[("epoch", 7)])).unwrap();
        assert_eq!(names(&file), ["h.0.w", "b"], "{wrapper}");
        assert_eq!(floats(&file, "b"), [5.0]);
        assert_eq!(file.numbers()["epoch"], 7);
    }
    let other = torch(torch_bytes(&tensors, Some("generator"), &[])).unwrap();
    assert_eq!(names(&other), ["generator.h.0.w", "generator.b"]);
}

/// What stands beside the state dict is neither listed nor refused, even weights.
#[test]
fn an_optimizer_beside_the_state_dict_is_passed_over() {
    let mut object = tensor("FloatStorage", "0", "K\0(K\x04t(K\x01t");
    object.drain(..2); // without the protocol
    object.pop();
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let quantized = b"ctorch._utils\n_rebuild_qtensor\n)R";
    let parts: [&[u8]; 7] = [
        b"\x80\x02}(",
        &text("optimizer"),
        quantized,
        &text("model"),
        &object,
        &text("args"),
        b"cargparse\nNamespace\n)\x81}bu.",
    ];
    let file = torch(legacy(&parts.concat())).unwrap();
    assert_eq!(names(&file), ["w"]);
}

/// A TorchScript archive: objects of its own code, whose attributes lead to the tensors.
#[test]
fn the_attributes_of_torch_script_are_its_keys() {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let object = |class: &str, attributes: &[Vec<u8>]| {
        [
            b"c__torch__.",
            class.as_bytes(),
            b"\n",
            class.as_bytes(),
            b"\n)\x81}(",
            &attributes.concat()[..],
            b"ub",
        ]
        .concat()
    };
    let tensor = |storage: &str, size: u8| {
        let id = [
            b"((",
            &text("storage")[..],
            b"ctorch\nFloatStorage\n",
            &text(storage),
            &text("cpu"),
            &[b'K', size],
            b"tQ",
        ];
        let view = [b'K', 0, b'(', b'K', size, b't', b'(', b'K', 1, b't', 0x89];
        [b"ctorch._utils\n_rebuild_tensor_v2\n", &id.concat()[..], &view, b"ccollections\nOrderedDict\n)RtR"]
            .concat()
    };
    let training = || [text("training"), vec![0x88]].concat();
    let inner = object("Linear", &[training(), text("weight"), tensor("0", 2), text("bias"), tensor("1", 1)]);
    let model = object(
        "Model",
        &[training(), text("layers"), object("List", &[text("0"), inner]), text("scale"), tensor("2", 1)],
    );
    let values = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let archive = zip_bytes(
        "ViT/",
        &[
            ("constants.pkl".into(), b"\x80\x02).".to_vec()),
            ("code/__torch__.py".into(), b"class Model(Module): ...".to_vec()),
            ("data/0".into(), values(&[1.0, 2.0])),
            ("data/1".into(), values(&[3.0])),
            ("data/2".into(), values(&[4.0])),
            ("data.pkl".into(), [b"\x80\x02", &model[..], b"."].concat()),
        ],
    );
    let file = torch(archive).unwrap();
    assert_eq!(names(&file), ["layers.0.weight", "layers.0.bias", "scale"]);
    assert_eq!(floats(&file, "layers.0.weight"), [1.0, 2.0]);
    assert_eq!(floats(&file, "scale"), [4.0]);
}

/// A module that was saved whole has its weights behind classes that are not torch's own: refused, not guessed.
#[test]
fn a_whole_module_is_refused() {
    let mut state = tensor("FloatStorage", "0", "K\0(K\x04t(K\x01t");
    state.pop();
    let object = [b"\x80\x02cmy.models\nNet\n)\x81", &state[2..], b"b."].concat();
    assert!(matches!(torch(legacy(&object)), Err(Error::Torch { reason: TorchError::NoTensors, .. })));
}

/// `{"w": array}` as Paddle pickles it: the numpy calls with these arguments and state.
fn paddle(dtype: &str, state: &[u8]) -> Vec<u8> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let dtype =
        [b"cnumpy\ndtype\n", &text(dtype)[..], b"\x89\x88\x87R(K\x03", &text("<"), b"NNNK\0tb"].concat();
    let array = [
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R(K\x01K\x02K\x03\x86",
        &dtype[..],
    ];
    [b"\x80\x03}", &text("w")[..], &array.concat(), state, b"tbs."].concat()
}

#[test]
fn a_paddle_file_is_a_dictionary_of_arrays() {
    let file = torch(paddle("i1", b"\x89C\x06\x01\x02\x03\x04\x05\x06")).unwrap();
    assert_eq!(file.entries(), [Entry { name: "w".into(), shape: vec![2, 3], dtype: Dtype::I8 }]);
    assert_eq!(*file.bytes("w").unwrap(), [1, 2, 3, 4, 5, 6]);
    let columns = torch(paddle("u1", b"\x88C\x06\x01\x02\x03\x04\x05\x06")).unwrap();
    assert_eq!(*columns.bytes("w").unwrap(), [1, 3, 5, 2, 4, 6], "stored column by column");
    // protocol 2 has no bytes: they are text, encoded
    let encoded = b"\x89c_codecs\nencode\nX\x07\0\0\0\x01\x02\xc3\xbf\x04\x05\x06X\x06\0\0\0latin1\x86R";
    let file = torch(paddle("u1", encoded)).unwrap();
    assert_eq!(*file.bytes("w").unwrap(), [1, 2, 255, 4, 5, 6]);
    let brain = torch(paddle("u2", b"\x89C\x0c\0\0\x80?\0@\0\0\0\0\0\0")).unwrap();
    assert_eq!(brain.entries()[0].dtype, Dtype::BF16, "Paddle has no other type for it");

    let reason = |bytes: Vec<u8>| match torch(bytes) {
        Err(Error::Torch { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let short =
        TorchError::StorageLength { key: "w".into(), storage: "its own".into(), expected: 6, found: 5 };
    assert_eq!(reason(paddle("u1", b"\x89C\x05\x01\x02\x03\x04\x05")), short);
    assert!(matches!(reason(paddle("c8", b"\x89C\x01\x01")), TorchError::Unsupported { .. }));
    assert!(matches!(reason(paddle("u1", b"\x89]")), TorchError::Unsupported { .. }));
}

/// Random states are numpy arrays beside the weights of torch files, not weights.
#[test]
fn an_array_in_a_torch_file_is_passed_over() {
    let mut object = tensor("FloatStorage", "0", "K\0(K\x04t(K\x01t");
    object.pop();
    let array = paddle("u1", b"\x89C\x06\x01\x02\x03\x04\x05\x06");
    object.extend(b"X\x03\0\0\0rng");
    object.extend(&array[2..array.len() - 1]);
    object.extend(b"s.");
    assert_eq!(names(&torch(legacy(&object)).unwrap()), ["w"]);
}

/// Reads everything a checkpoint has; whatever the bytes, this must not panic.
fn read_all(checkpoint: Result<&dyn Checkpoint, &Error>) {
    match checkpoint {
        Ok(checkpoint) => {
            for entry in checkpoint.entries() {
                let length = checkpoint.bytes(&entry.name).unwrap().len();
                assert_eq!(length, entry.shape.iter().product::<usize>() * entry.dtype.size());
            }
        }
        Err(error) => assert!(error.to_string().starts_with("m")),
    }
}

/// Broken copies of a file: bytes changed, runs overwritten with extreme values, the end cut off.
fn damage(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = original.len();
    let change = (
        0..length,
        prop::sample::select(vec![0x00, 0x01, 0x7f, 0x80, 0xff, b'0', b'9', b'(', b'.', b'h']),
        1..9usize,
    );
    let flips = prop::collection::vec((0..length, any::<u8>()), 0..4);
    (prop::collection::vec(change, 0..3), flips, prop::option::weighted(0.3, 0..length)).prop_map(
        move |(changes, flips, cut)| {
            let mut bytes = original.clone();
            for (at, value, run) in changes {
                let end = length.min(at + run);
                bytes[at..end].fill(value);
            }
            for (at, value) in flips {
                bytes[at] ^= value;
            }
            bytes.truncate(cut.unwrap_or(length));
            bytes
        },
    )
}

fn small_safetensors() -> Vec<u8> {
    safetensors_bytes(&[count("a.weight", &[2, 3], 0), ints("a.ids", &[1, 2]), count("empty", &[0, 3], 0)])
}

fn small_torch(name: &str) -> Vec<u8> {
    fs::read(fixture("torch_small").join(name)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_safetensors_file_panics(bytes in damage(small_safetensors())) {
        let file = Memory::new("m", bytes);
        read_all(file.as_ref().map(|file| file as &dyn Checkpoint));
    }

    #[test]
    fn no_torch_archive_panics(bytes in damage(small_torch("zip.pt"))) {
        let file = torch(bytes);
        read_all(file.as_ref().map(|file| file as &dyn Checkpoint));
    }

    #[test]
    fn no_legacy_torch_file_panics(bytes in damage(small_torch("legacy.pt"))) {
        let file = torch(bytes);
        read_all(file.as_ref().map(|file| file as &dyn Checkpoint));
    }

    #[test]
    fn no_bytes_at_all_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_all(Memory::new("m", bytes.clone()).as_ref().map(|file| file as &dyn Checkpoint));
        read_all(torch([b"\x80\x02", &bytes[..]].concat()).as_ref().map(|file| file as &dyn Checkpoint));
        read_all(torch([b"PK\x03\x04", &bytes[..]].concat()).as_ref().map(|file| file as &dyn Checkpoint));
    }
}

#[test]
#[cfg(unix)]
fn a_link_to_nothing_is_an_error_and_no_other_file_takes_its_place() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("../blobs/gone", folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("pytorch_model.bin"), small_torch("zip.pt")).unwrap();
    let error = open(folder.path()).err().unwrap();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("model.safetensors")), "{error:?}");
    fs::create_dir(folder.path().join("sub")).unwrap();
    fs::create_dir(folder.path().join("sub/model.safetensors")).unwrap();
    assert!(matches!(
        open(&folder.path().join("sub")),
        Err(Error::NotWeights { found: Lookalike::NotAFile, .. })
    ));
}
