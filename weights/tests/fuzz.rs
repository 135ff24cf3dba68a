//! Hostile files: whatever the bytes, no reader panics, hangs, or takes more memory than a small multiple of the file.
//!
//! Each target changes valid files at random for a fraction of a second; `VOLARY_FUZZ_SECONDS=60 cargo test -p
//! volary-weights --test fuzz` gives each of them a minute. A failure prints the input. Inputs that once were found are
//! at the end of the file.
#![allow(clippy::unwrap_used)] // a test may panic

use std::alloc::{GlobalAlloc, Layout, System};
use std::borrow::Cow;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use volary_weights::format::gguf::Gguf;
use volary_weights::format::torch::Torch;
use volary_weights::format::{Checkpoint, Memory, Sharded};
use volary_weights::{KeyMap, Ones, Rule};

/// Counts what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // a thread that is ending has no counters any more
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What opening may take, in bytes for each byte of the file, and for a file of any size. Pickles of nothing but
/// one-byte objects come to 25, honest files to less than 2.
const OPEN_FACTOR: usize = 32;
const OPEN_SLACK: usize = 1 << 18;
/// What reading a tensor may take besides: 2-bit blocks become f32, and a view may repeat its storage up to 16 MiB.
const READ_FACTOR: usize = 16;
const READ_SLACK: usize = 17 << 20;
/// No input of these sizes takes anywhere near as long, even beside other work.
const LONGEST: Duration = Duration::from_secs(20);

/// A small generator of random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }

    fn pick<'a, T>(&mut self, among: &'a [T]) -> &'a T {
        &among[self.below(among.len())]
    }
}

/// What is written over lengths, counts and offsets.
const EXTREMES: &[u64] = &[
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    33,
    255,
    256,
    65535,
    65536,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 62,
    i64::MAX as u64,
    u64::MAX - 7,
    u64::MAX,
];

/// Changes a file in a few places: bits, numbers, tokens of its format, pieces moved, doubled or cut out.
fn mutate(bytes: &mut Vec<u8>, tokens: &[&[u8]], random: &mut Random) {
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let length = random.below(40).min(bytes.len() - at);
        match random.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => {
                let number = random.pick(EXTREMES).to_le_bytes();
                let width = (*random.pick(&[1, 2, 4, 8])).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let piece = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            5 => {
                let token = *random.pick(tokens);
                bytes.splice(at..at, token.iter().copied());
            }
            6 => {
                let token = *random.pick(tokens);
                let end = (at + token.len()).min(bytes.len());
                bytes.splice(at..end, token.iter().copied());
            }
            7 => {
                // a token many times
                let token = random.pick(tokens).repeat(1 + random.below(300));
                bytes.splice(at..at, token);
            }
            8 if random.below(4) == 0 => bytes.truncate(at),
            9 => {
                let digits = random.pick(EXTREMES).to_string();
                bytes.splice(at..at, digits.bytes());
            }
            _ => {}
        }
    }
}

/// How long each target runs.
fn duration() -> Duration {
    let seconds = std::env::var("VOLARY_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(0.4))
}

/// Gives `target` changed copies of `seeds` until the time is over.
fn fuzz(
    seeds: &[Vec<u8>],
    tokens: &[&[u8]],
    fix: impl Fn(&mut Vec<u8>, &mut Random),
    target: impl Fn(&[u8]),
) {
    let started = Instant::now();
    let mut random = Random(
        std::env::var("VOLARY_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x0bad_5eed),
    );
    let mut rounds = 0u64;
    while started.elapsed() < duration() {
        let mut bytes = random.pick(seeds).clone();
        mutate(&mut bytes, tokens, &mut random);
        fix(&mut bytes, &mut random);
        examine(&bytes, &target);
        rounds += 1;
    }
    println!("{rounds} inputs");
}

/// Runs the target on one input, and prints the input when something is wrong.
fn examine(bytes: &[u8], target: &impl Fn(&[u8])) {
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| target(bytes)));
    if result.is_err() || started.elapsed() > LONGEST {
        panic!("after {:?}, with {} bytes: {}", started.elapsed(), bytes.len(), bytes.escape_ascii());
    }
}

/// Asserts what a call takes beyond what its thread held before.
fn within<T>(most: usize, what: &str, call: impl FnOnce() -> T) -> T {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let result = call();
    let taken = PEAK.with(Cell::get) - before;
    assert!(taken <= most as isize, "{what} took {taken} bytes, allowed are {most}");
    result
}

