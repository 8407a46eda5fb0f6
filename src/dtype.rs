//! Element types that can be paged, and the kinds of state a parameter has.

/// Element type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the high half of an `F32`.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Anything else, paged as bytes and never updated.
    Opaque {
        /// Bytes per element.
        size: u8,
    },
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Opaque { size } => size as usize,
        }
    }

    /// True where AdamW has a kernel for it.
    pub const fn trainable(self) -> bool {
        !matches!(self, Self::Opaque { .. })
    }
}

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateKind {
    /// The parameter in its own type.
    Param,
    /// Its gradient, in the parameter's type.
    Grad,
    /// What the fp32 master has beyond the parameter: a 16-bit remainder for bf16, the whole fp32 value for fp16, nothing for fp32.
    Master,
    /// First moment, fp32.
    ExpAvg,
    /// Second moment, fp32.
    ExpAvgSq,
}

impl StateKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Param, Self::Grad, Self::Master, Self::ExpAvg, Self::ExpAvgSq];

    /// The kinds that the optimizer owns, in the order in which they are packed.
    pub const OPTIMIZER: [Self; 3] = [Self::Master, Self::ExpAvg, Self::ExpAvgSq];

    /// Bytes per element of this kind for a parameter of type `dtype`.
    pub const fn element_size(self, dtype: DType) -> usize {
        match self {
            Self::Param | Self::Grad => dtype.size(),
            Self::Master => match dtype {
                DType::Bf16 => 2,
                DType::F16 => 4,
                DType::F32 | DType::Opaque { .. } => 0,
            },
            Self::ExpAvg | Self::ExpAvgSq => {
                if dtype.trainable() {
                    4
                } else {
                    0
                }
            }
        }
    }

    /// The name used in policies, messages and checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::Grad => "grad",
            Self::Master => "master",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bf16_parameter_costs_twelve_bytes() {
        let kinds = [StateKind::Param, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
        let sum = |d| kinds.iter().map(|k| k.element_size(d)).sum::<usize>();
        assert_eq!((sum(DType::Bf16), sum(DType::F16), sum(DType::F32)), (12, 14, 12));
    }
}
