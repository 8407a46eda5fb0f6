//! Packing of parameters into sections and units.

use crate::{
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    quantities::{UnitId, round_up},
};

/// Parameters start at multiples of this many elements: 256 bytes for 2-byte types, so that kernels see the alignment
/// that a tensor of their own would have.
pub const ALIGN_ELEMS: u64 = 128;
/// Sections start at multiples of this many bytes: the block of direct I/O.
pub const SECTION_ALIGN: u64 = 4096;

/// One parameter as the wrapper found it.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// Its first name in the model.
    pub name: String,
    /// Elements.
    pub numel: u64,
    /// Element type.
    pub dtype: DType,
    /// Whether it gets gradients and optimizer states.
    pub trainable: bool,
}

/// The parameters that are paged together.
#[derive(Clone, Debug)]
pub struct UnitSpec {
    /// The module's name.
    pub name: String,
    /// Its parameters, in the order of the model.
    pub params: Vec<ParamSpec>,
}

/// A run of parameters of one type and trainability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Element type.
    pub dtype: DType,
    /// Whether it has gradients and optimizer states.
    pub trainable: bool,
    /// Elements, padding included.
    pub elems: u64,
    /// First byte of the section in the unit's parameter segment; the gradient segment uses the same.
    pub offset: u64,
}

impl Section {
    /// Bytes of one kind of this section; none where the section has no such state.
    pub fn bytes(&self, kind: StateKind) -> u64 {
        if kind != StateKind::Param && !self.trainable {
            return 0;
        }
        self.elems * kind.element_size(self.dtype) as u64
    }
}

/// Where a parameter lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamPlace {
    /// Its name.
    pub name: String,
    /// Index of its section in the unit.
    pub section: usize,
    /// First element in the section.
    pub start: u64,
    /// Elements.
    pub numel: u64,
}

/// A unit, packed.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The module's name.
    pub name: String,
    /// Its sections.
    pub sections: Vec<Section>,
    /// Its parameters, in the order in which they were given.
    pub params: Vec<ParamPlace>,
}

impl Unit {
    /// Bytes of the parameter segment, a multiple of [`SECTION_ALIGN`].
    pub fn param_bytes(&self) -> u64 {
        self.sections.iter().map(|s| round_up(s.bytes(StateKind::Param), SECTION_ALIGN)).sum()
    }

    /// Bytes of the optimizer's states, each kind of each section padded to [`SECTION_ALIGN`].
    pub fn optimizer_bytes(&self) -> u64 {
        let padded = |s: &Section, k| round_up(s.bytes(k), SECTION_ALIGN);
        self.sections.iter().flat_map(|s| StateKind::OPTIMIZER.map(|k| padded(s, k))).sum()
    }

    /// True if any of its parameters is trained.
    pub fn trainable(&self) -> bool {
        self.sections.iter().any(|s| s.trainable)
    }

    /// Bytes of the gradient segment: as the parameters, none where nothing is trained.
    pub fn grad_bytes(&self) -> u64 {
        if self.trainable() { self.param_bytes() } else { 0 }
    }
}

/// All units of a model.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The units, in the order of the model.
    pub units: Vec<Unit>,
}

impl Layout {
    /// Packs units.
    ///
    /// # Errors
    /// `FN-E112` when a unit is too large to be addressed.
    pub fn new(specs: &[UnitSpec]) -> Result<Self> {
        Ok(Self { units: specs.iter().map(pack).collect::<Result<_>>()? })
    }

    /// The unit of that number.
    pub fn unit(&self, id: UnitId) -> &Unit {
        &self.units[id.index()]
    }

    /// All unit numbers, in order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = UnitId> + use<> {
        (0..u32::try_from(self.units.len()).unwrap_or(u32::MAX)).map(UnitId)
    }
}

fn pack(spec: &UnitSpec) -> Result<Unit> {
    let too_large =
        |p: &ParamSpec| Error::new(Code::UnsupportedParam, format!("'{}' is too large to be addressed.", p.name));
    let mut unit = Unit { name: spec.name.clone(), sections: Vec::new(), params: Vec::new() };
    for p in &spec.params {
        let trainable = p.trainable && p.dtype.trainable();
        let section =
            unit.sections.iter().position(|s| s.dtype == p.dtype && s.trainable == trainable).unwrap_or_else(|| {
                unit.sections.push(Section { dtype: p.dtype, trainable, elems: 0, offset: 0 });
                unit.sections.len() - 1
            });
        let start = unit.sections[section].elems;
        if p.numel > (1 << 48) {
            return Err(too_large(p));
        }
        unit.sections[section].elems = start + round_up(p.numel, ALIGN_ELEMS);
        unit.params.push(ParamPlace { name: p.name.clone(), section, start, numel: p.numel });
    }
    let mut offset = 0;
    for s in &mut unit.sections {
        s.offset = offset;
        offset += round_up(s.bytes(StateKind::Param), SECTION_ALIGN);
    }
    Ok(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(params: &[(u64, DType, bool)]) -> UnitSpec {
        let params = params
            .iter()
            .enumerate()
            .map(|(i, &(numel, dtype, trainable))| ParamSpec { name: format!("p{i}"), numel, dtype, trainable })
            .collect();
        UnitSpec { name: "u".into(), params }
    }

    #[test]
    fn parameters_of_one_type_share_a_section() {
        let layout = Layout::new(&[spec(&[
            (100, DType::Bf16, true),
            (3, DType::F32, true),
            (200, DType::Bf16, true),
            (0, DType::Bf16, true),
            (5, DType::Bf16, false),
        ])])
        .expect("packs");
        let unit = &layout.units[0];
        assert_eq!(unit.sections.len(), 3);
        assert_eq!(unit.params[2], ParamPlace { name: "p2".into(), section: 0, start: 128, numel: 200 });
        assert_eq!(unit.sections[0].elems, 128 + 256);
        assert_eq!(unit.sections[1].offset, 4096);
        assert_eq!(unit.param_bytes(), 3 * 4096);
        assert_eq!(unit.sections[2].bytes(StateKind::ExpAvg), 0, "frozen parameters have no states");
    }

    proptest::proptest! {
        #[test]
        fn places_never_overlap(sizes in proptest::collection::vec((0u64..5000, 0u8..4, proptest::bool::ANY), 0..40)) {
            let dtypes = [DType::F32, DType::Bf16, DType::F16, DType::Opaque { size: 1 }];
            let params: Vec<_> = sizes.iter().map(|&(n, d, t)| (n, dtypes[d as usize], t)).collect();
            let layout = Layout::new(&[spec(&params)]).expect("packs");
            let unit = &layout.units[0];
            let mut ranges: Vec<(u64, u64)> = unit.params.iter().map(|p| {
                let s = &unit.sections[p.section];
                let size = s.dtype.size() as u64;
                (s.offset + p.start * size, s.offset + (p.start + p.numel) * size)
            }).filter(|r| r.0 < r.1).collect();
            ranges.sort_unstable();
            proptest::prop_assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0));
            proptest::prop_assert!(ranges.last().is_none_or(|r| r.1 <= unit.param_bytes()));
        }
    }
}