/// Opens a file and reads all that it has.
fn open_and_read<C: Checkpoint, E: std::fmt::Display>(length: usize, open: impl FnOnce() -> Result<C, E>) {
    match within(OPEN_FACTOR * length + OPEN_SLACK, "opening", open) {
        Ok(checkpoint) => {
            // values that overlap may be many: not all need to be read
            for entry in checkpoint.entries().iter().take(50) {
                let most = READ_FACTOR * length + READ_SLACK;
                let bytes = within(most, "reading", || checkpoint.bytes(&entry.name).unwrap());
                assert_eq!(bytes.len(), entry.shape.iter().product::<usize>() * entry.dtype.size());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)).unwrap()
}

/// A torch file in the legacy layout around the pickle of an object, with one storage `0` of four floats.
fn legacy(object: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    let keys = b"\x80\x02]X\x01\0\0\x000a.";
    [&magic[..], object, keys, &4u64.to_le_bytes(), &[0; 16]].concat()
}

/// A dictionary with one tensor, as a pickle.
const OBJECT: &[u8] = b"\x80\x02}q\0X\x01\0\0\0wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\0\0\0storageq\x03\
    ctorch\nFloatStorage\nq\x04X\x01\0\0\x000q\x05X\x03\0\0\0cpuq\x06K\x04tq\x07QK\0K\x02K\x02\x86q\x08K\x02K\x01\x86q\x09\
    \x89ccollections\nOrderedDict\nq\x0a)Rtq\x0bRq\x0cs.";

/// A dictionary with one array, as Paddle pickles it in protocol 2.
const ARRAY: &[u8] = b"\x80\x02}q\0X\x01\0\0\0wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0\
    \x85c_codecs\nencode\nq\x04X\x01\0\0\0bX\x06\0\0\0latin1q\x05\x86R\x87R(K\x01K\x02\x85cnumpy\ndtype\nX\x02\0\0\0f4\
    \x89\x88\x87R(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89h\x04X\x09\0\0\0\0\0\xc2\x80?\0\0\0@h\x05\
    \x86Rtbs.";

const OPCODES: &[&[u8]] = &[
    b"(",
    b".",
    b"0",
    b"1",
    b"2",
    b"]",
    b"}",
    b")",
    b"t",
    b"l",
    b"d",
    b"a",
    b"e",
    b"s",
    b"u",
    b"b",
    b"R",
    b"Q",
    b"o",
    b"N",
    b"\x81",
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x88",
    b"\x89",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x93",
    b"\x94",
    b"q\0",
    b"h\0",
    b"h\x01",
    b"h\x02",
    b"h\x07",
    b"h\x08",
    b"h\x0c",
    b"K\0",
    b"K\x7f",
    b"M\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08",
    b"X\x01\0\0\0a",
    b"h\x02h\x02\x86",
    b"h\0s",
    b"]h\x01a",
    b"}h\x01h\x0cs",
    b"h\x01h\x0cs",
    b"h\x01h\0s",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"c__torch__\nM\n)\x81",
    b"B\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff",
    b"X\xff\xff\xff\xff",
    b"PK\x05\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
    b"\xff\xff\xff\xff",
];

fn memory(bytes: &[u8]) -> Cow<'static, [u8]> {
    Cow::Owned(bytes.to_vec())
}

fn safetensors(bytes: &[u8]) {
    let copy = memory(bytes);
    open_and_read(bytes.len(), || Memory::new("m", copy));
}

fn torch(bytes: &[u8]) {
    let copy = memory(bytes);
    open_and_read(bytes.len(), || Torch::parse("m".into(), copy));
}

fn gguf(bytes: &[u8]) {
    let copy = memory(bytes);
    let opened = within(OPEN_FACTOR * bytes.len() + OPEN_SLACK, "opening", || Gguf::parse("m".into(), copy));
    if let Ok(file) = &opened {
        // a walk over all metadata
        let items = |value| match value {
            volary_weights::format::gguf::Value::Array(array) => array.iter().count(),
            _ => 1,
        };
        within(OPEN_SLACK, "metadata", || file.metadata().map(|(_, value)| items(value)).sum::<usize>());
    }
    open_and_read(bytes.len(), || opened);
}

