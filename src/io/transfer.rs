//! One block on its way: what is left of it, and what a result of the system means. Pure; both engines use it.

use std::path::Path;

use super::{ALIGNMENT, Direction, FileId, IoFile};
use crate::error::{Code, Error};

/// How often a block without progress is tried again after `EIO`.
const IO_ERROR_RETRIES: u16 = 3;
/// The same after `EINTR` and `EAGAIN`, which are no fault of the disk.
const BUSY_RETRIES: u16 = 1000;
/// How often a direct transfer may end before the first aligned byte.
const STALL_RETRIES: u16 = 3;

/// A contiguous piece of a part, small enough to be one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) direction: Direction,
    pub(super) file: FileId,
    pub(super) offset: u64,
    /// Address of the first byte in memory; the request's lease keeps it valid while the block is in flight.
    pub(super) address: usize,
    pub(super) len: usize,
}

/// Why a block failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The system's error number, and how often it was tried.
    Errno(i32, u16),
    /// The file ended, or the disk took no more, after this many bytes.
    Short(usize),
}

/// What to do after a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    /// Issue [`Transfer::rest`].
    Again,
    Failed(Failure),
}

/// A block and how far it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    block: Block,
    direct: bool,
    done: usize,
    errors: u16,
    busy: u16,
    stalls: u16,
}

impl Transfer {
    pub(super) fn new(block: Block, direct: bool) -> Self {
        Self { block, direct, done: 0, errors: 0, busy: 0, stalls: 0 }
    }

    pub(super) fn block(&self) -> &Block {
        &self.block
    }

    /// What is left to transfer; aligned if the file is direct and the block was.
    pub(super) fn rest(&self) -> Block {
        Block {
            offset: self.block.offset + self.done as u64,
            address: self.block.address + self.done,
            len: self.block.len - self.done,
            ..self.block
        }
    }

    /// Takes the result of issuing [`Self::rest`]: bytes transferred, or a negative error number.
    pub(super) fn advance(&mut self, result: i64) -> Step {
        if result < 0 {
            let errno = i32::try_from(-result).unwrap_or(libc::EIO);
            let (count, limit) = match errno {
                libc::EINTR | libc::EAGAIN => (&mut self.busy, BUSY_RETRIES),
                libc::EIO => (&mut self.errors, IO_ERROR_RETRIES),
                _ => return Step::Failed(Failure::Errno(errno, 1)),
            };
            *count += 1;
            return if *count > limit { Step::Failed(Failure::Errno(errno, *count)) } else { Step::Again };
        }
        let got = usize::try_from(result).unwrap_or(0).min(self.block.len - self.done);
        let reached = self.done + got;
        if reached == self.block.len {
            self.done = reached;
            return Step::Done;
        }
        if got == 0 {
            return Step::Failed(Failure::Short(self.done));
        }
        // The next operation has to start aligned again; the tail beyond the last aligned byte is done twice.
        let resume = if self.direct { reached - reached % ALIGNMENT } else { reached };
        if resume > self.done {
            (self.done, self.errors, self.busy, self.stalls) = (resume, 0, 0, 0);
            return Step::Again;
        }
        self.stalls += 1;
        if self.stalls > STALL_RETRIES { Step::Failed(Failure::Short(reached)) } else { Step::Again }
    }
}

impl Failure {
    /// As an error that names everything.
    pub(super) fn error(self, block: &Block, file: &IoFile) -> Error {
        let (doing, done) = match block.direction {
            Direction::Read => ("reading", "read"),
            Direction::Write => ("writing", "written"),
        };
        let place = format!("{doing} {} bytes at offset {} of {}", block.len, block.offset, file.label());
        match self {
            Self::Errno(errno, tries) => {
                let cause = std::io::Error::from_raw_os_error(errno);
                let tries = if tries > 1 { format!(", {tries} times") } else { String::new() };
                let action = crate::os_error::advice(errno, Path::new(file.label()))
                    .unwrap_or_else(|| "See dmesg for what the kernel says about that device.".to_owned());
                Error::new(Code::IoFailed, format!("{place}: {cause}{tries}.")).errno(errno).action(action)
            }
            Self::Short(bytes) => Error::new(Code::IoFailed, format!("{place}: only {bytes} bytes were {done}."))
                .errno(libc::EIO)
                .action("The file is shorter than it was: was it truncated by another program?"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(direct: bool) -> Transfer {
        let block =
            Block { direction: Direction::Read, file: FileId(0), offset: 8192, address: 1 << 20, len: 5 * ALIGNMENT };
        Transfer::new(block, direct)
    }

    #[test]
    fn a_short_direct_transfer_resumes_at_the_last_aligned_byte() {
        let mut t = transfer(true);
        assert_eq!(t.advance(2 * 4096 + 100), Step::Again);
        assert_eq!((t.rest().offset, t.rest().address, t.rest().len), (16384, (1 << 20) + 8192, 3 * 4096));
        assert_eq!(t.advance(3 * 4096), Step::Done);
    }

    #[test]
    fn a_short_buffered_transfer_resumes_where_it_stopped() {
        let mut t = transfer(false);
        assert_eq!(t.advance(100), Step::Again);
        assert_eq!((t.rest().offset, t.rest().len), (8292, 5 * 4096 - 100));
    }

    #[test]
    fn the_end_of_the_file_is_an_error_not_a_loop() {
        let mut t = transfer(true);
        assert_eq!(t.advance(4096), Step::Again);
        assert_eq!(t.advance(0), Step::Failed(Failure::Short(4096)));
        let mut t = transfer(true);
        let steps: Vec<Step> = (0..4).map(|_| t.advance(100)).collect();
        assert_eq!(steps, [Step::Again, Step::Again, Step::Again, Step::Failed(Failure::Short(100))]);
    }

    #[test]
    fn retries_are_bounded_and_start_anew_after_progress() {
        let mut t = transfer(true);
        for _ in 0..3 {
            assert_eq!(t.advance(-5), Step::Again);
        }
        assert_eq!(t.advance(4096), Step::Again);
        for _ in 0..3 {
            assert_eq!(t.advance(-5), Step::Again);
        }
        assert_eq!(t.advance(-5), Step::Failed(Failure::Errno(5, 4)));
        let mut t = transfer(true);
        let again = (0..2000).take_while(|_| t.advance(-i64::from(libc::EAGAIN)) == Step::Again).count();
        assert_eq!(again, 1000);
        assert_eq!(transfer(true).advance(-28), Step::Failed(Failure::Errno(28, 1)));
    }
}
