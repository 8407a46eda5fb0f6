//! What a model looks like to the runtime: units, their sections, and where each parameter lies in them.
//!
//! L1: within a unit, parameters of one type and trainability form a section; every state kind of a section has the same
//! element offsets, so one span of elements names the bytes of all kinds. L2: parameters start at multiples of
//! [`ALIGN_ELEMS`] elements, sections at multiples of [`SECTION_ALIGN`] bytes. L3: padding is zero in every kind and
//! stays zero under AdamW.

mod layout;
mod sizes;

pub use layout::{ALIGN_ELEMS, Layout, ParamPlace, ParamSpec, SECTION_ALIGN, Section, Unit, UnitSpec};
pub use sizes::{FrameSpan, PIECE, staging_bytes};