#[test]
fn safetensors_headers() {
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    };
    let seeds = [
        file(
            r#"{"__metadata__":{"format":"pt"},"a.b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
                "c":{"dtype":"I64","shape":[],"data_offsets":[24,32]},"d":{"dtype":"BF16","shape":[0],"data_offsets":[32,32]}}"#,
            32,
        ),
        file("{}", 0),
        file(r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1),
    ];
    let tokens: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"\\u0000",
        b"\\",
        b"-1",
        b"1e9",
        b"null",
        b"\"a.b\"",
        b"\"F32\"",
        b"\"F64\"",
        b"\"shape\":[",
        b"\"data_offsets\":[0,0]",
        b"\"__metadata__\":",
        b"{\"a\":",
        b"0,",
        b"\xff",
        b"\"c\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,0]},",
    ];
    // half of the time the length is made to fit, or everything would end there
    let fix = |bytes: &mut Vec<u8>, random: &mut Random| {
        if bytes.len() > 8 && random.below(2) == 0 {
            let header = bytes[8..].iter().rposition(|&byte| byte == b'}').map_or(0, |end| end + 1) as u64;
            bytes[..8].copy_from_slice(&header.to_le_bytes());
        }
    };
    fuzz(&seeds, tokens, fix, safetensors);
}

#[test]
fn torch_files() {
    let seeds =
        [fixture("torch_small/zip.pt"), fixture("torch_small/legacy.pt"), legacy(OBJECT), ARRAY.to_vec()];
    torch(&seeds[2]);
    assert!(Torch::parse("m".into(), memory(ARRAY)).is_ok());
    fuzz(&seeds, OPCODES, |_, _| {}, torch);
}

/// Objects alone: what is around them stays whole.
#[test]
fn torch_pickles() {
    let fix = |bytes: &mut Vec<u8>, _: &mut Random| *bytes = legacy(bytes);
    fuzz(&[OBJECT.to_vec(), ARRAY.to_vec()], OPCODES, fix, torch);
}

#[test]
fn gguf_files() {
    let tokens: &[&[u8]] = &[
        b"GGUF",
        b"\x08\0\0\0",
        b"\x09\0\0\0",
        b"\x0c\0\0\0\x01\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x01\0\0\0\0\0\0\0a",
        b"\x09\0\0\0\x01\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\0",
        b"general.alignment",
    ];
    fuzz(&[fixture("gguf/small.gguf")[..2500].to_vec(), fixture("gguf/small.gguf")], tokens, |_, _| {}, gguf);
}

#[test]
fn indices_of_shards() {
    let folder = tempfile::tempdir().unwrap();
    let shard = |name: &str, key: &str| {
        let header = format!(r#"{{"{key}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1]].concat();
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    shard("model-00001-of-00002.safetensors", "a");
    shard("model-00002-of-00002.safetensors", "b");
    let index = folder.path().join("model.safetensors.index.json");
    let seed = br#"{"metadata":{"total_size":2},"weight_map":{"a":"model-00001-of-00002.safetensors",
        "b":"model-00002-of-00002.safetensors"}}"#;
    let tokens: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"null",
        b"1e999",
        b"\"a\":",
        b"\"weight_map\":",
        b"../",
        b"/",
        b"\\u002e",
        b"\"x\":\"model-00001-of-00002.safetensors\",",
        b"\"y\":\"z\",",
        b"\"model.safetensors.index.json\"",
        b"\"\":\"\",",
        b"{\"a\":",
        b"\xff",
    ];
    let target = |bytes: &[u8]| {
        std::fs::write(&index, bytes).unwrap();
        open_and_read(bytes.len() + 200, || Sharded::open(&index));
    };
    target(seed);
    fuzz(&[seed.to_vec()], tokens, |_, _| {}, target);
}

