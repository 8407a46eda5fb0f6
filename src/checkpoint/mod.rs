//! Checkpoints: sharded safetensors with a manifest, in a directory that appears whole or not at all.
//!
//! C1: files hold tensors by name; nothing in them says where a tensor lived. C2: every byte is under a checksum. C3: what
//! is under a checkpoint's name was durable before it got it. C4: memory is bounded by the frames of [`FrameBudget`].

pub mod cli;
mod contents;
mod control;
mod convert;
mod directory;
mod edges;
mod export;
mod folder;
mod foreign;
mod layout;
mod leftovers;
mod manifest;
mod manifest_file;
mod reader;
mod refused;
mod save;
mod series;
mod tensors;
mod writer;

pub use contents::{Contents, Found};
pub use control::Control;
pub use convert::{Conversion, master};
pub use directory::Workspace;
pub use folder::Opened;
pub use layout::TensorSpec;
pub use leftovers::{Leftover, leftovers};
pub use manifest::{FileFacts, MANIFEST, Manifest, PIECE, ShardFacts, VERSION};
pub use manifest_file::read_manifest;
pub use reader::{Range, Reader};
pub use safetensors::Dtype;
pub use save::{Request, Save, SaveSource};
pub use tensors::{TensorReader, verify};
pub use writer::{FrameBudget, Writer};

/// Bytes that are copied and then summed: they stay in a core's own cache.
pub const GRAIN: usize = 256 << 10;
