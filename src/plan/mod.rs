//! What a run will need and take, before it: memory by tier, bytes and time of a step, wear of the drives.
//!
//! Q1: the placement is the one that a run on that machine makes. Q2: nothing is allocated, no weights are read.

pub mod activations;
pub mod growth;
pub mod ranks;
pub mod source;
mod text;
mod time;

use serde::Serialize;

pub use activations::Activations;
pub use growth::Grows;
pub use ranks::RanksPlan;
pub use source::{PlannedUnit, Unpaged};
pub use text::text;
pub use time::Compute;
use time::{lanes_alone, rates, work};

use crate::{
    device::DeviceChoice,
    error::{Error, Result},
    machine::HostLimits,
    model::Layout,
    policy::{Policy, profile::Profile},
    quantities::{ByteCount, Tier, UnitId},
    runtime::{Config, RankSpec, check_ranks},
    schedule::{
        Budgets, Limits, Placement, advice,
        cost::{self, Rates, Resource, Work},
        growth::{Candidate, Own, candidates},
        placement,
        traffic::Uses,
    },
};

/// Chunks of a ring on a GPU.
const GPU_GRANULARITY: u64 = 2 << 20;
/// The same on the host device.
const HOST_GRANULARITY: u64 = 4096;
/// Rated writes of a consumer drive per byte of its size; data sheets say 600 TBW per TB.
const WRITES_PER_BYTE: f64 = 600.0;

/// What ranks share, in tables.
const HOST_MEMORY: &str = "host_memory";

/// The machine planned for.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Memory of its GPU that is free; none without a GPU.
    pub gpu: Option<ByteCount>,
    /// Its host memory and processors.
    pub limits: HostLimits,
    /// Size of its drives together, if known.
    pub disk: Option<ByteCount>,
    /// Its rates, if they were measured.
    pub profile: Option<Profile>,
    /// How many processes train the model together, each with a GPU like that.
    pub ranks: usize,
}