/// Patterns of key maps, and keys to match.
#[test]
fn key_maps() {
    let started = Instant::now();
    let mut random = Random(77);
    let pieces = ["{}", "{*}", ".", "a", "b7", "0", "10", "{", "}", "*", "层", "", "{}{}", "weight"];
    let text = |random: &mut Random| (0..random.below(6)).map(|_| *random.pick(&pieces)).collect::<String>();
    let mut maps = 0;
    while started.elapsed() < duration() {
        // patterns are `'static`: some hundred kilobytes a second are kept until the program ends
        let patterns: Vec<&'static str> = (0..100).map(|_| &*text(&mut random).leak()).collect();
        let rule = |random: &mut Random| {
            let list = |random: &mut Random| -> &'static [&'static str] {
                (0..random.below(4)).map(|_| *random.pick(&patterns)).collect::<Vec<_>>().leak()
            };
            let (a, b) = (*random.pick(&patterns), *random.pick(&patterns));
            match random.below(9) {
                0 | 1 => Rule::Rename(a, b),
                2 => Rule::Split(a, list(random)),
                3 => Rule::Concat(list(random), b),
                4 => Rule::Transpose(a, b),
                5 => Rule::SplitTranspose(a, list(random)),
                6 => Rule::Stack(a, b, Ones::Before(0)),
                7 => Rule::StackTranspose(a, b, Ones::Before(1)),
                _ => Rule::Ignore(a),
            }
        };
        for _ in 0..200 {
            let rules: &'static [Rule] = match random.below(4) {
                0 => {
                    let inner: &'static [Rule] = vec![rule(&mut random)].leak();
                    let (key, path) = (*random.pick(&patterns), *random.pick(&patterns));
                    let under = Rule::Under(key, path, inner);
                    vec![rule(&mut random), under].leak()
                }
                _ => vec![rule(&mut random)].leak(),
            };
            let map = KeyMap::new(rules).with_prefixes(&["a.", ""]);
            let number = random.below(100).to_string();
            let mut keys: Vec<String> =
                patterns.iter().take(20).map(|key| key.replace("{}", &number)).collect();
            if let Rule::Rename(key, _) | Rule::Split(key, _) | Rule::Transpose(key, _) | Rule::Ignore(key) =
                rules[0]
            {
                keys.push(key.replace("{}", &number));
            }
            for key in keys {
                let (Ok(paths), Ok(_)) = (map.paths(&key), map.keys(&key)) else { break };
                // what a rule leads to leads back, of a stack to its first key; of two rules, the first that knows a path counts
                for path in paths.iter().filter(|_| rules.len() == 1) {
                    let back = map.keys(path).unwrap();
                    let is_back = match rules[0] {
                        Rule::Stack(..) | Rule::StackTranspose(..) => {
                            back.iter().all(|first| map.paths(first).unwrap().contains(path))
                        }
                        _ => back.contains(&key),
                    };
                    assert!(is_back && !back.is_empty(), "{rules:?}: {key} -> {path} -> {back:?}");
                }
            }
            maps += 1;
        }
    }
    println!("{maps} maps");
}

/// Inputs that cost too much once, or were made to.
#[test]
fn found_inputs() {
    // a dictionary that is in the next one a hundred times, and so on
    let mut bomb = b"\x80\x02}q\0X\x01\0\0\0w".to_vec();
    bomb.extend(&OBJECT[14..OBJECT.len() - 2]);
    bomb.extend(b"s");
    for level in 0..20u8 {
        bomb.extend(b"}q");
        bomb.push(100 + level);
        for i in 0..100u8 {
            bomb.extend([b'X', 1, 0, 0, 0, b'0' + i % 70]);
            bomb.extend([b'h', if level == 0 { 0 } else { 99 + level }, b's']);
        }
    }
    bomb.push(b'.');
    examine(&legacy(&bomb), &torch);
    // one value of a megabyte each
    for opcode in [&b"]"[..], b"}", b"N", b")", b"(", b"2", b"]\x94", b"\x94", b"K\x01", b"}}s", b"h\x01"] {
        let body = opcode.repeat((1 << 18) / opcode.len());
        examine(&legacy(&[b"\x80\x04}q\x01", &body[..], b"."].concat()), &torch);
    }
    // a dictionary with a million entries that are no text, in every place of a list
    let mut wide = b"\x80\x02}q\x01(".to_vec();
    wide.extend(b"NN".repeat(1 << 16));
    wide.extend(b"u]q\x02(");
    wide.extend(b"h\x01".repeat(1 << 16));
    wide.extend(b"e.");
    examine(&legacy(&wide), &torch);
    // JSON that nests
    for text in ["[", "{\"a\":", "{\"weight_map\":", "{\"__metadata__\":{\"a\":"] {
        let header = text.repeat((1 << 18) / text.len());
        examine(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat(), &safetensors);
    }
    // arrays of arrays of nothing
    let nest = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(20_000);
    let pair = [&1u64.to_le_bytes()[..], b"a", &9u32.to_le_bytes(), &nest].concat();
    examine(&[&b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"[..], &pair].concat(), &gguf);
}
