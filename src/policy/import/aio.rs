//! The `aio` section, its aliases, and what its keys come to together.

use super::{
    deepspeed::{Import, MAX_BLOCK, remark},
    report::Found,
    scalar,
};
use crate::{
    policy::{
        Auto, format_size,
        source::{Entry, Node, Value},
        suggest,
    },
    quantities::ByteCount,
};

/// Threads per operation, as DeepSpeed's code names it; then as its documentation, its tuner and its benchmark do.
const THREADS: &[&str] = &["intra_op_parallelism", "thread_count", "num_threads", "io_parallel"];

const KEYS: &[&str] = &[
    "block_size",
    "queue_depth",
    "intra_op_parallelism",
    "thread_count",
    "num_threads",
    "io_parallel",
    "single_submit",
    "overlap_events",
    "use_gds",
];

/// Largest queue depth that a policy takes.
const MAX_DEPTH: u64 = 4096;

/// Numbers that are put together at the end.
#[derive(Default)]
pub(super) struct Aio {
    depth: Option<Number>,
    /// A depth is given, and cannot be read.
    unknown: bool,
    threads: Vec<(usize, Number)>,
}

/// A number with what is needed to report it.
struct Number {
    key: String,
    node: Node,
    value: u64,
    note: String,
}

impl Aio {
    pub(super) fn read(&mut self, import: &mut Import<'_>, section: &str, entry: &Entry, misplaced: &str) {
        let key = format!("{section}.{}", entry.key);
        let found = Found { key: &key, node: &entry.node };
        let number = |note: &str| {
            scalar::count(&entry.node).map(|read| Number {
                key: key.clone(),
                node: entry.node.clone(),
                value: read.value,
                note: format!("{note}{}{misplaced}", remark(&read)),
            })
        };
        match entry.key.as_str() {
            _ if matches!(entry.node.value, Value::Null) => import.ignored(found, "empty"),
            "block_size" => block(import, found, misplaced),
            "queue_depth" => match number("") {
                Ok(depth) => self.depth = Some(depth),
                Err(fault) => {
                    self.unknown = true;
                    import.undecided(found, fault);
                }
            },
            "single_submit" | "overlap_events" => {
                import.ignored(
                    found,
                    format!("requests are always submitted in batches here{}{misplaced}", as_flag(found)),
                );
            }
            "use_gds" => {
                import.ignored(
                    found,
                    format!(
                        "GPUDirect Storage is not used; NVMe goes through page-locked host memory{}",
                        as_flag(found)
                    ),
                );
            }
            name => match THREADS.iter().position(|alias| *alias == name) {
                Some(rank) => {
                    let alias = if rank == 0 {
                        ""
                    } else {
                        ", meant as intra_op_parallelism, though DeepSpeed does not read this name"
                    };
                    match number(alias) {
                        Ok(threads) => self.threads.push((rank, threads)),
                        Err(fault) => import.undecided(found, fault),
                    }
                }
                None => {
                    let hint = suggest::did_you_mean(name, KEYS.iter().copied());
                    import.undecided(found, format!("unknown key{hint}; DeepSpeed ignores it without a word"));
                }
            },
        }
    }

    /// Depth times threads is what was in flight.
    pub(super) fn finish(mut self, import: &mut Import<'_>) {
        self.threads.sort_by_key(|(rank, _)| *rank);
        let mut threads = self.threads.into_iter().map(|(_, number)| number);
        let used = threads.next();
        for other in threads {
            let found = Found { key: &other.key, node: &other.node };
            let chosen = used.as_ref().map_or("", |n| n.key.as_str());
            if used.as_ref().is_some_and(|n| n.value == other.value) {
                import.ignored(found, format!("says the same as {chosen}"));
            } else {
                import.undecided(found, format!("contradicts {chosen}, which was taken"));
            }
        }
        let each = used.as_ref().map_or(1, |n| n.value.max(1));
        let base = self.depth.as_ref().map_or(8, |n| n.value);
        let flight = base.saturating_mul(each);
        if let Some(depth) = &self.depth {
            let found = Found { key: &depth.key, node: &depth.node };
            let product = if each > 1 { format!(" ({base} of each of {each} threads)") } else { String::new() };
            queue(import, found, flight, &format!("{product}{}", depth.note));
        }
        if let Some(threads) = &used {
            let found = Found { key: &threads.key, node: &threads.node };
            if self.depth.is_some() {
                import.mapped(found, format!("nvme.queue_depth, as a factor{}", threads.note));
            } else if self.unknown {
                import.undecided(found, "of as many times queue_depth, which is not known: set nvme.queue_depth");
            } else {
                queue(import, found, flight, &format!(" (DeepSpeed's 8 of each of {each} threads){}", threads.note));
            }
        }
    }
}

fn queue(import: &mut Import<'_>, found: Found<'_>, flight: u64, note: &str) {
    match u32::try_from(flight.min(MAX_DEPTH)) {
        Ok(depth) if depth > 0 => {
            import.out.policy.nvme.queue_depth = Auto::Set(depth);
            let capped = if flight > MAX_DEPTH { ", the most there is" } else { "" };
            import.mapped(found, format!("nvme.queue_depth = {depth}{capped}{note}"));
        }
        _ => import.undecided(found, "0 in flight; leave nvme.queue_depth at \"auto\""),
    }
}

fn block(import: &mut Import<'_>, found: Found<'_>, misplaced: &str) {
    match scalar::count(found.node) {
        Err(fault) => import.undecided(found, fault),
        Ok(read) => {
            let wanted = ByteCount(read.value);
            let block = ByteCount(wanted.0.clamp(4096, MAX_BLOCK.0).next_power_of_two());
            import.out.policy.nvme.block = block;
            let rounded = if block == wanted { "" } else { ", the nearest power of two that is allowed" };
            let note = format!("nvme.block = \"{}\"{rounded}{}{misplaced}", format_size(block), remark(&read));
            import.mapped(found, note);
        }
    }
}

/// A remark on a boolean that is written as something else.
fn as_flag(found: Found<'_>) -> String {
    scalar::flag(found.node).map_or_else(|fault| format!(" ({fault})"), |read| remark(&read))
}
