//! What is set up before anything is measured: memory, files, the device, threads.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    bench::{
        Interrupt, Options, Progress,
        disk::{Disk, Lane, fill_with_numbers},
        link::{DEPTH, Link},
        memory::{Arrays, States},
        quiet::{self, Watch},
    },
    device::DeviceKind,
    doctor::facts::{self, Machine},
    error::{Code, Error, Result},
    memory::SlotPool,
    optim::Pool,
    quantities::ByteCount,
};

/// Bytes of a piece of a pipeline, where there are few threads: small, so that what is in flight stays near the caches.
const PIECE: u64 = 1 << 20;
/// The same with many threads: a piece has to have a task of AdamW for each.
const LARGE_PIECE: u64 = 4 << 20;
/// Pieces on their way between hops, besides those that keep the disk busy.
const BETWEEN: u64 = 8;
/// Bytes in flight in one engine at most, even if block and depth ask for more.
pub(super) const IN_FLIGHT: u64 = 256 << 20;
/// One block of a link's hop, as nvbandwidth has it; and where the processor copies.
const LINK_BLOCK: u64 = 64 << 20;
const HOST_LINK_BLOCK: u64 = 16 << 20;
/// Arrays in memory are so many times as large as the caches.
const BEYOND_CACHES: u64 = 4;
/// Less memory than this is an error before anything is allocated.
const LEAST_MEMORY: ByteCount = ByteCount::mib(384);
/// Filling the files may take this part of the whole time.
const FILLING: u32 = 8;

/// Everything that was set up.
pub(super) struct Bench<'a> {
    pub(super) options: &'a Options,
    pub(super) machine: Machine,
    /// When it all began, the start of the program included.
    pub(super) began: Instant,
    /// What fio took of the time since then.
    pub(super) beside: Duration,
    pub(super) watch: Watch,
    pub(super) disk: Option<Disk>,
    pub(super) link: Rc<Link>,
    /// For the NVMe hops.
    pub(super) blocks: SlotPool,
    /// For the pipelines.
    pub(super) pieces: SlotPool,
    /// Of the triad, and of AdamW; or why memory cannot be measured.
    pub(super) arrays: Rc<RefCell<Arrays>>,
    pub(super) states: Rc<RefCell<States>>,
    pub(super) cached: Option<String>,
    pub(super) pool: Arc<Pool>,
    /// Lines for the user.
    pub(super) notes: Vec<String>,
}

impl<'a> Bench<'a> {
    /// Sets up.
    ///
    /// # Errors
    /// Those of the options, the device, the paths and the engines.
    pub(super) fn new(options: &'a Options, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Self> {
        let (now, watch) = (Instant::now(), Watch::start());
        let began = now.checked_sub(quiet::start_up()).unwrap_or(now);
        check(options)?;
        progress.at(0.0, "looking at the paths");
        let device = facts::chosen(options.device)?;
        let machine = Machine::read(device)?;
        // Each rank has its share of the memory and of the processors, as in training.
        let available = machine.available / u64::from(options.ranks);
        let threads = options.threads.unwrap_or((machine.cpus / options.ranks).max(1));
        has_room(available)?;
        let (mut disk, mut notes) = if options.paths.is_empty() {
            (None, vec!["no path was given: nothing that needs a disk was measured.".to_owned()])
        } else {
            let (disk, notes) = Disk::open(&options.paths, options.file.0 >> 20 << 20)?;
            (Some(disk), notes)
        };
        let paths = options.paths.len().max(1) as u64;
        // An eighth of what is free, and no more than the file asks for: a small test stays small.
        let most = (available / 8).clamp(32 << 20, 4 << 30);
        let side = match device {
            // Beyond the caches is enough; more would take its time to touch first.
            DeviceKind::Host => {
                (machine.cache * BEYOND_CACHES).clamp(HOST_LINK_BLOCK * DEPTH as u64, LINK_BLOCK * DEPTH as u64)
            }
            DeviceKind::Cuda(_) => LINK_BLOCK * DEPTH as u64,
        };
        let side = side.min(most / 4).min(options.file.0);
        // Those in flight, and as many that wait.
        let slots = fit(options.block.0, 2 * u64::from(options.depth) * paths, most);
        let blocks = SlotPool::new(slots, options.block, "blocks of the benchmark")?;
        let in_flight = (options.block.0 * u64::from(options.depth) * paths).max(LARGE_PIECE);
        let piece = if threads > 4 { LARGE_PIECE } else { PIECE };
        let pieces = fit(piece, in_flight / piece + BETWEEN, most.min(options.file.0 / 2 + piece));
        let pieces = SlotPool::new(pieces, ByteCount(piece), "pieces of the benchmark")?;
        fill_slots(&blocks);
        fill_slots(&pieces);
        let link = Link::open(options.device, side, &[Arc::clone(pieces.region())])?;
        let pool = Arc::new(Pool::new(Some(threads as usize))?);
        progress.at(0.01, "making arrays in memory");
        let wanted = (machine.cache * BEYOND_CACHES).max(if options.quick { 192 << 20 } else { 768 << 20 });
        let arrays = wanted.min(most);
        if let Some(disk) = &mut disk {
            let limit = (options.file_limited).then(|| options.limit / FILLING);
            notes.extend(disk.fill(limit, least_file(options), interrupt, |part| {
                progress.at(0.01 + 0.04 * part, "writing the files");
            })?);
        }
        Ok(Self {
            options,
            began,
            beside: Duration::ZERO,
            watch,
            disk,
            link: Rc::new(link),
            blocks,
            pieces,
            arrays: Arrays::new(arrays / 3)?,
            states: States::new((arrays / 14) as usize)?,
            cached: (arrays < 2 * machine.cache).then(|| {
                format!(
                    "not measured: arrays of {} would lie in the caches ({}); more memory has to be available.",
                    ByteCount(arrays),
                    ByteCount(machine.cache)
                )
            }),
            pool,
            notes,
            machine,
        })
    }

