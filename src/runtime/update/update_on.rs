//! Who updates what has its home on the host.

use crate::device::DeviceKind;

/// Who updates it. The bits do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateOn {
    /// The processor alone.
    Cpu,
    /// The lanes of the compute device alone.
    Gpu,
    /// Both, as fast as they are seen to be.
    Both,
    /// Half of the pieces each; for tests.
    Halves,
}

/// True where the processor that computes is also the one that updates.
pub fn shares_processor(kind: DeviceKind) -> bool {
    kind == DeviceKind::Host
}
