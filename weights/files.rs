//! Every change that saving makes to the disk, one function each, so that a test can end or refuse any of them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// A new, empty file.
pub(crate) fn create(path: &Path) -> io::Result<Output> {
    fault::step()?;
    OpenOptions::new().write(true).create(true).truncate(true).open(path).map(Output)
}

/// A file that is being written.
pub(crate) struct Output(File);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fault::step_in(&mut self.0, bytes)?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Output {
    /// Waits until all of it is on the disk.
    pub fn sync(&self) -> io::Result<()> {
        fault::step()?;
        if cfg!(test) { Ok(()) } else { self.0.sync_all() } // no test outlives this machine's power
    }
}

/// Gives a file another name, in place of the file that has it.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fault::step()?;
    fs::rename(from, to)
}

/// Removes a file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    fault::step()?;
    fs::remove_file(path)
}

/// Waits until the names in a folder are on the disk, where the system can do that.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    fault::step()?;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(not(test)) {
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
    Ok(())
}

/// Nothing goes wrong outside tests.
#[cfg(not(test))]
mod fault {
    use std::fs::File;
    use std::io;

    pub fn step() -> io::Result<()> {
        Ok(())
    }

    pub fn step_in(_: &mut File, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// What goes wrong with the changes that a test makes, on its own thread.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;
    use std::fs::File;
    use std::io::{self, Write};

    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Fault {
        None,
        /// The program ends after so many changes.
        Kill(usize),
        /// It has ended: no change takes place any more.
        Dead,
        /// The disk refuses one change, after so many.
        Full(usize),
    }

    thread_local! {
        static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
    }

    /// What `run` returns with this fault, and whether it came to pass.
    pub fn with<T>(fault: Fault, run: impl FnOnce() -> T) -> (T, bool) {
        FAULT.set(fault);
        let returned = run();
        let left = FAULT.replace(Fault::None);
        (returned, matches!(left, Fault::Dead | Fault::None))
    }

    pub fn step() -> io::Result<()> {
        let (next, refused) = match FAULT.get() {
            Fault::None => (Fault::None, None),
            Fault::Kill(0) | Fault::Dead => (Fault::Dead, Some(io::ErrorKind::ConnectionAborted)),
            Fault::Full(0) => (Fault::None, Some(io::ErrorKind::StorageFull)),
            Fault::Kill(left) => (Fault::Kill(left - 1), None),
            Fault::Full(left) => (Fault::Full(left - 1), None),
        };
        FAULT.set(next);
        refused.map_or(Ok(()), |kind| Err(kind.into()))
    }

    /// Half of a write takes place when the program ends in it, or the disk is full.
    pub fn step_in(file: &mut File, bytes: &[u8]) -> io::Result<()> {
        let is_last = matches!(FAULT.get(), Fault::Kill(0) | Fault::Full(0));
        step().inspect_err(|_| {
            if is_last {
                let _ = file.write_all(&bytes[..bytes.len() / 2]);
            }
        })
    }
}
