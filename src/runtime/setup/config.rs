//! What a runtime is made from: a policy made concrete for one model on one machine.

use std::{path::PathBuf, sync::Arc};

use crate::{
    device::DeviceChoice,
    error::Result,
    io::{DirectIo, EngineChoice, Faults, device_number, free_bytes},
    machine::HostLimits,
    model::Layout,
    policy::{self, Auto, Direct, GradientsTier, OptimizerTier, ParamsTier, Policy, automatic},
    quantities::{ByteCount, Tier},
    runtime::{
        measure::slow::{Slow, rules_of},
        ranks::spec::RankSpec,
        update::update_on::UpdateOn,
    },
    schedule::{Budgets, LaneUse, Limits, Tiers},
};

/// What a runtime is made from; budgets are resolved numbers.
#[derive(Clone, Debug)]
pub struct Config {
    /// What may be used.
    pub budgets: Budgets,
    /// Wishes per unit.
    pub tiers: Vec<Tiers>,
    /// Directories on local disks.
    pub paths: Vec<PathBuf>,
    /// Which I/O engine.
    pub engine: EngineChoice,
    /// Bytes of one transfer.
    pub block: u64,
    /// Transfers in flight.
    pub queue_depth: u32,
    /// Whether direct I/O must, may or must not be used.
    pub direct: DirectIo,
    /// Whether segments are checked when they are read.
    pub checksums: bool,
    /// Threads of the update pool.
    pub threads: u32,
    /// Who updates, and whether lanes of the device are made for it.
    pub updates: (UpdateOn, LaneUse),
    /// Bytes paged in ahead at most; `None`: a ring.
    pub prefetch_window: Option<ByteCount>,
    /// Fill released frames with NaN.
    pub poison: bool,
    /// Nothing runs ahead.
    pub sync: bool,
    /// Whether what does not fit where it is wished goes one tier lower.
    pub demote: bool,
    /// Faults to inject.
    pub faults: Arc<Faults>,
    /// What is to be slower than it is.
    pub slow: Slow,
    /// The machine that budgets were resolved on.
    pub machine: HostLimits,
    /// Whether the policy left the host's budget to the machine.
    pub host_is_auto: bool,
    /// Whether units may live on the compute device.
    pub residents: bool,
    /// Processes that train the model together.
    pub ranks: u32,
}

/// Of the memory that is free on a GPU, frames may take this share unless the policy says otherwise; activations need the rest.
const AUTO_HBM_SHARE: u64 = 40;

impl Config {
    /// The device a policy asks for.
    pub fn device_of(policy: &Policy) -> DeviceChoice {
        match policy.device {
            policy::DeviceChoice::Auto => DeviceChoice::Auto,
            policy::DeviceChoice::Host => DeviceChoice::Host,
            policy::DeviceChoice::Cuda(n) => DeviceChoice::Cuda(n.unwrap_or(0)),
        }
    }

    /// Makes a policy concrete. `device_free` is the memory free on the compute device, none on the host; `freed` is host
    /// memory that will be given back as the model moves in. Of several `ranks` each has a share of the processors; the first has found out
    /// whether the host's budget can be had.
    ///
    /// # Errors
    /// `FN-E202` when the host budget is more than the machine or the container can give; a bad fault pattern.
    pub fn resolve(
        policy: &Policy,
        layout: &Layout,
        device_free: Option<ByteCount>,
        freed: ByteCount,
        ranks: Option<RankSpec>,
    ) -> Result<Self> {
        let machine = HostLimits::read()?.after(freed);
        let mut config = match ranks {
            None => Self::resolve_on(policy, layout, device_free, &machine)?,
            Some(spec) => {
                if spec.leads() {
                    admit_budget(policy, &machine)?;
                }
                let mut own = policy.clone();
                own.debug.faults = rules_of(&policy.debug.faults, spec.rank);
                Self::concrete(&own, layout, device_free, &machine)?.among(spec, policy)
            }
        };
        // Directories that cannot be used are named when they are opened.
        config.budgets.nvme_free = free_on(&config.paths).ok().map(ByteCount);
        Ok(config)
    }

    /// As [`Config::resolve`], for a machine of those limits.
    ///
    /// # Errors
    /// As for [`Config::resolve`].
    pub fn resolve_on(
        policy: &Policy,
        layout: &Layout,
        device_free: Option<ByteCount>,
        machine: &HostLimits,
    ) -> Result<Self> {
        admit_budget(policy, machine)?;
        Self::concrete(policy, layout, device_free, machine)
    }

    /// What several ranks do otherwise: no unit stays on the device of one of them, nothing but states has its home on NVMe unless it is asked
    /// for, and each has a share of the processors and of the transfers in flight.
    pub fn among(mut self, ranks: RankSpec, policy: &Policy) -> Self {
        self.residents = false;
        self.ranks = u32::try_from(ranks.size).unwrap_or(u32::MAX);
        for wish in &mut self.tiers {
            if wish.optimizer != Some(Tier::Hbm) {
                wish.params = wish.params.or(Some(Tier::Host));
            }
            wish.grads = wish.grads.or(Some(Tier::Host));
        }
        self.queue_depth = (self.queue_depth / self.ranks).max(1);
        if policy.budget.threads.given().is_none() {
            self.threads = (self.threads / self.ranks).max(1);
        }
        self
    }

