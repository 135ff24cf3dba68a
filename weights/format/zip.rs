//! The part of the zip format that torch writes: plain (stored) entries, found through the central directory.
//!
//! Reading the directory in place keeps the tensors in the mapped file; an unpacking reader would copy them.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::TorchError;

/// Sizes and offsets that do not fit 32 bits are in the entry's zip64 field.
const IN_ZIP64: u32 = u32::MAX;
const END: &[u8] = b"PK\x05\x06";
const END_LENGTH: usize = 22;
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END64_LOCATOR_LENGTH: usize = 20;
const END64: &[u8] = b"PK\x06\x06";
const ENTRY: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";

/// Where the content of each entry is in `file`, by name.
pub(super) fn entries(file: &[u8]) -> Result<HashMap<String, Range<usize>>, TorchError> {
    let broken = TorchError::Zip;
    let end = find_end(file).ok_or(broken("no end of directory: truncated?"))?;
    let (count, start) = directory(file, end).ok_or(broken("the end of the directory does not hold"))?;

    let mut entries = HashMap::new();
    let mut at = start;
    for _ in 0..count {
        let entry = Entry::read(file, at).ok_or(broken("the directory is cut short"))?;
        let name = String::from_utf8_lossy(entry.name).into_owned();
        if !entry.is_plain {
            return Err(TorchError::Packed { entry: name });
        }
        let content = entry.content(file).ok_or(broken("an entry lies outside the file: truncated?"))?;
        if entries.insert(name, content).is_some() {
            return Err(broken("two entries have the same name"));
        }
        at = entry.next;
    }
    Ok(entries)
}

/// An entry as the directory describes it.
pub(crate) struct Listed {
    pub(crate) name: String,
    /// Of its content.
    pub(crate) size: usize,
    /// Where its local header is, before its content.
    pub(crate) local: usize,
}

/// The bytes of `file` that the directory takes, from what its end says; `file` need only have its last 64 KiB.
pub(crate) fn directory_start(file: &[u8]) -> Option<usize> {
    directory(file, find_end(file)?).map(|(_, start)| start)
}

/// What the directory lists. Of `file` only the directory need be there.
pub(crate) fn listed(file: &[u8]) -> Result<Vec<Listed>, TorchError> {
    let broken = TorchError::Zip;
    let end = find_end(file).ok_or(broken("no end of directory: truncated?"))?;
    let (count, mut at) = directory(file, end).ok_or(broken("the end of the directory does not hold"))?;
    let mut listed = Vec::new();
    for _ in 0..count {
        let entry = Entry::read(file, at).ok_or(broken("the directory is cut short"))?;
        let name = String::from_utf8_lossy(entry.name).into_owned();
        listed.push(Listed { name, size: entry.size, local: entry.local });
        at = entry.next;
    }
    Ok(listed)
}

/// The last record of the file; only a comment of at most 64 KiB may follow it.
fn find_end(file: &[u8]) -> Option<usize> {
    let last = file.len().checked_sub(END_LENGTH)?;
    let first = last.saturating_sub(u16::MAX as usize);
    (first..=last).rev().find(|&at| file[at..].starts_with(END))
}

/// The number of entries and where the directory starts.
fn directory(file: &[u8], end: usize) -> Option<(usize, usize)> {
    let locator = end.checked_sub(END64_LOCATOR_LENGTH).filter(|&at| file[at..].starts_with(END64_LOCATOR));
    let (count, start) = match locator {
        None => (u16_at(file, end + 10)? as usize, u32_at(file, end + 16)? as usize),
        Some(locator) => {
            let end64 = usize::try_from(u64_at(file, locator + 8)?).ok()?;
            if !file.get(end64..)?.starts_with(END64) {
                return None;
            }
            let field = |offset| usize::try_from(u64_at(file, end64.checked_add(offset)?)?).ok();
            (field(32)?, field(48)?)
        }
    };
    Some((count, start))
}

struct Entry<'a> {
    name: &'a [u8],
    is_plain: bool,
    size: usize,
    /// Where its local header is, before its content.
    local: usize,
    /// Where the next entry of the directory is.
    next: usize,
}

impl<'a> Entry<'a> {
    fn read(file: &'a [u8], at: usize) -> Option<Self> {
        if !file.get(at..)?.starts_with(ENTRY) {
            return None;
        }
        let flags = u16_at(file, at + 8)?;
        let method = u16_at(file, at + 10)?;
        let packed = u32_at(file, at + 20)?;
        let size = u32_at(file, at + 24)?;
        let [name_length, extra_length, comment_length] =
            [u16_at(file, at + 28)?, u16_at(file, at + 30)?, u16_at(file, at + 32)?].map(usize::from);
        let local = u32_at(file, at + 42)?;
        let name_at = at + 46;
        let extra_at = name_at + name_length;
        let name = file.get(name_at..extra_at)?;
        let mut wide = zip64(file.get(extra_at..extra_at + extra_length)?);
        // the zip64 field has those of the three that do not fit, in this order
        let mut widen = |narrow: u32| match narrow {
            IN_ZIP64 => wide.next().and_then(|wide| usize::try_from(wide).ok()),
            narrow => Some(narrow as usize),
        };
        let size = widen(size)?;
        let packed = widen(packed)?;
        let local = widen(local)?;
        let encrypted = flags & 1 == 1;
        let is_plain = method == 0 && !encrypted && packed == size;
        Some(Self { name, is_plain, size, local, next: extra_at + extra_length + comment_length })
    }

    /// The content follows the local header, whose name and extra field have lengths of their own.
    fn content(&self, file: &[u8]) -> Option<Range<usize>> {
        if !file.get(self.local..)?.starts_with(LOCAL) {
            return None;
        }
        let name_length = u16_at(file, self.local + 26)? as usize;
        let extra_length = u16_at(file, self.local + 28)? as usize;
        let start = self.local + 30 + name_length + extra_length;
        let end = start.checked_add(self.size)?;
        (end <= file.len()).then_some(start..end)
    }
}

/// The 64-bit values of an entry's zip64 extra field.
fn zip64(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut values: &[u8] = &[];
    while let (Some(id), Some(length)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some(field) = extra.get(4..4 + length as usize) else { break };
        if id == 1 {
            values = field;
        }
        extra = &extra[4 + length as usize..];
    }
    values.chunks_exact(8).filter_map(|value| u64_at(value, 0))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