    /// Indices of the paths that can be measured.
    pub(super) fn measurable(disk: &Disk) -> Vec<usize> {
        (0..disk.paths.len()).filter(|&n| disk.paths[n].direct.is_ok()).collect()
    }

    /// An engine over some paths, for the blocks and the pieces.
    pub(super) fn lane(&self, disk: &Disk, which: &[usize]) -> Result<Lane> {
        let regions = [Arc::clone(self.blocks.region()), Arc::clone(self.pieces.region())];
        let depth = self.options.depth.saturating_mul(u32::try_from(which.len()).unwrap_or(1)).min(4096);
        disk.lane(which, self.options.engine, self.options.block.0 as usize, depth, &regions)
    }

    /// The block of a link's hop.
    pub(super) fn link_block(&self) -> usize {
        let wanted = if self.link.kind() == DeviceKind::Host { HOST_LINK_BLOCK } else { LINK_BLOCK };
        self.link.block(wanted as usize)
    }

    /// The number of threads of all ranks, in words.
    pub(super) fn threads(&self) -> String {
        match self.pool.threads() * self.options.ranks as usize {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        }
    }
}

/// What the files have to hold at least.
fn least_file(options: &Options) -> u64 {
    options.block.0.max(LARGE_PIECE) * 4
}

fn check(options: &Options) -> Result<()> {
    let least = least_file(options);
    if options.file.0 < least || options.block.0 < 4096 || !options.block.0.is_multiple_of(4096) {
        let message = format!("files of {} and blocks of {} cannot be measured.", options.file, options.block);
        let action = format!("Give --block as a multiple of 4KiB, and --size as at least {}.", ByteCount(least));
        return Err(Error::new(Code::PolicyValue, message).action(action));
    }
    Ok(())
}

/// What is allocated depends on what is there, down to this.
fn has_room(available: u64) -> Result<()> {
    if available >= LEAST_MEMORY.0 {
        return Ok(());
    }
    let message = format!("the benchmark needs {LEAST_MEMORY} of memory, {} are available.", ByteCount(available));
    Err(Error::new(Code::HostAlloc, message).action("End other processes, or raise the container's memory limit."))
}

/// How many slots of `len` bytes to have, at least one.
fn fit(len: u64, count: u64, most: u64) -> u32 {
    let count = count.min(IN_FLIGHT.max(len) / len).min(most / len).clamp(1, 4096);
    u32::try_from(count).unwrap_or(1)
}

/// Touches all slots of a pool, so that no first touch is timed, and leaves nothing in them that a drive could compress.
pub(super) fn fill_slots(pool: &SlotPool) {
    let mut leases: Vec<_> = std::iter::from_fn(|| pool.lease()).collect();
    leases.iter_mut().for_each(|lease| fill_with_numbers(lease.bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_an_error_before_anything_is_allocated() {
        has_room(8 << 30).expect("enough");
        let e = has_room(95 << 20).expect_err("too little");
        assert_eq!(e.code(), Code::HostAlloc);
        assert!(e.to_string().contains("384") && e.to_string().contains("95"), "{e}");
    }

    #[test]
    fn slots_fit_what_is_there() {
        assert_eq!(fit(1 << 20, 32, 4 << 30), 32);
        assert_eq!(fit(1 << 20, 4000, 4 << 30), 256);
        assert_eq!(fit(1 << 20, 32, 8 << 20), 8);
        assert_eq!(fit(1 << 30, 4, 1 << 20), 1);
    }
}
