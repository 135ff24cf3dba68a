//! Pickles as data. Nothing is imported, called or built: a call that is not one of torch's few ways to describe a
//! tensor becomes [`Node::Opaque`].
//!
//! Nodes live in one list and refer to each other by place, so that nothing recurses. A hostile file costs no more
//! memory than a small multiple of its length: values that a single byte can write are one shared node, and there may
//! be no more nodes than a third of the bytes (Python writes at least three for each).

use std::collections::HashMap;

use crate::error::{PickleError, TorchError};

/// More arguments than any function that is understood takes.
const MOST_ARGUMENTS: usize = 16;
/// More dimensions than torch allows.
const MOST_DIMENSIONS: usize = 64;
/// The nodes that even the shortest pickle may have.
const SOME_NODES: usize = 1 << 12;
/// The bytes that an honest pickle takes for each node.
const NODE_BYTES: usize = 3;

/// The places of the values that are made once.
const OTHER: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;
const EMPTY_TUPLE: Id = 3;
/// The integers of one byte start here.
const BYTES: Id = 4;

/// The place of a node.
pub(super) type Id = usize;

/// A value of the pickled object.
#[derive(Debug, Clone)]
pub(super) enum Node<'a> {
    Bool(bool),
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function: module and name.
    Global(&'a str, &'a str),
    Storage(Box<Storage<'a>>),
    Tensor(Box<Tensor<'a>>),
    /// Bytes as they are, by where they start and end in the file.
    Bytes(usize, usize),
    /// Bytes that protocol 2 writes as text of the characters 0 to 255.
    Latin1(&'a str),
    /// numpy's name of a dtype.
    NumpyDtype(&'a str),
    /// A numpy array.
    Array(Box<Array>),
    /// What a call of this class or function would have given.
    Opaque(&'a str, &'a str),
    /// A TorchScript object with the dictionary of its attributes.
    Object(Id),
    /// `None`, floats, sets, large integers: nothing that describes a tensor.
    Other,
}

/// The values behind one or more tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    /// The class, e.g. `FloatStorage`.
    pub class: &'a str,
    /// Its name in the file.
    pub key: &'a str,
    /// How many elements.
    pub elements: usize,
    /// In the legacy layout a storage may be a part of another: where it starts there.
    pub start: usize,
}

/// A view of a storage.
#[derive(Debug, Clone)]
pub(super) struct Tensor<'a> {
    pub storage: Storage<'a>,
    pub offset: usize,
    /// Tuples or lists of sizes, see [`Pickle::sizes`].
    pub shape: Id,
    pub strides: Id,
    /// The dtype's name where the storage's class does not say it, e.g. `bfloat16`.
    pub dtype: Option<&'a str>,
}

/// A numpy array, taken apart no further than its pickle does.
#[derive(Debug, Clone)]
pub(super) struct Array {
    /// A tuple of sizes, see [`Pickle::sizes`].
    pub shape: Id,
    /// A [`Node::NumpyDtype`].
    pub dtype: Id,
    /// Whether the first dimension is the innermost.
    pub is_fortran: bool,
    /// [`Node::Bytes`] or [`Node::Latin1`].
    pub data: Id,
}

/// A pickle that has been read.
pub(super) struct Pickle<'a> {
    pub nodes: Vec<Node<'a>>,
    pub root: Id,
    /// Where it ends.
    pub end: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that starts at `start`.
    pub fn read(bytes: &'a [u8], start: usize) -> Result<Self, TorchError> {
        let length = bytes.len().saturating_sub(start);
        let mut nodes = vec![Node::Other, Node::Bool(false), Node::Bool(true), Node::Tuple(Vec::new())];
        nodes.extend((0..=u8::MAX).map(|byte| Node::Int(byte.into())));
        let mut machine = Machine {
            bytes,
            at: start,
            most_nodes: SOME_NODES + length / NODE_BYTES,
            nodes,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { nodes: machine.nodes, root, end: machine.at }),
                Err(reason) => return Err(TorchError::Pickle { at, reason }),
            }
        }
    }

    pub fn root(&self) -> &Node<'a> {
        &self.nodes[self.root]
    }

    /// The sizes in a tuple or list.
    pub fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        sizes(&self.nodes, id)
    }
}