/// Bytes of one tier.
#[derive(Clone, Debug, Serialize)]
pub struct TierPlan {
    /// Its name.
    pub tier: &'static str,
    /// What the policy allows; none: no bound of its own.
    pub budget: Option<u64>,
    /// Between steps.
    pub steady: u64,
    /// At most while the model is moved in.
    pub init: u64,
    /// At most in a step.
    pub step: u64,
    /// At most while a checkpoint is written or read.
    pub checkpoint: u64,
    /// What it holds, in bytes.
    pub holds: Vec<(&'static str, u64)>,
}

/// One unit.
#[derive(Clone, Debug, Serialize)]
pub struct UnitPlan {
    /// Its name.
    pub name: String,
    /// Bytes of its parameters.
    pub params: u64,
    /// Bytes of its optimizer states.
    pub states: u64,
    /// Home of its parameters.
    pub params_tier: &'static str,
    /// Home of its states.
    pub states_tier: &'static str,
    /// Home of its gradients.
    pub grads_tier: &'static str,
    /// Whether it has a spare copy, for speculative updates.
    pub spare: bool,
}

/// The prediction of a step.
#[derive(Clone, Debug, Serialize)]
pub struct StepPlan {
    /// From one step to the next.
    pub seconds: f64,
    /// Tokens of a step, of all ranks, by its time, where they are known.
    pub tokens_per_second: Option<f64>,
    /// Of those, computing.
    pub compute_seconds: f64,
    /// Per part of the machine: its name, seconds busy, seconds that the training thread waits for it.
    pub parts: Vec<(&'static str, f64, f64)>,
    /// What the step is bound by.
    pub binding: &'static str,
    /// Seconds gained if that part were twice as fast, the most helpful first.
    pub twice_as_fast: Vec<(&'static str, f64)>,
    /// One more budget, and the seconds gained by it.
    pub more_memory: Option<(String, f64)>,
    /// Of the parameters that are not resident, the part that the GPU updates.
    pub by_gpu: f64,
}

/// What is written to the drives.
#[derive(Clone, Debug, Serialize)]
pub struct Wear {
    /// Bytes per step.
    pub bytes_per_step: u64,
    /// Bytes per day at the step time predicted.
    pub bytes_per_day: Option<f64>,
    /// Bytes that the drives are rated for.
    pub endurance: Option<f64>,
    /// Days until then.
    pub days: Option<f64>,
}

/// A plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Parameters.
    pub params: u64,
    /// Of them trained.
    pub trained: u64,
    /// Whether it fits as the policy has it.
    pub fits: bool,
    /// What is missing, where it does not.
    pub refusal: Option<String>,
    /// Changes of tiers that make it fit.
    pub ways: Vec<String>,
    /// By tier; with the budgets that it needs, where it does not fit.
    pub tiers: Vec<TierPlan>,
    /// Each unit.
    pub units: Vec<UnitPlan>,
    /// Bytes per step over each link, and through the update.
    pub traffic: Vec<(&'static str, u64)>,
    /// Time, where rates and compute are known.
    pub step: Option<StepPlan>,
    /// Writes to the drives.
    pub wear: Wear,
    /// What several ranks take; none for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RanksPlan>,
    /// Memory of activations, where something says how large the model's blocks are.
    pub activations: Option<Activations>,
    /// What it grows to, where `budget.hbm` is auto.
    pub grows: Option<Grows>,
    /// Units whose states move up then, in order.
    #[serde(skip)]
    pub order: Vec<Candidate>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Plan {
    /// Takes an estimate of activations in, and what it leaves for growth.
    pub fn expect(&mut self, gpu: Option<ByteCount>, activations: Option<Activations>) {
        let hbm = self.tiers.iter().find(|tier| tier.tier == "hbm").map_or(0, |tier| tier.steady);
        let gradients = self.ranks.as_ref().map_or(0, |ranks| ranks.own_gradients.1);
        self.grows = growth::expect(&self.order, gpu, hbm + gradients, activations.as_ref().map(|a| a.bytes));
        self.activations = activations;
    }
}

/// `FN-E201` for a plan that needs more than the GPU has, at any `budget.hbm`.
fn beyond(tiers: &[TierPlan], policy: &Policy, gpu: Option<ByteCount>) -> Option<Error> {
    let hbm = tiers.iter().find(|tier| tier.tier == "hbm")?;
    let most = ByteCount(hbm.steady.max(hbm.init).max(hbm.step).max(hbm.checkpoint));
    let gpu = gpu.filter(|gpu| most > *gpu)?;
    let what = format!("the plan needs {most} of GPU memory, and the GPU has {gpu}.");
    let next = match policy.budget.hbm.given() {
        Some(_) => "Lower budget.hbm, or leave it at \"auto\".",
        None => {
            "Two of the largest units must have room: name smaller modules in units.match, or take a GPU with more memory."
        }
    };
    Some(Error::new(crate::error::Code::HbmBudget, what).needing(most).action(next))
}

/// Plans a model on a machine.
///
/// # Errors
/// A policy that contradicts itself, or that no budget helps.
pub fn plan(units: &[PlannedUnit], policy: &Policy, machine: &Machine, compute: Compute) -> Result<Plan> {
    let layout = Layout::new(&units.iter().map(|u| u.spec.clone()).collect::<Vec<_>>())?;
    let mut config = Config::resolve_on(policy, &layout, machine.gpu, &machine.limits)?;
    let several = machine.ranks > 1;
    if several {
        config = config.among(RankSpec { rank: 0, size: machine.ranks, file: None, grows: None }, policy);
    }
    let granularity = if machine.gpu.is_some() { GPU_GRANULARITY } else { HOST_GRANULARITY };
    let limits = config.limits(granularity);
    let placed = advice::place_or_demote(&layout, &config.tiers, &config.budgets, &limits, config.demote);
    let mut notes = notes(machine, compute);
    if policy.activations.tier == crate::policy::ActivationsTier::Host {
        notes.push("Inputs of blocks that wait in host memory take of what budget.host leaves.".to_owned());
    }
    let (refusal, budgets, placed) = match placed {
        Ok((placed, demoted)) => {
            if several {
                check_ranks(&layout, &placed)?;
            }
            notes.extend(demoted);
            (None, config.budgets, placed)
        }
        Err(error) => {
            let raised = advice::least_budgets(&layout, &config.tiers, &config.budgets, &limits)?;
            (Some(error), raised.0, raised.1)
        }
    };
    let ways = match &refusal {
        Some(error) if error.code() == crate::Code::HostBudget => {
            advice::ways(&layout, &config.tiers, &config.budgets, &limits)
        }
        _ => Vec::new(),
    };
    let uses = Uses { passes: compute.passes.max(1), backward: units.iter().map(|u| u.backward).collect() };
    let sight = Sight { layout: &layout, config: &config, limits, budgets, placed: &placed };
    let tiers = sight.tiers(config.budgets);
    let refusal = refusal.or_else(|| beyond(&tiers, policy, machine.gpu));
    let moved = crate::schedule::traffic::of_step(&layout, &placed, &uses);
    let on_host = machine.gpu.is_none();
    let ranks = several
        .then(|| ranks::of(&layout, &placed, &moved, (machine.ranks, config.threads), compute.passes.max(1), on_host));
    let step = timed(&sight, machine, compute, uses, ranks.as_ref());
    let (by_cpu, by_gpu) = sight.updates(moved.update, step.as_ref());
    let share = |all: u64| ranks.as_ref().map_or(all, |ranks| ranks.share(all));
    let mut traffic = vec![
        ("host_to_device", moved.up),
        ("device_to_host", share(moved.down)),
        ("nvme_read", share(moved.nvme_read)),
        ("nvme_write", share(moved.nvme_write)),
        ("cpu_update", share(by_cpu)),
        ("gpu_update", share(by_gpu)),
    ];
    if let Some(ranks) = &ranks {
        traffic.push(("exchange", ranks.exchange));
        notes.push("The exchange of gradients between ranks is not in the time: its rate is not measured.".to_owned());
    }
    let grows = policy.budget.hbm.given().is_none() && placed.lane_elems > 0;
    let own = several.then_some(Own { rank: 0, size: machine.ranks, holds: true });
    let order = if grows { candidates(&layout, &placed, granularity, own) } else { Vec::new() };
    // Counted from the model's parameters, as sections are padded.
    let params = || units.iter().flat_map(|u| &u.spec.params);
    Ok(Plan {
        params: params().map(|p| p.numel).sum(),
        trained: params().filter(|p| p.trainable && p.dtype.trainable()).map(|p| p.numel).sum(),
        fits: refusal.is_none(),
        refusal: refusal.as_ref().map(Error::to_string),
        ways: ways.iter().map(advice::Way::describe).collect(),
        tiers,
        units: sight.units(),
        traffic,
        wear: wear(moved.nvme_write, step.as_ref(), machine.disk),
        step,
        ranks,
        activations: None,
        grows: None,
        order,
        notes,
    })
}

/// The time of a step, where rates and compute are known. Of several ranks it is at least what their bytes take through the host's memory.
fn timed(
    sight: &Sight<'_>,
    machine: &Machine,
    compute: Compute,
    uses: Uses,
    ranks: Option<&RanksPlan>,
) -> Option<StepPlan> {
    let profile = machine.profile.as_ref()?;
    let memory = profile.memory.bandwidth;
    let threads = sight.config.threads * ranks.map_or(1, |ranks| u32::try_from(ranks.ranks).unwrap_or(u32::MAX));
    let mut speed = rates(profile, machine.gpu.is_some(), threads)?;
    if let Some(ranks) = ranks {
        let at_once = profile.ranks() as usize == ranks.ranks;
        speed = ranks.rates(&speed, if at_once { 0.0 } else { memory });
    }
    let work = work(sight.layout, uses, compute, sight.config)?;
    let tokens = compute.tokens * machine.ranks as u64;
    let mut step = sight.step(&speed, &work, tokens);
    if let Some(ranks) = ranks.filter(|_| memory > 0.0) {
        #[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
        let (busy, tokens) = (ranks.through_host as f64 / memory, tokens as f64);
        let waits = (busy - step.seconds).max(0.0);
        step.parts.push((HOST_MEMORY, busy, waits));
        if waits > 0.0 {
            (step.seconds, step.binding) = (busy, HOST_MEMORY);
            step.tokens_per_second = step.tokens_per_second.map(|_| tokens / busy);
            (step.twice_as_fast, step.more_memory) = (vec![(HOST_MEMORY, waits.min(busy / 2.0))], None);
        }
    }
    Some(step)
}

/// The device that a policy means on this machine, for planning here.
pub fn device_here(policy: &Policy) -> DeviceChoice {
    Config::device_of(policy)
}

/// A placement and what it was made from.
struct Sight<'a> {
    layout: &'a Layout,
    config: &'a Config,
    limits: Limits,
    budgets: Budgets,
    placed: &'a Placement,
}

impl Sight<'_> {
    fn tiers(&self, allowed: Budgets) -> Vec<TierPlan> {
        let (plan, units) = (self.placed, || self.layout.units.iter().zip(&self.placed.homes));
        let on = |tier: Tier, f: fn(&crate::model::Unit) -> u64, home: fn(&placement::Homes) -> Tier| -> u64 {
            units().filter(|(_, h)| home(h) == tier).map(|(u, _)| f(u)).sum()
        };
        let params = |tier| on(tier, |u| u.param_bytes(), |h| h.params);
        let states = |tier| on(tier, |u| u.optimizer_bytes(), |h| h.optimizer);
        let grads = |tier| on(tier, |u| u.grad_bytes(), |h| h.grads);
        let spares = || self.layout.ids().filter(|u| plan.spare[u.index()]);
        let spare = spares().map(|u| placement::spare_bytes(self.layout.unit(u), plan.homes[u.index()]));
        let (spare, spare_on_nvme) = spare.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let staging =
            [plan.page_slots, plan.update_slots, plan.grad_slots].iter().map(|(n, b)| u64::from(*n) * b).sum::<u64>();
        // Of several ranks each has its own.
        let staging = staging * u64::from(self.limits.ranks);
        let shared = if self.budgets.hbm.is_none() { plan.hbm_bytes } else { 0 };
        let read = plan.widest_on_nvme(self.layout);
        let save = plan.checkpoint_bytes();
        let flat = |tier, budget: Option<u64>, bytes, (more, save), holds: Vec<(&'static str, u64)>| TierPlan {
            tier,
            budget,
            steady: bytes,
            init: bytes + more,
            step: bytes,
            checkpoint: bytes + save,
            holds: holds.into_iter().filter(|(_, b)| *b > 0).collect(),
        };
        let resident = plan.hbm_bytes - plan.ring_bytes() - plan.lane_bytes;
        let host = vec![
            ("params", params(Tier::Host)),
            ("grads", grads(Tier::Host)),
            ("states", states(Tier::Host)),
            ("spare", spare),
            ("staging", staging),
            ("compute tier", shared),
        ];
        let nvme = Some(allowed.nvme.0).filter(|&b| b != u64::MAX);
        vec![
            flat(
                "hbm",
                allowed.hbm.map(|b| b.0),
                plan.hbm_bytes,
                (0, 0),
                vec![("ring", plan.ring_bytes()), ("resident", resident), ("staging", plan.lane_bytes)],
            ),
            flat("host", Some(allowed.host.0), plan.host_bytes, (read, save), host),
            flat(
                "nvme",
                nvme,
                plan.nvme_bytes,
                (0, 0),
                vec![
                    ("params", params(Tier::Nvme)),
                    ("grads", grads(Tier::Nvme)),
                    ("states", states(Tier::Nvme)),
                    ("spare", spare_on_nvme),
                ],
            ),
        ]
    }

    fn units(&self) -> Vec<UnitPlan> {
        let one = |id: UnitId| {
            let (unit, home) = (self.layout.unit(id), self.placed.homes[id.index()]);
            UnitPlan {
                name: unit.name.clone(),
                params: unit.param_bytes(),
                states: unit.optimizer_bytes(),
                params_tier: home.params.name(),
                states_tier: home.optimizer.name(),
                grads_tier: home.grads.name(),
                spare: self.placed.spare[id.index()],
            }
        };
        self.layout.ids().map(one).collect()
    }

    fn step(&self, rates: &Rates, work: &Work, tokens: u64) -> StepPlan {
        let cost = cost::predict(self.layout, self.placed, rates, work);
        let part = |r: Resource| (r.name(), cost.busy[r as usize], cost.waits[r as usize]);
        let gains = cost::gains(self.layout, self.placed, rates, work);
        #[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
        let rate = tokens as f64 / cost.seconds;
        StepPlan {
            seconds: cost.seconds,
            tokens_per_second: (tokens > 0).then_some(rate),
            compute_seconds: cost.busy[Resource::Compute as usize],
            parts: Resource::ALL.into_iter().map(part).filter(|(_, busy, _)| *busy > 0.0).collect(),
            binding: cost.binding.name(),
            twice_as_fast: gains
                .into_iter()
                .filter(|(_, s)| *s > 0.001 * cost.seconds)
                .map(|(r, s)| (r.name(), s))
                .collect(),
            more_memory: self.more_memory(rates, work, cost.seconds),
            by_gpu: cost.by_lanes,
        }
    }

    /// Bytes of updates that the processor makes, and that the GPU makes for it. How they share is not known without
    /// rates.
    fn updates(&self, bytes: u64, step: Option<&StepPlan>) -> (u64, u64) {
        let alone = if self.placed.lane_elems > 0 && lanes_alone(self.config) { 1.0 } else { 0.0 };
        let part = step.map_or(alone, |step| step.by_gpu);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part"
        )]
        let by_gpu = ((bytes as f64 * part).round() as u64).min(bytes);
        (bytes - by_gpu, by_gpu)
    }

