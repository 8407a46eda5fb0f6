//! Tensors read one after the other: bytes checked against their checksums, converted on the way.

use twox_hash::XxHash3_64;

use std::hash::Hasher;

use crate::{
    checkpoint::{
        GRAIN,
        contents::{Contents, Found},
        control::Control,
        convert::Conversion,
        reader::{Range, Reader, damaged},
        writer::FrameBudget,
    },
    error::{Code, Error, Result},
};

/// Elements are converted through this many bytes.
const SCRATCH: usize = 64 << 10;

/// Sums pieces of a stream of bytes.
pub(super) struct Pieces {
    piece: u64,
    hasher: XxHash3_64,
    inside: u64,
    /// The sums of the pieces that are complete.
    pub(super) sums: Vec<u64>,
}

impl Pieces {
    pub(super) fn new(piece: u64) -> Self {
        Self { piece, hasher: XxHash3_64::new(), inside: 0, sums: Vec::new() }
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = (self.piece - self.inside).min(bytes.len() as u64) as usize;
            self.hasher.write(&bytes[..n]);
            self.inside += n as u64;
            bytes = &bytes[n..];
            if self.inside == self.piece {
                self.close();
            }
        }
    }

    /// The tensor has ended.
    pub(super) fn end(&mut self) {
        if self.inside > 0 {
            self.close();
        }
    }

    fn close(&mut self) {
        self.sums.push(self.hasher.finish());
        self.hasher = XxHash3_64::new();
        self.inside = 0;
    }
}

/// Reads a list of tensors in order.
pub struct TensorReader<'a> {
    reader: Reader<'a>,
    contents: &'a Contents,
    tensors: Vec<&'a Found>,
    /// The tensor at hand, how much of it was read, and its sums so far.
    next: usize,
    read: u64,
    pieces: Pieces,
    scratch: Vec<u8>,
}

impl<'a> TensorReader<'a> {
    /// Opens the files and begins to read.
    ///
    /// # Errors
    /// Those of [`Reader::open`].
    pub fn open(
        contents: &'a Contents,
        tensors: Vec<&'a Found>,
        budget: &FrameBudget,
        control: &'a Control,
    ) -> Result<Self> {
        let ranges = tensors.iter().map(|t| Range { file: t.file, start: t.start, end: t.end }).collect();
        let reader = Reader::open(&contents.files, ranges, budget, control)?;
        let pieces = Pieces::new(contents.piece);
        Ok(Self { reader, contents, tensors, next: 0, read: 0, pieces, scratch: Vec::new() })
    }

    /// The tensor at hand.
    ///
    /// # Errors
    /// `FN-E101` if there is none.
    pub fn tensor(&self) -> Result<&'a Found> {
        self.tensors.get(self.next).copied().ok_or_else(|| Error::new(Code::Stale, "no tensor is left to read."))
    }

    /// Fills `out` with the next elements of the tensor at hand.
    ///
    /// # Errors
    /// `FN-E406` as soon as a checksum differs; `FN-E404`, `FN-E412`.
    pub fn read(&mut self, conversion: Conversion, out: &mut [u8]) -> Result<()> {
        let size = self.tensor()?.dtype.bitsize() / 8;
        let (from, to) = conversion.sizes(size.max(1));
        if conversion == Conversion::Same {
            return self.exactly(out);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(SCRATCH, 0);
        let result = out.chunks_mut(SCRATCH / from * to).try_for_each(|piece| {
            let raw = &mut scratch[..piece.len() / to * from];
            self.exactly(raw)?;
            conversion.apply(raw, piece);
            Ok(())
        });
        self.scratch = scratch;
        result
    }

    fn exactly(&mut self, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor()?;
        let mut at = 0;
        while at < out.len() {
            let bytes = self.reader.take((out.len() - at).min(GRAIN))?;
            if bytes.is_empty() {
                return Err(damaged(format!("'{}' ends too early.", tensor.name)));
            }
            out[at..at + bytes.len()].copy_from_slice(bytes);
            if tensor.sums.is_some() {
                self.pieces.feed(bytes);
            }
            at += bytes.len();
        }
        self.read += at as u64;
        self.check(tensor)
    }

    /// Reads what is left of the tensor at hand only to check it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn skim(&mut self) -> Result<()> {
        let tensor = self.tensor()?;
        while self.read < tensor.end - tensor.start {
            let bytes = self.reader.take((tensor.end - tensor.start - self.read) as usize)?;
            if bytes.is_empty() {
                return Err(damaged(format!("'{}' ends too early.", tensor.name)));
            }
            if tensor.sums.is_some() {
                self.pieces.feed(bytes);
            }
            self.read += bytes.len() as u64;
        }
        self.check(tensor)
    }

    /// Goes on to the next tensor, once all of the one at hand was read.
    pub fn advance(&mut self) {
        self.next += 1;
        self.read = 0;
        self.pieces = Pieces::new(self.contents.piece);
    }

    fn check(&mut self, tensor: &Found) -> Result<()> {
        if self.read == tensor.end - tensor.start {
            self.pieces.end();
        }
        let Some(sums) = &tensor.sums else { return Ok(()) };
        let Some(bad) = self.pieces.sums.iter().zip(sums).position(|(a, b)| a != b) else { return Ok(()) };
        let file = &self.contents.files[tensor.file as usize];
        let start = tensor.start + bad as u64 * self.contents.piece;
        Err(damaged(format!(
            "{}: '{}', bytes {start} to {}: the checksum of what was written is {:016x}, of what was read {:016x}.",
            file.path.display(),
            tensor.name,
            tensor.end.min(start.saturating_add(self.contents.piece)),
            sums[bad],
            self.pieces.sums[bad],
        )))
    }
}

/// Reads tensors only to check them; what is wrong with each, in order.
///
/// # Errors
/// Those of [`TensorReader::open`], `FN-E412`.
pub fn verify(
    contents: &Contents,
    tensors: Vec<&Found>,
    budget: &FrameBudget,
    control: &Control,
) -> Result<Vec<Error>> {
    let mut wrong = Vec::new();
    let mut left = tensors;
    while !left.is_empty() {
        let mut reader = TensorReader::open(contents, left.clone(), budget, control)?;
        let mut good = 0;
        let error = loop {
            match reader.skim() {
                Ok(()) if good + 1 == left.len() => return Ok(wrong),
                Ok(()) => reader.advance(),
                Err(e) => break e,
            }
            good += 1;
        };
        control.check()?;
        wrong.push(error);
        // What follows is read anew: the stream stands somewhere inside the bad tensor.
        left.drain(..=good);
    }
    Ok(wrong)
}
