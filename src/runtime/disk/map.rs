//! Which segment of the store holds which kind of which section, and how update chunks cut them.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    dtype::StateKind,
    error::Result,
    io::{Direction, IoPart},
    model::Layout,
    quantities::{Tier, UnitId},
    runtime::{paging::homes::Set, ranks::spec::RankSpec},
    schedule::{Placement, ranks::owned::owned},
    store::Store,
};

/// The kinds that may lie on NVMe, in the order of an update slot, which has no room for the last where no gradients do.
pub const KINDS: [StateKind; 5] =
    [StateKind::Param, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq, StateKind::Grad];

/// A piece of an update that is streamed: elements of one section.
#[derive(Clone, Copy, Debug)]
pub struct UpdateChunk {
    /// Section of the unit.
    pub section: usize,
    /// First element.
    pub start: u64,
    /// Elements.
    pub len: u64,
}

/// Segment numbers by unit, section and kind.
#[derive(Debug)]
pub struct Map {
    /// Of both places of a unit; those of a unit with one place are the same.
    segments: [Vec<Vec<[Option<usize>; KINDS.len()]>>; 2],
    /// Per unit, whether the second place is the current one.
    swapped: Vec<AtomicBool>,
    chunks: Vec<Vec<UpdateChunk>>,
    /// Bytes and label of each segment, in the order of their numbers.
    pub specs: Vec<(u64, String)>,
    update_elems: u64,
}

impl Map {
    /// Numbers the segments of everything that lives on NVMe; of several `ranks` each updates what it owns.
    pub fn new(layout: &Layout, placement: &Placement, ranks: Option<RankSpec>) -> Self {
        let mut specs = Vec::new();
        let mut segments = [Vec::new(), Vec::new()];
        let mut chunks = Vec::new();
        for (id, (home, &spare)) in layout.ids().zip(placement.homes.iter().zip(&placement.spare)) {
            let unit = layout.unit(id);
            let mut of_unit = [Vec::new(), Vec::new()];
            let mut cuts = Vec::new();
            for (index, section) in unit.sections.iter().enumerate() {
                let mut ids = [[None; KINDS.len()]; 2];
                for (slot, kind) in KINDS.into_iter().enumerate() {
                    let tier = match kind {
                        StateKind::Param => home.params,
                        StateKind::Grad => home.grads,
                        _ => home.optimizer,
                    };
                    let bytes = section.bytes(kind);
                    if tier == Tier::Nvme && bytes > 0 {
                        ids[0][slot] = Some(specs.len());
                        ids[1][slot] = ids[0][slot];
                        specs.push((bytes, format!("{} {}", unit.name, kind.name())));
                        if spare && kind != StateKind::Grad {
                            ids[1][slot] = Some(specs.len());
                            specs.push((bytes, format!("{} {}, second place", unit.name, kind.name())));
                        }
                    }
                }
                if section.trainable && ids[0].iter().any(Option::is_some) {
                    let (step, block) = (placement.update_elems, placement.owned_block(id));
                    let all = 0..section.elems;
                    let own = ranks.map_or(all, |ranks| owned(section.elems, block, ranks.rank, ranks.size));
                    cuts.extend(own.clone().step_by(step as usize).map(|start| UpdateChunk {
                        section: index,
                        start,
                        len: step.min(own.end - start),
                    }));
                }
                of_unit.iter_mut().zip(ids).for_each(|(place, ids)| place.push(ids));
            }
            segments.iter_mut().zip(of_unit).for_each(|(place, of_unit)| place.push(of_unit));
            chunks.push(cuts);
        }
        let swapped = layout.units.iter().map(|_| AtomicBool::new(false)).collect();
        Self { segments, swapped, chunks, specs, update_elems: placement.update_elems }
    }

    /// The segment of a kind of a section, if it lives on NVMe, in the unit's current place.
    pub fn segment(&self, unit: UnitId, section: usize, kind: StateKind) -> Option<usize> {
        self.segment_in(Set::Current, unit, section, kind)
    }

