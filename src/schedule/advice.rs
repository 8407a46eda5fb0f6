//! The ways out where a model does not fit: changes that make it fit, found by placing it with them.

use crate::{
    error::{Code, Error},
    model::Layout,
    quantities::{ByteCount, Tier},
    schedule::{
        Budgets, Limits, Placement, Tiers,
        placement::{Homes, at_least, place},
    },
};

/// A change that makes a model fit, and what it needs then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The keys to set, as a policy spells them.
    pub change: String,
    /// Host memory then.
    pub host: ByteCount,
    /// NVMe then.
    pub nvme: ByteCount,
}

/// The budgets raised until the wishes hold: what this model needs as it is wished.
///
/// # Errors
/// Those of [`place`] that no budget helps against.
pub fn least_budgets(
    layout: &Layout,
    tiers: &[Tiers],
    budgets: &Budgets,
    limits: &Limits,
) -> Result<(Budgets, Placement), Error> {
    let mut budgets = *budgets;
    let mut last = None;
    loop {
        let error = match place(layout, tiers, &budgets, limits) {
            Ok(plan) => return Ok((budgets, plan)),
            Err(error) => error,
        };
        let need = error.needs().filter(|_| last != Some(error.code()));
        match (error.code(), need) {
            (Code::HbmBudget, Some(need)) => budgets.hbm = Some(need),
            (Code::HostBudget, Some(need)) => budgets.host = need,
            (Code::NvmeBudget, Some(need)) => budgets.nvme = need,
            _ => return Err(error),
        }
        last = Some(error.code());
    }
}

/// Places a model; with `demote`, what does not fit in the tier that it is wished in goes one tier lower. Then a line says how
/// much that was.
///
/// # Errors
/// Those of [`place`], as it was wished.
pub fn place_or_demote(
    layout: &Layout,
    tiers: &[Tiers],
    budgets: &Budgets,
    limits: &Limits,
    demote: bool,
) -> Result<(Placement, Option<String>), Error> {
    let error = match place(layout, tiers, budgets, limits) {
        Ok(plan) => return Ok((plan, None)),
        Err(error) => error,
    };
    if !demote || !matches!(error.code(), Code::HbmBudget | Code::HostBudget) {
        return Err(error);
    }
    let loose = |tier: Option<Tier>| tier.filter(|&t| t == Tier::Nvme);
    let all = |t: &Tiers| Tiers { params: loose(t.params), optimizer: loose(t.optimizer), grads: loose(t.grads) };
    // Of several ranks nothing but states can go lower yet.
    let states = |t: &Tiers| Tiers { optimizer: loose(t.optimizer), ..*t };
    let loosened: Vec<Tiers> = tiers.iter().map(|t| if limits.ranks > 1 { states(t) } else { all(t) }).collect();
    // Lower, not higher: what is wished on the host does not become resident on the device.
    let residents = limits.residents && !tiers.iter().any(|t| [t.params, t.optimizer].contains(&Some(Tier::Host)));
    let Ok(plan) = place(layout, &loosened, budgets, &Limits { residents, ..*limits }) else { return Err(error) };
    let lower = |wish: Option<Tier>, home: Tier| wish.is_some_and(|w| w < home);
    let count = |of: fn(&Tiers) -> Option<Tier>, home: fn(&Homes) -> Tier| {
        tiers.iter().zip(&plan.homes).filter(|(t, h)| lower(of(t), home(h))).count()
    };
    let note = format!(
        "FN-W209 pressure.action is demote: of {} units, parameters of {} and states of {} live one tier lower than asked. {}",
        tiers.len(),
        count(|t| t.params, |h| h.params),
        count(|t| t.optimizer, |h| h.optimizer),
        error.message()
    );
    Ok((plan, Some(note)))
}

/// Changes of tiers that make a model fit which does not fit the host's budget as it is wished, the mildest first.
pub fn ways(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits) -> Vec<Way> {
    let on_disk = Limits { has_nvme: true, ..*limits };
    let roomy = Budgets { nvme: ByteCount(u64::MAX), ..*budgets };
    let with =
        |params: Option<Option<Tier>>, optimizer: Option<Option<Tier>>, grads: Option<Option<Tier>>| -> Vec<Tiers> {
            let one = |t: &Tiers| Tiers {
                params: params.unwrap_or(t.params),
                optimizer: optimizer.unwrap_or(t.optimizer),
                grads: grads.unwrap_or(t.grads),
            };
            tiers.iter().map(one).collect()
        };
    let nvme = Some(Some(Tier::Nvme));
    let paths = if limits.has_nvme { "" } else { "nvme.paths" };
    let free = tiers.iter().all(|t| t.params.is_none() && t.optimizer.is_none() && t.grads.is_none());
    // Of several ranks nothing but states can live on NVMe yet.
    let of_ranks = [
        (
            if tiers.iter().all(|t| t.optimizer.is_none()) { "" } else { "optimizer.tier = \"auto\"" },
            with(None, Some(None), None),
        ),
        ("optimizer.tier = \"nvme\"", with(None, nvme, None)),
    ];
    let choices = [
        (if free { "" } else { "the tiers \"auto\"" }, with(Some(None), Some(None), Some(None))),
        ("optimizer.tier = \"nvme\"", with(None, nvme, None)),
        ("optimizer.tier and params.tier = \"nvme\"", with(nvme, nvme, None)),
        ("optimizer.tier, params.tier and gradients.tier = \"nvme\"", with(nvme, nvme, nvme)),
    ];
    let mut found: Vec<Way> = Vec::new();
    for (change, wishes) in if limits.ranks > 1 { of_ranks.to_vec() } else { choices.to_vec() } {
        let keys: Vec<&str> = [paths, change].into_iter().filter(|key| !key.is_empty()).collect();
        let Ok(plan) = place(layout, &wishes, &roomy, &on_disk) else { continue };
        if keys.is_empty() {
            continue;
        }
        let way =
            Way { change: keys.join(" and "), host: ByteCount(plan.host_bytes), nvme: ByteCount(plan.nvme_bytes) };
        if !found.iter().any(|w| (w.host, w.nvme) == (way.host, way.nvme)) {
            found.push(way);
        }
    }
    found
}

impl Way {
    /// As a clause: `optimizer.tier = "nvme" (61.0 GiB of host memory, 120.0 GiB on NVMe)`.
    pub fn describe(&self) -> String {
        format!("{} ({} of host memory, {} on NVMe)", self.change, self.host, self.nvme)
    }
}

/// An error about the host's budget with its ways out: the budget raised if that may help, the tiers changed, `last`.
pub fn with_ways(error: Error, raise: Option<ByteCount>, ways: &[Way], last: Option<String>) -> Error {
    let mut options: Vec<String> =
        raise.map(|b| format!("raise budget.host to {}", at_least(b.0))).into_iter().collect();
    options.extend(ways.iter().map(|way| format!("set {}", way.describe())));
    options.extend(last);
    let text = options.join("; or ");
    let mut letters = text.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase()).into_iter();
    error.action(first.chain(letters).chain(['.']).collect::<String>())
}
