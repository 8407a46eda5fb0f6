//! What several ranks of one host need and take: host memory once, all else for each.

use std::fmt;

use serde::Serialize;

use crate::{
    dtype::StateKind,
    model::{Layout, Unit},
    quantities::ByteCount,
    schedule::{Placement, cost::Rates, ranks::owned::owned, traffic::Traffic},
};

/// Units whose exchanges may be under way on a GPU before backward waits for the first of them: their gradients stay in memory for so long.
/// `python/funicular/ranks/on_gpu.py` goes by it.
pub const EXCHANGES_UNDER_WAY: u64 = 4;

/// What is known of all ranks together, and of each.
#[derive(Clone, Debug, Serialize)]
pub struct RanksPlan {
    /// How many.
    pub ranks: usize,
    /// Threads of the update, of each.
    pub threads: u32,
    /// Bytes of the compute tier of all, each of which has frames of its own.
    pub hbm: u64,
    /// Whether the compute tier is host memory.
    pub on_host: bool,
    /// Bytes of a rank's own gradients, before they are exchanged: at most in its first backward, and later.
    pub own_gradients: (u64, u64),
    /// Gradients that rank 0 sends and receives in a step.
    pub exchange: u64,
    /// Bytes through host memory in a step, of all ranks.
    pub through_host: u64,
    /// Of that, per trained parameter.
    pub per_parameter: f64,
}

/// What several ranks take of a model that is placed so, whose step moves so much for one process.
pub(super) fn of(
    layout: &Layout,
    placed: &Placement,
    moved: &Traffic,
    (ranks, threads): (usize, u32),
    passes: u32,
    on_host: bool,
) -> RanksPlan {
    let grads = |unit: &Unit| unit.params.iter().map(|p| gradient_bytes(unit, p.section, p.numel)).sum::<u64>();
    let all: u64 = layout.units.iter().map(grads).sum();
    let largest = layout.units.iter().map(grads).max().unwrap_or(0);
    let through_host = moved.up * ranks as u64 + moved.down + moved.update;
    #[expect(clippy::cast_precision_loss, reason = "a figure for a person")]
    let per_parameter = through_host as f64 / moved.updated_on_host.max(1) as f64;
    RanksPlan {
        ranks,
        threads,
        hbm: placed.hbm_bytes * ranks as u64,
        on_host,
        // On the host device units are exchanged at the end of a backward; on GPUs once all of a unit has come, but for the first backward,
        // in which nothing tells what will come. The mean of the unit that is exchanged is there as a whole too, for its norm.
        own_gradients: (all, if on_host { all } else { (EXCHANGES_UNDER_WAY * largest).min(all) + largest }),
        exchange: u64::from(passes)
            * layout.ids().map(|id| exchanged((layout.unit(id), placed.owned_block(id)), 0, ranks)).sum::<u64>(),
        through_host,
        per_parameter,
    }
}

/// What to say of rates that another number of ranks measured at once; nothing where it is the same.
pub(super) fn measured_otherwise(measured: usize, planned: usize) -> Option<String> {
    let by = if measured == 1 { "one process".to_owned() } else { format!("{measured} ranks at once") };
    (measured != planned).then(|| match planned {
        1 => format!("These rates are of {by}; one alone may be faster. Measure it: funicular bench --save."),
        _ => format!(
            "These rates are of {by}, not of {planned} ranks; what all copy at once is not more than memory.bandwidth. Measure it: torchrun \
             --nproc-per-node {planned} -m funicular bench --save."
        ),
    })
}

fn gradient_bytes(unit: &Unit, section: usize, elems: u64) -> u64 {
    let section = &unit.sections[section];
    if section.trainable { elems * StateKind::Grad.element_size(section.dtype) as u64 } else { 0 }
}

/// Bytes of a unit's gradients that a rank sends and receives: what others own, once, and what it owns itself, of each of the others.
fn exchanged((unit, block): (&Unit, u64), rank: usize, ranks: usize) -> u64 {
    let one = |p: &crate::model::ParamPlace| {
        let part = owned(unit.sections[p.section].elems, block, rank, ranks);
        let mine = part.end.min(p.start + p.numel).saturating_sub(part.start.max(p.start));
        gradient_bytes(unit, p.section, (p.numel - mine) + mine * (ranks as u64 - 1))
    };
    unit.params.iter().map(one).sum()
}

impl RanksPlan {
    /// What one rank moves of what one process would.
    pub(super) fn share(&self, all: u64) -> u64 {
        all.div_ceil(self.ranks as u64)
    }

    /// The rates by which a rank's step is played through: it copies all parameters up, by its part of the host's memory, and waits for the
    /// gradients and the updates of all, which all make at once. `memory`: what the host's memory moves, 0 if that is not known, or if `one` is
    /// of as many ranks measured at once.
    pub(super) fn rates(&self, one: &Rates, memory: f64) -> Rates {
        #[expect(clippy::cast_precision_loss, reason = "a handful of ranks")]
        let ranks = self.ranks as f64;
        let memory = if memory > 0.0 { memory } else { f64::INFINITY };
        // Where ranks share one processor, its copies are measured on all of it.
        let links = if self.on_host { 1.0 } else { ranks };
        Rates {
            up: (one.up * links / ranks).min(memory / ranks),
            down: (one.down * links).min(memory),
            both: (one.both * links / ranks).min(memory / ranks),
            ..*one
        }
    }
}

impl fmt::Display for RanksPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, later) = self.own_gradients;
        let beside = if self.on_host { "Of host memory each takes that beside the tier host" } else { "On each GPU" };
        write!(
            f,
            "{} ranks: the tier host is there once, hbm on each, {} in all. {beside}{} {} of own gradients until they are exchanged",
            self.ranks,
            ByteCount(self.hbm),
            if self.on_host { ", and" } else { " come" },
            ByteCount(first),
        )?;
        if later < first {
            write!(f, " in its first backward, {} in later ones", ByteCount(later))?;
        }
        write!(
            f,
            ". Through host memory go {} per step, {:.1} bytes a parameter.",
            ByteCount(self.through_host),
            self.per_parameter
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::ranks::owned::OWNED_BLOCK;
    use crate::{
        dtype::DType,
        model::{ParamSpec, UnitSpec},
    };

    #[test]
    fn what_ranks_exchange_is_all_that_is_not_their_own() {
        let param = |numel, trainable| ParamSpec { name: "p".into(), numel, dtype: DType::Bf16, trainable };
        let unit = UnitSpec { name: "u".into(), params: vec![param(100_000, true), param(7, true), param(900, false)] };
        let layout = Layout::new(&[unit]).expect("a layout");
        let (unit, all) = (&layout.units[0], 2 * 100_007);
        let of = |rank, ranks| exchanged((unit, OWNED_BLOCK), rank, ranks);
        assert_eq!((of(0, 2), of(1, 2)), (all, all), "of two ranks each has every byte of it, sent or received");
        let sum: u64 = (0..4).map(|rank| of(rank, 4)).sum();
        assert_eq!(sum, 2 * 3 * all, "each byte is sent by three and received by one, three times");
    }
}
