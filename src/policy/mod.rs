//! The policy: what may be used, and what lives where.
//!
//! P1: a policy is read strictly; an unknown key, an unknown word or a size without a unit is an error with its place.
//! P2: every key has a default, and a policy written by [`Policy::to_toml`] reads back as the same policy.
//! P3: no key does nothing: what contradicts another key is refused by [`Policy::check_consistent`].
//! P4: nothing here asks the machine.

mod arithmetic;
pub mod automatic;
pub mod cli;
mod decode;
mod glob;
pub mod import;
mod overlay;
mod parse_json;
mod parse_python;
mod parse_toml;
pub mod profile;
mod read;
pub mod schema;
mod source;
mod suggest;
mod support;
mod values;
mod words;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use glob::Pattern;
pub(crate) use read::{open_regular, read_text};
pub use values::{Auto, DeviceChoice, MicroBatch, Setting, format_size, parse_size};
pub use words::{
    ActivationsTier, Direct, Engine, GradientsTier, Level, OptimizerTier, ParamsDtype, ParamsTier, Pressure, UpdateOn,
};

use crate::{
    error::{Code, Error, Result},
    quantities::ByteCount,
};
use source::Node;

/// The version of the schema that this build reads and writes.
pub const VERSION: u32 = 1;

/// Names of the presets.
pub const PRESETS: &[&str] = &["fits", "host", "nvme", "laptop"];

/// What may be used, and what lives where. docs/policy.md explains every key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a policy: a table of sections")]
pub struct Policy {
    /// Version of the schema: 1.
    #[serde(deserialize_with = "version")]
    pub version: u32,
    /// The compute tier.
    pub device: DeviceChoice,
    /// How much may be used.
    pub budget: Budget,
    /// The NVMe tier.
    pub nvme: Nvme,
    /// Parameters.
    pub params: Params,
    /// The optimizer's states and its update.
    pub optimizer: Optimizer,
    /// Gradients.
    pub gradients: Gradients,
    /// What is paged as a whole.
    pub units: Units,
    /// Homes by name; the first that matches wins.
    #[serde(rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Looking ahead.
    pub prefetch: Prefetch,
    /// Activations.
    pub activations: Activations,
    /// Aids for finding faults.
    pub debug: Debugging,
    /// Log lines and traces.
    pub log: Log,
    /// What to do when a budget is short.
    pub pressure: UnderPressure,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            version: VERSION,
            device: DeviceChoice::default(),
            budget: Budget::default(),
            nvme: Nvme::default(),
            params: Params::default(),
            optimizer: Optimizer::default(),
            gradients: Gradients::default(),
            units: Units::default(),
            overrides: Vec::new(),
            prefetch: Prefetch::default(),
            activations: Activations::default(),
            debug: Debugging::default(),
            log: Log::default(),
            pressure: UnderPressure::default(),
        }
    }
}

/// How much may be used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [budget] and its keys below")]
pub struct Budget {
    /// Memory of the compute device for paged parameters.
    pub hbm: Auto<ByteCount>,
    /// Page-locked host memory.
    pub host: Auto<ByteCount>,
    /// Space on all NVMe paths together.
    pub nvme: Auto<ByteCount>,
    /// Threads of the CPU optimizer.
    pub threads: Auto<u32>,
    /// Host memory left to others when `host` is auto.
    pub reserve: Auto<ByteCount>,
}

/// The NVMe tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [nvme] and its keys below")]
pub struct Nvme {
    /// Directories on local disks, striped by block.
    #[serde(deserialize_with = "values::directories")]
    pub paths: Vec<PathBuf>,
    /// What moves bytes.
    pub engine: Engine,
    /// Size of one read or write and of a stripe; a power of two.
    #[serde(serialize_with = "values::size::serialize", deserialize_with = "values::size::block")]
    pub block: ByteCount,
    /// Reads and writes in flight per path.
    pub queue_depth: Auto<u32>,
    /// Direct I/O.
    pub direct: Direct,
    /// Verify checksums of what is read back.
    pub checksums: bool,
}

impl Default for Nvme {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            engine: Engine::default(),
            block: ByteCount::mib(1),
            queue_depth: Auto::Auto,
            direct: Direct::default(),
            checksums: true,
        }
    }
}

/// Parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [params] and its keys below")]
pub struct Params {
    /// Their home.
    pub tier: ParamsTier,
    /// What those in floating point are converted to.
    pub dtype: ParamsDtype,
}

/// The optimizer's states and its update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [optimizer] and its keys below")]
pub struct Optimizer {
    /// Home of the states.
    pub tier: OptimizerTier,
    /// Host memory for speculative updates.
    pub spare: Auto<ByteCount>,
    /// Where the update runs.
    #[serde(rename = "where")]
    pub update_on: UpdateOn,
}

/// Gradients.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [gradients] and its keys below")]
pub struct Gradients {
    /// Their home.
    pub tier: GradientsTier,
}

/// What is paged as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [units] and its keys below")]
pub struct Units {
    /// Names of modules; empty: found by themselves.
    #[serde(rename = "match")]
    pub patterns: Vec<Pattern>,
}

/// Homes for units or parameters by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OverrideKeys")]
pub struct Override {
    /// Which units or parameters.
    #[serde(rename = "match")]
    pub pattern: Pattern,
    /// Home of their parameters; `None` leaves it to `params.tier`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub params: Option<ParamsTier>,
    /// Home of their optimizer states; `None` leaves it to `optimizer.tier`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<OptimizerTier>,
}