    fn segment_in(&self, set: Set, unit: UnitId, section: usize, kind: StateKind) -> Option<usize> {
        let slot = KINDS.iter().position(|&k| k == kind)?;
        let place = usize::from(self.swapped[unit.index()].load(Ordering::Acquire) == (set == Set::Current));
        self.segments[place][unit.index()][section][slot]
    }

    /// Makes a unit's other place the current one.
    pub fn swap(&self, unit: UnitId) {
        self.swapped[unit.index()].fetch_xor(true, Ordering::AcqRel);
    }

    /// How many pieces a unit's update is streamed in; 0 if nothing of it lives on NVMe.
    pub fn chunk_count(&self, unit: UnitId) -> u32 {
        u32::try_from(self.chunks[unit.index()].len()).unwrap_or(u32::MAX)
    }

    /// One piece.
    pub fn chunk(&self, unit: UnitId, index: u32) -> UpdateChunk {
        self.chunks[unit.index()][index as usize]
    }

    /// Where a kind starts in an update slot: four bytes per element for each kind.
    pub fn slot_offset(&self, kind: StateKind) -> usize {
        let slot = KINDS.iter().position(|&k| k == kind).unwrap_or(0);
        slot * self.update_elems as usize * 4
    }

    /// The store's chunks that a byte range of a segment touches.
    pub fn store_chunks(store: &Store, bytes: Range<u64>) -> Range<u32> {
        let size = store.chunk_bytes();
        (bytes.start / size) as u32..bytes.end.div_ceil(size) as u32
    }

    /// Parts that move the NVMe kinds of one update chunk. Gradients are read only, and only if `grads` says that they are not in memory.
    /// What was never written is skipped on reading; true if there was such a piece, and the caller zero-fills the slot first.
    pub fn update_parts(
        &self,
        store: &Store,
        layout: &Layout,
        unit: UnitId,
        chunk: UpdateChunk,
        (direction, set, grads): (Direction, Set, bool),
        parts: &mut Vec<IoPart>,
    ) -> bool {
        let mut skipped = false;
        self.for_each(layout, (unit, set), chunk, |segment, kind, bytes| {
            if kind == StateKind::Grad && !(grads && direction == Direction::Read) {
                return;
            }
            let mut at = self.slot_offset(kind);
            for c in Self::store_chunks(store, bytes) {
                if direction == Direction::Write || store.written(segment, c) {
                    store.parts(segment, c..c + 1, direction, at, parts);
                } else {
                    skipped = true;
                }
                at += store.chunk_bytes() as usize;
            }
        });
        skipped
    }

    /// Seals (before a write) or verifies (after a read) every store chunk of an update chunk in its slot.
    ///
    /// # Errors
    /// `FN-E302` when bytes read are not those written.
    pub fn check(
        &self,
        store: &Store,
        layout: &Layout,
        unit: UnitId,
        chunk: UpdateChunk,
        (direction, set, grads): (Direction, Set, bool),
        slot: &[u8],
    ) -> Result<()> {
        let mut result = Ok(());
        self.for_each(layout, (unit, set), chunk, |segment, kind, bytes| {
            if kind == StateKind::Grad && !(grads && direction == Direction::Read) {
                return;
            }
            let mut at = self.slot_offset(kind);
            for c in Self::store_chunks(store, bytes) {
                let len = store.chunk_len(segment, c) as usize;
                if direction == Direction::Write {
                    store.seal(segment, c, &slot[at..at + len]);
                } else if result.is_ok() && store.written(segment, c) {
                    result = store.verify(segment, c, &slot[at..at + len]);
                }
                at += store.chunk_bytes() as usize;
            }
        });
        result
    }

    fn for_each(
        &self,
        layout: &Layout,
        (unit, set): (UnitId, Set),
        chunk: UpdateChunk,
        mut f: impl FnMut(usize, StateKind, Range<u64>),
    ) {
        let section = &layout.unit(unit).sections[chunk.section];
        for kind in KINDS {
            if let Some(segment) = self.segment_in(set, unit, chunk.section, kind) {
                let size = kind.element_size(section.dtype) as u64;
                f(segment, kind, chunk.start * size..(chunk.start + chunk.len) * size);
            }
        }
    }
}