    /// Which budget, a quarter larger, gains the most.
    fn more_memory(&self, rates: &Rates, work: &Work, now: f64) -> Option<(String, f64)> {
        let host = Budgets { host: ByteCount(self.budgets.host.0 / 4 * 5), ..self.budgets };
        let hbm = Budgets { hbm: self.budgets.hbm.map(|b| ByteCount(b.0 / 4 * 5)), ..self.budgets };
        let named = [
            ("budget.host", host, self.budgets.host.0 / 4),
            ("budget.hbm", hbm, self.budgets.hbm.map_or(0, |b| b.0 / 4)),
        ];
        let gain = |(key, budgets, more): (&str, Budgets, u64)| {
            let placed = placement::place(self.layout, &self.config.tiers, &budgets, &self.limits).ok()?;
            let seconds = now - cost::predict(self.layout, &placed, rates, work).seconds;
            (seconds > 0.01 * now).then(|| (format!("{key} + {}", ByteCount(more)), seconds))
        };
        named.into_iter().filter_map(gain).max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

fn wear(bytes_per_step: u64, step: Option<&StepPlan>, disk: Option<ByteCount>) -> Wear {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let (bytes, size) = (bytes_per_step as f64, disk.map(|d| d.0 as f64));
    let bytes_per_day = step.map(|s| bytes / s.seconds * 86_400.0);
    let endurance = size.map(|s| s * WRITES_PER_BYTE);
    let days = bytes_per_day.zip(endurance).map(|(day, all)| all / day).filter(|d| d.is_finite());
    Wear { bytes_per_step, bytes_per_day, endurance, days }
}

fn notes(machine: &Machine, compute: Compute) -> Vec<String> {
    let mut notes = Vec::new();
    match &machine.profile {
        None => notes.push(
            "No rates: measure this machine with `funicular bench --save`, or give --profile; times are left out."
                .to_owned(),
        ),
        Some(p) if (p.device.name == "host") == machine.gpu.is_some() => {
            notes.push(format!(
                "The profile was measured on device '{}', which is not planned for; times are left out.",
                p.device.name
            ));
        }
        Some(_) if compute.seconds.is_none() && compute.flops <= 0.0 => {
            notes.push(
                "Compute is unknown: give --tokens and --flops, or --compute-seconds; times are left out.".to_owned(),
            );
        }
        Some(p) => {
            notes.push(format!("Rates of {} ({}), measured {}.", p.host, p.device.name, p.measured));
            notes.extend(ranks::measured_otherwise(p.ranks() as usize, machine.ranks));
        }
    }
    notes.push("hbm is what is paged: activations, and torch's own memory, come on top.".to_owned());
    notes
}
