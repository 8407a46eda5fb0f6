//! A store that several processes have: one makes the files, the others open them anew, and all see the same checksums.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    error::{Code, Error, Result},
    io::{IoFile, reopened_file},
    memory::SharedWords,
    store::{
        checksums::Checksums,
        room::{Room, StorePath},
    },
};

/// Words before those of the files: the first one is the bell, which these words do not use.
const HEAD: usize = 1;
/// Set in a file's word where it was opened for direct I/O.
const DIRECT: u64 = 1 << 63;

/// What processes have in common of a store.
#[derive(Debug)]
pub struct Common {
    words: SharedWords,
    /// The process that has made the files; none in that process.
    maker: Option<u32>,
}

/// Words for so many files and chunks.
pub(super) fn words(files: usize, chunks: usize) -> usize {
    HEAD + files + chunks
}

impl Common {
    /// Over words that nothing else looks at; `maker`: the process that has made the files before, none if this one is to.
    pub fn new(words: SharedWords, maker: Option<u32>) -> Self {
        Self { words, maker }
    }

    /// This store as one that another process has made; none where this process makes it.
    pub(super) fn made_by(&self) -> Option<Maker<'_>> {
        self.maker.map(|process| Maker { words: &self.words, process })
    }

    /// Tells the other processes the numbers of the files that this one has made.
    pub(super) fn show(&self, files: &[IoFile]) {
        for (at, file) in files.iter().enumerate().filter(|_| self.maker.is_none()) {
            let direct = if file.is_direct() { DIRECT } else { 0 };
            self.words.store(HEAD + at, u64::from(file.number().unsigned_abs()) | direct);
        }
    }

    pub(super) fn checksums(self, files: usize, enabled: bool) -> Checksums {
        Checksums::shared(self.words, HEAD + files, enabled)
    }
}

/// The process that has made the files.
pub(super) struct Maker<'a> {
    words: &'a SharedWords,
    process: u32,
}

impl Maker<'_> {
    /// Opens the files, which have no names, by their numbers in that process.
    pub(super) fn files(&self, dirs: &[PathBuf], bytes: &[u64]) -> Result<Room> {
        let mut room: Room = (Vec::new(), Vec::new(), Vec::new());
        for (at, (dir, &bytes)) in dirs.iter().zip(bytes).enumerate() {
            let word = self.words.load(HEAD + at);
            let (number, direct) = (word & !DIRECT, word & DIRECT != 0);
            let there = PathBuf::from(format!("/proc/{}/fd/{number}", self.process));
            let file = reopened_file(&there, direct).map_err(|e| self.refused(dir, &there, &e))?;
            if file.metadata().map_or(0, |m| m.len()) < bytes {
                return Err(self.refused(dir, &there, &"it is smaller than planned"));
            }
            let label: Arc<str> = dir.join("data").to_string_lossy().into();
            room.1.push(IoFile::new(file, Arc::clone(&label), direct));
            room.0.push(StorePath { _run_dir: None, label });
        }
        Ok(room)
    }

    fn refused(&self, dir: &Path, there: &Path, why: &dyn std::fmt::Display) -> Error {
        let text = format!(
            "the file that process {} has made in {} cannot be opened as {}: {why}.",
            self.process,
            dir.display(),
            there.display()
        );
        Error::new(Code::PathUnusable, text)
            .action("Run all ranks as one user, in one container that shows their files in /proc.")
    }
}
