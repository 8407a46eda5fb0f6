//! A plan as a table for a person.

use std::fmt::Write;

use super::{Plan, StepPlan, TierPlan};
use crate::quantities::ByteCount;

/// That it fits; the activations, which no tier holds, may not.
fn fits(plan: &Plan) -> String {
    let activations = plan.activations.as_ref();
    match activations.and_then(|a| Some((ByteCount(a.bytes), a.too_large_for()?))) {
        None => "It fits.".to_owned(),
        Some((bytes, beside)) => {
            format!("It fits, but for the activations: they take about {bytes}, and the GPU has {beside} for them.")
        }
    }
}

/// The whole plan; `units` adds a line for each unit.
pub fn text(plan: &Plan, units: bool) -> String {
    let mut out = String::new();
    let trained =
        if plan.trained == plan.params { String::new() } else { format!(", {} trained", count(plan.trained)) };
    line(&mut out, format_args!("{} parameters{trained}, {} units", count(plan.params), plan.units.len()));
    line(&mut out, format_args!(""));
    line(
        &mut out,
        format_args!(
            "{:<6}{:>12}{:>12}{:>12}{:>12}{:>12}  holds",
            "tier", "budget", "steady", "init", "step", "checkpoint"
        ),
    );
    for tier in &plan.tiers {
        line(&mut out, format_args!("{}", row(tier)));
    }
    line(&mut out, format_args!(""));
    match &plan.refusal {
        None => line(&mut out, format_args!("{}", fits(plan))),
        Some(refusal) => {
            line(&mut out, format_args!("It does not fit; the table shows what it needs. {refusal}"));
            for way in &plan.ways {
                line(&mut out, format_args!("  or {way}"));
            }
        }
    }
    if let Some(ranks) = &plan.ranks {
        line(&mut out, format_args!("{ranks}"));
    }
    let moved: Vec<String> = plan
        .traffic
        .iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(name, bytes)| format!("{name} {}", ByteCount(*bytes)))
        .collect();
    line(
        &mut out,
        format_args!(
            "Per {}step: {}.",
            if plan.ranks.is_some() { "rank and " } else { "" },
            if moved.is_empty() { "nothing is moved".to_owned() } else { moved.join(", ") }
        ),
    );
    if let Some(step) = &plan.step {
        out += &times(step);
    }
    if let Some(activations) = &plan.activations {
        line(&mut out, format_args!("{activations}"));
    }
    if let Some(grows) = &plan.grows {
        line(&mut out, format_args!("{grows}"));
    }
    let wear = &plan.wear;
    if wear.bytes_per_step > 0 {
        let per_day = wear.bytes_per_day.map_or_else(String::new, |b| format!(", {:.1} TB a day", b / 1e12));
        let days = match (wear.days, wear.endurance) {
            (Some(days), Some(all)) => format!("; drives rated for {:.0} TB last {days:.0} days of it", all / 1e12),
            _ => String::new(),
        };
        line(&mut out, format_args!("Writes to NVMe: {} per step{per_day}{days}.", ByteCount(wear.bytes_per_step)));
    }
    for note in &plan.notes {
        line(&mut out, format_args!("Note: {note}"));
    }
    if units {
        line(
            &mut out,
            format_args!("\n{:<40}{:>12}{:>12}  {:<8}{:<8}", "unit", "params", "states", "params", "states"),
        );
        for u in &plan.units {
            let spare = match (u.spare, u.grads_tier) {
                (true, _) => "spare",
                (false, "nvme") => "gradients on nvme",
                _ => "",
            };
            let row = format_args!(
                "{:<40}{:>12}{:>12}  {:<8}{:<8}{spare}",
                u.name,
                ByteCount(u.params).to_string(),
                ByteCount(u.states).to_string(),
                u.params_tier,
                u.states_tier
            )
            .to_string();
            line(&mut out, format_args!("{}", row.trim_end()));
        }
    }
    out
}

fn row(tier: &TierPlan) -> String {
    let size = |bytes: u64| ByteCount(bytes).to_string();
    let budget = tier.budget.map_or_else(|| "none".to_owned(), size);
    let holds: Vec<String> = tier.holds.iter().map(|(what, bytes)| format!("{what} {}", ByteCount(*bytes))).collect();
    let row = format!(
        "{:<6}{budget:>12}{:>12}{:>12}{:>12}{:>12}  {}",
        tier.tier,
        size(tier.steady),
        size(tier.init),
        size(tier.step),
        size(tier.checkpoint),
        holds.join(", ")
    );
    row.trim_end().to_owned()
}

fn times(step: &StepPlan) -> String {
    let mut out = String::new();
    let parts: Vec<String> = step
        .parts
        .iter()
        .map(|(name, busy, wait)| {
            let waited =
                if *wait > 0.0005 * step.seconds { format!(", waited for {wait:.3} s") } else { String::new() };
            format!("{name} {busy:.3} s{waited}")
        })
        .collect();
    let rate = step.tokens_per_second.map_or_else(String::new, |rate| format!(" ({rate:.0} tokens/s)"));
    line(
        &mut out,
        format_args!(
            "A step takes about {:.3} s{rate}, bound by {}: {}.",
            step.seconds,
            step.binding,
            parts.join("; ")
        ),
    );
    let gains = &step.twice_as_fast;
    if let Some((name, seconds)) = gains.iter().find(|(name, _)| *name == step.binding).or(gains.first()) {
        line(&mut out, format_args!("{name} twice as fast would save {seconds:.3} s."));
    }
    if let Some((change, seconds)) = &step.more_memory {
        line(&mut out, format_args!("{change} would save {seconds:.3} s."));
    }
    out
}

/// A count of parameters as people say it.
fn count(n: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a person reads three digits")]
    let x = n as f64;
    match n {
        1_000_000_000.. => format!("{:.2} B", x / 1e9),
        1_000_000.. => format!("{:.1} M", x / 1e6),
        _ => n.to_string(),
    }
}

fn line(out: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{what}");
}