fn sizes(nodes: &[Node], id: Id) -> Option<Vec<usize>> {
    let (Node::Tuple(sizes) | Node::List(sizes)) = &nodes[id] else { return None };
    if sizes.len() > MOST_DIMENSIONS {
        return None;
    }
    sizes.iter().map(|&id| size(nodes, id)).collect()
}

fn size(nodes: &[Node], id: Id) -> Option<usize> {
    match nodes[id] {
        Node::Int(value) => usize::try_from(value).ok(),
        _ => None,
    }
}

type Step<T> = Result<T, PickleError>;

/// The pickle machine: a stack, marks on it, and a memo.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    most_nodes: usize,
    stack: Vec<Id>,
    /// The heights at which the marks stand.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    /// Follows one opcode; the last gives the root.
    fn step(&mut self) -> Step<Option<Id>> {
        match self.byte()? {
            // the frame of the pickle
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'.' => return self.pop().map(Some),

            // the stack
            b'(' => self.marks.push(self.stack.len()),
            b'0' => match self.marks.last() {
                Some(&mark) if mark == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }

            // the memo
            b'p' => {
                let index = self.index_line()?;
                self.memorize(index)?;
            }
            b'q' => {
                let index = self.byte()?;
                self.memorize(index.into())?;
            }
            b'r' => {
                let index = self.u32()?;
                self.memorize(index.into())?;
            }
            0x94 => self.memorize(self.memo.len() as u64)?,
            b'g' => {
                let index = self.index_line()?;
                self.recall(index)?;
            }
            b'h' => {
                let index = self.byte()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = self.u32()?;
                self.recall(index.into())?;
            }

            // numbers
            b'N' => self.stack.push(OTHER),
            0x88 => self.stack.push(TRUE),
            0x89 => self.stack.push(FALSE),
            b'I' => {
                let node = match self.line()? {
                    "00" => Node::Bool(false),
                    "01" => Node::Bool(true),
                    digits => int(digits),
                };
                self.push(node)?;
            }
            b'L' => {
                let line = self.line()?;
                self.push(int(line.trim_end_matches('L')))?;
            }
            b'J' => {
                let value = self.u32()? as i32;
                self.push(Node::Int(value.into()))?;
            }
            b'K' => {
                let value = self.byte()?;
                self.stack.push(BYTES + usize::from(value));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()))?;
            }
            0x8a => {
                let length = self.byte()?;
                self.long(length.into())?;
            }
            0x8b => {
                let length = self.u32()?;
                self.long(length as usize)?;
            }
            b'F' => {
                self.line()?;
                self.stack.push(OTHER);
            }
            b'G' => {
                self.take(8)?;
                self.stack.push(OTHER);
            }

            // text and bytes
            b'X' => {
                let length = self.u32()?;
                self.text(length as usize)?;
            }
            0x8c => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            0x8d => {
                let length = self.u64_length()?;
                self.text(length)?;
            }
            b'V' => {
                let line = self.line()?;
                self.push(if line.contains('\\') { Node::Other } else { Node::Text(line) })?;
            }
            b'S' => {
                let line = self.line()?;
                let quoted = line.len() >= 2 && line.as_bytes()[0] == line.as_bytes()[line.len() - 1];
                let text =
                    quoted.then(|| line.get(1..line.len() - 1)).flatten().filter(|text| !text.contains('\\'));
                self.push(text.map_or(Node::Other, Node::Text))?;
            }
            b'T' => {
                let length = self.u32()?;
                self.maybe_text(length as usize)?;
            }
            b'U' => {
                let length = self.byte()?;
                self.maybe_text(length.into())?;
            }
            b'B' => {
                let length = self.u32()?;
                self.raw(length as usize)?;
            }
            b'C' => {
                let length = self.byte()?;
                self.raw(length.into())?;
            }
            0x8e | 0x96 => {
                let length = self.u64_length()?;
                self.raw(length)?;
            }

            // containers
            b')' => self.stack.push(EMPTY_TUPLE),
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            0x8f => self.stack.push(OTHER), // EMPTY_SET
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items))?;
            }
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Node::List(items))?;
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Dict(pairs(&items)?))?;
            }
            0x91 => {
                self.pop_to_mark()?; // FROZENSET
                self.stack.push(OTHER);
            }
            length @ 0x85..=0x87 => {
                let length = usize::from(length - 0x84);
                let mut items = Vec::with_capacity(length);
                for _ in 0..length {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Node::Tuple(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }

            // classes and functions
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(Node::Global(module, name))?;
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                let (Node::Text(module), Node::Text(name)) = (&self.nodes[module], &self.nodes[name]) else {
                    return Err(PickleError::Malformed("a class whose name is not text"));
                };
                let global = Node::Global(module, name);
                self.push(global)?;
            }
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let function = self.pop()?;
                self.call(function, arguments)?;
            }
            0x92 => {
                self.pop()?; // the keyword arguments of NEWOBJ_EX
                let arguments = self.pop()?;
                let class = self.pop()?;
                self.call(class, arguments)?;
            }
            b'i' => {
                let module = self.line()?;
                let name = self.line()?;
                self.pop_to_mark()?;
                self.push(Node::Opaque(module, name))?;
            }
            b'o' => {
                let items = self.pop_to_mark()?;
                let node = match items.first().map(|&class| &self.nodes[class]) {
                    Some(&Node::Global(module, name)) => Node::Opaque(module, name),
                    _ => Node::Other,
                };
                self.push(node)?;
            }
            b'b' => {
                let state = self.pop()?;
                let object = self.top()?;
                self.build(object, state)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let node = self.persistent(id)?;
                self.push(node)?;
            }
            opcode => return Err(PickleError::Opcode(opcode)),
        }
        Ok(None)
    }

    /// Pushes what torch's and numpy's own functions describe; anything else is opaque.
    fn call(&mut self, function: Id, arguments: Id) -> Step<()> {
        let Node::Global(module, name) = self.nodes[function] else {
            self.stack.push(OTHER);
            return Ok(());
        };
        let Node::Tuple(arguments) = &self.nodes[arguments] else {
            return self.push(Node::Opaque(module, name));
        };
        let arguments: Vec<Id> = arguments.iter().take(MOST_ARGUMENTS).copied().collect();
        let first = arguments.first().copied().unwrap_or(OTHER);
        let node = match (module, name) {
            ("collections", "OrderedDict") => match &mut self.nodes[first] {
                _ if arguments.is_empty() => Node::Dict(Vec::new()),
                // the list of pairs is moved: a thousand calls on one list must not make a thousand copies
                Node::List(items) => {
                    let items = std::mem::take(items);
                    Node::Dict(items.into_iter().filter_map(|item| self.pair(item)).collect())
                }
                _ => Node::Other,
            },
            // these give back what they are given
            ("torch", "Size") if matches!(self.nodes[first], Node::Tuple(_) | Node::List(_)) => {
                self.stack.push(first);
                return Ok(());
            }
            ("builtins" | "__builtin__", "tuple") if matches!(self.nodes[first], Node::Tuple(_)) => {
                self.stack.push(first);
                return Ok(());
            }
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
                if matches!(self.nodes[first], Node::Tensor(_)) =>
            {
                self.stack.push(first);
                return Ok(());
            }
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => self.tensor(&arguments, None)?,
            ("torch._utils", "_rebuild_tensor_v3") => {
                let dtype = match arguments.get(6).map(|&dtype| &self.nodes[dtype]) {
                    Some(&Node::Global("torch", dtype)) => Some(dtype),
                    _ => return Err(PickleError::Malformed("a tensor without a dtype")),
                };
                self.tensor(&arguments, dtype)?
            }
            ("_codecs", "encode") => match (arguments.as_slice(), &self.nodes[first]) {
                (&[_, encoding], &Node::Text(text))
                    if matches!(self.nodes[encoding], Node::Text("latin1" | "latin-1")) =>
                {
                    Node::Latin1(text)
                }
                _ => Node::Other,
            },
            ("numpy", "dtype") => match self.nodes[first] {
                Node::Text(name) => Node::NumpyDtype(name),
                _ => Node::Opaque(module, name),
            },
            // `(data, dtype, shape, order)`
            ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => match arguments.as_slice() {
                &[data, dtype, shape, order] => {
                    let is_fortran = matches!(self.nodes[order], Node::Text("F"));
                    Node::Array(Box::new(Array { shape, dtype, is_fortran, data }))
                }
                _ => Node::Opaque(module, name),
            },
            _ => Node::Opaque(module, name),
        };
        self.push(node)
    }

    /// Gives an object its state. Most stay what they are, e.g. a state dict whose state is its `_metadata`.
    fn build(&mut self, object: Id, state: Id) -> Step<()> {
        let built = match (&self.nodes[object], &self.nodes[state]) {
            (Node::Opaque(module, _), Node::Dict(_)) if is_torch_script(module) => Node::Object(state),
            // `(version, shape, dtype, is_fortran, data)`
            (
                Node::Opaque("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"),
                Node::Tuple(state),
            ) => match state.as_slice() {
                &[_, shape, dtype, order, data] => {
                    let is_fortran = matches!(self.nodes[order], Node::Bool(true));
                    Node::Array(Box::new(Array { shape, dtype, is_fortran, data }))
                }
                _ => return Err(PickleError::Malformed("a numpy array without shape, dtype and data")),
            },
            // `(version, byte order, ...)`
            (Node::NumpyDtype(_), Node::Tuple(state)) => {
                match state.get(1).map(|&order| &self.nodes[order]) {
                    Some(Node::Text("<" | "|" | "=")) => return Ok(()),
                    _ => Node::Opaque("numpy", "dtype of another byte order"),
                }
            }
            _ => return Ok(()),
        };
        self.nodes[object] = built;
        Ok(())
    }

    /// `(storage, offset, size, stride, ...)`.
    fn tensor(&self, arguments: &[Id], dtype: Option<&'a str>) -> Step<Node<'a>> {
        let malformed = PickleError::Malformed("a tensor that is not (storage, offset, size, stride, ...)");
        let &[storage, offset, shape, strides, ..] = arguments else { return Err(malformed) };
        let (Node::Storage(storage), Some(offset), Some(sizes), Some(steps)) =
            (&self.nodes[storage], self.size(offset), sizes(&self.nodes, shape), sizes(&self.nodes, strides))
        else {
            return Err(malformed);
        };
        if sizes.len() != steps.len() {
            return Err(PickleError::Malformed("a tensor with more sizes than strides or fewer"));
        }
        Ok(Node::Tensor(Box::new(Tensor { storage: **storage, offset, shape, strides, dtype })))
    }

    /// `("storage", class, key, device, elements)` and, in the legacy layout, `(view key, start, elements)` or `None`.
    fn persistent(&self, id: Id) -> Step<Node<'a>> {
        let malformed = PickleError::Malformed("a storage that is not (storage, class, key, device, size)");
        let Node::Tuple(id) = &self.nodes[id] else { return Err(malformed) };
        let &[kind, class, key, _, elements, ..] = id.as_slice() else { return Err(malformed) };
        let (Node::Text("storage"), &Node::Global(_, class), &Node::Text(key), Some(elements)) =
            (&self.nodes[kind], &self.nodes[class], &self.nodes[key], self.size(elements))
        else {
            return Err(malformed);
        };
        let storage = Storage { class, key, elements, start: 0 };
        let view = id.get(5).map(|&view| &self.nodes[view]);
        Ok(Node::Storage(Box::new(match view {
            None | Some(Node::Other) => storage,
            Some(Node::Tuple(view)) => match view.as_slice() {
                &[_, start, elements] => match (self.size(start), self.size(elements)) {
                    (Some(start), Some(elements)) => Storage { start, elements, ..storage },
                    _ => return Err(malformed),
                },
                _ => return Err(malformed),
            },
            Some(_) => return Err(malformed),
        })))
    }

    fn size(&self, id: Id) -> Option<usize> {
        size(&self.nodes, id)
    }

    fn pair(&self, id: Id) -> Option<(Id, Id)> {
        match &self.nodes[id] {
            Node::Tuple(pair) | Node::List(pair) => match pair.as_slice() {
                &[key, value] => Some((key, value)),
                _ => None,
            },
            _ => None,
        }
    }

    fn append(&mut self, items: &[Id]) -> Step<()> {
        let list = self.top()?;
        if let Node::List(list) = &mut self.nodes[list] {
            list.extend(items);
        }
        Ok(()) // items of sets and unknown objects are dropped
    }

    fn set_items(&mut self, items: &[Id]) -> Step<()> {
        let dict = self.top()?;
        let pairs = pairs(items)?;
        if let Node::Dict(dict) = &mut self.nodes[dict] {
            dict.extend(pairs);
        }
        Ok(())
    }

    fn push(&mut self, node: Node<'a>) -> Step<()> {
        if self.nodes.len() >= self.most_nodes {
            return Err(PickleError::Malformed("more objects than a file of this length can hold"));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack
            .get(floor..)
            .and_then(<[Id]>::last)
            .copied()
            .ok_or(PickleError::Malformed("an empty stack"))
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or(PickleError::Malformed("no mark"))?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn memorize(&mut self, index: u64) -> Step<()> {
        let top = self.top()?;
        if self.memo.len() >= self.most_nodes {
            return Err(PickleError::Malformed("more memos than a file of this length can need"));
        }
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Step<()> {
        let id = self.memo.get(&index).copied().ok_or(PickleError::Malformed("an unknown memo"))?;
        self.stack.push(id);
        Ok(())
    }

    fn take(&mut self, length: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(length).ok_or(PickleError::Truncated)?;
        let taken = self.bytes.get(self.at..end).ok_or(PickleError::Truncated)?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        self.take(N)?.first_chunk().copied().ok_or(PickleError::Truncated)
    }

    fn byte(&mut self) -> Step<u8> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Step<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64_length(&mut self) -> Step<usize> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| PickleError::Truncated)
    }

    /// The text up to the end of the line.
    fn line(&mut self) -> Step<&'a str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or(PickleError::Truncated)?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| PickleError::Malformed("a line that is not UTF-8"))
    }

    fn index_line(&mut self) -> Step<u64> {
        self.line()?.parse().map_err(|_| PickleError::Malformed("a memo that is not a number"))
    }

    fn text(&mut self, length: usize) -> Step<()> {
        let text = std::str::from_utf8(self.take(length)?);
        self.push(Node::Text(text.map_err(|_| PickleError::Malformed("text that is not UTF-8"))?))?;
        Ok(())
    }

    /// A string of Python 2, where text was bytes.
    fn maybe_text(&mut self, length: usize) -> Step<()> {
        let node = std::str::from_utf8(self.take(length)?).map_or(Node::Other, Node::Text);
        self.push(node)?;
        Ok(())
    }

    /// Bytes, which stay where they are.
    fn raw(&mut self, length: usize) -> Step<()> {
        let start = self.at;
        self.take(length)?;
        self.push(Node::Bytes(start, self.at))
    }

    /// A little-endian two's complement integer.
    fn long(&mut self, length: usize) -> Step<()> {
        let bytes = self.take(length)?;
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        let node = match wide.get_mut(..length) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Node::Int(i64::from_le_bytes(wide))
            }
            None => Node::Other,
        };
        self.push(node)?;
        Ok(())
    }
}

/// Whether a class lives in the code of a TorchScript archive.
fn is_torch_script(module: &str) -> bool {
    module == "__torch__" || module.starts_with("__torch__.")
}

fn int<'a>(digits: &str) -> Node<'a> {
    digits.parse().map_or(Node::Other, Node::Int)
}

fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    if !items.len().is_multiple_of(2) {
        return Err(PickleError::Malformed("a key without a value"));
    }
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}