    fn concrete(
        policy: &Policy,
        layout: &Layout,
        device_free: Option<ByteCount>,
        machine: &HostLimits,
    ) -> Result<Self> {
        let host = automatic::resolve_host_budget(machine, policy);
        let (slow, faults) = Slow::parse(&policy.debug.faults)?;
        let largest = layout.units.iter().map(|u| u.param_bytes()).max().unwrap_or(0);
        let hbm = policy.budget.hbm.given().or_else(|| {
            // At least two of the largest units, even if the share is smaller.
            device_free.map(|free| ByteCount((free.0 / 100 * AUTO_HBM_SHARE).max(2 * largest + (64 << 20))))
        });
        Ok(Self {
            budgets: Budgets {
                hbm,
                host,
                nvme: policy.budget.nvme.or(ByteCount(u64::MAX)),
                nvme_free: None,
                // Where updates and compute share a processor, a speculative update only takes its time.
                spare: policy
                    .optimizer
                    .spare
                    .given()
                    .filter(|_| !policy.debug.sync)
                    .or((device_free.is_none() || policy.debug.sync).then_some(ByteCount(0))),
            },
            tiers: layout.units.iter().map(|u| tiers(policy, u)).collect(),
            paths: policy.nvme.paths.clone(),
            engine: match policy.nvme.engine {
                policy::Engine::Auto => EngineChoice::Auto,
                policy::Engine::IoUring => EngineChoice::IoUring,
                policy::Engine::Threads => EngineChoice::Threads,
            },
            block: policy.nvme.block.0,
            queue_depth: policy.nvme.queue_depth.or(32),
            direct: match policy.nvme.direct {
                Direct::Auto => DirectIo::Preferred,
                Direct::Required => DirectIo::Required,
                Direct::Off => DirectIo::Off,
            },
            checksums: policy.nvme.checksums,
            threads: threads(machine, policy, device_free.is_some()),
            updates: match policy.optimizer.update_on {
                policy::UpdateOn::Gpu => (UpdateOn::Gpu, LaneUse::Always),
                // A device that is the processor itself has nothing to add.
                policy::UpdateOn::Auto if device_free.is_some() => (UpdateOn::Both, LaneUse::IfRoom),
                policy::UpdateOn::Auto | policy::UpdateOn::Cpu => (UpdateOn::Cpu, LaneUse::Never),
            },
            prefetch_window: policy
                .prefetch
                .window
                .given()
                .filter(|_| !policy.debug.sync)
                .or(policy.debug.sync.then_some(ByteCount(0))),
            poison: policy.debug.poison,
            sync: policy.debug.sync,
            demote: policy.pressure.action == policy::Pressure::Demote,
            faults: Arc::new(Faults::parse(&faults)?),
            slow,
            machine: machine.clone(),
            host_is_auto: policy.budget.host.given().is_none(),
            residents: true,
            ranks: 1,
        })
    }

    /// What the machine dictates to the placement, for frames of that granularity.
    pub fn limits(&self, granularity: u64) -> Limits {
        let (has_nvme, lanes) = (!self.paths.is_empty(), self.updates.1);
        Limits { granularity, block: self.block, has_nvme, residents: self.residents, lanes, ranks: self.ranks }
    }
}

/// Whether the machine can give the host memory that the policy asks for.
fn admit_budget(policy: &Policy, machine: &HostLimits) -> Result<()> {
    if let Auto::Set(asked) = policy.budget.host {
        machine.admit_budget(asked)?;
    }
    Ok(())
}

/// Bytes that files of equal size on all paths may have together.
fn free_on(paths: &[PathBuf]) -> Result<u64> {
    let devices = paths.iter().map(|path| device_number(path)).collect::<Result<Vec<_>>>()?;
    let mut least = u64::MAX;
    for (path, device) in paths.iter().zip(&devices) {
        least = least.min(free_bytes(path)? / devices.iter().filter(|d| *d == device).count() as u64);
    }
    Ok(least.saturating_mul(paths.len() as u64))
}

/// Threads of the update pool. The thread that feeds a GPU, and the one that runs its backward, need processors of their own.
fn threads(machine: &HostLimits, policy: &Policy, gpu: bool) -> u32 {
    let all = automatic::resolve_threads(machine, policy);
    let spare = if gpu && policy.budget.threads.given().is_none() { 2.min(all / 4) } else { 0 };
    all - spare
}

/// The tiers of a unit: the first override that matches its name or one of its parameters wins.
fn tiers(policy: &Policy, unit: &crate::model::Unit) -> Tiers {
    let matches = |p: &policy::Pattern| p.matches(&unit.name) || unit.params.iter().any(|q| p.matches(&q.name));
    let found = policy.overrides.iter().find(|o| matches(&o.pattern));
    let params = found.and_then(|o| o.params).unwrap_or(policy.params.tier);
    let optimizer = found.and_then(|o| o.optimizer).unwrap_or(policy.optimizer.tier);
    Tiers {
        params: match params {
            ParamsTier::Auto => None,
            ParamsTier::Host => Some(Tier::Host),
            ParamsTier::Nvme => Some(Tier::Nvme),
        },
        optimizer: match optimizer {
            OptimizerTier::Auto => None,
            OptimizerTier::Hbm => Some(Tier::Hbm),
            OptimizerTier::Host => Some(Tier::Host),
            OptimizerTier::Nvme => Some(Tier::Nvme),
        },
        grads: match policy.gradients.tier {
            GradientsTier::Auto => None,
            GradientsTier::Host => Some(Tier::Host),
            GradientsTier::Nvme => Some(Tier::Nvme),
        },
    }
}