/// An override as it is written, before it is known to set anything.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table: write [[override]] and its keys below")]
struct OverrideKeys {
    #[serde(rename = "match")]
    pattern: Pattern,
    params: Option<ParamsTier>,
    optimizer: Option<OptimizerTier>,
}

impl TryFrom<OverrideKeys> for Override {
    type Error = String;

    fn try_from(keys: OverrideKeys) -> std::result::Result<Self, String> {
        let OverrideKeys { pattern, params, optimizer } = keys;
        if params.is_none() && optimizer.is_none() {
            return Err(format!("the override for '{}' sets nothing; give it params or optimizer", pattern.as_str()));
        }
        Ok(Self { pattern, params, optimizer })
    }
}

/// Looking ahead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [prefetch] and its keys below")]
pub struct Prefetch {
    /// Bytes fetched ahead of the unit that computes.
    pub window: Auto<ByteCount>,
}

/// Activations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [activations] and its keys below")]
pub struct Activations {
    /// Rows of the batch that a block takes at a time.
    pub micro_batch: MicroBatch,
    /// Where they wait for their backward.
    pub tier: ActivationsTier,
}

/// Aids for finding faults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [debug] and its keys below")]
pub struct Debugging {
    /// Fill released memory with NaN.
    pub poison: bool,
    /// Wait for every transfer at once.
    pub sync: bool,
    /// Faults to inject, for tests.
    pub faults: String,
}

/// Log lines and traces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [log] and its keys below")]
pub struct Log {
    /// How much.
    pub level: Level,
    /// One line of facts every so many steps; 0: none.
    #[serde(deserialize_with = "whole")]
    pub every: u32,
    /// File for a trace; empty: none.
    pub trace: String,
    /// The steps to trace.
    pub trace_steps: Vec<u64>,
    /// NVTX ranges, for Nsight Systems.
    pub nvtx: bool,
}

/// What to do when a budget is short.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section: write [pressure] and its keys below")]
pub struct UnderPressure {
    /// Demote or refuse.
    pub action: Pressure,
}

fn version<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<u32, D::Error> {
    let found = i64::deserialize(from)?;
    if found != i64::from(VERSION) {
        let message = format!("{found} is not a version that this funicular reads; it reads {VERSION}");
        return Err(serde::de::Error::custom(message));
    }
    Ok(VERSION)
}

fn whole<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<u32, D::Error> {
    let found = i64::deserialize(from)?;
    u32::try_from(found).map_err(|_| serde::de::Error::custom(format!("{found} is not a whole number from 0")))
}

impl Policy {
    /// A ready policy: `fits` (all automatic), `host` (no NVMe), `nvme` (everything on NVMe; set `nvme.paths`),
    /// `laptop` (states on NVMe, more memory left to others; set `nvme.paths`).
    ///
    /// # Errors
    /// `FN-E503` for another name.
    pub fn preset(name: &str) -> Result<Self> {
        let mut policy = Self::default();
        match name {
            "fits" => {}
            "host" => {
                policy.params.tier = ParamsTier::Host;
                policy.optimizer.tier = OptimizerTier::Host;
            }
            "nvme" => {
                policy.params.tier = ParamsTier::Nvme;
                policy.optimizer.tier = OptimizerTier::Nvme;
            }
            "laptop" => {
                policy.optimizer.tier = OptimizerTier::Nvme;
                policy.budget.reserve = Auto::Set(ByteCount::gib(4));
                policy.nvme.queue_depth = Auto::Set(16);
            }
            _ => {
                let hint = suggest::did_you_mean(name, PRESETS.iter().copied());
                return Err(Error::new(Code::PolicyValue, format!("no preset '{name}'{hint}."))
                    .action(format!("Presets: {}.", PRESETS.join(", "))));
            }
        }
        Ok(policy)
    }

    /// The whole policy as TOML, every key written out; reads back as the same policy.
    ///
    /// # Errors
    /// `FN-E503` if a path is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::new(Code::PolicyValue, format!("cannot be written as TOML: {e}")))
    }

    /// As TOML, with only the version and what differs from the defaults.
    ///
    /// # Errors
    /// As for [`Policy::to_toml`].
    pub fn to_toml_short(&self) -> Result<String> {
        let write =
            |e: &dyn std::fmt::Display| Error::new(Code::PolicyValue, format!("cannot be written as TOML: {e}"));
        let mut own = toml::Table::try_from(self).map_err(|e| write(&e))?;
        let default = toml::Table::try_from(Self::default()).map_err(|e| write(&e))?;
        own.retain(|key, value| match (value, default.get(key)) {
            _ if key == "version" => true,
            (toml::Value::Table(section), Some(toml::Value::Table(default))) => {
                section.retain(|key, value| default.get(key) != Some(value));
                !section.is_empty()
            }
            (value, default) => Some(&*value) != default,
        });
        toml::to_string(&own).map_err(|e| write(&e))
    }

    /// The tree of this policy, without spans.
    fn to_node(&self) -> Result<Node> {
        let json =
            serde_json::to_value(self).map_err(|e| Error::new(Code::PolicyValue, format!("cannot be written: {e}")))?;
        Ok(Node::from_json(json))
    }
}
